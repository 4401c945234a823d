"""The activations that cells know by name, and those that a user adds."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.activations import ACTIVATIONS, BUILT_IN, FUNCTIONS, Activation
from fpi_cuda.lowered import NotLowered
from fpi_cuda.options import require_real


def require_compiled(name: str) -> str:
    """`name`, if kernels compute ACTIVATIONS[name] too.

    Raises:
        NotLowered: it was added or exchanged by the user.
    """
    if ACTIVATIONS[name] is not BUILT_IN.get(name):
        raise NotLowered(f"no kernel computes the activation {name!r}")
    return name


def require_activation(owner: str, option: str, name: object) -> str:
    """`name`, if it is one of ACTIVATIONS; else a ValueError that lists them."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{owner}: {option} must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return name


def add_activation(name: str, activation: Activation) -> None:
    """Let cells be made with `name`. They take the host loop: no kernel has code for it.

    Args:
        name: an identifier.
        activation: elementwise; its derivative is compared with what autograd finds of its value.
    Raises:
        TypeError: name is no string, activation no Activation of functions.
        ValueError: the name is taken or no identifier, the derivative is that of another function,
            or lipschitz is not positive and finite or smaller than the derivative somewhere.
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
    if name in ACTIVATIONS or name in FUNCTIONS:
        raise ValueError(f"add_activation: name must be a new one, got {name!r}, which is taken")
    require_own_derivative(name, activation)
    ACTIVATIONS[name] = activation


def require_own_derivative(name: str, activation: Activation) -> None:
    """Raise unless activation.derivative is what autograd finds of activation.value.

    Energies take the one, layers the other.
    """
    small = torch.logspace(-8, 2, 300, dtype=torch.float64)
    u = torch.cat([torch.linspace(-8, 8, 300, dtype=torch.float64), small, -small])
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
