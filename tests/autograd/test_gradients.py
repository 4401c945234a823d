"""First and higher derivatives, against finite differences and against closed forms."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fpi_cuda as fpi

F64 = torch.float64
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 500}
B, D, K = 3, 4, 2

EXACT = [
    fpi.Implicit(),
    fpi.Implicit(solver=fpi.Picard()),
    fpi.Implicit(solver=fpi.Anderson(m=4, ridge=0.0)),
    fpi.Implicit(solver=fpi.Broyden()),
    fpi.Implicit(solver=fpi.GMRES()),
    fpi.Implicit(solver=fpi.ConjugateGradient()),
]
# The spectral radius of the problem below is 0.5, so that these are exact to 1e-15.
CONVERGED_SERIES = [fpi.Neumann(k=50), fpi.Phantom(k=50), fpi.Phantom(k=50, tau=0.9)]


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


def linear_layer(z: Tensor, a: Tensor, c: Tensor, **options: Any) -> Tensor:
    """x* of A x + C z."""

    def g(x: Tensor, z: Tensor) -> Tensor:
        return x @ a.T + z @ c.T

    return fpi.fixed_point(g, torch.zeros(len(z), D, dtype=F64), z, **(TIGHT | options)).value


def closed_form(z: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """(I - A)^-1 C z. An explicit inverse: torch.linalg.solve loses derivatives of tangents."""
    return z @ c.T @ torch.linalg.inv(torch.eye(D, dtype=F64) - a).T


def derivatives(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], order: int) -> list[Tensor]:
    """The gradients of orders 1 to `order`, each of a nonlinear scalar of the one before."""
    scalar = (f(*inputs) ** 3).sum()
    found: list[Tensor] = []
    for _ in range(order):
        grads = torch.autograd.grad(scalar, inputs, create_graph=True)
        found += [grad.detach() for grad in grads]
        scalar = sum((grad.sin().sum() for grad in grads), torch.zeros((), dtype=F64))
    return found


@pytest.mark.parametrize("adjoint", EXACT + CONVERGED_SERIES, ids=str)
def test_gradcheck_of_every_adjoint(adjoint: Any, weights: Any) -> None:
    layer = tanh_layer(adjoint=adjoint)
    assert gradcheck(layer, weights, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(layer, weights, check_fwd_over_rev=True, fast_mode=True)


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


def test_a_layer_inside_of_a_layer(weights: Any) -> None:
    """The inner g sees the outer x as an input; its fixed point is linear in it."""
    _z, _a, _c = weights

    def nested(z: Tensor, a: Tensor, c: Tensor) -> Tensor:
        def outer(x: Tensor, z: Tensor) -> Tensor:
            def inner(y: Tensor, x: Tensor, z: Tensor) -> Tensor:
                return 0.5 * y @ a.T + 0.2 * x + z @ c.T

            return torch.tanh(fpi.fixed_point(inner, torch.zeros_like(x), x, z, **TIGHT).value)

        return fpi.fixed_point(outer, torch.zeros(B, D, dtype=F64), z, **TIGHT).value

    assert gradcheck(nested, weights, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(nested, weights, fast_mode=True)


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


def test_closing_over_a_non_leaf(weights: Any) -> None:
    z, a, c = weights

    def layer(raw: Tensor) -> Tensor:
        weight = (raw * 2).sin() / 4
        return tanh_layer()(z, weight, c)

    assert gradcheck(layer, (a,))
    assert gradgradcheck(layer, (a,))


def test_the_gradient_of_a_captured_non_leaf_itself(weights: Any) -> None:
    z, a, c = weights

    def second(weight: Tensor) -> Tensor:
        x = tanh_layer()(z, weight, c)
        (grad,) = torch.autograd.grad((x**2).sum(), weight, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), weight)[0]

    leaf = (a.detach() * 2).sin().div(4).requires_grad_()
    torch.testing.assert_close(second((a * 2).sin() / 4), second(leaf))


class Hidden(torch.autograd.Function):
    """x W^T, with W reaching autograd without a torch function that could be watched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return v @ w, v.T @ x


def test_a_non_leaf_that_cannot_be_found_is_refused_in_second_order_only(weights: Any) -> None:
    z, a, c = weights
    weight = a * 1.0
    x = fpi.fixed_point(
        lambda x, z: Hidden.apply(x, weight) + z @ c.T, torch.zeros(B, D, dtype=F64), z, **TIGHT
    ).value
    expected = closed_form(z, a, c)
    (grad,) = torch.autograd.grad((x**2).sum(), a, retain_graph=True)
    (oracle,) = torch.autograd.grad((expected**2).sum(), a, retain_graph=True)
    torch.testing.assert_close(grad, oracle)
    with pytest.raises(RuntimeError, match=r"Pass .* as z"):
        torch.autograd.grad((x**2).sum(), a, create_graph=True)


