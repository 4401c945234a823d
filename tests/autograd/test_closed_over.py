"""What g closes over: found, differentiated, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_layers import (
    F64,
    TIGHT,
    B,
    D,
    K,
    closed_form,
    derivatives,
    linear_layer,
    tanh_layer,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fpi_cuda as fpi


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
