"""A map with what a captured graph may get wrong, and solves of it compared with the host loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fpi_cuda as fpi

FEATURES = 12
TIGHT = {"rtol": 1e-10, "max_steps": 200}


class Cell(nn.Module):
    """tanh(s norm(A x) + B z + b) with what a captured graph may get wrong: a Python number,
    a buffer, a mode."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.a = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
        self.b = nn.Linear(3, FEATURES, dtype=torch.float64)
        self.norm = nn.GroupNorm(3, FEATURES, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("shift", torch.zeros(FEATURES, dtype=torch.float64))
        self.scale = 0.3
        self.eval()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        inner = self.scale * self.norm(self.a(x)) + self.b(z) + self.shift
        return torch.tanh(self.dropout(inner))


def inputs(batch: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x0 and z."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(batch, FEATURES + 3, dtype=torch.float64, generator=generator)
    return numbers[:, :FEATURES].contiguous(), numbers[:, FEATURES:].contiguous()


def solve(g: Any, x0: Any, *z: Tensor, **options: Any) -> fpi.Solution:
    return fpi.fixed_point(g, x0, *z, **{**TIGHT, "route": "device", **options})


def assert_same(found: fpi.Solution, expected: fpi.Solution) -> None:
    """Bit for bit: the tape calls the very kernels of the host loop."""
    for name in ("value", "status", "num_steps", "residual"):
        mine, other = getattr(found, name), getattr(expected, name)
        assert torch.equal(mine.nan_to_num(), other.nan_to_num()), name


def assert_like_host(g: Any, x0: Any, *z: Tensor, **options: Any) -> fpi.Solution:
    found = solve(g, x0, *z, **options)
    assert_same(found, solve(g, x0, *z, **{**options, "route": "host"}))
    return found


def gradients(g: nn.Module, x0: Tensor, z: Tensor, **options: Any) -> list[Tensor]:
    """Value, adjoint steps and status, gradients in z and in the parameters."""
    z = z.clone().requires_grad_()
    solution = solve(g, x0, z, **options)
    weights = torch.linspace(-1.0, 2.0, solution.value.numel(), dtype=solution.value.dtype)
    found = torch.autograd.grad(
        (solution.value * weights.view_as(solution.value)).sum(),
        [z, *g.parameters()],
        allow_unused=True,
    )
    stats = solution.adjoint_stats
    assert stats is not None
    account = [solution.value.detach(), stats.num_steps, stats.status, stats.residual]
    return [*account, *(t for t in found if t is not None)]


def assert_gradients_like_host(g: nn.Module, x0: Tensor, z: Tensor, **options: Any) -> None:
    """All that gradients() gives, bit for bit."""
    found = gradients(g, x0, z, **options)
    expected = gradients(g, x0, z, **{**options, "route": "host"})
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine.nan_to_num(), other.nan_to_num())