class Sine(torch.autograd.Function):
    """sin, with a backward that autograd may or may not follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return v * ctx.saved_tensors[0].cos()


class Detached(Sine):
    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return v.detach() * ctx.saved_tensors[0].detach().cos()


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


def test_parameters_shared_between_g_and_z(weights: Any) -> None:
    """z is computed from the weight that g closes over: no path may count twice."""
    _, a, _ = weights
    z = a.sum(0, keepdim=True).expand(B, D) * 0.3

    def layer(f: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        (grad,) = torch.autograd.grad((f(z, a) ** 2).sum(), a, create_graph=True)
        return grad, torch.autograd.grad((grad**2).sum(), a, retain_graph=True)[0]

    found = layer(
        lambda z, a: (
            fpi.fixed_point(
                lambda x, z: x @ a.T + z, torch.zeros(B, D, dtype=F64), z, **TIGHT
            ).value
        )
    )
    expected = layer(lambda z, a: z @ torch.linalg.inv(torch.eye(D, dtype=F64) - a).T)
    for grad, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, oracle, rtol=1e-7, atol=1e-9)


def test_a_tensor_hook_on_a_parameter_runs_once(weights: Any) -> None:
    z, a, c = weights
    plain = derivatives(linear_layer, weights, 1)
    seen = []
    handle = a.register_hook(lambda grad: seen.append(1) or grad * 2)
    grads = torch.autograd.grad((linear_layer(z, a, c) ** 3).sum(), (z, a, c), create_graph=True)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(grads[1].detach(), 2 * plain[1])


def test_module_parameters_and_a_frozen_one() -> None:
    cell = fpi.cells.Dense(K, D, dtype=F64)
    cell.B.bias.requires_grad_(False)
    z = torch.randn(B, K, dtype=F64)
    x = fpi.fixed_point(cell, torch.zeros(B, D, dtype=F64), z, **TIGHT).value
    x.sum().backward()
    assert cell.B.bias.grad is None
    assert cell.A.weight.grad.abs().max() > 0


def test_hypergradient_through_functional_call() -> None:
    """Second order where the module holds other parameters again by the time of backward."""
    cell = fpi.cells.Dense(K, D, dtype=F64)
    layer = fpi.FPILayer(cell, **TIGHT)
    z = torch.randn(B, K, dtype=F64)
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone() for p in layer.parameters()]

    def solve(*values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (z,))

    inputs = tuple(v.requires_grad_() for v in values)
    assert gradcheck(solve, inputs, fast_mode=True)
    assert gradgradcheck(solve, inputs, fast_mode=True)
    fast = [v * 0.9 for v in values]  # as after an inner step of MAML
    (grad,) = torch.autograd.grad((solve(*fast) ** 2).sum(), fast[0], create_graph=True)
    assert torch.autograd.grad(grad.sum(), inputs[0])[0].abs().max() > 0


def test_a_g_that_has_changed_by_backward_is_refused(weights: Any) -> None:
    z, a, c = weights
    gain = [1.0]
    x = fpi.fixed_point(
        lambda x, z: gain[0] * (x @ a.T) + z @ c.T, torch.zeros(B, D, dtype=F64), z, **TIGHT
    ).value
    gain[0] = 0.5
    (grad,) = torch.autograd.grad((x**2).sum(), a, retain_graph=True)
    (oracle,) = torch.autograd.grad((closed_form(z, a, c) ** 2).sum(), a)
    torch.testing.assert_close(grad, oracle)
    with pytest.raises(RuntimeError, match="another value"):
        torch.autograd.grad((x**2).sum(), a, create_graph=True)


def test_a_g_that_depends_on_other_tensors_by_backward_is_refused(weights: Any) -> None:
    z, a, c = weights
    frozen = a.detach().clone()
    chosen = [a]
    x = fpi.fixed_point(
        lambda x, z: x @ chosen[0].T + z @ c.T, torch.zeros(B, D, dtype=F64), z, **TIGHT
    ).value
    chosen[0] = frozen
    with pytest.raises(RuntimeError, match="other tensors"):
        torch.autograd.grad((x**2).sum(), a, create_graph=True)


def test_an_optimizer_step_before_backward_is_noticed() -> None:
    cell = fpi.cells.Dense(K, D)
    x = fpi.fixed_point(cell, torch.zeros(B, D), torch.randn(B, K)).value
    with torch.no_grad():
        cell.A.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_an_in_place_op_on_the_value_does_no_harm(weights: Any) -> None:
    z, a, c = weights
    x = torch.relu_(linear_layer(z, a, c))
    (grad,) = torch.autograd.grad(x.sum(), z)
    (expected,) = torch.autograd.grad(torch.relu(closed_form(z, a, c)).sum(), z)
    torch.testing.assert_close(grad, expected)


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
