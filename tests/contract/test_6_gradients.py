"""Contract, 6: gradients are right, or refused.

gradcheck and gradgradcheck in float64, forward mode, ``torch.func``, several forwards before one
backward, ``retain_graph`` and closures over tensors all work or raise. The adjoint's tolerance is
relative to the incoming gradient of each sample, so that the loss scale changes nothing. Failed
adjoint solves are reported.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from small_layers import F64, TIGHT, B, D, closed_form, linear_layer, tanh_layer
from torch import Tensor
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
