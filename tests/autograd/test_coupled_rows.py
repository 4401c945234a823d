"""Clause 2 and 6: derivatives where rows depend on one another are those of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from coupled_maps import (
    F64,
    LINEAR_SOLVERS,
    SOLVERS,
    Map,
    attention,
    batch_norm,
    chain,
    dense_gradient,
    dense_vector,
    graph,
    iterated,
    masked,
    same_as_told,
    true_residual,
)
from torch import Tensor

import fpi_cuda as fpi


@pytest.mark.parametrize("make", [graph, chain, attention, batch_norm])
@pytest.mark.parametrize("solver", LINEAR_SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("loss", [lambda v: v, masked], ids=["all", "masked"])
def test_the_gradient(make: Map, solver: Any, loss: Any) -> None:
    g, x0 = make()
    z = (0.1 * torch.randn_like(x0)).requires_grad_()
    v = loss(torch.randn_like(x0))
    adjoint = fpi.Implicit(solver=solver, rtol=1e-9, max_steps=2000)
    sol = fpi.fixed_point(g, x0, z, rtol=1e-11, max_steps=2000, adjoint=adjoint)
    (found,) = torch.autograd.grad(sol.value, z, v)
    want = dense_gradient(g, x0, z.detach(), v)
    assert sol.adjoint_stats is not None
    assert sol.adjoint_stats.converged.all()
    assert (found - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("make", [graph, attention])
@pytest.mark.parametrize(
    ("adjoint", "solver"),
    [
        *((fpi.Unroll(), solver) for solver in SOLVERS),
        (fpi.Neumann(150), SOLVERS[0]),
        (fpi.Phantom(150), SOLVERS[1]),
    ],
    ids=str,
)
def test_the_gradient_of_other_adjoints(make: Map, adjoint: Any, solver: Any) -> None:
    g, x0 = make()
    z = (0.1 * torch.randn_like(x0)).requires_grad_()
    v = torch.randn_like(x0)
    sol = fpi.fixed_point(g, x0, z, solver=solver, rtol=1e-12, max_steps=500, adjoint=adjoint)
    assert sol.converged.all()
    assert same_as_told(sol, true_residual(g, sol.value.detach(), z))
    (found,) = torch.autograd.grad(sol.value, z, v)
    want = dense_gradient(g, x0, z.detach(), v)
    assert (found - want).norm() <= 1e-6 * want.norm()


def test_an_infinite_gradient_reaches_the_rows_that_depend_on_it() -> None:
    g, x0 = dense_vector()
    z = torch.zeros_like(x0).requires_grad_()
    sol = fpi.fixed_point(g, x0, z, rtol=1e-8, max_steps=300)
    v = torch.ones_like(x0)
    v[3] = torch.inf
    (found,) = torch.autograd.grad(sol.value, z, v)
    assert not found.isfinite().any()
    assert sol.adjoint_stats is not None
    assert sol.adjoint_stats.num_zeroed == 0


def test_an_infinite_gradient_spoils_no_rows_that_were_not_seen_to_depend_on_it() -> None:
    """A sum does not look for that, and the forward solve begins at the solution."""
    z = torch.randn(4, 3, dtype=F64).requires_grad_()
    x_star = torch.linalg.solve(0.75 * torch.eye(4, dtype=F64) - 0.125, z.detach())
    sol = fpi.fixed_point(
        lambda x, z: 0.25 * x + 0.5 * x.mean(0) + z, x_star, z, solver=fpi.Picard(), rtol=1e-6,
        adjoint=fpi.Neumann(5),
    )  # fmt: skip
    v = torch.ones_like(z)
    v[0, 1] = torch.inf
    (found,) = torch.autograd.grad(sol.value, z, v)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()
    assert sol.adjoint_stats is not None
    assert sol.adjoint_stats.num_zeroed == 0


@pytest.mark.parametrize("solver", LINEAR_SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("dtype", "small", "rtol"),
    [(torch.float16, 1e-3, 0.02), (torch.float32, 1e-22, 1e-5), (F64, 1e-200, 1e-5)],
    ids=str,
)
def test_gradients_of_other_sizes_in_each_row(
    dtype: torch.dtype, small: float, rtol: float, solver: Any
) -> None:
    """They are scaled apart, which would be another system here; the forward saw no coupling."""
    system = 0.75 * torch.eye(4, dtype=F64) - 0.125
    z = torch.randn(4, 3, dtype=dtype).requires_grad_()
    x_star = torch.linalg.solve(system, z.detach().double()).to(dtype)
    v = torch.full_like(z, small)
    v[0] = 1.0
    adjoint = fpi.Implicit(solver=solver, rtol=rtol / 4)
    sol = fpi.fixed_point(
        lambda x, z: 0.25 * x + 0.5 * x.mean(0) + z, x_star, z, rtol=rtol, adjoint=adjoint
    )
    (found,) = torch.autograd.grad(sol.value, z, v)
    want = torch.linalg.solve(system, v.double())
    torch.testing.assert_close(found.double(), want, rtol=4 * rtol, atol=0)


@pytest.mark.parametrize("solver", LINEAR_SOLVERS, ids=lambda s: type(s).__name__)
def test_the_residual_of_the_adjoint_is_that_of_all_rows(solver: Any) -> None:
    """Where the forward solve had no chance to notice: it begins at the solution."""
    g, x0 = graph()
    x_star = iterated(g, x0)
    t = torch.zeros_like(x0).requires_grad_()
    adjoint = fpi.Implicit(solver=solver, rtol=1e-6)
    sol = fpi.fixed_point(
        lambda x, t: g(x) + t, x_star, t, rtol=1e-4, max_steps=500, adjoint=adjoint
    )
    v = masked(torch.randn_like(x0))
    (c,) = torch.autograd.grad(sol.value, t, v)  # dg/dt = I, so this is the adjoint itself
    _, pull = torch.func.vjp(g, sol.value.detach())
    residual = (pull(c)[0] + v - c).norm(dim=1)
    stats = sol.adjoint_stats
    assert stats is not None
    assert stats.converged.all()
    assert residual.norm() <= 1.001e-6 * v.norm()
    assert (stats.residual - residual).norm() <= 1e-9 * v.norm() + 1e-2 * residual.norm()


@pytest.mark.parametrize("solver", [fpi.GMRES(), fpi.ConjugateGradient()], ids=str)
def test_rows_that_a_krylov_solver_cannot_solve_apart(solver: Any) -> None:
    """They end at a true residual that is no solution, and nothing has moved."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.rand(3, 3, dtype=F64, generator=generator)
    mix = mix / mix.sum(1, keepdim=True)
    weight = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=generator))[0] * 0.6

    def g(x: Tensor, t: Tensor) -> Tensor:
        return mix @ x @ weight + t

    t = torch.randn(3, 4, dtype=F64, generator=generator).requires_grad_()
    x_star = iterated(g, torch.zeros_like(t), t.detach())
    adjoint = fpi.Implicit(solver=solver, rtol=1e-9, max_steps=500)
    for _ in range(3):
        sol = fpi.fixed_point(g, x_star, t, rtol=1e-3, adjoint=adjoint)
        v = torch.randn(3, 4, dtype=F64, generator=generator)
        (found,) = torch.autograd.grad(sol.value, t, v)
        want = dense_gradient(g, x_star, t.detach(), v)
        assert (found - want).norm() <= 1e-7 * want.norm()


