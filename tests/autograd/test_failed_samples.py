"""Samples whose solve or adjoint solve fails: they give no gradient, and take none away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fpi_cuda as fpi

F64 = torch.float64
B, D = 5, 4
BAD = 2
OTHERS = [0, 1, 3, 4]
TIGHT: dict[str, Any] = {"rtol": 1e-10, "max_steps": 300}
ADJOINTS = [
    fpi.Implicit(),
    fpi.Implicit(solver=fpi.Picard()),
    fpi.Implicit(solver=fpi.GMRES()),
    fpi.JacobianFree(),
    fpi.Neumann(k=20),
    fpi.Phantom(k=3),
    fpi.Unroll(),
]
WARNING = "contribute no gradient"


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    """z and A, leaves that require grad."""
    a = torch.randn(D, D, dtype=F64)
    a = 0.5 * a / torch.linalg.matrix_norm(a, 2)
    return torch.randn(B, D, dtype=F64).requires_grad_(), a.requires_grad_()


def with_nan_in_z(z: Tensor) -> Tensor:
    z = z.detach().clone()
    z[BAD, 0] = torch.nan
    return z.requires_grad_()


def tanh_map(a: Tensor) -> Any:
    return lambda x, z: torch.tanh(x @ a.T + z)


def gradients_without_the_bad_one(a: Tensor, z: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(gradient in z of the other samples, gradient in A) of their loss."""
    others = z.detach()[OTHERS].requires_grad_()
    x = fpi.fixed_point(tanh_map(a), torch.zeros_like(others), others, **options).value
    grads = torch.autograd.grad((x**2).sum(), (others, a))
    return grads[0], grads[1]


def test_rows_of_tiny_states_that_are_coupled_are_not_evaluated_elsewhere() -> None:
    """Whether that leaves the good ones alone is asked relative to them."""
    from fpi_cuda.evaluation.bound_map import BoundMap
    from fpi_cuda.evaluation.state import layout_of

    x = 1e-25 * torch.randn(B, D, dtype=F64)
    bad = torch.arange(B) == BAD
    for g, mends in ((lambda x: 0.5 * x, True), (lambda x: x - x.mean(0), False)):
        layout = layout_of(x)
        bound_map = BoundMap(g, layout, ())
        bound_map.evaluate(x, None)
        assert (bound_map.replace_failed_if_batchwise(x, bad) is not bound_map) == mends


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_a_sample_that_fails_forward(adjoint: Any, weights: Any) -> None:
    z, a = weights
    z = with_nan_in_z(z)
    options = TIGHT | {"adjoint": adjoint}
    sol = fpi.fixed_point(tanh_map(a), torch.zeros_like(z), z, **options)
    assert sol.status[BAD] == fpi.Status.NONFINITE
    assert sol.converged[OTHERS].all()
    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        grad_z, grad_a = torch.autograd.grad((sol.value**2).sum(), (z, a))
    expected_z, expected_a = gradients_without_the_bad_one(a, z, **options)
    assert (grad_z[BAD] == 0).all()
    torch.testing.assert_close(grad_z[OTHERS], expected_z)
    torch.testing.assert_close(grad_a, expected_a)
    assert sol.adjoint_stats.num_zeroed == 1
    assert sol.adjoint_stats.status[BAD] == fpi.Status.NONFINITE


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_all_samples_failing_give_zeros(adjoint: Any, weights: Any) -> None:
    z, a = weights
    z = (z.detach() * torch.nan).requires_grad_()
    scale = a * 1.0
    options = TIGHT | {"adjoint": adjoint}
    sol = fpi.fixed_point(tanh_map(scale), torch.zeros_like(z), z, **options)
    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        grads = torch.autograd.grad(sol.value.nan_to_num().sum(), (z, a))
    assert all((grad == 0).all() for grad in grads)
    assert sol.adjoint_stats.num_zeroed == B


