"""A small state that tests of gradients and of memory share, and adjoints for it."""

from __future__ import annotations

import torch
from torch import Tensor

import fpi_cuda as fpi

F64 = torch.float64
B, D = 4, 6
ADJOINTS = [
    fpi.Implicit(),
    fpi.Implicit(solver=fpi.GMRES()),
    fpi.JacobianFree(),
    fpi.Phantom(k=3),
    fpi.Neumann(k=5),
]


def orthogonal(gain: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.linalg.qr(torch.randn(D, D, dtype=F64))[0].to(dtype) * gain


def zeros() -> Tensor:
    return torch.zeros(B, D, dtype=F64)
