"""A solve holds 2m + 6 arrays of the state at most, and a little, however many steps it takes.

The little is what the rules and small solves remember of a sample, whatever its size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi
from bench.memory import torch_peak_bytes

B, D = 64, 2048
# What rules and small solves remember per sample, and the allocator's rounding.
SMALL = 0.05


def peak(
    solver: fpi.Anderson | fpi.Picard | fpi.Broyden,
    max_steps: int,
    shape: tuple[int, int] = (B, D),
    dtype: torch.dtype = torch.float32,
) -> float:
    """Arrays of the state that a solve holds at its peak, those of g included."""
    weight = torch.linspace(0.1, 0.99, shape[1], dtype=dtype)
    z = torch.randn(shape, dtype=dtype)
    x0 = torch.zeros(shape, dtype=dtype)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.addcmul(z, weight, x)

    def solve() -> None:
        with torch.no_grad():
            fpi.fixed_point(g, x0, z, solver=solver, rtol=0.0, max_steps=max_steps)

    solve()
    return torch_peak_bytes(solve, torch.device("cpu")) / (x0.numel() * x0.element_size())


@pytest.mark.parametrize("m", [1, 5, 10])
def test_anderson(m: int) -> None:
    assert peak(fpi.Anderson(m=m), 12) <= 2 * m + 6 + SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("dim", "m"), [(4, 5), (1, 16), (2, 5), (16, 5), (3, 3)])
def test_small_samples(dim: int, m: int, dtype: torch.dtype) -> None:
    """As the docstring of Anderson has it."""
    k = min(m, dim)
    per_sample = (2 * k + 6) * dim * dtype.itemsize + 4 * k * (k + 1) + 133
    held = peak(fpi.Anderson(m=m), 12, (20_000, dim), dtype) * dim * dtype.itemsize
    assert held <= per_sample * (1 + SMALL)


@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Broyden(m=5)], ids=repr)
def test_small_samples_of_others(solver: fpi.Picard | fpi.Broyden) -> None:
    arrays = 6 if isinstance(solver, fpi.Picard) else 2 * 5 + 6
    held = peak(solver, 12, (20_000, 4)) * 4 * 4
    assert held <= (arrays * 4 * 4 + 133) * (1 + SMALL)


def test_picard_and_broyden() -> None:
    assert peak(fpi.Picard(), 12) <= 6
    assert peak(fpi.Broyden(m=5), 12) <= 2 * 5 + 6 + SMALL


@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson(m=3), fpi.Broyden(m=3)], ids=repr)
def test_no_growth_with_the_number_of_steps(
    solver: fpi.Anderson | fpi.Picard | fpi.Broyden,
) -> None:
    assert peak(solver, 200) <= peak(solver, 20) + SMALL
