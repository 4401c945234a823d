"""Adjoints that are cut short by choice: the series that they say, and unrolling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_layers import F64, TIGHT, B, D, linear_layer
from torch import Tensor

import fpi_cuda as fpi


@pytest.mark.parametrize("k", [0, 1, 3])
def test_truncated_adjoints_are_the_truncated_series(k: int, weights: Any) -> None:
    z, a, c = weights
    v = torch.randn(B, D, dtype=F64)
    series = sum((v @ torch.matrix_power(a, i) for i in range(k + 1)), torch.zeros_like(v))
    expected = (series @ c).detach()
    choices = [fpi.Neumann(k=k), fpi.Phantom(k=k + 1)]
    if k == 0:
        choices.append(fpi.JacobianFree())
    for adjoint in choices:
        x = linear_layer(z, a, c, adjoint=adjoint)
        (grad,) = torch.autograd.grad(x, z, v)
        torch.testing.assert_close(grad, expected)


def test_damped_phantom_is_its_own_series(weights: Any) -> None:
    z, a, c = weights
    v, tau, k = torch.randn(B, D, dtype=F64), 0.3, 4
    damped = (1 - tau) * torch.eye(D, dtype=F64) + tau * a
    series = sum((v @ torch.matrix_power(damped, i) for i in range(k)), torch.zeros_like(v))
    x = linear_layer(z, a, c, adjoint=fpi.Phantom(k=k, tau=tau))
    (grad,) = torch.autograd.grad(x, z, v)
    torch.testing.assert_close(grad, (tau * series @ c).detach())


def test_a_phantom_value_is_the_fixed_point_itself(weights: Any) -> None:
    z, a, c = weights
    loose: dict[str, Any] = {"rtol": 1e-2, "solver": fpi.Picard()}
    exact = linear_layer(z, a, c, **loose)
    assert torch.equal(linear_layer(z, a, c, adjoint=fpi.Phantom(k=3), **loose), exact)


def test_no_gradient_to_x0_but_through_unroll(weights: Any) -> None:
    z, a, c = weights
    x0 = torch.ones(B, D, dtype=F64, requires_grad=True)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ a.T + z @ c.T)

    loss = fpi.fixed_point(g, x0, z, **TIGHT).value.sum()
    assert torch.autograd.grad(loss, x0, allow_unused=True) == (None,)
    few: dict[str, Any] = {"rtol": 0.0, "max_steps": 3, "solver": fpi.Picard()}
    unrolled = fpi.fixed_point(g, x0, z, adjoint=fpi.Unroll(), **few)
    x = x0
    for _ in range(2):  # the third evaluation is for the residual
        x = g(x, z)
    torch.testing.assert_close(unrolled.value, x)
    for grad, expected in zip(
        torch.autograd.grad(unrolled.value.sum(), (x0, a)),
        torch.autograd.grad(x.sum(), (x0, a)),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected)
