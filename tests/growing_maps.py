"""Maps that grow from a small start, and cells whose products are rounded."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Map = Callable[[Tensor], Tensor]
Solver = fpi.Picard | fpi.Anderson | fpi.Broyden
SOLVERS: list[Solver] = [fpi.Picard(), fpi.Anderson(m=5), fpi.Broyden(m=5)]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)


def short(value: object) -> str:
    """An id without spaces."""
    return re.sub(r"\s|torch\.", "", str(value))


def orthogonal(n: int, gain: float, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    square = torch.randn(n, n, dtype=F64, generator=generator)
    return (torch.linalg.qr(square)[0] * gain).to(dtype)


def size(x: Tensor) -> Tensor:
    """(B,) 2-norms, in float64 so that small ones do not vanish."""
    return x.double().norm(dim=1)


# --- growth from a small start ---


def ricker(x: Tensor) -> Tensor:
    """Growth to 1; 0 repels."""
    return x * torch.exp(0.5 * (1 - x))


def logistic(x: Tensor) -> Tensor:
    """Growth to 7, by up to a half each step."""
    return x + 0.5 * x * (1 - x / 7)


def late(x: Tensor) -> Tensor:
    """Growth to 1, a hundred and 1e4, the last at a fifth of the pace."""
    pace, size = x.new_tensor([0.5, 0.5, 0.1]), x.new_tensor([1.0, 100.0, 1e4])
    return x + pace * x * (1 - x / size)


def cell(x: Tensor) -> Tensor:
    """A tanh cell of spectral radius 2.5 with an input of 1e-6."""
    return torch.tanh(2.5 * x.roll(1, -1) + 1e-6)


GROWING = [ricker, logistic, late, cell]