def test_a_diverging_sample(weights: Any) -> None:
    _, a = weights
    growth = torch.full((B, 1), 0.5, dtype=F64)
    growth[BAD] = 3.0
    growth.requires_grad_()
    sol = fpi.fixed_point(
        lambda x, s: s * (x @ torch.linalg.qr(a)[0].T) + 1,
        torch.zeros(B, D, dtype=F64),
        growth,
        solver=fpi.Picard(),
        **TIGHT,
    )
    assert sol.status[BAD] == fpi.Status.DIVERGED
    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        grad_s, grad_a = torch.autograd.grad(sol.value.sum(), (growth, a))
    assert grad_s[BAD] == 0
    assert torch.isfinite(grad_a).all()
    assert (grad_s[OTHERS] != 0).all()


def slope(x: Tensor) -> Tensor:
    """0 at x = 1, where its derivative is Inf."""
    return torch.sqrt((x - 1).abs())


def test_a_sample_that_fails_in_the_adjoint_only(weights: Any) -> None:
    """Where z is 0 the fixed point is 1, and sqrt has no derivative there."""
    z, a = weights
    z = z.detach().abs() + 0.5
    z[BAD] = 0
    z.requires_grad_()
    x0 = torch.ones(B, D, dtype=F64)

    def layer(x0: Tensor, z: Tensor) -> fpi.Solution:
        def g(x: Tensor, z: Tensor) -> Tensor:
            return 1 + 0.1 * (1 + torch.tanh(a).mean()) * slope(x) + 0.3 * z

        return fpi.fixed_point(g, x0, z, **TIGHT)

    sol = layer(x0, z)
    assert sol.converged.all()
    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        grads = torch.autograd.grad((sol.value**2).sum(), (z, a), retain_graph=True)
    assert sol.adjoint_stats.num_zeroed == 1
    assert sol.adjoint_stats.status[BAD] == fpi.Status.NONFINITE
    others = z.detach()[OTHERS].requires_grad_()
    expected = torch.autograd.grad((layer(x0[OTHERS], others).value ** 2).sum(), (others, a))
    assert (grads[0][BAD] == 0).all()
    torch.testing.assert_close(grads[0][OTHERS], expected[0])
    torch.testing.assert_close(grads[1], expected[1])

    # One warning per solution is enough: here it would be an error.
    second = torch.autograd.grad((sol.value**2).sum(), (z, a), create_graph=True)
    torch.testing.assert_close([s.detach() for s in second], list(grads))
    hessian = torch.autograd.grad(second[1].sum() + second[0].sum(), (z, a))
    assert all(torch.isfinite(h).all() for h in hessian)


def test_second_derivatives_without_the_failed_sample(weights: Any) -> None:
    z, a = weights
    bad = with_nan_in_z(z)

    def second(z: Tensor) -> Tensor:
        x = fpi.fixed_point(tanh_map(a), torch.zeros_like(z), z, **TIGHT).value
        (grad,) = torch.autograd.grad((x**2).sum(), a, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), a)[0]

    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        found = second(bad)
    torch.testing.assert_close(found, second(z.detach()[OTHERS].requires_grad_()))


