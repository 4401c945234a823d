"""The solve of a tanh map and the loop that it equals, for any transform of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fpi_cuda as fpi

F64 = torch.float64
B, D = 3, 4
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 300}
Layer = Callable[[Tensor, Tensor], Tensor]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


Z = double(B, D)
A = 0.5 * double(D, D) / torch.linalg.matrix_norm(double(D, D), 2)
ZZ = torch.stack([Z, Z + 1])
AA = torch.stack([A, 0.3 * A])


def solved(**options: Any) -> Layer:
    """x* of tanh(A x + z); A is closed over."""

    def layer(z: Tensor, a: Tensor) -> Tensor:
        def g(x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(x @ a.T + z)

        return fpi.fixed_point(g, torch.zeros_like(z), z, **(TIGHT | options)).value

    return layer


def looped(z: Tensor, a: Tensor) -> Tensor:
    x = torch.zeros_like(z)
    for _ in range(80):
        x = torch.tanh(x @ a.T + z)
    return x


def loss(layer: Layer, z: Tensor = Z) -> Callable[[Tensor], Tensor]:
    return lambda a: (layer(z, a) ** 3).sum()


def with_matrix(a: Tensor) -> Tensor:
    return solved()(Z, a)
