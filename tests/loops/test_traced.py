"""The host's loop by a trace of g: the same numbers, and what needs no x once a solve."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fpi_cuda as fpi
from fpi_cuda.loops import traced
from fpi_cuda.loops.capture import SWITCH

B = 3


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace at the first solve."""
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(traced, "WORTH_A_TRACE", -1.0)
    traced.steps.clear()
    yield
    traced.steps.clear()


class Normed(nn.Module):
    def __init__(self, d: int = 5, h: int = 7) -> None:
        super().__init__()
        self.A, self.B, self.W = nn.Linear(d, h), nn.Linear(d, h), nn.Linear(h, d)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.3 * self.norm(self.W(F.relu(self.A(x) + self.B(z))))


class Convolved(nn.Module):
    def __init__(self, c: int = 4) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv2d(c, c, 3, padding=1))
        self.second, self.norm = nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(2, c)
        self.relu, self.silu = nn.ReLU(inplace=True), nn.SiLU()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.3 * self.norm(self.second(self.silu(self.first(x)) + torch.tanh(z)))


class InPlace(Convolved):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.3 * self.norm(self.second(self.relu(self.first(x) + torch.tanh(z))))


class Attention(nn.Module):
    def __init__(self, e: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(e, e, bias=False) for _ in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        share = F.softmax(self.q(x) @ self.k(x).mT * 0.5, -1)
        return torch.tanh(0.4 * self.drop(share @ self.v(x)) + z)


def closure() -> Callable[..., Tensor]:
    weight = 0.2 * torch.randn(5, 5)
    shift = {"all": torch.randn(5)}

    def g(x: Tensor, z: Tensor, scale: Tensor) -> Tensor:
        mask = torch.arange(5) < 4
        return F.layer_norm(x @ weight, (5,)) * 0.1 * mask + z.cumsum(1) * scale + shift["all"]

    return g


def cases() -> dict[str, tuple[Any, tuple[Tensor, ...], int, int]]:
    """A g, its z, and operations of its trace: once a solve, and in all."""
    torch.manual_seed(1)
    image, rows = torch.randn(B, 4, 6, 6), torch.randn(B, 5)
    return {
        "norm": (Normed(), (rows,), 1, 7),
        "convolution": (Convolved(), (image,), 2, 8),
        "in place": (InPlace(), (image,), 0, 8),
        "attention": (Attention().eval(), (torch.randn(B, 3, 4),), 0, 12),
        "closure": (closure(), (rows, torch.rand(B, 1)), 4, 10),
        "partial": (functools.partial(closure(), scale=torch.rand(B, 1)), (rows,), 4, 10),
    }


@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson(), fpi.Broyden()], ids=repr)
@pytest.mark.parametrize("rowwise", [None, True])
@pytest.mark.parametrize("name", cases())
def test_a_trace_has_the_numbers_of_g(
    name: str, rowwise: bool | None, solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, z, hoisted, total = cases()[name]
    z = tuple(t.requires_grad_() for t in z)
    leaves = [*z, *(g.parameters() if isinstance(g, nn.Module) else ())]
    layer = fpi.FPILayer(g, solver=solver, rtol=1e-5, rowwise=rowwise)

    def solved() -> list[Tensor]:
        s = layer.solve(*z)
        return [s.value, s.residual, s.num_steps, *torch.autograd.grad(s.value.sin().sum(), leaves)]

    found = [solved(), solved()]
    (capture,) = traced.steps.kind_of(g).captures
    assert capture.verified
    assert capture.found[2:] == (hoisted, total)
    monkeypatch.setenv(SWITCH, "0")
    for one in found:
        assert all(map(torch.equal, one, solved()))


def test_what_needs_no_x_is_computed_once_a_solve() -> None:
    g, (z,), *_ = cases()["norm"]
    layer = fpi.FPILayer(g, rtol=1e-6)
    with torch.no_grad():
        layer(z)
        with torch.autograd.profiler.profile() as profile:
            steps = int(layer.solve(z).num_steps.max())
    linears = [event for event in profile.function_events if event.name == "aten::linear"]
    assert len(linears) == 3 + 1 + 2 * (steps - 1)  # by g, once, and in each step


def test_only_after_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "WORTH_A_TRACE", 1e-3)
    g, (z,), *_ = cases()["norm"]
    layer = fpi.FPILayer(g, rtol=1e-6)
    layer(z)
    kind = traced.steps.kind_of(g)
    assert not kind.captures
    assert sum(kind.seconds.values()) > 0
    assert "traced" not in layer.explain()
    for _ in range(100):
        layer(z)
    assert len(kind.captures) == 1
    assert "g was traced, 1 of its 7 operations once a solve" in layer.explain()


def test_seconds_of_few_shapes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "WORTH_A_TRACE", 1e9)
    monkeypatch.setattr(traced, "MOST_SHAPES", 3)
    layer = fpi.FPILayer(Normed())
    for batch in range(1, 8):
        layer(torch.randn(batch, 5))
    assert 0 < len(traced.steps.kind_of(layer.g).seconds) <= 3


