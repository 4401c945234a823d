"""Dropout, autocast and other surroundings that every evaluation of g must share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dropping import F64, TIGHT, B, D, Dropping, Watching, leaves, with_mask
from torch import Tensor, nn

import fpi_cuda as fpi


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    return leaves()


def test_a_fresh_mask_per_solve_and_one_evaluation_worth_of_numbers(weights: Any) -> None:
    z, a = weights
    torch.manual_seed(5)
    g = Dropping(a)
    for _ in range(3):
        fpi.fixed_point(g, torch.zeros_like(z), z, **TIGHT).value.sum().backward()
    after = torch.rand(4)
    torch.manual_seed(5)
    expected = [(torch.rand(B, D) > 0.5).to(F64) for _ in range(3)]
    found = [mask for i, mask in enumerate(g.masks) if i == 0 or not mask.equal(g.masks[i - 1])]
    assert len(found) == 3
    assert all(map(torch.equal, found, expected))
    assert torch.equal(after, torch.rand(4))


def test_interleaved_solves_keep_their_own_masks(weights: Any) -> None:
    z, a = weights
    first, second = Dropping(a), Dropping(a)
    one = fpi.fixed_point(first, torch.zeros_like(z), z, **TIGHT).value
    two = fpi.fixed_point(second, torch.zeros_like(z), z, **TIGHT).value
    grads = [
        torch.autograd.grad(torch.autograd.grad((x**2).sum(), a, create_graph=True)[0].sum(), a)[0]
        for x in (one, two)
    ]
    for g, x, grad in ((first, one, grads[0]), (second, two, grads[1])):
        assert all(torch.equal(mask, g.masks[0]) for mask in g.masks)
        expected = with_mask(a, z, g.masks[0])
        torch.testing.assert_close(x, expected)
        (once,) = torch.autograd.grad((expected**2).sum(), a, create_graph=True)
        torch.testing.assert_close(grad, torch.autograd.grad(once.sum(), a)[0])
    assert not torch.equal(first.masks[0], second.masks[0])


def test_backward_draws_no_numbers(weights: Any) -> None:
    z, a = weights
    x = fpi.fixed_point(Dropping(a), torch.zeros_like(z), z, **TIGHT).value
    state = torch.get_rng_state()
    torch.autograd.grad((x**2).sum(), a, create_graph=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stochastic_layer_inside_of_a_stochastic_g(weights: Any) -> None:
    z, a = weights
    inner = Dropping(0.5 * a)

    def g(x: Tensor, z: Tensor) -> Tensor:
        keep = (torch.rand(D) > 0.3).to(x.dtype)
        return 0.5 * fpi.fixed_point(inner, torch.zeros_like(x), 0.3 * x * keep + z, **TIGHT).value

    sol = fpi.fixed_point(g, torch.zeros_like(z), z, **TIGHT)
    assert sol.converged.all()
    assert all(torch.equal(mask, inner.masks[0]) for mask in inner.masks)


def test_a_module_with_dropout_trains_and_evaluates(weights: Any) -> None:
    z, _ = weights
    cell = nn.Sequential(nn.Linear(D, D, dtype=F64), nn.Dropout(0.5), nn.Tanh())
    layer = fpi.FPILayer(lambda x, z: 0.5 * cell(x) + z, **TIGHT)
    assert layer.solve(z).converged.all()
    assert not torch.equal(layer(z), layer(z))
    cell.eval()
    assert torch.equal(layer(z), layer(z))


def test_dropout_in_what_is_hoisted(weights: Any) -> None:
    z, a = weights

    class Hoisted:
        drawn = 0

        def prepare(self, z: Tensor) -> Tensor:
            self.drawn += 1
            return torch.dropout(z, 0.5, True)

        def step(self, x: Tensor, prepared: Tensor) -> Tensor:
            return torch.tanh(x @ a.T + prepared)

        def __call__(self, x: Tensor, z: Tensor) -> Tensor:
            return self.step(x, self.prepare(z))

    g = Hoisted()
    x = fpi.fixed_point(g, torch.zeros_like(z), z, **TIGHT).value
    assert g.drawn == 1
    # Evaluating g anew in a second derivative checks that it has the same value.
    (grad,) = torch.autograd.grad((x**2).sum(), a, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(grad.sum(), z)[0]).all()


def test_random_numbers_are_in_order_after_an_exception(weights: Any) -> None:
    z, a = weights
    calls = [0]

    def g(x: Tensor, z: Tensor) -> Tensor:
        mask = (torch.rand(x.shape) > 0.5).to(x.dtype)
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return torch.tanh((x * mask) @ a.T + z)

    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        fpi.fixed_point(g, torch.zeros_like(z), z, **TIGHT)
    found = torch.rand(3)
    torch.manual_seed(3)
    torch.rand(B, D)
    assert torch.equal(found, torch.rand(3))
    assert torch.is_grad_enabled()


def test_vmap_over_a_stochastic_layer(weights: Any) -> None:
    z, a = weights
    zz = torch.stack([z, z]).detach()

    def layer(z: Tensor) -> Tensor:
        return fpi.fixed_point(
            lambda x, z: torch.tanh(torch.dropout(x, 0.5, True) @ a.T + z),
            torch.zeros_like(z),
            z,
            **TIGHT,
        ).value

    different = torch.func.vmap(layer, randomness="different")(zz)
    assert not torch.equal(different[0], different[1])
    same = torch.func.vmap(layer, randomness="same")(zz)
    torch.testing.assert_close(same[0], same[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(layer)(zz)


def test_autocast_loses_no_gradient_to_its_cache() -> None:
    """Weights cast under no_grad are cached without a graph, for everybody inside autocast."""
    cell = Watching()
    z = torch.randn(B, D)
    with torch.autocast("cpu", torch.bfloat16):
        x = fpi.fixed_point(cell, torch.zeros(B, D), z, rtol=1e-2).value
        elsewhere = cell.linear(z)
    (grad,) = torch.autograd.grad(x.sum(), cell.linear.weight)
    assert (grad != 0).any()
    (grad,) = torch.autograd.grad(elsewhere.float().sum(), cell.linear.weight)
    assert (grad != 0).any()


def test_cached_parametrizations_lose_no_gradient() -> None:
    linear = fpi.contract_(nn.Linear(D, D, bias=False), 0.5)
    z = torch.randn(B, D)
    raw = next(linear.parameters())

    def gradient(create_graph: bool) -> Tensor:
        x = fpi.fixed_point(lambda x, z: torch.tanh(linear(x) + z), torch.zeros(B, D), z).value
        loss = (x**2).sum() + linear(z).sum()
        (grad,) = torch.autograd.grad(loss, raw, create_graph=create_graph)
        return torch.autograd.grad((grad**2).sum(), raw)[0] if create_graph else grad

    for create_graph in (False, True):
        with torch.nn.utils.parametrize.cached():
            cached = gradient(create_graph)
        torch.testing.assert_close(cached, gradient(create_graph))


def test_autocast_around_backward_does_not_round_the_adjoint() -> None:
    a = 0.5 * torch.linalg.qr(torch.randn(D, D))[0]
    z = torch.randn(B, D, requires_grad=True)
    x = fpi.fixed_point(lambda x, z: x @ a.T + z, torch.zeros(B, D), z, rtol=1e-6).value
    (plain,) = torch.autograd.grad(x.sum(), z, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (cast,) = torch.autograd.grad(x.sum(), z)
    assert torch.equal(cast, plain)


def test_the_solvers_own_arithmetic_is_not_autocast() -> None:
    z = torch.randn(B, D)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * torch.sin(x) + z

    plain = fpi.fixed_point(g, torch.zeros(B, D), z, rtol=1e-6, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        cast = fpi.fixed_point(g, torch.zeros(B, D), z, rtol=1e-6, backend="reference")
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(cast.value, plain.value)
    assert torch.equal(cast.num_steps, plain.num_steps)


@pytest.mark.parametrize("rowwise", [False, True])
def test_a_g_that_works_in_place_on_x(rowwise: bool, weights: Any) -> None:
    z, a = weights
    z = (z.detach() * torch.logspace(-4, 1, B, dtype=F64)[:, None]).requires_grad_()

    def g(x: Tensor, z: Tensor) -> Tensor:
        x.mul_(0.5)
        return torch.tanh(x @ a.T) + x + z

    def pure(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(0.5 * x @ a.T) + 0.5 * x + z

    x0 = torch.ones_like(z)
    found = fpi.fixed_point(g, x0, z, rowwise=rowwise, **TIGHT)
    expected = fpi.fixed_point(pure, x0, z, rowwise=rowwise, **TIGHT)
    assert (x0 == 1).all()
    torch.testing.assert_close(found.value, expected.value)
    for grad, oracle in zip(
        torch.autograd.grad((found.value**2).sum(), (z, a), create_graph=True),
        torch.autograd.grad((expected.value**2).sum(), (z, a), create_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(grad, oracle)
    with torch.inference_mode():
        again = fpi.fixed_point(g, x0, z, rowwise=rowwise, **TIGHT)
    torch.testing.assert_close(again.value.clone(), expected.value.detach())
