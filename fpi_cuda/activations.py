"""The elementwise functions that kernels have code for, in torch."""

from __future__ import annotations

from collections.abc import Callable

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