def test_dynamo_is_not_imported_for_short_work() -> None:
    code = (
        "import sys, torch, fpi_cuda\n"
        "layer = fpi_cuda.FPILayer(lambda x, z: 0.3 * torch.fft.fft(x).real / 9 + z)\n"
        "layer(torch.randn(2, 3, 4))\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, env=os.environ | {SWITCH: "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr


seen: list[int] = []


def appends(x: Tensor, z: Tensor) -> Tensor:
    seen.append(1)
    return 0.5 * x.flip(1) + z


def counts(counter: dict[str, int]) -> Callable[..., Tensor]:
    def g(x: Tensor, z: Tensor) -> Tensor:
        counter["calls"] = counter.get("calls", 0) + 1
        return 0.5 * x.flip(1) + z

    return g


def test_what_else_g_does_is_done_in_every_evaluation() -> None:
    z = torch.randn(B, 4)
    seen.clear()
    solution = fpi.fixed_point(appends, torch.zeros_like(z), z)
    assert len(seen) >= int(solution.num_steps.max())
    counter: dict[str, int] = {}
    solution = fpi.fixed_point(counts(counter), torch.zeros_like(z), z)
    assert counter["calls"] >= int(solution.num_steps.max())


@torch.library.custom_op("fpi_traced_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    seen.append(1)
    return x / 2


halved.register_fake(torch.empty_like)


def test_an_operation_of_a_library_is_called_in_every_step() -> None:
    z = torch.randn(B, 4)
    seen.clear()
    solution = fpi.fixed_point(
        lambda x, z: 0.5 * x.flip(1) + halved(z), torch.zeros_like(z), z, rtol=1e-6
    )
    assert len(seen) >= int(solution.num_steps.max()) > 3


def of_branches(x: Tensor, z: Tensor) -> Tensor:
    return 0.5 * x.flip(1) + (z if x.sum() > 0 else 2 * z)


def of_its_own_gradient(x: Tensor, z: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        energy = (F.layer_norm(leaf, (4,)) * z).sum() + (leaf**2).sum()
        (slope,) = torch.autograd.grad(energy, leaf)
    return x - 0.2 * slope


def of_torch_func(x: Tensor, z: Tensor) -> Tensor:
    def energy(x: Tensor) -> Tensor:
        return (x**2).sum() + (x * z.cumsum(1)).sum()

    return x - 0.2 * torch.func.grad(energy)(x)


def of_numpy(x: Tensor, z: Tensor) -> Tensor:
    return 0.5 * torch.from_numpy(x.detach().numpy()[:, ::-1].copy()) + z


def that_draws(x: Tensor, z: Tensor) -> Tensor:
    return 0.5 * F.dropout(x.flip(1), 0.5) + z


@pytest.mark.parametrize(
    "g", [of_branches, of_its_own_gradient, of_torch_func, of_numpy, that_draws]
)
def test_what_a_trace_cannot_tell_is_left_to_g(
    g: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    z = torch.randn(B, 4).abs()
    found = []
    for switch in "110":
        monkeypatch.setenv(SWITCH, switch)
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(fpi.fixed_point(g, torch.zeros_like(z), z, rtol=1e-5).value)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


def test_compiled_modules_are_called() -> None:
    inner = torch.compile(nn.Linear(4, 4), backend="eager")
    layer = fpi.FPILayer(Holding(inner))
    with torch.no_grad():
        layer(torch.randn(B, 4))
    assert not traced.steps.kind_of(layer.g).captures
    assert "g was not traced: OptimizedModule is compiled" in layer.explain()


class Holding(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.3 * F.layer_norm(self.inner(x), (4,)) + z


def test_a_trace_with_other_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    g, (z,), *_ = cases()["norm"]
    part_of = traced.part_of

    def wrong(*args: Any) -> Callable[..., Any]:
        part = part_of(*args)
        return lambda *given: part(*given) if isinstance(args[2], tuple) else part(*given) + 1e-7

    layer = fpi.FPILayer(g, rtol=1e-6)
    with monkeypatch.context() as m:
        m.setenv(SWITCH, "0")
        expected = layer(z)
    monkeypatch.setattr(traced, "part_of", wrong)
    assert torch.equal(layer(z), expected)
    assert "g was not traced: its trace has other numbers than it has" in layer.explain()


def test_weights_of_the_moment_are_read() -> None:
    g, (z,), *_ = cases()["norm"]
    layer = fpi.FPILayer(g)
    with torch.no_grad():
        before = layer(z)
        g.B.weight.mul_(3)
        after = layer(z)
        g.B.weight.data = g.B.weight.data / 3
        again = layer(z)
    assert len(traced.steps.kind_of(g).captures) == 1
    assert not torch.allclose(before, after)
    torch.testing.assert_close(before, again)


def test_a_g_that_was_traced_is_let_go_of() -> None:
    g = Normed()
    fpi.FPILayer(g)(torch.randn(B, 5))
    assert traced.steps.kind_of(g).captures
    gone = weakref.ref(g)
    del g
    gc.collect()
    assert gone() is None


def test_threads_solve_one_g_at_a_time_of_its_trace() -> None:
    g, (z,), *_ = cases()["norm"]
    layer = fpi.FPILayer(g)
    with torch.no_grad():
        expected = layer(z)
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.extend(layer(z) for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 20
    assert all(torch.equal(value, expected) for value in found)


def test_in_place_operations_are_known_under_all_names() -> None:
    from fpi_cuda.loops.nodes import writes

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for target, args, kwargs in (
        (F.leaky_relu, (x, 0.1, True), {}),
        (F.silu, (x,), {"inplace": True}),
        (torch.relu_, (x,), {}),
        (torch.add, (x, 1), {"out": x}),
    ):
        assert writes(graph.call_function(target, args, kwargs))
    assert writes(graph.call_method("mul_", (x, 2)))
    for target in (F.leaky_relu, F.silu, torch.relu, F.gelu):
        assert not writes(graph.call_function(target, (x,)))
    assert not writes(graph.call_function(F.leaky_relu, (x, 0.1, False)))
