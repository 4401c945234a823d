"""Maps that draw a mask, or watch their dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fpi_cuda as fpi

F64 = torch.float64
B, D = 8, 6
TIGHT: dict[str, Any] = {"rtol": 1e-10, "max_steps": 300}


def leaves() -> tuple[Tensor, Tensor]:
    """z and A, that require grad."""
    a = torch.randn(D, D, dtype=F64)
    a = 0.4 * a / torch.linalg.matrix_norm(a, 2)
    return torch.randn(B, D, dtype=F64).requires_grad_(), a.requires_grad_()


class Dropping:
    """tanh(A dropout(x) + z), which remembers its masks."""

    def __init__(self, a: Tensor, rowwise: bool = False) -> None:
        self.a = a
        self.rowwise = rowwise
        self.masks: list[Tensor] = []

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        mask = (torch.rand(x.shape) > 0.5).to(x.dtype)
        self.masks.append(mask)
        return torch.tanh((x * mask) @ self.a.T + z)


def with_mask(a: Tensor, z: Tensor, mask: Tensor) -> Tensor:
    return fpi.fixed_point(
        lambda x, z: torch.tanh((x * mask) @ a.T + z), torch.zeros_like(z), z, **TIGHT
    ).value


class Watching(nn.Module):
    """tanh(A x + z), which writes down the dtype that A x was computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D, bias=False)
        nn.init.orthogonal_(self.linear.weight, 0.5)
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = self.linear(x)
        self.dtypes.append(y.dtype)
        return torch.tanh(y + z)