@pytest.mark.parametrize("mode", ["backward", "forward"])
@pytest.mark.parametrize("pair", [(0, 2), (4, 11), (11, 4)], ids=str)
@pytest.mark.parametrize("solver", LINEAR_SOLVERS, ids=lambda s: type(s).__name__)
def test_one_row_that_depends_on_one_other(solver: Any, pair: tuple[int, int], mode: str) -> None:
    """Forward, each row is solved in turn, so that nobody notices; apart, CG finds nothing."""
    mix = 0.8 * torch.eye(12, dtype=F64)
    mix[pair] = 1.0
    t = torch.randn(12, 2, dtype=F64)
    x_star = torch.linalg.solve(torch.eye(12, dtype=F64) - mix, t)
    adjoint = fpi.Implicit(solver=solver, rtol=1e-9, max_steps=500)

    def solve(t: Tensor) -> Tensor:
        return fpi.fixed_point(lambda x, t: mix @ x + t, x_star, t, adjoint=adjoint).value

    v = torch.randn(12, 2, dtype=F64)
    if mode == "forward":
        found = torch.func.jvp(solve, (t,), (v,))[1]
        want = torch.linalg.solve(torch.eye(12, dtype=F64) - mix, v)
    else:
        t.requires_grad_()
        (found,) = torch.autograd.grad(solve(t), t, v)
        want = torch.linalg.solve(torch.eye(12, dtype=F64) - mix.T, v)
    assert (found - want).norm() <= 1e-7 * want.norm()


