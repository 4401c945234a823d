"""The activations: each in torch, its derivative, and the number that kernels know it by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "gelu": torch.nn.functional.gelu,
    "softplus": torch.nn.functional.softplus,
    "tanh_derivative": tanh_derivative,
    "relu_derivative": relu_derivative,
    "sigmoid_derivative": sigmoid_derivative,
    "gelu_derivative": gelu_derivative,
    "one": torch.ones_like,
}
"""By the names of lowered layers, in the order of csrc/common/activation.h."""

CODES = {name: code for code, name in enumerate(FUNCTIONS)}
"""What kernels call them."""


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


DERIVATIVES = {
    "tanh": "tanh_derivative",
    "relu": "relu_derivative",
    "sigmoid": "sigmoid_derivative",
    "gelu": "gelu_derivative",
    "softplus": "sigmoid",
    "identity": "one",
}
"""Those that cells know by name, with what FUNCTIONS calls their derivatives."""

# gelu is steepest at u = sqrt(2).
LIPSCHITZ = {"sigmoid": 0.25, "gelu": 1.1289042}

BUILT_IN = {
    name: Activation(FUNCTIONS[name], FUNCTIONS[derivative], LIPSCHITZ.get(name, 1.0))
    for name, derivative in DERIVATIVES.items()
}
ACTIVATIONS = dict(BUILT_IN)
"""What cells are made with, those that a user has added among them."""
