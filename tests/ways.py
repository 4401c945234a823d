"""Every solver on every backend of the CPU, and maps whose fixed points are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi

F64 = torch.float64
SOLVERS = {
    "picard": fpi.Picard(),
    "damped": fpi.Picard(damping=0.6),
    "anderson": fpi.Anderson(),
    "anderson2": fpi.Anderson(m=2),
    "broyden": fpi.Broyden(),
}
BACKENDS = ["reference", "native"]
WAYS = [
    pytest.param({"solver": solver, "backend": backend}, id=f"{name}-{backend}")
    for (name, solver), backend in itertools.product(SOLVERS.items(), BACKENDS)
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
every_way = pytest.mark.parametrize("way", WAYS)


def zeros(*shape: int) -> Tensor:
    """Of three samples of four numbers, or of this shape."""
    return torch.zeros(*(shape or (3, 4)))


def halved(x: Tensor, z: Tensor) -> Tensor:
    """Its fixed point is 2z, its derivative 2."""
    return 0.5 * x + z


def bent(x: Tensor, z: Tensor) -> Tensor:
    return 0.6 * torch.sin(x) + z


def bent_loop(z: Tensor) -> Tensor:
    x = torch.zeros_like(z)
    for _ in range(120):
        x = bent(x, z)
    return x
