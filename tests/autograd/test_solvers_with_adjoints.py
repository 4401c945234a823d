"""Every forward solver with every adjoint: first and second derivatives, and the loss scale.

JacobianFree is exact only where g does not depend on x, and Neumann(k) and Phantom(k) only up to
what k terms leave out; here the Jacobian's norm is 0.5, so that 50 terms are exact to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fpi_cuda as fpi

F64 = torch.float64
B, D, K = 2, 3, 2
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 500}

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
    "neumann": fpi.Neumann(k=50),
    "phantom": fpi.Phantom(k=50),
    "phantom-damped": fpi.Phantom(k=60, tau=0.8),
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


@pytest.fixture
def weights() -> tuple[Tensor, Tensor, Tensor]:
    """z, A (norm 0.5) and C, leaves that require grad."""
    a = torch.randn(D, D, dtype=F64)
    a = 0.5 * a / torch.linalg.matrix_norm(a, 2)
    z, c = torch.randn(B, K, dtype=F64), torch.randn(D, K, dtype=F64)
    return z.requires_grad_(), a.requires_grad_(), c.requires_grad_()


def tanh_layer(**options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """x* of tanh(A x + C z), A and C closed over."""

    def solve(z: Tensor, a: Tensor, c: Tensor) -> Tensor:
        def g(x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(x @ a.T + z @ c.T)

        return fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), z, **(TIGHT | options)).value

    return solve


@pytest.mark.parametrize(("solver", "adjoint"), table(SOLVERS, EXACT))
def test_gradcheck_of_every_pair(solver: Any, adjoint: Any, weights: Any) -> None:
    layer = tanh_layer(solver=solver, adjoint=adjoint)
    assert gradcheck(layer, weights, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(layer, weights, fast_mode=True)


@pytest.mark.parametrize(("solver", "adjoint"), table(SOLVERS, EXACT | APPROXIMATE))
def test_both_backends_give_the_same_derivatives(solver: Any, adjoint: Any, weights: Any) -> None:
    def derivatives(backend: str) -> list[Tensor]:
        x = tanh_layer(solver=solver, adjoint=adjoint, backend=backend)(*weights)
        first = torch.autograd.grad((x**3).sum(), weights, create_graph=True)
        second = torch.autograd.grad(sum(grad.sin().sum() for grad in first), weights)
        return [x, *first, *second]

    torch.testing.assert_close(
        derivatives("reference"), derivatives("native"), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize(("solver", "adjoint"), table(SOLVERS, APPROXIMATE))
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
@pytest.mark.parametrize(("solver", "adjoint"), table(SOLVERS, EXACT | APPROXIMATE))
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
