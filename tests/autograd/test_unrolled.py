"""Unrolled from where it ends: one step from a solution, each sample as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_state import F64, B, D, orthogonal, zeros
from torch import Tensor

import fpi_cuda as fpi

SOLVERS = [fpi.Picard(), fpi.Anderson(), fpi.Broyden()]


# --- unrolled from where it ends -----------------------------------------------------------------


def one_step(g: Any, x: Any, z: Tensor, weights: Any) -> tuple[Tensor, ...]:
    """The gradient of g at x in z, x held fast."""
    gx = g(x, z)
    parts = gx if isinstance(gx, tuple) else (gx,)
    return torch.autograd.grad(parts, z, weights)


@pytest.mark.parametrize("state", ["tensor", "tuple"])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_unroll_from_the_solution_takes_one_step(solver: Any, state: str) -> None:
    a = orthogonal(0.5)
    z = torch.randn(B, D, dtype=F64, requires_grad=True)

    def g(x: Any, z: Tensor) -> Any:
        if isinstance(x, tuple):
            return torch.tanh(x[1] @ a + z), torch.tanh(0.5 * x[0] @ a + 0.1 * z)
        return torch.tanh(x @ a + z)

    x = zeros() if state == "tensor" else (zeros(), zeros())
    for _ in range(60):
        x = g(x, z.detach())
    sol = fpi.fixed_point(g, x, z, solver=solver, adjoint=fpi.Unroll(), rtol=1e-6)
    assert (sol.num_steps == 1).all()
    torch.testing.assert_close(sol.value, x, rtol=0, atol=0)
    parts = sol.value if state == "tuple" else (sol.value,)
    weights = tuple(torch.randn_like(t) for t in parts)
    got = torch.autograd.grad(parts, z, weights)
    torch.testing.assert_close(got, one_step(g, x, z, weights))
    assert got[0].abs().max() > 0.1


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_unroll_where_some_samples_start_solved(solver: Any) -> None:
    """Each as if it were alone; one fails besides."""
    a = orthogonal(0.5)
    g = lambda x, z: torch.tanh(x @ a + z)  # noqa: E731
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    x0 = zeros()
    for _ in range(60):
        x0[1] = g(x0, z.detach())[1]
    options: dict[str, Any] = {"solver": solver, "adjoint": fpi.Unroll(), "rtol": 1e-8}
    sol = fpi.fixed_point(g, x0, z, **options)
    assert sol.num_steps[1] == 1
    assert (sol.num_steps[[0, 2, 3]] > 1).all()
    torch.testing.assert_close(sol.value[1], x0[1], rtol=0, atol=0)
    got = torch.autograd.grad(sol.value.sum(), z)[0]
    for row in range(B):
        alone = z.detach()[row : row + 1].requires_grad_()
        x = fpi.fixed_point(g, x0[row : row + 1], alone, **options).value
        torch.testing.assert_close(got[row], torch.autograd.grad(x.sum(), alone)[0][0])
    bad = z.detach().clone()
    bad[2, 0] = torch.nan
    bad.requires_grad_()
    sol = fpi.fixed_point(g, x0, bad, **options)
    with pytest.warns(fpi.FixedPointWarning, match="no gradient"):
        found = torch.autograd.grad(sol.value.sum(), bad)[0]
    torch.testing.assert_close(found[[0, 1, 3]], got[[0, 1, 3]])
    assert (found[2] == 0).all()


def test_unroll_from_the_solution_in_its_start_and_to_second_order() -> None:
    a = orthogonal(0.5)
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    g = lambda x, z: torch.tanh(x @ a + z)  # noqa: E731
    x = zeros()
    for _ in range(60):
        x = g(x, z.detach())
    start = x.requires_grad_()
    value = fpi.fixed_point(g, start, z, adjoint=fpi.Unroll(), rtol=1e-6).value
    v = torch.randn_like(x)
    by_start = torch.autograd.grad(value, start, v, retain_graph=True)[0]
    torch.testing.assert_close(by_start, torch.autograd.grad(g(start, z), start, v)[0])
    slope = torch.autograd.grad(value, z, v, create_graph=True)[0]
    want = torch.autograd.grad(g(start, z), z, v, create_graph=True)[0]
    torch.testing.assert_close(
        torch.autograd.grad(slope.square().sum(), z)[0],
        torch.autograd.grad(want.square().sum(), z)[0],
    )
    fixed, tangent = start.detach(), torch.randn_like(x)

    def call(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, fixed, z, adjoint=fpi.Unroll(), rtol=1e-6).value

    pushed = torch.func.jvp(call, (z.detach(),), (tangent,))[1]
    wanted = torch.func.jvp(lambda z: g(fixed, z), (z.detach(),), (tangent,))[1]
    torch.testing.assert_close(pushed, wanted)


def test_unroll_with_one_evaluation() -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    sol = fpi.fixed_point(
        lambda x, z: 0.5 * torch.tanh(x) + z, zeros(), z, adjoint=fpi.Unroll(), max_steps=1
    )
    assert (torch.autograd.grad(sol.value.sum(), z)[0] == 1).all()
    assert (sol.value == 0).all()