@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
@pytest.mark.parametrize("order", ["second", "third", "tangent", "tangent alone"])
def test_what_was_evaluated_at_failed_samples_too(
    order: str, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop whose result nobody waits for leaves them to whoever asks for more derivatives."""
    from fpi_cuda.loops import host

    z, a = weights

    def g(x: Tensor, z: Tensor, a: Tensor) -> Tensor:
        return torch.tanh(x @ a.T + z) + 0.1 * torch.sqrt(4 - z[:, :1])

    def solved(z: Tensor, a: Tensor) -> Tensor:
        return fpi.fixed_point(g, torch.zeros_like(z), z, a, **TIGHT).value

    def found() -> tuple[Tensor, ...]:
        there = z.detach().clamp(max=1.0).index_fill(0, torch.tensor(BAD), 50.0).requires_grad_()
        if order.startswith("tangent"):
            alone = order.endswith("alone")
            with forward_ad.dual_level(), torch.set_grad_enabled(not alone):
                pair = [forward_ad.make_dual(t, t.detach().sin()) for t in (there, a)]
                tangent = forward_ad.unpack_dual(solved(*pair)).tangent
            return (tangent,) if alone else torch.autograd.grad(tangent.square().sum(), (there, a))
        total = solved(there, a)[OTHERS].square().sum()
        slopes = torch.autograd.grad(total, (there, a), create_graph=True)
        if order == "third":
            total = slopes[0].square().sum() + slopes[1].square().sum()
            slopes = torch.autograd.grad(total, (there, a), create_graph=True)
        return torch.autograd.grad(slopes[0].sum() + slopes[1].square().sum(), (there, a))

    expected = found()
    monkeypatch.setattr(host, "is_late", True)
    late = found()
    assert all(torch.isfinite(t).all() for t in late)
    torch.testing.assert_close(late, expected)


def test_forward_mode_leaves_the_failed_sample_out(weights: Any) -> None:
    z, a = weights
    bad = with_nan_in_z(z)

    def tangent(z: Tensor) -> Tensor:
        def layer(a: Tensor) -> Tensor:
            return fpi.fixed_point(tanh_map(a), torch.zeros_like(z), z, **TIGHT).value

        return torch.func.jvp(layer, (a.detach(),), (torch.ones_like(a),))[1]

    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        found = tangent(bad.detach())
    assert (found[BAD] == 0).all()
    torch.testing.assert_close(found[OTHERS], tangent(z.detach()[OTHERS]))


def test_torch_func_grad_leaves_the_failed_sample_out(weights: Any) -> None:
    z, a = weights
    bad = with_nan_in_z(z).detach()

    def loss(a: Tensor, z: Tensor) -> Tensor:
        x = fpi.fixed_point(tanh_map(a), torch.zeros_like(z), z, **TIGHT).value
        return (x**2).sum()

    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        found = torch.func.grad(loss)(a.detach(), bad)
    torch.testing.assert_close(found, torch.func.grad(loss)(a.detach(), bad[OTHERS]))


def test_a_weight_that_only_looks_like_a_batch(weights: Any) -> None:
    """A z of B rows that is no batch must not be tampered with when a sample fails."""
    z, _ = weights
    z = with_nan_in_z(z)
    weight = (torch.randn(B, B, dtype=F64) * 0.1).requires_grad_()
    z_wide = torch.cat([z, z[:, :1]], 1)

    def g(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x @ w + z)

    sol = fpi.fixed_point(g, torch.zeros(B, B, dtype=F64), z_wide, weight, **TIGHT)
    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        (grad,) = torch.autograd.grad((sol.value**2).sum(), z)
    others = z_wide.detach()[OTHERS].requires_grad_()
    x = fpi.fixed_point(g, torch.zeros(4, B, dtype=F64), others, weight, **TIGHT).value
    (expected,) = torch.autograd.grad((x**2).sum(), others)
    expected = expected[:, :D] + torch.nn.functional.pad(expected[:, D:], (0, D - 1))
    torch.testing.assert_close(grad[OTHERS], expected)


def test_unfinished_samples_keep_their_gradient(weights: Any) -> None:
    z, a = weights
    sol = fpi.fixed_point(tanh_map(a), torch.zeros_like(z), z, rtol=1e-12, max_steps=3)
    assert (sol.status == fpi.Status.MAX_STEPS).all()
    sol.value.sum().backward()
    stats = sol.adjoint_stats
    assert (stats.status == fpi.Status.MAX_STEPS).all()
    assert stats.num_zeroed == 0
    assert (a.grad != 0).any()


def test_a_tolerance_below_the_floor_ends_stalled_and_keeps_its_gradient() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    sol = fpi.fixed_point(
        lambda x, z: 0.5 * torch.tanh(x) + z, torch.zeros(3, 4), z, rtol=0.0, max_steps=400
    )
    assert ((sol.status == fpi.Status.STALLED) | (sol.status == fpi.Status.CONVERGED)).all()
    sol.value.sum().backward()
    expected = 1 / (1 - 0.5 * (1 - torch.tanh(sol.value.detach()) ** 2))
    torch.testing.assert_close(z.grad, expected)
