"""The adjoint solve itself: its account, its scale, and samples without a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_layers import F64, TIGHT, B, D, closed_form, linear_layer
from torch import Tensor

import fpi_cuda as fpi


def test_a_power_of_two_in_the_loss_changes_no_digit(weights: Any) -> None:
    z, a, c = weights
    x = linear_layer(z, a, c, rtol=1e-3)
    (plain,) = torch.autograd.grad(x.sum(), a, retain_graph=True)
    (scaled,) = torch.autograd.grad(2.0**40 * x.sum(), a)
    assert torch.equal(scaled, plain * 2.0**40)


@pytest.mark.parametrize("magnitude", [1e-42, 1e-20, 1e30])
def test_gradients_near_the_ends_of_float32(magnitude: float) -> None:
    z = torch.ones(2, 3, requires_grad=True)
    x = fpi.fixed_point(lambda x, z: 0.5 * x + z, torch.zeros(2, 3), z, rtol=1e-6).value
    (grad,) = torch.autograd.grad(x, z, torch.full_like(x, magnitude))
    torch.testing.assert_close(grad, torch.full_like(x, 2 * magnitude), rtol=1e-3, atol=3e-45)


def test_adjoint_stats_are_true_and_relative_to_each_sample(weights: Any) -> None:
    _, a, _ = weights
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    v = torch.randn(B, D, dtype=F64) * torch.tensor([[1e-8], [1.0], [1e8]], dtype=F64)
    sol = fpi.fixed_point(
        lambda x, z: x @ a.T + z,
        torch.zeros(B, D, dtype=F64),
        z,
        adjoint=fpi.Implicit(rtol=1e-3, solver=fpi.Picard()),
    )
    assert sol.adjoint_stats is None
    (c,) = torch.autograd.grad(sol.value, z, v)
    stats = sol.adjoint_stats
    assert stats is not None
    assert stats.converged.all()
    assert stats.num_zeroed == 0
    assert stats.num_steps.shape == stats.status.shape == (B,)
    residual = torch.linalg.vector_norm(c @ a.detach() + v - c, dim=1)
    torch.testing.assert_close(stats.residual, residual)
    assert (stats.residual <= 1e-3 * torch.linalg.vector_norm(v, dim=1)).all()
    assert (stats.residual > 0).all()


def test_a_sample_without_a_gradient_costs_no_accuracy(weights: Any) -> None:
    z, a, c = weights
    x = linear_layer(z, a, c)
    v = torch.zeros_like(x)
    v[1] = 1.0
    (grad,) = torch.autograd.grad(x, z, v)
    (expected,) = torch.autograd.grad(closed_form(z, a, c), z, v)
    torch.testing.assert_close(grad, expected)
    assert (grad[[0, 2]] == 0).all()


def test_samples_that_g_couples_share_their_adjoint(weights: Any) -> None:
    """The batch is centred inside g: even samples with v = 0 have c != 0."""
    z, a, c = weights

    def g(x: Tensor, z: Tensor) -> Tensor:
        x = x @ a.T
        return x - x.mean(0) + z @ c.T

    x = fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), z, solver=fpi.Picard(), **TIGHT).value
    centre = torch.eye(B, dtype=F64) - 1 / B
    operator = torch.eye(B * D, dtype=F64) - torch.kron(centre, a)
    expected = (torch.linalg.inv(operator) @ (z @ c.T).flatten()).reshape(B, D)
    v = torch.zeros_like(x)
    v[0] = 1.0
    (grad,) = torch.autograd.grad(x, z, v)
    (oracle,) = torch.autograd.grad(expected, z, v)
    torch.testing.assert_close(grad, oracle, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e-300])
def test_states_whose_squares_vanish(scale: float) -> None:
    a = torch.randn(4, 4, dtype=torch.float64)
    a *= 0.5 / torch.linalg.matrix_norm(a, 2)
    z = (scale * torch.randn(3, 4, dtype=torch.float64)).requires_grad_()
    solution = fpi.fixed_point(lambda x, z: x @ a.T + z, torch.zeros_like(z), z, rtol=1e-10)
    assert bool(solution.converged.all())
    v = torch.randn_like(z)
    (grad,) = torch.autograd.grad((solution.value * v).sum(), z)
    expected = torch.linalg.solve((torch.eye(4, dtype=torch.float64) - a).T, v.T).T
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8)
