"""Maps that nothing solves in two steps, and what is said of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fpi_cuda as fpi

DIM = 6
Heard = list[warnings.WarningMessage]


def matrix(gain: float = 0.99) -> Tensor:
    return torch.linalg.qr(torch.randn(DIM, DIM))[0] * gain


def slow(gain: float = 0.99) -> Callable[..., Any]:
    """A map that nothing solves in two steps."""
    a = matrix(gain)
    return lambda x, z: torch.tanh(x @ a + z)


def fast(x: Tensor, z: Tensor) -> Tensor:
    return 0.01 * torch.tanh(x) + z


class Module(torch.nn.Module):
    """The same as a module that can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(matrix())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ self.a + z)


def z_of(batch: int = 8, grad: bool = False) -> Tensor:
    return torch.randn(batch, DIM).requires_grad_(grad)


def texts(heard: Heard) -> list[str]:
    """What was said, but for what torch says itself."""
    return [str(w.message) for w in heard if w.category is fpi.FixedPointWarning]
