"""Contract, 6: the adjoint is as accurate as the forward was asked to be, in each sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi

F64 = torch.float64
BATCH, DIM = 5, 6
BACKENDS = ["reference", "native"] if fpi.native_available() else ["reference"]
SOLVERS = [
    fpi.Picard(), fpi.Anderson(), fpi.Broyden(), fpi.GMRES(), fpi.ConjugateGradient(),
]  # fmt: skip


@pytest.fixture
def problem() -> tuple[Any, Tensor, Tensor]:
    """A linear map, its z in rows of very different size, and the gradient of <1, x> in z."""
    a = torch.linalg.qr(torch.randn(DIM, DIM, dtype=F64))[0] * 0.9
    z = torch.randn(BATCH, DIM, dtype=F64)
    z *= torch.tensor([1e-2, 1.0, 1e2, 1e4, 0.0], dtype=F64)[:, None]
    exact = torch.linalg.solve(torch.eye(DIM, dtype=F64) - a, torch.ones(DIM, dtype=F64))
    return (lambda x, z: x @ a + z), z, exact.expand(BATCH, DIM)


def solved(g: Any, z: Tensor, **options: Any) -> tuple[fpi.Stats, Tensor]:
    z = z.detach().requires_grad_()
    options = {"rtol": 0.0, "atol": 1e-3, "max_steps": 400} | options
    solution = fpi.fixed_point(g, torch.zeros_like(z), z, **options)
    assert solution.converged.all()
    (gradient,) = torch.autograd.grad(solution.value.sum(), z)
    assert solution.adjoint_stats is not None
    return solution.adjoint_stats, gradient


def expected_share(g: Any, z: Tensor, rtol: float, atol: float) -> Tensor:
    x = fpi.fixed_point(g, torch.zeros_like(z), z, rtol=rtol, atol=atol, max_steps=400).value
    return (rtol + atol / x.norm(dim=1)).clamp(max=max(rtol, 1e-2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_an_absolute_tolerance_ends_the_adjoint_too(
    problem: Any, solver: Any, backend: str
) -> None:
    g, z, exact = problem
    stats, gradient = solved(g, z, backend=backend, adjoint=fpi.Implicit(solver=solver))
    assert stats.converged.all()
    assert stats.num_steps.max() < 200
    share = expected_share(g, z, 0.0, 1e-3)
    assert (stats.residual <= share * DIM**0.5 * (1 + 1e-9)).all()
    error = (gradient - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error <= 10 * share).all()  # 1 / (1 - 0.9)


def test_it_does_not_depend_on_the_rest_of_the_batch(problem: Any) -> None:
    g, z, _ = problem
    together = solved(g, z)[1]
    for i in range(BATCH):
        torch.testing.assert_close(solved(g, z[i : i + 1])[1][0], together[i], rtol=1e-12, atol=0.0)


def test_without_atol_nothing_is_loosened(problem: Any) -> None:
    g, z, _ = problem
    stats, _ = solved(g, z, rtol=1e-6, atol=0.0)
    assert (stats.residual <= 1e-6 * DIM**0.5).all()
    asked, _ = solved(g, z, adjoint=fpi.Implicit(rtol=1e-8))
    assert (asked.residual <= 1e-8 * DIM**0.5).all()


def test_a_failed_sample_asks_for_nothing(problem: Any) -> None:
    g, z, exact = problem
    z = z.clone()
    z[1, 0] = torch.nan
    z.requires_grad_()
    solution = fpi.fixed_point(g, torch.zeros_like(z), z, rtol=0.0, atol=1e-3, max_steps=400)
    with pytest.warns(fpi.FixedPointWarning, match="contribute no gradient"):
        (gradient,) = torch.autograd.grad(solution.value.sum(), z)
    stats = solution.adjoint_stats
    assert stats is not None
    assert stats.converged[[0, 2, 3, 4]].all()
    torch.testing.assert_close(gradient[3], exact[3], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("route", ["fused", "host"])
def test_a_cell_on_either_route(route: str) -> None:
    if route == "fused" and not fpi.native_available():
        pytest.skip("the fused loop is native")
    layer = fpi.FPILayer(
        fpi.cells.Dense(DIM, DIM).double(), rtol=0.0, atol=1e-3, max_steps=400, route=route
    )
    z = torch.randn(BATCH, DIM, dtype=F64, requires_grad=True)
    x = layer(z)
    x.sum().backward()
    assert layer.last_solution is not None
    stats = layer.last_solution.adjoint_stats
    assert stats is not None
    assert stats.converged.all()
    share = (1e-3 / x.detach().norm(dim=1)).clamp(max=1e-2)
    assert (stats.residual <= share * DIM**0.5 * (1 + 1e-9)).all()
    assert "0 + 0.001 / ||x||, at most 0.01" in layer.explain()


def test_second_order_forward_mode_and_transforms() -> None:
    a = torch.linalg.qr(torch.randn(DIM, DIM, dtype=F64))[0] * 0.5
    z = torch.randn(BATCH, DIM, dtype=F64)

    def value(z: Tensor, rtol: float, atol: float) -> Tensor:
        return fpi.fixed_point(
            lambda x, z: torch.tanh(x @ a + z), torch.zeros_like(z), z, rtol=rtol, atol=atol,
            max_steps=200,
        ).value  # fmt: skip

    def loss(z: Tensor, rtol: float, atol: float) -> Tensor:
        return value(z, rtol, atol).square().sum()

    ones = torch.ones_like(z)
    for compute in (
        lambda *tolerance: torch.func.grad(lambda z: loss(z, *tolerance))(z),
        lambda *tolerance: torch.func.jvp(lambda z: value(z, *tolerance), (z,), (ones,))[1],
        lambda *tolerance: torch.func.jacrev(lambda z: value(z, *tolerance))(z),
        lambda *tolerance: torch.func.jacfwd(lambda z: value(z, *tolerance))(z),
        lambda *tolerance: torch.func.hessian(lambda z: loss(z, *tolerance))(z),
        lambda *tolerance: torch.func.vmap(torch.func.grad(lambda z: loss(z[None], *tolerance)))(z),
        lambda *tolerance: torch.autograd.functional.hessian(lambda z: loss(z, *tolerance), z),
    ):
        torch.testing.assert_close(compute(0.0, 1e-8), compute(1e-11, 0.0), rtol=1e-5, atol=1e-6)
