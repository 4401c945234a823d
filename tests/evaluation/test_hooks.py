"""Contract clause 7: g is evaluated as calling it does, whatever the user hangs on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooked_maps import (
    ADJOINTS,
    CELLS,
    CLOSE,
    F64,
    TIGHT,
    D,
    Own,
    Plain,
    by_hand,
    dense,
    derivatives,
    descent,
    halved,
    inputs,
    mlp,
    parts,
    start,
)
from hung import HUNG, forward_hook
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

import fpi_cuda as fpi


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize(
    ("name", "how"),
    [("dense", "forward_hook"), ("descent", "other_class"), ("pair", "patched_forward")],
)
def test_derivatives_are_those_of_the_call(name: str, how: str, adjoint: str, order: int) -> None:
    g, z = CELLS[name]().double(), inputs().requires_grad_()
    HUNG[how](g)
    given = [z, *g.parameters()]
    expected = derivatives(by_hand(g, z, 100), given, order)
    sol = fpi.fixed_point(g, start(g), z, adjoint=ADJOINTS[adjoint], solver=fpi.Picard(), **TIGHT)
    found = derivatives(sol.value, given, order)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_transforms_and_forward_mode_see_it_too() -> None:
    g, z, t = Own().double(), inputs(), inputs()
    forward_hook(g)

    def solve(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, start(g), z, **TIGHT).value

    def loop(z: Tensor) -> Tensor:
        return by_hand(g, z, 100)

    for transform in (
        lambda f: torch.func.jvp(f, (z,), (t,))[1],
        lambda f: torch.func.grad(lambda z: f(z).square().sum())(z),
        lambda f: torch.func.vmap(f)(torch.stack([z, t])),
    ):
        torch.testing.assert_close(transform(solve), transform(loop), rtol=1e-7, atol=1e-8)
    with torch.inference_mode():
        torch.testing.assert_close(solve(z), loop(z), **CLOSE)
    named = {name: 0.5 * p.detach() for name, p in g.named_parameters()}
    layer = fpi.FPILayer(g, **TIGHT)
    found = torch.func.functional_call(layer, {f"g.{n}": p for n, p in named.items()}, (z,))
    x = start(g)
    for _ in range(100):
        x = torch.func.functional_call(g, named, (x, z))
    torch.testing.assert_close(found, x, **CLOSE)


def test_a_hook_counts_from_the_next_solve_on() -> None:
    g, z = dense().double(), inputs()
    layer = fpi.FPILayer(g, **TIGHT)
    before = layer(z)
    handle = g.register_forward_hook(lambda m, args, out: 0.5 * out)
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)
    torch.testing.assert_close(copy.deepcopy(layer)(z), by_hand(g, z), **CLOSE)
    handle.remove()
    assert torch.equal(layer(z), before)


@pytest.mark.parametrize("route", [None, "host"])
def test_a_hook_added_before_backward_changes_nothing_or_raises(route: str | None) -> None:
    g, z = dense().double(), inputs().requires_grad_()
    expected = derivatives(by_hand(g, z, 100), [z], 1)
    value = fpi.fixed_point(g, start(g), z, route=route, **TIGHT).value
    g.register_forward_hook(lambda m, args, out: 0.5 * out)
    torch.testing.assert_close(derivatives(value, [z], 1), expected, rtol=1e-7, atol=1e-8)
    value = fpi.fixed_point(g, start(g), z, route=route, **TIGHT).value
    g._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="another value"):
        torch.autograd.grad(value.sum(), z, create_graph=True)


def test_hooks_on_all_modules() -> None:
    z = inputs()
    for make in CELLS.values():
        g = make().double()
        handle = register_module_forward_hook(
            lambda m, args, out, g=g: halved(out) if m is g else None
        )
        try:
            expected = by_hand(g, z)
            value = fpi.fixed_point(g, start(g), z, **TIGHT).value
            assert "hooks on all modules" in fpi.FPILayer(g).explain()
        finally:
            handle.remove()
        torch.testing.assert_close(parts(value), parts(expected), **CLOSE)


@pytest.mark.usefixtures("tape")
def test_a_captured_loop_takes_hooks_that_compute_weights() -> None:
    g, z = Plain().double(), inputs()
    prune.l1_unstructured(g.A, "weight", 0.5)
    sol = fpi.fixed_point(g, start(g), z, route="device", **TIGHT)
    torch.testing.assert_close(sol.value, by_hand(g, z), **CLOSE)


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.register_forward_hook(lambda m, args, out: out - 0.5 * out.mean(0)),
        lambda g: g.A.register_forward_hook(lambda m, args, out: out - 0.5 * out.mean(0)),
        lambda g: setattr(g, "A", nn.Sequential(g.A, nn.BatchNorm1d(D, dtype=F64))),
        lambda g: setattr(g, "A", Centred(D, D, bias=False, dtype=F64)),
    ],
    ids=["hook", "inside", "batch_norm", "other"],
)
def test_a_cell_does_not_promise_rows_for_what_hangs_on_it(change: Any) -> None:
    g = dense().double()
    change(g)
    text = fpi.FPILayer(g).explain()
    assert "all are evaluated until the last one stops (g.rowwise is True, but" in text
    assert "stopped ones leave the batch" in fpi.FPILayer(dense()).explain()
    assert "stopped ones leave the batch" in fpi.FPILayer(g, rowwise=True).explain()


class Centred(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - input.mean(0))


# --- wrappers -----------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Hands on what it does not have, as FullyShardedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x: Tensor, *z: Tensor) -> Tensor:
        return 0.5 * self.module(x, *z)


@pytest.mark.parametrize("make", [dense, mlp, descent, Own])
def test_a_wrapper_is_called_itself(make: Callable[[], nn.Module]) -> None:
    g, z = Wrapper(make().double()), inputs()
    assert callable(g.step)
    torch.testing.assert_close(fpi.FPILayer(g, **TIGHT)(z), by_hand(g, z), **CLOSE)
