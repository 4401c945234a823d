"""Activations that a user adds to the cells, and to the fused loop if they are compiled in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpi_cuda import _extension
from fpi_cuda.cells.activation import ACTIVATIONS, COMPILED, DERIVATIVES, Activation
from fpi_cuda.lowered import ACTIVATIONS as BUILT_IN
from fpi_cuda.lowered import added_functions


def add_activation(name: str, activation: Activation) -> None:
    """Let cells be made with `name`; fused too, if the library was built with code for it.

    That is, with FPI_ACTIVATIONS naming a header that has `name`, and for an MLPEnergy
    `name_derivative`. What was compiled is compared here with `activation`, on numbers of all
    sizes in float32 and float64. Without such code the cells take the host loop.

    Raises:
        ValueError: the name is taken, or the compiled function is another one.
    """
    if name in ACTIVATIONS or name in BUILT_IN:
        raise ValueError(f"add_activation: name must be a new one, got {name!r}, which is taken")
    derivative = f"{name}_derivative"
    functions = {name: activation.value, derivative: activation.derivative}
    compiled = compiled_names()
    numbers = {n: len(BUILT_IN) + compiled.index(n) for n in functions if n in compiled}
    for known, number in numbers.items():
        require_same_function(known, number, functions[known])
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
    small = torch.logspace(-8, 2, 300, dtype=torch.float64)
    u = torch.cat([torch.linspace(-8, 8, 300, dtype=torch.float64), small, -small])
    for dtype in (torch.float32, torch.float64):
        given = u.to(dtype)
        expected = function(given).detach().double()
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
        if bool(function(nan).isnan()) and not bool(compiled_value(number, nan).isnan()):
            raise ValueError(f"add_activation: the compiled {name} must be NaN at NaN")


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
