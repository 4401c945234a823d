"""Contract clause 7: backward hooks act on every product with the Jacobian of g."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooked_maps import (
    ADJOINTS,
    TIGHT,
    B,
    D,
    Own,
    Pair,
    Plain,
    by_hand,
    dense,
    derivatives,
    inputs,
    start,
)
from torch import Tensor, nn

import fpi_cuda as fpi

# --- backward hooks -----------------------------------------------------------------------------


def scaled(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else 0.5 * g for g in grads)


def tensor_hook(change: bool, seen: list[int]) -> Callable[..., Any]:
    def on_output(m: nn.Module, args: Any, out: Any) -> Any:
        def hooked(t: Tensor) -> Tensor:
            t = t.clone()
            if t.requires_grad:
                t.register_hook(lambda grad: (seen.append(1), 0.5 * grad if change else None)[1])
            return t

        return tuple(map(hooked, out)) if isinstance(out, tuple) else hooked(out)

    return on_output


def hang(g: nn.Module, kind: str, change: bool) -> list[int]:
    seen: list[int] = []
    if kind == "full":
        g.register_full_backward_hook(
            lambda m, into, out: (seen.append(1), scaled(into) if change else None)[1]
        )
    elif kind == "pre":
        g.register_full_backward_pre_hook(
            lambda m, out: (seen.append(1), scaled(out) if change else None)[1]
        )
    else:
        g.register_forward_hook(tensor_hook(change, seen))
    return seen


BACKWARD = ["full", "pre", "tensor"]


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize(
    ("make", "kind", "change"),
    [
        *itertools.product([dense, Plain], BACKWARD, [False, True]),
        # Of a tuple, torch shows such hooks parts.
        *itertools.product([Pair], BACKWARD, [False]),
        (Pair, "tensor", True),
    ],
)
def test_backward_hooks_act_on_every_product(
    make: Callable[[], nn.Module], kind: str, adjoint: str, change: bool
) -> None:
    g, z = make().double(), inputs().requires_grad_()
    seen = hang(g, kind, change)
    expected = derivatives(by_hand(g, z, 60), [z, *g.parameters()], 1)
    seen.clear()
    sol = fpi.fixed_point(g, start(g), z, adjoint=ADJOINTS[adjoint], solver=fpi.Picard(), **TIGHT)
    found = derivatives(sol.value, [z, *g.parameters()], 1)
    # Of a tuple state, torch shows a full hook z alone.
    assert len(seen) > (0 if make is Pair and kind == "full" else 3)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("adjoint", ["implicit", "neumann", "unroll"])
@pytest.mark.parametrize("kind", BACKWARD)
@pytest.mark.parametrize("make", [dense, Plain, Pair])
def test_hooks_that_look_have_second_derivatives(
    make: Callable[[], nn.Module], kind: str, adjoint: str
) -> None:
    g, z = make().double(), inputs().requires_grad_()
    given = [z, *g.parameters()]
    expected = derivatives(by_hand(g, z, 60), given, 2)
    seen = hang(g, kind, change=False)
    sol = fpi.fixed_point(g, start(g), z, adjoint=ADJOINTS[adjoint], solver=fpi.Picard(), **TIGHT)
    found = derivatives(sol.value, given, 2)
    assert seen
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", BACKWARD)
def test_hooks_that_look_may_see_rounding_alone(kind: str) -> None:
    class Halved(nn.LayerNorm):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
            return 0.5 * super().forward(x + z)

    for seed in range(8):
        # Of two numbers it keeps the signs: its Jacobian is about zero.
        z = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        g = Halved(2)
        hang(g, kind, change=False)
        value = fpi.fixed_point(g, torch.zeros(4, 2), z).value
        (slope,) = torch.autograd.grad(value.square().sum(), z, create_graph=True)
        slope.sum().backward()
        torch.testing.assert_close(z.grad, torch.zeros(4, 2), rtol=0, atol=1e-2)


@pytest.mark.parametrize("adjoint", ["implicit", "gmres", "neumann", "phantom"])
@pytest.mark.parametrize("kind", BACKWARD)
@pytest.mark.parametrize("make", [dense, Plain])
def test_hooks_that_change_gradients_have_none(
    make: Callable[[], nn.Module], kind: str, adjoint: str
) -> None:
    g, z = make().double(), inputs().requires_grad_()
    hang(g, kind, change=True)
    value = fpi.fixed_point(g, start(g), z, adjoint=ADJOINTS[adjoint], **TIGHT).value
    with pytest.raises(RuntimeError, match="a backward hook on g or inside it changes these"):
        derivatives(value, [z], 2)


@pytest.mark.parametrize("adjoint", [*ADJOINTS.values(), fpi.JacobianFree()], ids=str)
def test_a_full_backward_hook_is_called(adjoint: Any) -> None:
    for g in (dense(), Plain(), Own()):
        seen = hang(g, "full", change=False)
        z = torch.randn(B, D, requires_grad=True)
        fpi.FPILayer(g, adjoint=adjoint)(z).sum().backward()
        assert seen
