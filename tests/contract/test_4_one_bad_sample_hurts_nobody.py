"""Contract, 4: one bad sample hurts nobody where g is row-wise.

NaN, Inf, a singular small system, divergence, a 2-cycle: a status for that sample, the others
untouched. Nothing throws inside of the solve unless ``throw=True``. There is always a step cap.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from ways import F64, bent, each_backend, every_way

import fpi_cuda as fpi
from fpi_cuda import Status

# --- numbers that are not finite, and maps without a fixed point ------------------------------


@every_way
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x0", "z"])
def test_a_poisoned_sample_hurts_no_other(where: str, poison: float, way: Any) -> None:
    x0, z = torch.randn(5, 4), torch.randn(5, 4)
    plain = fpi.fixed_point(bent, x0, z, rtol=1e-5, **way)
    bad = {"x0": x0, "z": z}
    bad[where] = bad[where].clone()
    bad[where][2, 1] = poison
    sol = fpi.fixed_point(bent, bad["x0"], bad["z"], rtol=1e-5, **way)
    others = [0, 1, 3, 4]
    assert not sol.converged[2]
    assert sol.status[2] == Status.NONFINITE
    for field in ("value", "status", "num_steps", "residual"):
        assert torch.equal(getattr(sol, field)[others], getattr(plain, field)[others]), field


@each_backend
def test_a_two_cycle(backend: str) -> None:
    """-x + z jumps between 0 and z; the fixed point is z / 2."""
    z = torch.randn(3, 4, requires_grad=True)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return z - x

    picard = fpi.fixed_point(g, torch.zeros(3, 4), z, solver=fpi.Picard(), backend=backend)
    assert (picard.status == Status.MAX_STEPS).all()
    for solver in (fpi.Picard(damping=0.5), fpi.Anderson(), fpi.Broyden()):
        sol = fpi.fixed_point(g, torch.zeros(3, 4), z, solver=solver, backend=backend, rtol=1e-6)
        assert sol.converged.all(), solver
        torch.testing.assert_close(sol.value, z / 2, rtol=1e-4, atol=1e-5)
        (found,) = torch.autograd.grad(sol.value.sum(), z)
        torch.testing.assert_close(found, torch.full_like(z, 0.5), rtol=1e-4, atol=1e-5)


@every_way
@pytest.mark.parametrize("max_steps", [1, 2])
def test_few_steps(max_steps: int, way: Any) -> None:
    z = torch.randn(4, 6, dtype=F64, requires_grad=True)
    x0 = torch.randn(4, 6, dtype=F64)
    calls = [0]

    def g(x: Tensor, z: Tensor) -> Tensor:
        calls[0] += not torch.is_grad_enabled()
        return bent(x, z)

    fpi.fixed_point(g, x0, z, rtol=1e-12, max_steps=max_steps, **way)  # probes the map
    calls[0] = 0
    sol = fpi.fixed_point(g, x0, z, rtol=1e-12, max_steps=max_steps, **way)
    assert calls[0] == max_steps
    assert (sol.status == Status.MAX_STEPS).all()
    assert (sol.num_steps == max_steps).all()
    residual = torch.linalg.vector_norm(bent(sol.value, z) - sol.value, dim=1)
    torch.testing.assert_close(sol.residual, residual.detach())
    if max_steps == 1:
        assert torch.equal(sol.value, x0)
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    assert torch.isfinite(found).all()
    assert sol.adjoint_stats is not None
    assert (sol.adjoint_stats.num_steps <= max_steps).all()


# --- singular systems -------------------------------------------------------------------------


@every_way
def test_a_jacobian_without_rank(way: Any) -> None:
    matrix = torch.zeros(5, 5, dtype=F64)
    matrix[0, 1] = 0.9
    z = torch.randn(3, 5, dtype=F64, requires_grad=True)
    sol = fpi.fixed_point(
        lambda x, z: x @ matrix.T + z, torch.zeros(3, 5, dtype=F64), z, rtol=1e-10, **way
    )
    assert sol.converged.all()
    inverse = torch.linalg.inv(torch.eye(5, dtype=F64) - matrix)
    torch.testing.assert_close(sol.value, z @ inverse.T)
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    torch.testing.assert_close(found, inverse.sum(0).expand(3, 5))


@pytest.mark.parametrize("route", ["host", "fused", "device"])
@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson()], ids=str)
@pytest.mark.usefixtures("tape")
def test_a_poisoned_sample_hurts_no_other_in_any_loop(solver: Any, route: str) -> None:
    """The device loop on a stand-in for CUDA graphs."""
    if route == "fused" and not fpi.native_available():
        pytest.skip("the fused loop is native")
    cell, z = fpi.cells.Dense(4, 4), torch.randn(5, 4)
    bad = z.clone()
    bad[2, 1] = torch.nan
    with torch.no_grad():
        options = {"solver": solver, "route": route, "rtol": 1e-5}
        sol, plain = (fpi.fixed_point(cell, 0 * z, t, **options) for t in (bad, z))
    assert sol.status[2] == Status.NONFINITE
    for field in ("value", "status", "num_steps", "residual"):
        others = [0, 1, 3, 4]
        assert torch.equal(getattr(sol, field)[others], getattr(plain, field)[others]), field


@every_way
def test_nothing_throws_unless_it_is_asked_for(way: Any) -> None:
    def g(x: Tensor) -> Tensor:
        return torch.stack([0.5 * x[0] + 1, x[1] + 1, 3 * x[2].abs() + 1, x[3] * torch.nan])

    x0 = torch.ones(4, 3)
    sol = fpi.fixed_point(g, x0, max_steps=40, **way)
    assert sol.converged.tolist() == [True, False, False, False]
    with pytest.raises(fpi.ConvergenceError, match="3 of 4 samples did not converge"):
        fpi.fixed_point(g, x0, max_steps=40, throw=True, **way)
