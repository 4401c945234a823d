"""States that grow before they settle: an end like any other, and no divergence."""

from __future__ import annotations

import pytest
import torch
from growing_maps import F16, F32, F64, GROWING, SOLVERS, Map, Solver, ricker, short, size
from torch import Tensor

import fpi_cuda as fpi


def by_hand(g: Map, x: Tensor, rtol: float, max_steps: int) -> Tensor:
    """The ten lines that a user writes instead."""
    for _ in range(max_steps):
        gx = g(x)
        if bool((size(gx - x) <= rtol * size(gx)).all()):
            return x
        x = gx
    raise AssertionError("the loop by hand does not finish")


@pytest.mark.parametrize("dtype", [F32, F64], ids=short)
@pytest.mark.parametrize("start", [1e-5, 1e-10, 1e-30])
@pytest.mark.parametrize("g", GROWING, ids=lambda g: g.__name__)
@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_picard_solves_what_a_loop_by_hand_solves(
    dtype: torch.dtype, start: float, g: Map, damping: float
) -> None:
    x0 = torch.full((1, 3), start, dtype=dtype)
    x = by_hand(lambda x: x + damping * (g(x) - x), x0, 1e-4, 3000)
    solver = fpi.Picard(damping=damping)
    sol = fpi.fixed_point(g, x0, solver=solver, rtol=1e-4, max_steps=3000)
    assert sol.converged.all(), sol
    assert (sol.value - x).norm() <= 1e-2 * x.norm()
    true = size(g(sol.value) - sol.value)
    torch.testing.assert_close(sol.residual.double(), true, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("start", [1e-5, 1e-3])
@pytest.mark.parametrize("rate", [1.5, 1.8, 2.5, 2.9])
def test_growth_in_16_bits_ends_where_rounding_lets_it(
    dtype: torch.dtype, start: float, rate: float
) -> None:
    """At the fixed point a residual is zero or some roundings, perhaps over 1% of its peak."""

    def g(x: Tensor) -> Tensor:
        return rate * x * (1 - x)

    x0 = torch.full((2, 3), start, dtype=dtype)
    solver = fpi.Picard()
    sol = fpi.fixed_point(g, x0, solver=solver, rtol=0.02, max_steps=500)
    assert sol.converged.all(), sol
    assert (sol.value.double() - (1 - 1 / rate)).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [F32, F64], ids=short)
@pytest.mark.parametrize("solver", SOLVERS[1:], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("g", GROWING, ids=lambda g: g.__name__)
def test_growth_is_no_divergence_for_accelerated_solvers(
    dtype: torch.dtype, solver: Solver, g: Map
) -> None:
    x0 = torch.full((1, 3), 1e-5, dtype=dtype)
    sol = fpi.fixed_point(g, x0, solver=solver, rtol=1e-4, max_steps=300)
    assert sol.status.item() not in (fpi.Status.DIVERGED, fpi.Status.STALLED), sol


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("size_of_input", [1e-6, 1e-9])
def test_growth_in_the_fused_loop(precision: str, size_of_input: float) -> None:
    """tanh(2.5 x + z), whose fixed point is 0.985 beside an input of 1e-6."""
    dense = fpi.cells.Dense(6, 6)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
        dense.A.weight.copy_(2.5 * torch.eye(6))
        dense.B.weight.copy_(torch.eye(6))
        z = torch.full((3, 6), size_of_input)
        options = {"solver": fpi.Picard(), "route": "fused", "precision": precision}
        sol = fpi.fixed_point(dense, torch.zeros(3, 6), z, rtol=2e-2, max_steps=200, **options)
    assert sol.converged.all(), sol
    assert (sol.value > 0.9).all()


def test_growth_in_a_row_of_a_batch_is_that_rows_alone() -> None:
    x0 = torch.tensor([[1e-9] * 3, [0.9] * 3, [1e3] * 3], dtype=F64)
    sol = fpi.fixed_point(ricker, x0, solver=fpi.Picard(), rtol=1e-6, max_steps=500)
    for i in range(3):
        one = fpi.fixed_point(ricker, x0[i : i + 1], solver=fpi.Picard(), rtol=1e-6, max_steps=500)
        assert sol.status[i] == one.status[0]
        assert sol.num_steps[i] == one.num_steps[0]


def test_the_adjoint_of_a_state_that_grew() -> None:
    z = torch.full((2, 3), 0.5, dtype=F64, requires_grad=True)
    x0 = torch.full((2, 3), 1e-10, dtype=F64)
    options = {"solver": fpi.Picard(), "rtol": 1e-10, "max_steps": 500}
    sol = fpi.fixed_point(lambda x, z: x * torch.exp(0.5 * (2 * z - x)), x0, z, **options)
    sol.value.sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, 2.0))


def test_an_adjoint_may_grow_before_it_falls() -> None:
    """A product with a nilpotent Jacobian grows by a million, and is then exactly zero."""
    J = torch.diag(torch.full((5,), 30.0, dtype=F64), -1)
    z = torch.ones(1, 6, dtype=F64, requires_grad=True)
    options = {"solver": fpi.Picard(), "rtol": 1e-10, "max_steps": 50}
    sol = fpi.fixed_point(lambda x, z: x @ J.T + z, torch.zeros(1, 6, dtype=F64), z, **options)
    sol.value.sum().backward()
    want = torch.linalg.solve((torch.eye(6, dtype=F64) - J).T, torch.ones(6, dtype=F64))
    torch.testing.assert_close(z.grad[0], want)
    assert sol.adjoint_stats is not None
    assert sol.adjoint_stats.num_zeroed == 0


def test_growth_to_overflow_in_float16() -> None:
    x0 = torch.ones(1, 2, dtype=F16)
    sol = fpi.fixed_point(lambda x: 3 * x + 1, x0, solver=fpi.Picard(), max_steps=5000)
    assert sol.status.item() in (fpi.Status.DIVERGED, fpi.Status.NONFINITE)
    assert torch.equal(sol.value, x0)
