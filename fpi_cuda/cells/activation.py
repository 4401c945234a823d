"""The activations that cells know by name, with derivatives for energies and fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fpi_cuda.activations import (
    gelu_derivative,
    identity,
    relu_derivative,
    sigmoid_derivative,
    tanh_derivative,
)
from fpi_cuda.lowered import NotLowered


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    Attributes:
        value: u -> act(u).
        derivative: u -> act'(u), itself differentiable.
        lipschitz: the largest |act'|.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    lipschitz: float


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, tanh_derivative, 1.0),
    "relu": Activation(torch.relu, relu_derivative, 1.0),
    "sigmoid": Activation(torch.sigmoid, sigmoid_derivative, 0.25),
    # Largest at u = sqrt(2).
    "gelu": Activation(torch.nn.functional.gelu, gelu_derivative, 1.1289042),
    "softplus": Activation(torch.nn.functional.softplus, torch.sigmoid, 1.0),
    "identity": Activation(identity, torch.ones_like, 1.0),
}


# What kernels call the derivative, in fpi_cuda.activations.FUNCTIONS.
DERIVATIVES = {
    "tanh": "tanh_derivative",
    "relu": "relu_derivative",
    "sigmoid": "sigmoid_derivative",
    "gelu": "gelu_derivative",
    "softplus": "sigmoid",
    "identity": "one",
}
# Those that kernels have code for.
COMPILED = dict(ACTIVATIONS)


def require_compiled(name: str) -> str:
    """`name`, if kernels compute ACTIVATIONS[name] too.

    Raises:
        NotLowered: it was added or exchanged by the user.
    """
    if ACTIVATIONS[name] is not COMPILED.get(name):
        raise NotLowered(f"no kernel computes the activation {name!r}")
    return name


def require_activation(owner: str, option: str, name: object) -> str:
    """`name`, if it is one of ACTIVATIONS; else a ValueError that lists them."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{owner}: {option} must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return name
