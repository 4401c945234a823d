"""First and higher derivatives, against finite differences and against closed forms."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_layers import F64, TIGHT, B, D, Detached, K, Sine, closed_form, derivatives, linear_layer
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fpi_cuda as fpi


@pytest.mark.parametrize(
    "adjoint", [fpi.Implicit(), fpi.Implicit(solver=fpi.GMRES()), fpi.Unroll()], ids=str
)
def test_three_orders_against_the_closed_form(adjoint: Any, weights: Any) -> None:
    found = derivatives(lambda *w: linear_layer(*w, adjoint=adjoint), weights, 3)
    expected = derivatives(closed_form, weights, 3)
    for grad, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, oracle, rtol=1e-6, atol=1e-6 * float(oracle.abs().max()))


def tangent_of(f: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """The tangent of f along cos of the inputs."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.detach().cos()) for t in inputs]
        tangent = forward_ad.unpack_dual(f(*duals)).tangent
    assert tangent is not None
    return tangent


def test_forward_mode_and_its_gradient_against_the_closed_form(weights: Any) -> None:
    found, expected = tangent_of(linear_layer, weights), tangent_of(closed_form, weights)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad((found**3).sum(), weights)
    oracles = torch.autograd.grad((expected**3).sum(), weights)
    for grad, oracle in zip(grads, oracles, strict=True):
        torch.testing.assert_close(grad, oracle, rtol=1e-7, atol=1e-7)


def test_forward_mode_under_no_grad(weights: Any) -> None:
    with torch.no_grad():
        found, expected = tangent_of(linear_layer, weights), tangent_of(closed_form, weights)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_tangent_of_a_gradient(weights: Any) -> None:
    def gradient(f: Callable[..., Tensor], create_graph: bool) -> Callable[..., Tensor]:
        def grad_of(*w: Tensor) -> Tensor:
            grads = torch.autograd.grad((f(*w) ** 3).sum(), w, create_graph=create_graph)
            return torch.cat([grad.flatten() for grad in grads])

        return grad_of

    expected = tangent_of(gradient(closed_form, True), weights)
    for create_graph in (False, True):
        found = tangent_of(gradient(linear_layer, create_graph), weights)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_tangent_of_a_gradient_in_what_has_no_gradient_itself(
    create_graph: bool, weights: Any
) -> None:
    """Only z has a tangent, and only A a gradient."""
    z, a, _ = weights
    z = torch.randn(B, D, dtype=F64)

    def tangent(closed_over: bool, loop: bool) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(z, z.cos())
            given = torch.zeros_like(z) if closed_over else dual

            def g(x: Tensor, z: Tensor) -> Tensor:
                return torch.tanh(x @ a.T + (z + dual if closed_over else z))

            x = torch.zeros(B, D, dtype=F64)
            if loop:
                for _ in range(80):
                    x = g(x, given)
            else:
                x = fpi.fixed_point(g, x, given, **TIGHT).value
            (grad,) = torch.autograd.grad((x**3).sum(), a, create_graph=create_graph)
            found = forward_ad.unpack_dual(grad).tangent
            assert found is not None
            return found

    torch.testing.assert_close(tangent(False, False), tangent(False, True), rtol=1e-7, atol=1e-9)
    with pytest.raises(RuntimeError, match="pass them to g as z"):
        tangent(True, False)


def test_a_layer_on_top_of_a_layer(weights: Any) -> None:
    _z, _a, _c = weights

    def deep(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda z, a, c: layer(layer(z, a, c)[:, :K] * 0.5, a, c)

    for grad, oracle in zip(
        derivatives(deep(linear_layer), weights, 2),
        derivatives(deep(closed_form), weights, 2),
        strict=True,
    ):
        torch.testing.assert_close(grad, oracle, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("sine", [Sine, Detached])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_backward_without_a_derivative_is_refused_where_one_is_needed(
    share: float, sine: Any
) -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * (share * sine.apply(x) + (1 - share) * torch.sin(x)) + z

    def layer(z: Tensor, **options: Any) -> Tensor:
        return fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), z, **(TIGHT | options)).value

    for solver in (None, fpi.Picard(), fpi.Broyden(), fpi.GMRES()):
        x = layer(z, adjoint=fpi.Implicit(solver=solver))
        (found,) = torch.autograd.grad(x.sum(), z)
        torch.testing.assert_close(found, 1 / (1 - 0.5 * x.detach().cos()))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(layer(z, adjoint=fpi.Implicit(fpi.ConjugateGradient())).sum(), z)
    if sine is Sine:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(layer(z).sum(), z, create_graph=True)


