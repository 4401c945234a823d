"""Which backends can solve on this machine, found by solving."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fpi_cuda.options import Anderson
from fpi_cuda.solvers.loop import solve


@functools.cache
def backends_available() -> tuple[str, ...]:
    """Names of the backends that solve a CPU problem here; "reference" is always among them."""
    return tuple(name for name in ("reference", "native", "cuda", "triton") if _solves(name))


def _solves(backend: str) -> bool:
    x0, solver = torch.zeros(1, 1), Anderson()
    try:
        solve(_halve, x0, solver, rtol=1e-3, atol=0.0, max_steps=9, backend=backend)
    except (RuntimeError, ValueError):
        return False
    return True


def _halve(x: Tensor, rows: Tensor | None) -> Tensor:
    return 0.5 * x + 1
