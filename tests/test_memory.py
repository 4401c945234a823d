"""A solve holds 2m + 6 arrays of the state at most, however many steps it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi
from bench.memory import torch_peak_bytes

B, D = 64, 2048
STATE = B * D * 4
# What rules and small solves remember per sample, and the allocator's rounding.
SMALL = 0.05


def peak(solver: fpi.Anderson | fpi.Picard | fpi.Broyden, max_steps: int) -> float:
    """Arrays of the state that a solve holds at its peak, those of g included."""
    weight = torch.linspace(0.1, 0.99, D)
    z = torch.randn(B, D)
    x0 = torch.zeros(B, D)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.addcmul(z, weight, x)

    def solve() -> None:
        with torch.no_grad():
            fpi.fixed_point(g, x0, z, solver=solver, rtol=0.0, max_steps=max_steps)

    solve()
    return torch_peak_bytes(solve, torch.device("cpu")) / STATE


@pytest.mark.parametrize("m", [1, 5, 10])
def test_anderson(m: int) -> None:
    assert peak(fpi.Anderson(m=m), 12) <= 2 * m + 6 + SMALL


def test_picard_and_broyden() -> None:
    assert peak(fpi.Picard(), 12) <= 6
    assert peak(fpi.Broyden(m=5), 12) <= 2 * 5 + 6 + SMALL


@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson(m=3), fpi.Broyden(m=3)], ids=repr)
def test_no_growth_with_the_number_of_steps(
    solver: fpi.Anderson | fpi.Picard | fpi.Broyden,
) -> None:
    assert peak(solver, 200) <= peak(solver, 20) + SMALL