def test_nothing_is_attached_where_nothing_is_asked_for(weights: Any) -> None:
    z, a, c = weights
    calls = []

    def g(x: Tensor, z: Tensor) -> Tensor:
        calls.append(1)
        return x @ a.T + z @ c.T

    x0 = torch.zeros(B, D, dtype=F64)
    fpi.fixed_point(g, x0, z.detach(), **TIGHT)  # the first solve of a map probes it
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            calls.clear()
            sol = fpi.fixed_point(g, x0, z.detach(), **TIGHT)
        assert not sol.value.requires_grad
        assert len(calls) == int(sol.num_steps.max())
    a.requires_grad_(False)
    c.requires_grad_(False)
    assert not fpi.fixed_point(g, x0, z.detach(), **TIGHT).value.requires_grad


def test_a_tuple_state(weights: Any) -> None:
    _z, _a, _c = weights

    def layer(z: Tensor, a: Tensor, c: Tensor) -> Tensor:
        def g(state: tuple[Tensor, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
            x, y = state
            return torch.tanh(0.5 * y[:, 0] @ a.T + z @ c.T), 0.5 * (x @ a.T)[:, None] + 0.1

        x0 = (torch.zeros(B, D, dtype=F64), torch.zeros(B, 1, D, dtype=F64))
        x, y = fpi.fixed_point(g, x0, z, **TIGHT).value
        return x + y[:, 0]

    assert gradcheck(layer, weights, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(layer, weights, fast_mode=True)


def test_gradient_descent_cells_have_all_derivatives() -> None:
    cell = fpi.cells.GradientDescent(fpi.cells.MLPEnergy(K, D, 5, dtype=F64), 0.3)
    z = torch.randn(B, K, dtype=F64, requires_grad=True)

    def layer(z: Tensor, *_: Tensor) -> Tensor:
        return fpi.fixed_point(cell, torch.zeros(B, D, dtype=F64), z, **TIGHT).value

    inputs = (z, *cell.parameters())
    assert gradcheck(layer, inputs, fast_mode=True)
    assert gradgradcheck(layer, inputs, fast_mode=True)


def test_activation_checkpointing_around_a_layer(weights: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    z, a, c = weights
    calls = []

    def g(x: Tensor, z: Tensor) -> Tensor:
        calls.append(1)
        return torch.tanh(x @ a.T + z @ c.T)

    def block(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), z, **TIGHT).value.sin()

    expected = torch.autograd.grad(block(z).sum(), (z, a))
    num_steps = len(calls)
    for use_reentrant in (False, True):
        loss = checkpoint(block, z, use_reentrant=use_reentrant).sum()
        calls.clear()
        z.grad = a.grad = None
        loss.backward()
        # One more solve, not one for every adjoint step.
        assert len(calls) <= 1.2 * num_steps
        torch.testing.assert_close((z.grad, a.grad), expected)


def test_backward_on_another_thread(weights: Any) -> None:
    z, a, c = weights
    loss = (linear_layer(z, a, c) ** 2).sum()
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.autograd.grad(loss, a)[0]))
    thread.start()
    thread.join()
    (expected,) = torch.autograd.grad((closed_form(z, a, c) ** 2).sum(), a)
    torch.testing.assert_close(found[0], expected)


def test_the_graph_is_freed_with_the_value(weights: Any) -> None:
    z, a, c = weights
    held: list[Any] = []

    def g(x: Tensor, z: Tensor) -> Tensor:
        gx = torch.tanh(x @ a.T + z @ c.T)
        held.append(weakref.ref(gx))
        return gx

    x = fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), z, **TIGHT).value
    grads = torch.autograd.grad((x**2).sum(), (z, a), create_graph=True)
    del x, grads
    assert all(ref() is None for ref in held)


def test_stacked_modules_train() -> None:
    model = nn.Sequential(
        nn.Linear(K, K), fpi.FPILayer(fpi.cells.Dense(K, D)), nn.ReLU(inplace=True), nn.Linear(D, 1)
    )
    z = torch.randn(32, K)
    target = z.sum(1, keepdim=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(z), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
