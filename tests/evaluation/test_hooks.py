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
    B,
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
from tape import TapeGraphs
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

import fpi_cuda as fpi
from fpi_cuda import device_loop
from fpi_cuda.device_loop.cache import PlanCache

# --- what hangs on the call of g ----------------------------------------------------------------


def forward_hook(g: nn.Module) -> None:
    g.register_forward_hook(lambda m, args, out: halved(out))


def hook_with_kwargs(g: nn.Module) -> None:
    g.register_forward_hook(
        lambda m, args, kwargs, out: halved(out), with_kwargs=True, always_call=True
    )


def pre_hook(g: nn.Module) -> None:
    g.register_forward_pre_hook(lambda m, args: (args[0], 2 * args[1]))


def patched_forward(g: nn.Module) -> None:
    old = g.forward
    g.forward = lambda x, *z: halved(old(x, *z))


def patched_call(g: nn.Module) -> None:
    old = g._call_impl
    g._call_impl = lambda *args: halved(old(*args))  # type: ignore[method-assign]


def compiled(g: nn.Module) -> None:
    # As module.compile() does, whose compiler would make this the slowest test of all.
    old = g._call_impl
    g._compiled_call_impl = lambda *args: halved(old(*args))  # type: ignore[assignment]


def other_class(g: nn.Module) -> None:
    kind = type(g)

    class Half(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Any, *z: Tensor) -> Any:
            return halved(super().forward(x, *z))

    g.__class__ = Half


def other_call(g: nn.Module) -> None:
    kind = type(g)

    class Half(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: Any, *z: Tensor) -> Any:
            return halved(super().__call__(x, *z))

    g.__class__ = Half


HUNG = {
    f.__name__: f
    for f in (
        forward_hook, hook_with_kwargs, pre_hook, patched_forward, patched_call, compiled,
        other_class, other_call,
    )
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("how", HUNG)
@pytest.mark.parametrize("name", CELLS)
def test_what_hangs_on_g_is_evaluated(name: str, how: str, backend: str | None) -> None:
    g, z = CELLS[name]().double(), inputs()
    plain = by_hand(g, z)
    HUNG[how](g)
    expected = by_hand(g, z)
    assert not torch.allclose(torch.stack(parts(plain)), torch.stack(parts(expected)), rtol=1e-3)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            sol = fpi.fixed_point(g, start(g), z, backend=backend, **TIGHT)
        assert sol.converged.all()
        torch.testing.assert_close(parts(sol.value), parts(expected), **CLOSE)


@pytest.mark.parametrize("how", HUNG)
@pytest.mark.parametrize("name", CELLS)
def test_the_layer_says_so_and_the_fused_loop_refuses(name: str, how: str) -> None:
    g = CELLS[name]()
    assert "runs once per solve" in fpi.FPILayer(g).explain()
    HUNG[how](g)
    text = fpi.FPILayer(g).explain()
    assert "g(x, *z) runs whole in every step (" in text
    assert "fused loop:" not in text
    assert "has no prepare" not in text
    with pytest.raises(RuntimeError, match='route="fused" was asked for'):
        fpi.fixed_point(g, start(g, torch.float32), torch.randn(B, D), route="fused")


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


# --- captured loops -----------------------------------------------------------------------------


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let states on the CPU be captured, on a stand-in for CUDA graphs."""
    monkeypatch.setitem(device_loop.GRAPHS, "cpu", TapeGraphs())
    monkeypatch.setattr(device_loop, "plans", PlanCache())


@pytest.mark.usefixtures("tape")
@pytest.mark.parametrize("on", ["g", "inside"])
def test_a_captured_loop_does_not_pass_hooks_over(on: str) -> None:
    g, z, seen = Plain().double(), inputs(), []
    options = {"solver": fpi.Picard(), **TIGHT}
    fpi.fixed_point(g, start(g), z, route="device", **options)
    (g if on == "g" else g.A).register_forward_hook(lambda m, args, out: seen.append(1))
    with pytest.raises(RuntimeError, match="has hooks, which must see its evaluations"):
        fpi.fixed_point(g, start(g), z, route="device", **options)
    assert "has hooks, which must see its evaluations" in fpi.FPILayer(g).explain()
    seen.clear()
    with torch.no_grad():
        sol = fpi.fixed_point(g, start(g), z, **options)
    assert len(seen) >= int(sol.num_steps.max())


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


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_managed_by_fully_shard(tmp_path: Any) -> None:
    distributed = pytest.importorskip("torch.distributed")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("no gloo")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        z = torch.randn(B, D)
        for on in ("g", "layer", "A"):
            torch.manual_seed(1)
            reference = fpi.FPILayer(dense(), rtol=1e-6, route="host")
            torch.manual_seed(1)
            layer = fpi.FPILayer(dense(), rtol=1e-6)
            sharded = {"g": layer.g, "layer": layer, "A": layer.g.A}[on]
            fsdp.fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
            for run in (reference, layer):
                run(z).square().sum().backward()
            for mine, plain in zip(layer.parameters(), reference.parameters(), strict=True):
                grad = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
                torch.testing.assert_close(grad, plain.grad, rtol=1e-4, atol=1e-5)
    finally:
        distributed.destroy_process_group()
