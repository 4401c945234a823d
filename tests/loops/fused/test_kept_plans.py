"""Plans of solves are used where nothing has changed, change no number, and hold nothing."""

from __future__ import annotations

import functools
import gc
import os
import random
import re
import subprocess
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from changing_maps import F64, TIGHT, B, D, Map, by_hand, close, function_of, orthogonal
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda import cells
from fpi_cuda.loops import capture
from fpi_cuda.loops.fused import kept
from fpi_cuda.loops.fused.forms import NO_LOWER, forms
from fpi_cuda.lowered import NotLowered

pytestmark = pytest.mark.skipif(not fpi.native_available(), reason="no native library")

KINDS: dict[str, Callable[[], Any]] = {
    "module": Map,
    "function": lambda: function_of(orthogonal()),
    "cell": lambda: cells.Dense(D, D, dtype=F64),
    "two layers": lambda: cells.MLP(D, D, D, dtype=F64),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    kept.clear()
    yield
    kept.clear()


def is_kept(layer: fpi.FPILayer, z: Tensor) -> bool:
    return kept.kept_solution(layer.g, torch.zeros_like(z), (z,), layer.options) is not None


def solved(layer: fpi.FPILayer, z: Tensor) -> list[Tensor]:
    """All numbers of a solve and of its gradients."""
    z = z.detach().requires_grad_()
    solution = layer.solve(z)
    held = layer.g.parameters() if isinstance(layer.g, nn.Module) else ()
    grads = torch.autograd.grad(solution.value.square().sum(), [z, *held])
    stats = solution.adjoint_stats
    told = [solution.status, solution.num_steps, solution.residual]
    return [solution.value, *told, *grads, stats.status, stats.num_steps, stats.residual]


@each_kind
@pytest.mark.parametrize("options", [{}, TIGHT, {"solver": fpi.Picard(), "rtol": 1e-6}], ids=str)
def test_no_number_depends_on_how_often_was_solved(
    make: Callable[[], Any], options: dict[str, Any]
) -> None:
    layer, z = fpi.FPILayer(make(), **options), torch.randn(B, D, dtype=F64)
    assert not is_kept(layer, z)
    first = solved(layer, z)
    assert is_kept(layer, z.requires_grad_())
    for _ in range(9):
        for now, before in zip(solved(layer, z), first, strict=True):
            assert torch.equal(now, before)
    kept.clear()
    for now, before in zip(solved(layer, z), first, strict=True):
        assert torch.equal(now, before)


@each_kind
def test_plans_are_counted_and_let_go_of(make: Callable[[], Any]) -> None:
    layer, z = fpi.FPILayer(make()), torch.randn(B, D, dtype=F64)
    assert kept.memory() == 0
    for _ in range(2):
        layer(z)
    assert is_kept(layer, z)
    assert kept.memory() > 0
    value = layer(z.requires_grad_())
    kept.clear()
    assert kept.memory() == 0
    assert not is_kept(layer, z)
    value.sum().backward()  # of a solve whose plan is gone
    assert z.grad is not None


@each_kind
def test_no_more_than_so_many_are_kept(make: Callable[[], Any]) -> None:
    g = make()
    for count in range(1, kept.MOST_PLANS + 4):
        fpi.FPILayer(g)(torch.randn(count, D, dtype=F64))
    (plans,) = kept.known.values()
    assert len(plans) <= kept.MOST_PLANS


@each_kind
def test_threads_share_a_layer(make: Callable[[], Any]) -> None:
    layer = fpi.FPILayer(make(), **TIGHT)
    inputs = [torch.randn(2 + n % 2, D, dtype=F64) for n in range(6)]
    expected = [solved(layer, z) for z in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            found = solved(layer, inputs[number])
            if not all(map(torch.equal, found, expected[number])):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Nested(nn.Module):
    """Holds a layer of its own, which is solved in each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = fpi.FPILayer(Map(), **TIGHT)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.3 * self.inner(0.2 * x + z)


def test_a_layer_inside_g() -> None:
    g, z = Nested(), torch.randn(B, D, dtype=F64)
    layer = fpi.FPILayer(g, **TIGHT)
    inner = g.inner.g
    expected = by_hand(lambda x, z: 0.3 * by_hand(inner, 0.2 * x + z), z)
    for _ in range(3):
        close(layer(z), expected)


@each_kind
def test_a_hook_on_the_value_that_calls_the_layer(make: Callable[[], Any]) -> None:
    layer, z = fpi.FPILayer(make(), **TIGHT), torch.randn(B, D, dtype=F64).requires_grad_()
    first = solved(layer, z)
    seen = []

    def again(grad: Tensor) -> None:
        with torch.enable_grad():
            seen.append(solved(layer, z))

    value = layer(z)
    value.register_hook(again)
    (grad,) = torch.autograd.grad(value.square().sum(), z)
    assert torch.equal(grad, first[4])
    assert all(map(torch.equal, seen[0], first))


@pytest.mark.parametrize("make", [Map, KINDS["cell"]], ids=["module", "cell"])
def test_weights_swapped_before_backward(make: Callable[[], Any]) -> None:
    layer, z = fpi.FPILayer(make(), **TIGHT), torch.randn(B, D, dtype=F64, requires_grad=True)
    found = []
    for _ in range(2):  # of a solve that keeps a plan, and of one that goes by it
        value = layer(z)
        weight = next(layer.g.parameters())
        weight.data, before = 0.5 * weight.data, weight.data
        found.append(torch.autograd.grad(value.sum(), z)[0])
        weight.data = before
    assert torch.equal(*found)


def test_settings_of_dynamo_are_left_as_they_were() -> None:
    from torch._dynamo import config

    before = config.get_config_copy()
    state = torch.get_rng_state()
    forms.clear()
    g, z = function_of(orthogonal()), torch.randn(B, D, dtype=F64)
    torch.set_rng_state(state)
    fpi.fixed_point(g, torch.zeros_like(z), z)
    assert forms.kind_of(g).captures
    assert config.get_config_copy() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_captured_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(capture.SWITCH, "0")
    forms.clear()
    layer, z = fpi.FPILayer(Map()), torch.randn(B, D, dtype=F64)
    for _ in range(3):
        layer(z)
    assert not is_kept(layer, z)
    assert not any(kind.captures for kind in forms.kinds.values())
    with pytest.raises(RuntimeError, match=re.escape(NO_LOWER)):
        fpi.FPILayer(Map(), route="fused")(z)


def test_the_environment_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = orthogonal()

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ weight * float(os.getenv("FPI_SIZE_OF_A_TEST", "1")) + z)

    z = torch.randn(B, D, dtype=F64)
    for size in ("1", "1", "0.5"):
        monkeypatch.setenv("FPI_SIZE_OF_A_TEST", size)
        close(fpi.fixed_point(g, torch.zeros_like(z), z, **TIGHT).value, by_hand(g, z))


def test_inputs_that_g_does_not_read_are_looked_at_too() -> None:
    weight = orthogonal()

    def g(x: Tensor, z: Tensor, ignored: Tensor) -> Tensor:
        return torch.tanh(x @ weight + z)

    z: Any = torch.randn(B, D, dtype=F64)
    for _ in range(2):
        fpi.fixed_point(g, torch.zeros_like(z), z, z.clone())
    with pytest.raises(TypeError, match=r"z\[1\] of type str"):
        fpi.fixed_point(g, torch.zeros_like(z), z, "no tensor")  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0.5, 0.7, 0.9])
def test_a_number_that_changes_stays_a_number(number: float) -> None:
    g, z = Map(), torch.randn(B, D, dtype=F64, requires_grad=True)
    g.size = number
    layer = fpi.FPILayer(g, route="fused", **TIGHT)
    layer(z)
    assert is_kept(layer, z)


def test_a_refusal_while_dynamo_is_off_is_not_remembered() -> None:
    forms.clear()
    layer, z = fpi.FPILayer(Map()), torch.randn(B, D, dtype=F64)
    with torch.compiler.set_stance("force_eager"):
        layer(z)
        assert not is_kept(layer, z)
    layer(z)
    assert is_kept(layer, z)


WITHOUT_DYNAMO = """
import sys, torch, fpi_cuda as fpi
from fpi_cuda import cells
assert "torch._dynamo" not in sys.modules, "import"
z = torch.randn(3, 4, requires_grad=True)
for g in (cells.Dense(4, 4), cells.MLP(4, 4, 5)):
    layer = fpi.FPILayer(g)
    for _ in range(3):
        layer(z).sum().backward()
assert "torch._dynamo" not in sys.modules, "cells"
class Convolved(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 2, 3, padding=1)
    def forward(self, x, z):
        return torch.tanh(0.1 * self.conv(x) + z)
layer = fpi.FPILayer(Convolved())
for _ in range(3):
    layer(torch.randn(3, 2, 5, 5)).sum().backward()
assert "torch._dynamo" not in sys.modules, "convolutions"
"""


def test_dynamo_is_imported_by_captures_alone() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_DYNAMO],
        capture_output=True, text=True, check=False, env=os.environ | {capture.SWITCH: "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@each_kind
def test_plans_keep_nobody_alive(make: Callable[[], Any]) -> None:
    layer, z = fpi.FPILayer(make()), torch.randn(B, D, dtype=F64, requires_grad=True)
    for _ in range(3):
        value = layer(z)
        value.sum().backward()
    assert is_kept(layer, z)
    gone = [weakref.ref(layer.g), weakref.ref(layer), weakref.ref(value.grad_fn)]
    if isinstance(layer.g, nn.Module):
        gone += map(weakref.ref, layer.g.parameters())
    else:
        gone.append(weakref.ref(layer.g.__closure__[1].cell_contents))
    gc.collect()
    gc.disable()
    try:
        del layer, value
        assert [ref() for ref in gone] == [None] * len(gone)
    finally:
        gc.enable()


def test_a_g_that_is_refused_is_let_go_of() -> None:
    weight = orthogonal()

    class Holder:
        def step(self, x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(x @ weight) + z  # something behind its last activation

    holder, z = Holder(), torch.randn(B, D, dtype=F64)
    solution = fpi.fixed_point(holder.step, torch.zeros_like(z), z)
    record = solution.adjoint_record
    assert record.route is not None
    assert "behind its last activation" in record.route.reason
    gone = weakref.ref(holder)
    del holder, solution, record
    gc.collect()
    assert gone() is None


def test_a_solve_out_of_the_ordinary_leaves_the_plan_as_it_is() -> None:
    layer, z = fpi.FPILayer(Map()), torch.randn(B, D, dtype=F64)
    layer(z)
    before = kept.known[Map]
    with torch.autocast("cpu", enabled=False), torch.autograd.forward_ad.dual_level():
        layer(z)
    assert kept.known[Map] is before


MEMORIES: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() == 2 else t,
    "overlapping": lambda t: t.flatten().repeat(2).as_strided(t.shape, (1,) * t.dim()),
    "negative": lambda t: torch._neg_view(-t),
    "imaginary": lambda t: torch.complex(t, -t).conj().imag,
}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
@pytest.mark.parametrize("place", ["weight", "bias", "z", "gradient"])
def test_tensors_that_lie_in_memory_in_all_ways(
    memory: Callable[[Tensor], Tensor], place: str
) -> None:
    tensors = {
        "weight": 0.1 * torch.randn(D, D, dtype=F64),
        "bias": torch.randn(D, dtype=F64),
        "z": torch.randn(B, D, dtype=F64),
        "gradient": torch.randn(B, D, dtype=F64),
    }
    tensors[place] = memory(tensors[place])
    weight, bias, z, v = (t.detach() for t in tensors.values())
    weight.requires_grad_()

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(torch.nn.functional.linear(x, weight, bias) + z)

    x0 = torch.zeros(B, D, dtype=F64)

    def numbers(route: str | None) -> list[Tensor]:
        value = fpi.fixed_point(g, x0, z, rtol=1e-10, route=route).value
        return [value, *torch.autograd.grad(value, weight, v)]

    expected = numbers("host")
    for _ in range(3):
        for found, known in zip(numbers("fused"), expected, strict=True):
            torch.testing.assert_close(found, known, rtol=1e-8, atol=1e-8)
    layer = fpi.FPILayer(g, rtol=1e-10, route="fused")
    layer(z, x0=x0)
    assert kept.kept_solution(g, x0, (z,), layer.options) is not None


@functools.lru_cache
def half() -> float:
    return 0.5


def test_a_trace_warns_of_nothing() -> None:
    weight = 0.1 * torch.randn(D, D, dtype=F64)
    before = random.setstate, torch.random.set_rng_state, warnings.warn

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ weight + half() * z)

    z = torch.randn(B, D, dtype=F64)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fpi.fixed_point(g, torch.zeros_like(z), z, route="fused")
    assert not told
    assert (random.setstate, torch.random.set_rng_state, warnings.warn) == before


def test_what_is_put_aside_while_tracing_works_again_for_whoever_has_it() -> None:
    with capture.nothing_else_touched():
        taken = random.setstate
    random.seed(1)
    state, first = random.getstate(), random.random()
    taken(state)
    assert random.random() == first


def test_a_method_of_any_callable() -> None:
    class Tanh:
        def __call__(self, size: float, x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(size * x + z)

    z = torch.randn(B, D, dtype=F64)
    g = types.MethodType(Tanh(), 0.5)
    for _ in range(2):
        assert fpi.fixed_point(g, torch.zeros_like(z), z).converged.all()


def test_a_capture_may_be_refused_by_several() -> None:
    g, x, z = function_of(orthogonal()), torch.zeros(B, D, dtype=F64), torch.ones(B, D, dtype=F64)
    found = forms.of(g, x, (z,))
    for _ in range(2):
        forms.refuse(found, g, x, (z,), "a reason")
    with pytest.raises(NotLowered, match="a reason"):
        forms.of(g, x, (z,))


def test_a_torch_with_other_insides_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._C._dynamo import eval_frame

    forms.clear()
    monkeypatch.delattr(eval_frame, "_debug_get_cache_entry_list")
    z = torch.randn(B, D, dtype=F64)
    for _ in range(2):
        solution = fpi.fixed_point(function_of(orthogonal()), torch.zeros_like(z), z)
        assert solution.converged.all()
        assert solution.adjoint_record.route.name == "host"


@each_kind
def test_where_a_plan_was_made_and_first_used_leaves_no_trace(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    layer, z = fpi.FPILayer(make()), torch.randn(B, D, dtype=F64)
    with torch.device("meta"):
        layer(z)
    with torch.inference_mode():
        layer(z)
        layer(z)
    solved(layer, z)
    found = solved(layer, z)
    assert is_kept(layer, z.clone().requires_grad_())
    assert all(t.device.type == "cpu" and not t.is_inference() for t in found)
    expected = solved(fpi.FPILayer(layer.g, route="host"), z)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        assert mine.dtype is other.dtype


def test_a_gradient_that_lies_in_another_way_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And one that native code cannot read goes the way of any other."""
    layer, z = fpi.FPILayer(Map(), **TIGHT), torch.randn(B, D, dtype=F64, requires_grad=True)
    layer(z)
    v = torch.randn(D, B, dtype=F64).mT
    inputs = [z, *layer.g.parameters()]
    assert is_kept(layer, z)
    expected = torch.autograd.grad(layer(z), inputs, v.contiguous())
    for mine, other in zip(torch.autograd.grad(layer(z), inputs, v), expected, strict=True):
        assert torch.equal(mine, other)
    (plan,) = kept.known[Map]
    monkeypatch.setattr(plan, "solve_adjoint", lambda *_: kept.UNFIT)
    for mine, other in zip(torch.autograd.grad(layer(z), inputs, v), expected, strict=True):
        close(mine, other)


@each_kind
def test_a_first_solve_may_be_one_that_a_checkpoint_repeats(make: Callable[[], Any]) -> None:
    forms.clear()
    layer, z = fpi.FPILayer(make(), **TIGHT), torch.randn(B, D, dtype=F64, requires_grad=True)
    value = torch.utils.checkpoint.checkpoint(layer, z, use_reentrant=False)
    (found,) = torch.autograd.grad(value.sum(), z)
    close(found, torch.autograd.grad(layer(z).sum(), z)[0])


class Tanh:
    act = staticmethod(torch.tanh)


class Sigmoid:
    act = staticmethod(torch.sigmoid)


@pytest.mark.parametrize("route", [None, "host"])
def test_bases_exchanged(route: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpi_cuda.loops.traced.WORTH_A_TRACE", -1.0)

    class Acted(Tanh, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D, dtype=F64)
            nn.init.orthogonal_(self.linear.weight, 0.5)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.act(self.linear(x) + z)

    g, z = Acted(), torch.randn(B, D, dtype=F64)
    layer = fpi.FPILayer(g, rtol=1e-11, route=route)
    for _ in range(3):
        close(layer(z), by_hand(g, z))
    Acted.__bases__ = (Sigmoid, nn.Module)
    for _ in range(3):
        close(layer(z), by_hand(g, z))


@each_kind
def test_many_gradients_of_one_value_by_vmap(make: Callable[[], Any]) -> None:
    layer = fpi.FPILayer(make(), **TIGHT)
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    v = torch.randn(4, B, D, dtype=F64)
    for _ in range(3):
        value = layer(z)

        def pulled(v: Tensor, value: Tensor = value) -> Tensor:
            return torch.autograd.grad(value, z, v, retain_graph=True)[0]

        close(torch.func.vmap(pulled)(v), torch.stack([*map(pulled, v)]))


@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_weights_that_a_thread_exchanges_during_a_solve() -> None:
    layer = fpi.FPILayer(Wide().requires_grad_(False), rtol=0.0)  # all steps, for time to do so
    z = torch.randn(64, 1024)
    layer(z)
    weight = layer.g.linear.weight
    known, stop = weight.data.clone(), threading.Event()

    def exchange() -> None:
        while not stop.wait(1e-4):
            weight.data = known.clone()

    expected = layer(z)
    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        assert all(torch.equal(layer(z), expected) for _ in range(40))
    finally:
        stop.set()
        thread.join()


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1024, 1024)
        nn.init.orthogonal_(self.linear.weight, 0.8)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + z)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_memory_that_was_freed_is_not_read(name: str) -> None:
    cell = cells.Dense(D, D)
    x, z = torch.zeros(B, D), torch.randn(B, D)
    getattr(cell.A if name == "weight" else cell.B, name).detach().untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"freed|out of bounds|storage"), torch.no_grad():
        fpi.fixed_point(cell, x, z)
