"""Contract, 2: a stopped sample is frozen.

Its value, residual and step count never move again. Where g is declared row-wise, stopped samples
leave the batch and cost nothing. Where nobody promised it, and the rows are seen to depend on one
another, the state is one sample from then on; a row-wise g keeps every bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from coupled_maps import (
    COUPLED,
    F64,
    SOLVERS,
    Map,
    dense_gradient,
    graph,
    iterated,
    same_as_told,
    true_residual,
)
from torch import Tensor
from ways import every_way

import fpi_cuda as fpi
from fpi_cuda.testing import backends_available


@every_way
def test_a_sample_that_stops_stays_where_it_is(way: Any) -> None:
    """The slow sample takes many more steps; the fast one's points are those of a solve alone."""
    slope = torch.tensor([[0.1], [0.97]], dtype=F64)

    def g(x: Tensor, z: Tensor, slope: Tensor) -> Tensor:
        return slope * torch.sin(x) + z

    z = torch.randn(2, 1, dtype=F64).repeat(1, 3)
    both = fpi.fixed_point(g, torch.zeros(2, 3, dtype=F64), z, slope, max_steps=500, **way)
    alone = fpi.fixed_point(g, torch.zeros(1, 3, dtype=F64), z[:1], slope[:1], max_steps=500, **way)
    assert both.num_steps[1] >= both.num_steps[0]
    assert both.num_steps[0] == alone.num_steps[0]
    torch.testing.assert_close(both.value[:1], alone.value, rtol=0, atol=1e-15)
    torch.testing.assert_close(both.residual[:1], alone.residual, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("make", COUPLED)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("rtol", [1e-3, 1e-7])
def test_all_rows_are_solved_together(make: Map, grad: bool, solver: Any, rtol: float) -> None:
    g, x0 = make()
    want = iterated(g, x0)
    for _ in range(2):  # what is remembered of the first solve must not hurt the second
        with torch.set_grad_enabled(grad):
            sol = fpi.fixed_point(g, x0, solver=solver, rtol=rtol, max_steps=500)
        assert sol.converged.all()
        residual = true_residual(g, sol.value)
        assert same_as_told(sol, residual)
        assert (residual <= rtol * g(sol.value).reshape(len(x0), -1).norm(dim=1) * (1 + 1e-9)).all()
        assert (sol.value - want).norm() <= 100 * rtol * want.norm()


@pytest.mark.parametrize("backend", backends_available(dtype=F64))
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_on_every_backend(backend: str, solver: Any) -> None:
    if backend == "triton" and isinstance(solver, fpi.Broyden):
        pytest.skip("Triton has no Broyden")
    g, x0 = graph(12, 3)
    sol = fpi.fixed_point(g, x0, solver=solver, rtol=1e-5, max_steps=300, backend=backend)
    assert sol.converged.all()
    assert same_as_told(sol, true_residual(g, sol.value))


# --- rows that are independent -------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_rows_that_are_independent_keep_every_bit(solver: Any, dtype: torch.dtype) -> None:
    """With failures of every kind among them."""
    scale = torch.tensor([0.1, 0.5, 0.9, 1.0, 3.0, 0.99, 0.0, 0.3], dtype=dtype)[:, None]
    z = torch.randn(8, 5, dtype=dtype)
    z[3], z[7, 2] = 1.0, torch.nan  # x + 1 has no fixed point

    def g(x: Tensor, z: Tensor) -> Tensor:
        return scale[: len(x)] * x + z

    options: dict[str, Any] = {"solver": solver, "rtol": 1e-4, "max_steps": 60}
    sols = [fpi.fixed_point(g, torch.zeros_like(z), z, **options) for _ in range(2)]

    def alone(i: int) -> fpi.Solution:
        row = z[i : i + 1]
        return fpi.fixed_point(lambda x, z: scale[i] * x + z, torch.zeros_like(row), row, **options)

    single = [alone(i) for i in range(8)]
    for sol in sols:
        for name in ("value", "status", "num_steps", "residual"):
            want = torch.cat([getattr(one, name) for one in single])
            assert torch.equal(getattr(sol, name).nan_to_num(), want.nan_to_num()), name


# --- promises and their names ------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_broken_promise_names_both_ways_out(grad: bool) -> None:
    g, x0 = graph()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as raised:
        fpi.fixed_point(g, x0, rtol=1e-6, max_steps=300, rowwise=True)
    assert "rowwise=None" in str(raised.value)
    assert "batch_dims=0" in str(raised.value)


@pytest.mark.parametrize("make", COUPLED)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_the_whole_state_as_one_sample(make: Map, solver: Any) -> None:
    g, x0 = make()
    z = (0.1 * torch.randn_like(x0)).requires_grad_()
    sol = fpi.fixed_point(g, x0, z, solver=solver, batch_dims=0, rtol=1e-10, max_steps=2000)
    for field in (sol.status, sol.num_steps, sol.residual, sol.converged):
        assert field.shape == ()
    assert sol.converged
    assert sol.value.shape == x0.shape
    assert abs(sol.residual - true_residual(g, sol.value, z).norm()) <= 1e-12
    v = torch.randn_like(x0)
    (found,) = torch.autograd.grad(sol.value, z, v)
    assert (found - (want := dense_gradient(g, x0, z.detach(), v))).norm() <= 1e-7 * want.norm()
    stats = sol.adjoint_stats
    assert stats is not None
    assert stats.status.shape == stats.num_steps.shape == stats.residual.shape == ()
    assert stats.converged


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_where_rows_are_promised_the_work_follows_the_steps_of_each_sample(solver: Any) -> None:
    """Stopped samples leave the batch: rows evaluated, against batch times slowest."""
    slope = torch.full((64, 1), 0.05, dtype=F64)
    slope[5] = 0.97
    rows = []

    def g(x: Tensor, z: Tensor, slope: Tensor) -> Tensor:
        rows.append(len(x))
        return slope * torch.sin(x) + z

    z = torch.randn(64, 3, dtype=F64)
    work = {}
    with torch.no_grad():
        for rowwise in (None, True):
            rows.clear()
            sol = fpi.fixed_point(
                g, 0 * z, z, slope, solver=solver, rtol=1e-9, max_steps=1000, rowwise=rowwise
            )
            assert sol.converged.all()
            work[rowwise] = sum(rows)
    assert work[True] < 0.7 * work[None]
    assert work[True] <= 2 * int(sol.num_steps.sum()) + 2 * 64
