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
saves_time = traced.saves_time


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace at the first solve, and every g."""
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(traced, "WORTH_A_TRACE", -1.0)
    monkeypatch.setattr(traced, "saves_time", lambda *_: True)
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
    assert capture.found[2:4] == (hoisted, total)
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_fork_while_another_thread_traces_can_trace() -> None:
    code = (
        "import os, signal, threading, torch, fpi_cuda\n"
        "from fpi_cuda.loops import capture\n"
        "held = threading.Event()\n"
        "def hold():\n"
        "    with capture.lock:\n"
        "        held.set(); threading.Event().wait(30)\n"
        "threading.Thread(target=hold, daemon=True).start()\n"
        "held.wait()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    signal.alarm(20)\n"
        "    fpi_cuda.FPILayer(lambda x, z: torch.tanh(0.1 * x @ z.T @ z) + z)(torch.eye(3))\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-uc", code],
        capture_output=True, text=True, check=False, env=os.environ | {SWITCH: "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "0", done.stderr


seen: list[Any] = []


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


def that_draws_a_constant(x: Tensor, z: Tensor) -> Tensor:
    return 0.1 * x @ projection(4) + z


@functools.lru_cache
def projection(n: int) -> Tensor:
    return torch.randn(n, n)


def that_writes_a_list(x: Tensor, z: Tensor) -> Tensor:
    value = 0.5 * x.flip(1) + z
    seen.append(value.clone())
    return value


def that_knows_of_traces(x: Tensor, z: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        seen.append(x.clone())
    return 0.5 * x.flip(1) + z


def that_is_profiled(x: Tensor, z: Tensor) -> Tensor:
    with torch.profiler.record_function("mine"):
        return 0.5 * x.flip(1) + z


def that_counts(x: Tensor, z: Tensor) -> Tensor:
    COUNTER.add_(1)
    return 0.5 * x.flip(1) + z


COUNTER = torch.zeros(())


def that_keeps_statistics(x: Tensor, z: Tensor) -> Tensor:
    return 0.2 * x.flip(1) + F.batch_norm(z, MEAN, VARIANCE, training=True)


def that_keeps_statistics_of_x(x: Tensor, z: Tensor) -> Tensor:
    return 0.2 * F.batch_norm(x, MEAN, VARIANCE, training=True) + z


MEAN, VARIANCE = torch.zeros(4), torch.ones(4)


def that_marks(x: Tensor, z: Tensor) -> Tensor:
    mask = z > 0
    mask |= x > 0.3
    return 0.3 * torch.where(mask, x, -x.flip(1)) + z


def that_unmarks(x: Tensor, z: Tensor) -> Tensor:
    mask = z > 0
    mask &= x < 0.9
    return 0.3 * torch.where(mask, x, -x.flip(1)) + z


def that_shifts(x: Tensor, z: Tensor) -> Tensor:
    number = (z > 0).int() + 1
    number <<= (x > 0.3).int()
    return 0.1 * x.flip(1) * number + z


def that_marks_by_name(x: Tensor, z: Tensor) -> Tensor:
    mask = (z > 0).__ior__(z < -1)
    mask.__ixor__(x > 0.3)
    return 0.3 * torch.where(mask, x, -x.flip(1)) + z


def that_marks_what_lasts(x: Tensor, z: Tensor) -> Tensor:
    LASTING[:] = LASTING | (x[0] > 0.3)
    return 0.3 * x.flip(1) + z


LASTING = torch.zeros(4, dtype=torch.bool)


def of_a_domain(x: Tensor, z: Tensor) -> Tensor:
    return 0.1 * F.binary_cross_entropy(x, torch.sigmoid(z), reduction="none") + 0.4


def of_positive_definite(x: Tensor, z: Tensor) -> Tensor:
    return 0.3 * torch.linalg.cholesky(torch.diag_embed(x)).diagonal(dim1=-2, dim2=-1) + 0.4


def of_a_view(x: Tensor, z: Tensor) -> Tensor:
    halves = z.clone()
    halves[:, :2] += 0.2 * x[:, 2:]
    return halves


LEFT_TO_G = [
    of_branches, of_its_own_gradient, of_torch_func, of_numpy, that_draws, that_draws_a_constant,
    that_writes_a_list, that_knows_of_traces, that_is_profiled, that_counts, that_keeps_statistics,
    that_keeps_statistics_of_x, that_marks_what_lasts, of_a_view,
]  # fmt: skip
TRACED = [
    that_marks, that_unmarks, that_shifts, that_marks_by_name, of_a_domain, of_positive_definite,
]  # fmt: skip


@pytest.mark.parametrize("g", [*LEFT_TO_G, *TRACED])
def test_nothing_shows_of_a_trace(
    g: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    z = torch.randn(B, 4)
    lasting = (COUNTER, MEAN, VARIANCE, LASTING)
    begin = [t.clone() for t in lasting]
    projection(4)
    found = []
    for switch in "001":  # at first a solve looks twice at what g draws
        monkeypatch.setenv(SWITCH, switch)
        seen.clear()
        for t, value in zip(lasting, begin, strict=True):
            t.copy_(value)
        torch.manual_seed(3)
        with torch.no_grad():
            told = [
                fpi.fixed_point(g, torch.full_like(z, 0.5), z, rtol=1e-5, route="host")
                for _ in range(3)
            ]
        numbers = [t for s in told for t in (s.value, s.residual, s.num_steps, s.status)]
        found.append([*numbers, *seen, *(t.clone() for t in lasting), torch.get_rng_state()])
    _, plain, by_trace = found
    assert len(plain) == len(by_trace)
    assert all(map(torch.equal, plain, by_trace))
    assert bool(traced.steps.kind_of(g).captures) == (g in TRACED)


@pytest.mark.parametrize("place", ["g", "callee"])
def test_compiled_functions_are_called(place: str) -> None:
    calls = []

    def backend(module: Any, _: Any) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            calls.append(1)
            return module.forward(*given)

        return run

    @torch.compile(backend=backend)
    def inner(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * x.flip(1) + z

    def outer(x: Tensor, z: Tensor) -> Tensor:
        return inner(x, z) * 1.0

    z = torch.randn(B, 4)
    with torch.no_grad():
        for _ in range(3):
            calls.clear()
            s = fpi.fixed_point(inner if place == "g" else outer, torch.zeros_like(z), z)
            assert len(calls) >= int(s.num_steps.max()) > 2


def test_a_g_that_changes_pays_longer_for_each_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "WORTH_A_TRACE", 1e-3)
    g, (z,), *_ = cases()["norm"]
    layer = fpi.FPILayer(g)
    for number in range(200):
        g.norm.eps = 1e-5 + number * 1e-9
        layer(z)
    assert sum(traced.steps.kind_of(g).traces.values()) <= 4


def test_what_a_trace_cannot_run_without_numbers_is_refused_in_silence(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    k = torch.tensor(1)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.3 * torch.tanh(x.flip(1)) + z + 0.1 * x[:, k][:, None]

    z = torch.randn(B, 4)
    with torch.no_grad(), caplog.at_level("WARNING"):
        fpi.fixed_point(g, torch.zeros_like(z), z)
    assert not caplog.text
    assert not capfd.readouterr().err
    (reason,) = traced.steps.kind_of(g).refusals.values()
    assert "\n" not in reason


def test_what_a_trace_would_not_save_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "saves_time", saves_time)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * x.flip(1) + z

    z = torch.randn(B, 4)
    with torch.no_grad():
        fpi.fixed_point(g, torch.zeros_like(z), z)
        assert not traced.steps.kind_of(g).captures
        z = torch.randn(B, 20_000)
        fpi.fixed_point(g, torch.zeros_like(z), z)
    assert traced.steps.kind_of(g).captures


@pytest.mark.parametrize("steps", [1, 2])
def test_a_trace_is_asked_for_by_a_second_evaluation(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, (z,), *_ = cases()["norm"]
    with torch.no_grad():
        fpi.fixed_point(g, torch.zeros_like(z), z, max_steps=steps, atol=1e9 if steps == 1 else 0)
    assert bool(traced.steps.kind_of(g).captures) == (steps > 1)


@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
@pytest.mark.parametrize("terms", [3, 30])
def test_what_is_kept_of_z_is_bounded(terms: int) -> None:
    def g(x: Tensor, z: Tensor) -> Tensor:
        for i in range(terms):
            x = 0.9 * torch.sin(0.5 * x + z * (0.1 + 0.01 * i))
        return x

    z = torch.randn(B, 4)
    with torch.no_grad():
        fpi.fixed_point(g, torch.zeros_like(z), z)
    (capture,) = traced.steps.kind_of(g).captures
    assert capture.found.hoisted == (terms if terms == 3 else 0)


def test_functions_that_were_traced_are_let_go_of() -> None:
    gone = []
    for _ in range(3):
        names: dict[str, Any] = {"torch": torch}
        exec("def g(x, z):\n    return 0.5 * x.flip(1) + z", names)
        z = torch.randn(B, 4)
        fpi.fixed_point(names["g"], torch.zeros_like(z), z)
        assert traced.steps.kind_of(names["g"]).captures
        gone.append(weakref.ref(names["g"].__code__))
    del names
    gc.collect()
    assert [code() for code in gone[1:]] == [None] * 2  # Dynamo keeps the first that it meets


def test_a_refusal_that_passes_is_not_kept() -> None:
    g, (z,), *_ = cases()["norm"]
    layer = fpi.FPILayer(g)
    with torch.no_grad():
        with torch.compiler.set_stance("fail_on_recompile"):
            layer(z)
        assert not traced.steps.kind_of(g).captures
        layer(z)
    assert traced.steps.kind_of(g).captures


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
