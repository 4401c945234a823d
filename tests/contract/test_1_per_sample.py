"""Contract, 1: per sample, always.

A sample is converged when ``||g(x) - x|| <= atol + rtol ||g(x)||``, in the 2-norm over everything
but dim 0; a tuple state counts as one concatenated vector. Each sample has its own history, stop
test, restart and status. What becomes of it does not depend on the rest of the batch: bit for bit
on the native, CUDA and Triton kernels when g is row-wise deterministic.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from ways import F64, bent, every_way

import fpi_cuda as fpi

FIELDS = ("value", "status", "num_steps", "residual")
SOLVERS = [fpi.Picard(), fpi.Anderson()]
needs_native = pytest.mark.skipif(not fpi.native_available(), reason="no native library")


def of_many_sizes() -> Tensor:
    """Samples that stop at different steps."""
    return torch.randn(7, 6) * torch.logspace(-3, 2, 7)[:, None]


@every_way
@pytest.mark.parametrize(("rtol", "atol"), [(1e-6, 0.0), (0.0, 1e-5), (1e-6, 1e-5)])
def test_the_stop_test_is_that_of_each_sample(rtol: float, atol: float, way: Any) -> None:
    z = of_many_sizes().double()
    sol = fpi.fixed_point(bent, torch.zeros_like(z), z, rtol=rtol, atol=atol, **way)
    gx = bent(sol.value, z)
    residual = (gx - sol.value).norm(dim=1)
    assert sol.converged.all()
    assert (residual <= (atol + rtol * gx.norm(dim=1)) * (1 + 1e-9)).all()
    # Each needed its own number of steps, and none was solved much further than was asked.
    assert sol.num_steps.unique().numel() > 1


@every_way
def test_a_tuple_is_one_vector(way: Any) -> None:
    """A small part beside a large one may be left less accurate than it would be alone."""
    z = of_many_sizes().double()
    both = fpi.fixed_point(
        lambda s, z: (bent(s[0], z), bent(s[1], 1e-3 * z)), (0 * z, 0 * z), z, rtol=1e-6, **way
    )
    joined = torch.cat([z, 1e-3 * z], 1)
    one = fpi.fixed_point(bent, 0 * joined, joined, rtol=1e-6, **way)
    assert torch.equal(torch.cat(both.value, 1), one.value)
    assert torch.equal(both.num_steps, one.num_steps)


def alone(g: Any, z: Tensor, **options: Any) -> list[Tensor]:
    """Each sample solved in a batch of its own."""
    single = [fpi.fixed_point(g, 0 * row, row, **options) for row in z.split(1)]
    return [torch.cat([getattr(sol, name) for sol in single]) for name in FIELDS]


@needs_native
@pytest.mark.parametrize("solver", [*SOLVERS, fpi.Broyden()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_the_host_loop_gives_a_sample_the_same_bits_in_any_batch(solver: Any, dtype: Any) -> None:
    z = of_many_sizes().to(dtype)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.9 * x.roll(1, -1) / (1 + x * x) + z

    for rowwise in (None, True):
        options = {"solver": solver, "route": "host", "rtol": 1e-5, "rowwise": rowwise}
        whole = fpi.fixed_point(g, 0 * z, z, **options)
        for name, part in zip(FIELDS, alone(g, z, **options), strict=True):
            assert torch.equal(getattr(whole, name), part), name


@needs_native
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_fused_loop_gives_a_sample_the_same_bits_in_any_batch(solver: Any) -> None:
    cell, z = fpi.cells.MLP(6, 6, 9, "tanh", "tanh"), of_many_sizes()
    with torch.no_grad():
        options = {"solver": solver, "route": "fused", "rtol": 1e-5}
        whole = fpi.fixed_point(cell, 0 * z, z, **options)
        for name, part in zip(FIELDS, alone(cell, z, **options), strict=True):
            # The input's product, done once by torch before the loop, has its own rounding.
            torch.testing.assert_close(getattr(whole, name), part, rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.usefixtures("tape")
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_device_loop_gives_a_sample_the_same_bits_in_any_batch(solver: Any) -> None:
    """On a stand-in for CUDA graphs."""
    z = of_many_sizes()

    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.9 * x.roll(1, -1) / (1 + x * x) + z

    with torch.no_grad():
        options = {"solver": solver, "route": "device", "rtol": 1e-5}
        whole = fpi.fixed_point(g, 0 * z, z, **options)
        for name, part in zip(FIELDS, alone(g, z, **options), strict=True):
            assert torch.equal(getattr(whole, name), part), name
