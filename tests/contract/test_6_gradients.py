"""Contract, 6: gradients are right, or refused.

gradcheck and gradgradcheck in float64, forward mode, ``torch.func``, several forwards before one
backward, ``retain_graph`` and closures over tensors all work or raise. The adjoint's tolerance is
relative to the incoming gradient of each sample, so that the loss scale changes nothing. Failed
adjoint solves are reported.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_layers import (
    F64,
    TIGHT,
    B,
    D,
    Problem,
    closed_form,
    linear_layer,
    tanh_layer,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fpi_cuda as fpi

SOLVERS = {
    "picard": fpi.Picard(),
    "damped": fpi.Picard(damping=0.7),
    "anderson": fpi.Anderson(m=3),
    "broyden": fpi.Broyden(),
}
EXACT = {
    "implicit": fpi.Implicit(),
    "implicit-picard": fpi.Implicit(solver=fpi.Picard()),
    "implicit-damped": fpi.Implicit(solver=fpi.Picard(damping=0.7)),
    "implicit-anderson": fpi.Implicit(solver=fpi.Anderson(m=4, ridge=0.0)),
    "implicit-broyden": fpi.Implicit(solver=fpi.Broyden()),
    "implicit-gmres": fpi.Implicit(solver=fpi.GMRES()),
    "implicit-cg": fpi.Implicit(solver=fpi.ConjugateGradient()),
    "neumann": fpi.Neumann(k=30),
    "phantom": fpi.Phantom(k=30),
    "phantom-damped": fpi.Phantom(k=40, tau=0.8),
    "unroll": fpi.Unroll(),
}
APPROXIMATE = {
    "jacobian-free": fpi.JacobianFree(),
    "neumann-1": fpi.Neumann(k=1),
    "phantom-2": fpi.Phantom(k=2),
}


def table(*columns: dict[str, Any]) -> list[Any]:
    """One case per combination, named by its parts."""
    return [
        pytest.param(*(value for _, value in cells), id="-".join(name for name, _ in cells))
        for cells in itertools.product(*(column.items() for column in columns))
    ]


ANDERSON = {"anderson": SOLVERS["anderson"]}
# At a fixed point it is all one how it was found, but to an adjoint that goes the way again.
PAIRS = table(ANDERSON, EXACT) + table(
    {name: solver for name, solver in SOLVERS.items() if name != "anderson"},
    {name: EXACT[name] for name in ("implicit", "neumann", "unroll")},
)
# Series take products with g alone.
SOLVED = {name: adjoint for name, adjoint in EXACT.items() if name[:8] in ("implicit", "unroll")}
SOLVERS_OF_A_BACKEND = {name: SOLVERS[name] for name in ("picard", "anderson", "broyden")}


@pytest.mark.parametrize(("solver", "adjoint"), PAIRS)
def test_gradcheck_of_every_pair(solver: Any, adjoint: Any, weights: Any) -> None:
    layer = tanh_layer(solver=solver, adjoint=adjoint)
    # What batches gradients here is the older vmap of torch, without a rule for unrolled solves.
    batched = not isinstance(adjoint, fpi.Unroll)
    assert gradcheck(
        layer, weights, check_forward_ad=True, check_batched_grad=batched, fast_mode=True
    )
    assert gradgradcheck(layer, weights, check_fwd_over_rev=batched, fast_mode=True)


@pytest.mark.parametrize(("solver", "adjoint"), table(SOLVERS_OF_A_BACKEND, SOLVED))
def test_both_backends_give_the_same_derivatives(solver: Any, adjoint: Any, weights: Any) -> None:
    def derivatives(backend: str) -> list[Tensor]:
        x = tanh_layer(solver=solver, adjoint=adjoint, backend=backend)(*weights)
        first = torch.autograd.grad((x**3).sum(), weights, create_graph=True)
        second = torch.autograd.grad(sum(grad.sin().sum() for grad in first), weights)
        return [x, *first, *second]

    torch.testing.assert_close(
        derivatives("reference"), derivatives("native"), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize(("solver", "adjoint"), table(ANDERSON, APPROXIMATE))
def test_an_approximate_adjoint_is_exact_where_g_does_not_depend_on_x(
    solver: Any, adjoint: Any, weights: Any
) -> None:
    z, _, c = weights

    def layer(z: Tensor, c: Tensor) -> Tensor:
        return fpi.fixed_point(
            lambda x, z: torch.tanh(z @ c.T) + 0 * x,
            torch.zeros(B, D, dtype=F64),
            z,
            solver=solver,
            adjoint=adjoint,
            **TIGHT,
        ).value

    assert gradcheck(layer, (z, c), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(layer, (z, c), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize(("solver", "adjoint"), table(ANDERSON, EXACT | APPROXIMATE))
def test_the_loss_scale_changes_nothing(
    solver: Any, adjoint: Any, dtype: torch.dtype, weights: Any
) -> None:
    z, a, c = (w.detach().to(dtype) for w in weights)

    def gradients(scale: float) -> list[Tensor]:
        leaves = [w.clone().requires_grad_() for w in (z, a, c)]

        def g(x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(x @ leaves[1].T + z @ leaves[2].T)

        x = fpi.fixed_point(
            g, torch.zeros(B, D, dtype=dtype), leaves[0], solver=solver, adjoint=adjoint
        ).value
        grads = torch.autograd.grad(scale * (x**2).sum(), leaves)
        return [grad / scale for grad in grads]

    expected = gradients(1.0)
    for scale in (1e-6, 65536.0):
        for grad, oracle in zip(gradients(scale), expected, strict=True):
            error = torch.linalg.vector_norm(grad - oracle)
            assert error <= 1e-5 * torch.linalg.vector_norm(oracle)


def test_several_forwards_before_one_backward(weights: Any) -> None:
    z, a, c = weights
    total = sum((linear_layer(z * s, a, c) ** 2).sum() for s in (1.0, 0.5, 2.0))
    oracle = sum((closed_form(z * s, a, c) ** 2).sum() for s in (1.0, 0.5, 2.0))
    for grad, expected in zip(
        torch.autograd.grad(total, weights), torch.autograd.grad(oracle, weights), strict=True
    ):
        torch.testing.assert_close(grad, expected)


def test_backward_twice_with_retain_graph_and_not_without(weights: Any) -> None:
    z, a, c = weights
    loss = (linear_layer(z, a, c) ** 2).sum()
    loss.backward(retain_graph=True)
    once = a.grad.clone()
    loss.backward()
    torch.testing.assert_close(a.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# --- where and how derivatives are asked for ---------------------------------------------------


class Cell(nn.Module):
    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a.detach().clone())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ self.a.T + z)

    def method(self, x: Tensor, z: Tensor) -> Tensor:
        return self(x, z)


def with_keyword(x: Tensor, z: Tensor, *, a: Tensor) -> Tensor:
    return torch.tanh(x @ a.T + z)


def closures(a: Tensor, z: Tensor) -> dict[str, tuple[Any, Tensor]]:
    """The same g in every form, and the tensor that its derivative is asked for."""
    cell = Cell(a)
    doubled = a * 2
    holder = {"a": [a]}
    return {
        "tensor": (lambda x, z: torch.tanh(x @ a.T + z), a),
        "non-leaf": (lambda x, z: torch.tanh(x @ doubled.T / 2 + z), a),
        "container": (lambda x, z: torch.tanh(x @ holder["a"][0].T + z), a),
        "partial": (functools.partial(with_keyword, a=a), a),
        "partial of a non-leaf": (functools.partial(with_keyword, a=doubled / 2), a),
        "module": (cell, cell.a),
        "module in a lambda": (lambda x, z: cell(x, z), cell.a),
        "bound method": (cell.method, cell.a),
        "partial of a method": (functools.partial(cell.method), cell.a),
        "forward": (cell.forward, cell.a),
        "z as well": (lambda x, _: torch.tanh(x @ a.T + z), a),
        "z in part": (lambda x, y: torch.tanh(x @ a.T + 0.5 * (y + z)), a),
    }


@pytest.mark.parametrize("form", closures(torch.zeros(1), torch.zeros(1)))
def test_whatever_g_closes_over_gets_its_derivatives(form: str, problem: Problem) -> None:
    z, a = problem
    closure, wanted = closures(a, z)[form]
    value = fpi.fixed_point(closure, torch.zeros_like(z), z, **TIGHT).value
    found = torch.autograd.grad((value**2).sum(), (z, wanted), create_graph=True)
    second = torch.autograd.grad((found[0] ** 2).sum() + (found[1] ** 2).sum(), (z, wanted))
    oracle = torch.autograd.grad((problem.looped() ** 2).sum(), (z, a), create_graph=True)
    expected = torch.autograd.grad((oracle[0] ** 2).sum() + (oracle[1] ** 2).sum(), (z, a))
    torch.testing.assert_close(found, oracle, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(second, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
@pytest.mark.parametrize("solver", [*SOLVERS.values(), fpi.GMRES(), fpi.ConjugateGradient()])
def test_an_adjoint_without_a_solution_is_reported(solver: Any) -> None:
    """Every x solves x = x + 0 z: the adjoint c = c + v has no solution."""
    z = torch.randn(3, 4, requires_grad=True)
    x0 = torch.randn(3, 4)
    sol = fpi.fixed_point(lambda x, z: x + 0.0 * z, x0, z, adjoint=fpi.Implicit(solver=solver))
    assert sol.converged.all()
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    stats = sol.adjoint_stats
    assert stats is not None
    assert not stats.converged.any()
    assert torch.isfinite(found).all()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, z: torch.func.grad(lambda z: f(z).square().sum())(z),
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (z.cos(),))[1],
    "vmap": lambda f, z: torch.func.vmap(f)(torch.stack([z, 2 * z])),
    "vmap of grad": lambda f, z: torch.func.vmap(
        torch.func.grad(lambda row: f(row[None]).square().sum())
    )(z),
}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_inside_of_torch_func_it_is_the_loop(name: str, backend: str, problem: Problem) -> None:
    z, a = (t.detach() for t in problem)

    def solve(z: Tensor) -> Tensor:
        return fpi.fixed_point(
            lambda x, z: torch.tanh(x @ a.T + z), torch.zeros_like(z), z, backend=backend, **TIGHT
        ).value

    found = TRANSFORMS[name](solve, z)
    expected = TRANSFORMS[name](lambda z: Problem(z, a).looped(), z)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
