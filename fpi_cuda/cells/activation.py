"""The activations that cells know by name, with derivatives for energies and fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


def identity(u: Tensor) -> Tensor:
    """u itself."""
    return u


def tanh_derivative(u: Tensor) -> Tensor:
    """1 - tanh(u)^2."""
    return 1 - torch.tanh(u) ** 2


def relu_derivative(u: Tensor) -> Tensor:
    """1 where u > 0, else 0, as autograd has it."""
    return (u > 0).to(u.dtype)


def sigmoid_derivative(u: Tensor) -> Tensor:
    """sigmoid(u) sigmoid(-u): no cancellation for large u."""
    return torch.sigmoid(u) * torch.sigmoid(-u)


def gelu_derivative(u: Tensor) -> Tensor:
    """Phi(u) + u phi(u), with the distribution and the density of the standard normal."""
    density = torch.exp(-0.5 * u * u) * 0.3989422804014327
    return torch.special.ndtr(u) + u * density


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, tanh_derivative, 1.0),
    "relu": Activation(torch.relu, relu_derivative, 1.0),
    "sigmoid": Activation(torch.sigmoid, sigmoid_derivative, 0.25),
    # Largest at u = sqrt(2).
    "gelu": Activation(torch.nn.functional.gelu, gelu_derivative, 1.1289042),
    "softplus": Activation(torch.nn.functional.softplus, torch.sigmoid, 1.0),
    "identity": Activation(identity, torch.ones_like, 1.0),
}


# What kernels call the derivative, in fpi_cuda.lowered.ACTIVATIONS.
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


def compiled_activation(name: str) -> Activation:
    """ACTIVATIONS[name], as kernels compute it too.

    Raises:
        NotLowered: it was added or exchanged by the user.
    """
    activation = ACTIVATIONS[name]
    if activation is not COMPILED.get(name):
        raise NotLowered(f"no kernel computes the activation {name!r}")
    return activation


def require_activation(owner: str, option: str, name: object) -> str:
    """`name`, if it is one of ACTIVATIONS; else a ValueError that lists them."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{owner}: {option} must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return name
