"""Activations that a user adds to the cells, and to the fused loop if they are compiled in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpi_cuda import _extension
from fpi_cuda.cells.activation import ACTIVATIONS, COMPILED, DERIVATIVES, Activation
from fpi_cuda.lowered import ACTIVATIONS as BUILT_IN
from fpi_cuda.lowered import added_functions
from fpi_cuda.options import require_real


def add_activation(name: str, activation: Activation) -> None:
    """Let cells be made with `name`; fused too, if the library was built with code for it.

    That is, with FPI_ACTIVATIONS naming a header that has `name`, and for an MLPEnergy
    `name_derivative`. What was compiled is compared here with `activation`, on numbers of all
    sizes in float32 and float64. Without such code the cells take the host loop.

    Args:
        name: an identifier.
        activation: elementwise; its derivative is compared with what autograd finds of its value.
    Raises:
        TypeError: name is no string, activation no Activation of functions.
        ValueError: the name is taken or no identifier, the compiled function is another one, the
            derivative is that of another function, or lipschitz is not positive and finite or
            smaller than the derivative somewhere.
    """
    if not isinstance(name, str):
        raise TypeError(f"add_activation: name must be a string, got {type(name).__name__}")
    if not name.isidentifier():
        raise ValueError(f"add_activation: name must be an identifier, got {name!r}")
    if not isinstance(activation, Activation):
        raise TypeError(
            f"add_activation: activation must be an Activation(value, derivative, lipschitz), got "
            f"{type(activation).__name__}"
        )
    for part in ("value", "derivative"):
        if not callable(getattr(activation, part)):
            got = type(getattr(activation, part)).__name__
            raise TypeError(f"add_activation: {part} must be a function of a tensor, got {got}")
    require_real("add_activation", "lipschitz", activation.lipschitz, 0.0, open_below=True)
    if name in ACTIVATIONS or name in BUILT_IN:
        raise ValueError(f"add_activation: name must be a new one, got {name!r}, which is taken")
    derivative = f"{name}_derivative"
    functions = {name: activation.value, derivative: activation.derivative}
    compiled = compiled_names()
    numbers = {n: len(BUILT_IN) + compiled.index(n) for n in functions if n in compiled}
    for known, number in numbers.items():
        require_same_function(known, number, functions[known])
    require_own_derivative(name, activation)
    ACTIVATIONS[name] = activation
    if name not in numbers:
        return
    added_functions.update({n: (number, functions[n]) for n, number in numbers.items()})
    COMPILED[name] = activation
    if derivative in numbers:
        DERIVATIVES[name] = derivative


def compiled_names() -> list[str]:
    """Those that the library was built with, besides its own, in the order of their numbers."""
    if not _extension.native_available():
        return []
    return _extension.build_info()["activations"].split()


def require_same_function(name: str, number: int, function: Callable[[Tensor], Tensor]) -> None:
    """Raise unless the compiled function `number` is `function`, up to rounding."""
    u = numbers_of_all_sizes()
    for dtype in (torch.float32, torch.float64):
        given = u.to(dtype)
        expected = function(given.clone()).detach().double()
        scale = 1 + expected.abs()
        error = (compiled_value(number, given).double() - expected).abs()
        if not bool((error <= 1e3 * torch.finfo(dtype).eps * scale).all()):
            worst = int((error / scale).nan_to_num(torch.inf).argmax())
            raise ValueError(
                f"add_activation: the compiled {name} must be the function given in torch, "
                f"but at {float(given[worst]):g} in {dtype} they differ by "
                f"{float(error[worst]):.3g}"
            )
        nan = given.new_tensor([torch.nan])
        if bool(function(nan.clone()).isnan()) and not bool(compiled_value(number, nan).isnan()):
            raise ValueError(f"add_activation: the compiled {name} must be NaN at NaN")


def require_own_derivative(name: str, activation: Activation) -> None:
    """Raise unless activation.derivative is what autograd finds of activation.value.

    Energies and kernels take the one, layers the other.
    """
    u = numbers_of_all_sizes()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = u.clone().requires_grad_()
        value = activation.value(leaf.clone())  # a copy may be written to
        if not isinstance(value, Tensor) or value.shape != u.shape or not value.requires_grad:
            raise ValueError(
                f"add_activation: the value of {name} must be an elementwise function that "
                "autograd can differentiate. Use torch operations on the tensor it is given"
            )
        (expected,) = torch.autograd.grad(value.sum(), leaf)
    given = activation.derivative(u.clone())
    if not isinstance(given, Tensor) or given.shape != u.shape:
        raise ValueError(f"add_activation: the derivative of {name} must be elementwise")
    error = (given - expected).abs()
    off = (error > 1e-6 * (1 + expected.abs())) | ~given.isfinite()
    off &= expected.isfinite()
    if bool(off.any()):
        worst = int(torch.where(off, error.nan_to_num(torch.inf), 0.0).argmax())
        raise ValueError(
            f"add_activation: the derivative of {name} must be that of its value, but at "
            f"{float(u[worst]):g} it is {float(given[worst]):g}, and autograd finds "
            f"{float(expected[worst]):g}"
        )
    steepest = given.abs().nan_to_num(0.0, 0.0).max()
    if bool(steepest > activation.lipschitz * (1 + 1e-6)):
        raise ValueError(
            f"add_activation: lipschitz must bound the derivative of {name}, which is "
            f"{float(steepest):g} somewhere, got {activation.lipschitz}"
        )


def numbers_of_all_sizes() -> Tensor:
    """Float64 numbers at which functions are compared."""
    small = torch.logspace(-8, 2, 300, dtype=torch.float64)
    return torch.cat([torch.linspace(-8, 8, 300, dtype=torch.float64), small, -small])


def compiled_value(number: int, u: Tensor) -> Tensor:
    """The compiled function `number` at u (n,), as the fused loop finishes its sums."""
    out = u.new_empty(len(u), 1)
    torch.ops.fpi_cuda.cell_layer_.default(
        out,
        None,
        u.new_zeros(len(u), 1),
        u.new_ones(1, 1),
        None,
        u[:, None].contiguous(),
        None,
        activation=number,
        derivative=number,
    )
    return out.squeeze(1)