@pytest.mark.parametrize("mode", ["backward", "forward"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "solver", [fpi.Anderson(), fpi.GMRES(), fpi.ConjugateGradient()], ids=lambda s: type(s).__name__
)
def test_rows_that_can_only_be_solved_together(solver: Any, seed: int, mode: str) -> None:
    """Apart they run away; the forward solve begins at the solution, and shows nothing."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=generator))[0] * 1.1
    t, v = torch.randn(2, 4, 1, dtype=F64, generator=generator)
    system = torch.eye(4, dtype=F64) - mix
    x_star = torch.linalg.solve(system, t)
    adjoint = fpi.Implicit(solver=solver, rtol=1e-9, max_steps=200)
    stats = []

    def solve(t: Tensor) -> Tensor:
        sol = fpi.fixed_point(lambda x, t: mix @ x + t, x_star, t, adjoint=adjoint)
        stats.append(sol)
        return sol.value

    if mode == "forward":
        found = torch.func.jvp(solve, (t,), (v,))[1]
        want = torch.linalg.solve(system, v)
    else:
        t.requires_grad_()
        (found,) = torch.autograd.grad(solve(t), t, v)
        want = torch.linalg.solve(system.T, v)
    assert stats[0].adjoint_stats.converged.all()
    assert (found - want).norm() <= 1e-7 * want.norm()


def test_derivatives_of_every_order_and_mode() -> None:
    g, x0 = graph(6, 2, sources=1)
    z = (0.1 * torch.randn_like(x0)).requires_grad_()

    def solve(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, x0, z, rtol=1e-12, max_steps=500).value

    assert torch.autograd.gradcheck(solve, (z,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, (z,))


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "jvp", "vmap", "hessian"])
def test_inside_of_torch_func(transform: str) -> None:
    g, x0 = graph(6, 2, sources=1)
    z, t = (0.1 * torch.randn_like(x0) for _ in range(2))

    def solve(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, x0, z, rtol=1e-11, max_steps=800).value

    def unrolled(z: Tensor) -> Tensor:
        x = x0
        for _ in range(300):
            x = g(x, z)
        return x

    def loss(of: Map) -> Map:
        return lambda z: of(z)[::2].square().sum()

    func: dict[str, Callable[[Map], Tensor]] = {
        "grad": lambda of: torch.func.grad(loss(of))(z),
        "jacrev": lambda of: torch.func.jacrev(of)(z),
        "jacfwd": lambda of: torch.func.jacfwd(of)(z),
        "jvp": lambda of: torch.func.jvp(of, (z,), (t,))[1],
        "vmap": lambda of: torch.func.vmap(of)(torch.stack([z, t, z + t])),
        "hessian": lambda of: torch.func.hessian(loss(of))(z),
    }
    found, want = func[transform](solve), func[transform](unrolled)
    assert (found - want).abs().max() <= 1e-7 * want.abs().max()


@pytest.mark.parametrize("adjoint", [fpi.Implicit(), fpi.Implicit(solver=fpi.GMRES())], ids=str)
def test_samples_of_a_vmap_are_not_coupled(adjoint: Any) -> None:
    """One of them has no fixed point that the iteration finds; the others have theirs."""
    mix = torch.softmax(torch.randn(5, 5, dtype=F64), 1)
    z = torch.randn(3, 5, 2, dtype=F64)
    k = torch.tensor([0.5, 1.5, 0.6], dtype=F64)
    options: dict[str, Any] = {"solver": fpi.Picard(), "rtol": 1e-10, "max_steps": 200}

    def solve(k: Tensor, z: Tensor) -> fpi.Solution:
        g = lambda x, k, z: k * (mix @ x) + z  # noqa: E731
        return fpi.fixed_point(g, torch.zeros_like(z), k, z, adjoint=adjoint, **options)

    def loss(k: Tensor, z: Tensor) -> Tensor:
        return solve(k, z).value.square().sum()

    status, value = torch.func.vmap(lambda k, z: (solve(k, z).status, solve(k, z).value))(k, z)
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1)))(k, z)
    for i in (0, 2):
        sol = solve(k[i], z[i])
        assert (status[i] == fpi.Status.CONVERGED).all()
        assert (value[i] - sol.value).abs().max() < 1e-9
        alone = torch.func.grad(loss, (0, 1))(k[i], z[i])
        for found, want in zip(grads, alone, strict=True):
            assert (found[i] - want).norm() <= 1e-7 * want.norm()
    assert not (status[1] == fpi.Status.CONVERGED).any()


def test_a_row_that_is_skipped_by_the_loss_gets_its_gradient() -> None:
    """b is zero in most rows, and so is their own tolerance; the sum of them all counts."""
    g, x0 = chain(12)
    z = torch.zeros_like(x0).requires_grad_()
    x = fpi.fixed_point(g, x0, z, rtol=1e-10, max_steps=400).value
    (found,) = torch.autograd.grad(x[-1], z)
    want = 0.8 ** torch.arange(11, -1, -1, dtype=F64)
    assert (found - want).abs().max() < 1e-8
