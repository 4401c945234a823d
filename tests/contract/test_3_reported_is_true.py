"""Clause 3: what is reported is true. How a solve is said to have ended, and where its floor is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing_maps import (
    BF16,
    F32,
    F64,
    Map,
    Solver,
    each_solver,
    logistic,
    orthogonal,
    ricker,
    short,
)
from torch import Tensor
from ways import bent, each_backend, every_way

import fpi_cuda as fpi
from fpi_cuda import Status
from fpi_cuda.testing import backends_available

FLOOR = 64.0


@pytest.mark.parametrize("backend", backends_available())
def test_every_backend_has_the_same_rules(backend: str) -> None:
    """Growth, then a fixed point; a cycle; a drift; divergence: by Triton's interpreter too."""
    rows: list[Map] = [
        ricker,
        lambda x: x * torch.exp(2.2 * (1 - x)),
        lambda x: x + 1,
        lambda x: 1.7 * x + 1e-9,
    ]

    def g(x: Tensor) -> Tensor:
        return torch.cat([row(x[i : i + 1]) for i, row in enumerate(rows)])

    x0 = torch.full((len(rows), 1), 1e-5)
    options = {"solver": fpi.Picard(), "rtol": 1e-2, "max_steps": 45}
    sol = fpi.fixed_point(g, x0, backend=backend, **options)
    want = fpi.fixed_point(g, x0, backend="reference", **options)
    assert sol.status.tolist() == want.status.tolist()
    assert sol.num_steps.tolist() == want.num_steps.tolist()
    S = fpi.Status
    assert sol.status.tolist() == [S.CONVERGED, S.MAX_STEPS, S.MAX_STEPS, S.DIVERGED]


# --- maps without a fixed point ---


@each_backend
@each_solver
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=short)
@pytest.mark.parametrize(
    ("g", "start"),
    [
        (lambda x: x + 1, 0.0),
        (lambda x: x + 0.5 * (1 + x.abs()), 0.0),
        (lambda x: x + torch.log(2 + x.abs()), 0.0),
        (lambda x: torch.sqrt(x * x + 1) + 0.5, 0.0),
        (lambda x: x + x.abs() / (1e-6 + x.abs()), 1e-8),
        (lambda x: x + x.abs() / (1 + x.abs()) + 1e-30, 1e-8),
        (lambda x: 3 * x.abs() + 1, 0.0),
        (lambda x: 1.5 * torch.exp(x), 0.0),
    ],
    ids=[
        "shift",
        "growing",
        "logarithm",
        "hyperbola",
        "late-shift",
        "growth-then-shift",
        "tripled",
        "exp",
    ],
)
def test_drifting_off_is_never_convergence(
    backend: str, solver: Solver, dtype: torch.dtype, g: Map, start: float
) -> None:
    x0 = torch.full((1, 2), start, dtype=dtype)
    sol = fpi.fixed_point(g, x0, solver=solver, rtol=1e-2, max_steps=400, backend=backend)
    true = (g(sol.value).double() - sol.value.double()).norm(dim=1)
    scale = max(x0.double().norm(), g(x0).double().norm())
    # The smallest that any point has is far below the tolerance where the map starts at rest.
    assert not sol.converged.any() or bool(true <= 0.1 * scale), sol


# --- how a failure is called ---


@each_backend
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=short)
@pytest.mark.parametrize("gain", [3.0, 1e3, -3.0])
def test_growth_to_overflow_fails_with_the_best_point(
    backend: str, dtype: torch.dtype, gain: float
) -> None:
    x0 = torch.ones(1, 2, dtype=dtype)
    g = lambda x: gain * x + 1  # noqa: E731
    sol = fpi.fixed_point(g, x0, solver=fpi.Picard(), max_steps=5000, backend=backend)
    if sol.converged.all():  # thrown back from overflow with half the damping
        assert gain < 0
        return
    assert sol.status.item() in (fpi.Status.DIVERGED, fpi.Status.NONFINITE)
    assert torch.equal(sol.value, x0)


@each_backend
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_at_the_cap_what_still_grows_has_diverged(backend: str, scale: float) -> None:
    A = orthogonal(4, 1.5, F32)
    b = scale * torch.ones(1, 4)
    options = {"solver": fpi.Picard(), "max_steps": 60, "backend": backend}
    sol = fpi.fixed_point(lambda x: x @ A + b, torch.zeros(1, 4), **options)
    assert sol.status.item() == fpi.Status.DIVERGED
    assert not sol.value.any()


@each_backend
def test_at_the_cap_what_has_stopped_growing_has_not_diverged(backend: str) -> None:
    options = {"solver": fpi.Picard(), "rtol": 1e-9, "backend": backend}
    x0 = torch.full((1, 3), 1e-10, dtype=F64)
    # A 2-cycle between 0.43 and 1.57 of another size than the start.
    cycle = fpi.fixed_point(lambda x: x * torch.exp(2.2 * (1 - x)), x0, max_steps=300, **options)
    assert cycle.status.item() == fpi.Status.MAX_STEPS
    settling = fpi.fixed_point(ricker, x0, max_steps=60, **options)
    assert settling.status.item() == fpi.Status.MAX_STEPS
    begun = fpi.fixed_point(ricker, x0, max_steps=15, **options)
    assert begun.status.item() == fpi.Status.MAX_STEPS


@each_solver
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", F32), ("native", F32), ("native", F64), ("native", BF16)],
    ids=short,
)
def test_stalled_is_at_the_floor_of_the_point_returned(
    backend: str, solver: Solver, dtype: torch.dtype
) -> None:
    A = orthogonal(5, 0.9, dtype)
    maps: list[Map] = [
        ricker,
        logistic,
        lambda x: x @ A + 1,
        lambda x: torch.cos(x.roll(1, -1)),
        lambda x: 1 - x,
        lambda x: 1.7 * x.flip(-1) + 1,
    ]
    stalled = 0
    for g in maps:
        for start in (1e-10, 1e-3, 3.0):
            x0 = torch.full((1, 5), start, dtype=dtype)
            sol = fpi.fixed_point(g, x0, solver=solver, rtol=0.0, max_steps=300, backend=backend)
            gx = g(sol.value).double()
            true = (gx - sol.value.double()).norm()
            assert abs(sol.residual.item() - true.item()) <= 1e-5 * true.item() + 1e-100
            if sol.status.item() == fpi.Status.STALLED:
                stalled += 1
                assert true <= FLOOR * torch.finfo(dtype).eps * gx.norm()
    assert stalled or dtype != F32 or not isinstance(solver, fpi.Picard)


@every_way
def test_a_g_that_turns_nan_on_the_way_ends_at_the_best_point(way: Any) -> None:
    calls = [0]

    def g(x: Tensor, z: Tensor) -> Tensor:
        calls[0] += 1
        gx = bent(x, z)
        if calls[0] > 3:
            gx = torch.where(torch.arange(3)[:, None] == 1, torch.nan, gx)
        return gx

    z = torch.randn(3, 4)
    sol = fpi.fixed_point(g, torch.zeros(3, 4), z, rtol=1e-6, max_steps=60, **way)
    assert sol.converged[[0, 2]].all()
    assert sol.status[1] == Status.NONFINITE
    assert torch.isfinite(sol.value).all()
    residual = torch.linalg.vector_norm(bent(sol.value, z) - sol.value, dim=1)
    torch.testing.assert_close(sol.residual, residual, rtol=1e-3, atol=1e-5)
    assert sol.residual[1] <= torch.linalg.vector_norm(z[1])  # the residual at x0
