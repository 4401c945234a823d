"""Captured solves, on a stand-in for CUDA graphs: right answers from memory that is never stale."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tape import Loop, Tape, TapeGraphs
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda import backends, device_loop
from fpi_cuda.device_loop import chunks
from fpi_cuda.device_loop.cache import MOST_REBUILDS, PlanCache
from fpi_cuda.device_loop.graphs import Refused
from fpi_cuda.device_loop.method import numeric_flags
from fpi_cuda.device_loop.trace import Recorder
from fpi_cuda.late import Late
from fpi_cuda.state import Layout

FEATURES = 12
TIGHT = {"rtol": 1e-10, "max_steps": 200}


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[TapeGraphs]:
    """Let states on the CPU be captured, in a process that has captured nothing yet."""
    graphs = TapeGraphs()
    monkeypatch.setitem(device_loop.GRAPHS, "cpu", graphs)
    monkeypatch.setattr(device_loop, "plans", PlanCache())
    yield graphs
    assert graphs.open == 0


class Cell(nn.Module):
    """tanh(s norm(A x) + B z + b) with what a captured graph may get wrong: a Python number,
    a buffer, a mode."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.a = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
        self.b = nn.Linear(3, FEATURES, dtype=torch.float64)
        self.norm = nn.GroupNorm(3, FEATURES, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("shift", torch.zeros(FEATURES, dtype=torch.float64))
        self.scale = 0.3
        self.eval()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        inner = self.scale * self.norm(self.a(x)) + self.b(z) + self.shift
        return torch.tanh(self.dropout(inner))


def inputs(batch: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x0 and z."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(batch, FEATURES + 3, dtype=torch.float64, generator=generator)
    return numbers[:, :FEATURES].contiguous(), numbers[:, FEATURES:].contiguous()


def solve(g: Any, x0: Any, *z: Tensor, **options: Any) -> fpi.Solution:
    return fpi.fixed_point(g, x0, *z, **{**TIGHT, "route": "device", **options})


def assert_same(found: fpi.Solution, expected: fpi.Solution) -> None:
    """Bit for bit: the tape calls the very kernels of the host loop."""
    for name in ("value", "status", "num_steps", "residual"):
        mine, other = getattr(found, name), getattr(expected, name)
        assert torch.equal(mine.nan_to_num(), other.nan_to_num()), name


def assert_like_host(g: Any, x0: Any, *z: Tensor, **options: Any) -> fpi.Solution:
    found = solve(g, x0, *z, **options)
    assert_same(found, solve(g, x0, *z, **{**options, "route": "host"}))
    return found


def gradients(g: nn.Module, x0: Tensor, z: Tensor, **options: Any) -> list[Tensor]:
    """Value, adjoint steps and status, gradients in z and in the parameters."""
    z = z.clone().requires_grad_()
    solution = solve(g, x0, z, **options)
    weights = torch.linspace(-1.0, 2.0, solution.value.numel(), dtype=solution.value.dtype)
    found = torch.autograd.grad(
        (solution.value * weights.view_as(solution.value)).sum(),
        [z, *g.parameters()],
        allow_unused=True,
    )
    stats = solution.adjoint_stats
    assert stats is not None
    account = [solution.value.detach(), stats.num_steps, stats.status, stats.residual]
    return [*account, *(t for t in found if t is not None)]


# The same answers as the host loop.


@pytest.mark.parametrize(
    "solver", [fpi.Picard(), fpi.Anderson(m=3), fpi.Broyden()], ids=lambda s: type(s).__name__
)
def test_a_captured_solve_is_the_host_loop(tape: TapeGraphs, solver: Any) -> None:
    g = Cell()
    for seed in range(3):
        x0, z = inputs(seed=seed)
        for found, expected in zip(
            gradients(g, x0, z, solver=solver),
            gradients(g, x0, z, solver=solver, route="host"),
            strict=True,
        ):
            assert torch.equal(found, expected)
    assert tape.log.count("capture") == 3  # the solve, the point of the adjoint, its products


@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_cells_with_hoisting(tape: TapeGraphs, batch: int, dtype: torch.dtype) -> None:
    cell = fpi.cells.Dense(3, FEATURES).to(dtype)
    for seed in range(2):
        x0, z = (t.to(dtype) for t in inputs(batch, seed))
        rtol = 10 * torch.finfo(dtype).eps
        for found, expected in zip(
            gradients(cell, x0, z, rtol=rtol, rowwise=False),
            gradients(cell, x0, z, rtol=rtol, rowwise=False, route="host"),
            strict=True,
        ):
            assert torch.equal(found, expected)
    assert tape.log.count("capture") == 3


def test_a_tuple_state_and_a_warm_start(tape: TapeGraphs) -> None:
    def g(x: tuple[Tensor, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(0.5 * x[1] + z.sum(1, keepdim=True)), torch.sin(0.5 * x[0])

    x0, z = inputs()
    start = (x0[:, :4], x0[:, 4:8].clone())
    for _ in range(2):
        found = solve(g, start, z)
        expected = solve(g, start, z, route="host")
        for part, other in zip(found.value, expected.value, strict=True):
            assert torch.equal(part, other)
        start = found.value
    assert found.num_steps.tolist() == [1] * 5
    assert tape.log.count("capture") == 1


def test_failed_samples_end_as_on_the_host(tape: TapeGraphs) -> None:
    cell = fpi.cells.Dense(3, FEATURES, activation="relu").double()
    x0, z = inputs(6)
    z[1] = torch.nan
    z[4] = torch.inf
    found = assert_like_host(cell, x0, z, rowwise=False, max_steps=25)
    assert fpi.Status.NONFINITE in found.status
    for _ in range(2):
        with pytest.warns(fpi.FixedPointWarning):
            captured = gradients(cell, x0, z, rowwise=False, max_steps=25)
        with pytest.warns(fpi.FixedPointWarning):
            hosted = gradients(cell, x0, z, rowwise=False, max_steps=25, route="host")
        for mine, other in zip(captured, hosted, strict=True):
            assert torch.equal(mine.nan_to_num(), other.nan_to_num())


def test_a_cap_below_convergence_is_kept(tape: TapeGraphs) -> None:
    x0, z = inputs()
    for max_steps in (1, 2, 7):
        found = assert_like_host(Cell(), x0, z, max_steps=max_steps, rtol=1e-14)
        assert found.num_steps.tolist() == [max_steps] * 5


# Plans are found again, and only where they fit.


def test_later_solves_capture_nothing(tape: TapeGraphs) -> None:
    g = Cell()
    solve(g, *inputs())
    tape.log.clear()
    for seed in range(3):
        with torch.no_grad():
            assert_like_host(g, *inputs(seed=seed))
    assert tape.log == ["wait", "loop", "mark"] * 3
    assert len(device_loop.plans) == 2  # solve and adjoint


def strided(z: Tensor) -> Tensor:
    return z.t().contiguous().t()


@pytest.mark.parametrize(
    "change",
    [
        lambda g, x0, z: (solve, (g, x0[:3], z[:3]), {}),
        lambda g, x0, z: (solve, (g, x0, strided(z)), {}),
        lambda g, x0, z: (solve, (g, x0, z), {"rtol": 1e-9}),
        lambda g, x0, z: (solve, (g, x0, z), {"max_steps": 150}),
        lambda g, x0, z: (solve, (g, x0, z), {"solver": fpi.Anderson(m=4)}),
        lambda g, x0, z: (solve, (g, x0, z), {"backend": "reference"}),
        lambda g, x0, z: (solve, (Cell(), x0, z), {}),
    ],
    ids=["batch", "strides", "rtol", "max_steps", "solver", "backend", "module"],
)
def test_another_solve_gets_another_plan(
    tape: TapeGraphs, change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = Cell()
    x0, z = inputs()
    with torch.no_grad():
        solve(g, x0, z)
        run, arguments, options = change(g, x0, z)
        if options.get("backend") == "reference":
            monkeypatch.setattr(
                backends.reference, "anderson_step_", backends.native.anderson_step_
            )
        run(*arguments, **options)
        assert tape.log.count("capture") == 2
        solve(g, x0, z)
    assert tape.log.count("capture") == 2


def test_atol_is_no_part_of_a_plan(tape: TapeGraphs) -> None:
    g, (x0, z) = Cell(), inputs()
    with torch.no_grad():
        loose = assert_like_host(g, x0, z, atol=0.1)
        tight = assert_like_host(g, x0, z, atol=0.0)
    assert bool((loose.num_steps < tight.num_steps).all())
    assert tape.log.count("capture") == 1


def test_autocast_and_global_switches_get_their_own_plans(tape: TapeGraphs) -> None:
    cell = fpi.cells.Dense(3, FEATURES)
    x0, z = (t.float() for t in inputs())
    options = {"rtol": 1e-3, "rowwise": False}
    with torch.no_grad():
        plain = assert_like_host(cell, x0, z, **options)
        with torch.autocast("cpu", torch.bfloat16):
            low = assert_like_host(cell, x0, z, **options)
            assert_like_host(cell, x0, z, **options)
        assert not torch.equal(plain.value, low.value)
        assert tape.log.count("capture") == 2
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            assert_like_host(cell, x0, z, **options)
        finally:
            torch.set_float32_matmul_precision(before)
        assert tape.log.count("capture") == 3


def test_gradients_under_autocast_come_from_the_device_again(tape: TapeGraphs) -> None:
    cell = fpi.cells.Dense(3, FEATURES)
    x0, z = (t.float() for t in inputs())
    options = {"rtol": 1e-2, "rowwise": False}
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            # A weight that torch has cast already must not be what the graph reads.
            cell(x0, z)
            found = gradients(cell, x0, z, **options)
            expected = gradients(cell, x0, z, **options, route="host")
        assert all(map(torch.equal, found, expected))
    assert tape.log.count("capture") == 3


# Nothing is read from stale memory.


def test_weights_changed_in_place_are_seen(tape: TapeGraphs) -> None:
    g = Cell()
    optimizer = torch.optim.SGD(g.parameters(), lr=0.1)
    values = []
    for _ in range(4):
        x0, z = inputs()
        found = solve(g, x0, z)
        assert_same(found, solve(g, x0, z, route="host"))
        values.append(found.value.detach())
        optimizer.zero_grad()
        found.value.square().sum().backward()
        optimizer.step()
    assert not torch.equal(values[0], values[-1])
    assert tape.log.count("capture") == 3


def swap_data(g: Cell) -> None:
    g.a.weight.data = 0.5 * g.a.weight.data


def swap_parameter(g: Cell) -> None:
    g.a.weight = nn.Parameter(0.5 * g.a.weight.detach())


def change_number(g: Cell) -> None:
    g.scale = 0.1


def swap_buffer(g: Cell) -> None:
    g.shift = torch.ones(FEATURES, dtype=torch.float64)


def swap_layer(g: Cell) -> None:
    g.norm = nn.Identity()  # type: ignore[assignment]


@pytest.mark.parametrize(
    "change", [swap_data, swap_parameter, change_number, swap_buffer, swap_layer]
)
def test_a_changed_g_is_captured_anew(tape: TapeGraphs, change: Callable[[Cell], None]) -> None:
    g = Cell()
    x0, z = inputs()
    before = gradients(g, x0, z)
    change(g)
    for _ in range(2):
        found, expected = gradients(g, x0, z), gradients(g, x0, z, route="host")
        assert all(map(torch.equal, found, expected))
    assert not torch.equal(before[0], found[0])


def test_a_freed_weight_whose_memory_is_used_again(tape: TapeGraphs) -> None:
    x0, z = inputs()
    memory = torch.eye(FEATURES, dtype=torch.float64)
    weights = [0.3 * memory, 0.6 * memory]

    def layer(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, z: torch.cos(x @ weight + z.sum(1, keepdim=True))

    first = assert_like_host(layer(weights[0]), x0, z)
    # Another tensor at the very same address.
    weights[0].copy_(weights[1])
    alias = torch.as_strided(weights[0], (FEATURES, FEATURES), (FEATURES, 1))
    second = assert_like_host(layer(alias), x0, z)
    assert not torch.equal(first.value, second.value)
    third = assert_like_host(layer(weights[1]), x0, z)
    assert torch.equal(third.value, second.value)


def test_a_map_that_is_another_each_time_goes_back_to_the_host(tape: TapeGraphs) -> None:
    x0, z = inputs()
    kept = []

    def once(weight: Tensor) -> fpi.Solution:
        kept.append(weight)
        return solve(
            lambda x, z: torch.tanh(weight * x + z.sum(1, keepdim=True)), x0, z, route=None
        )

    for i in range(3 * MOST_REBUILDS):
        weight = torch.full((FEATURES,), 0.1 * i / MOST_REBUILDS, dtype=torch.float64)
        with torch.no_grad():
            found = once(weight)
        expected = solve(
            lambda x, z, w=weight: torch.tanh(w * x + z.sum(1, keepdim=True)), x0, z, route="host"
        )
        assert_same(found, expected)
    route = found.adjoint_record.route
    assert route is not None
    assert route.name == "host"
    assert "another computation than when it was captured: op 1" in route.reason
    assert tape.log.count("capture") <= MOST_REBUILDS + 1
    assert len(device_loop.plans) == 0


def test_results_are_no_part_of_a_plan(tape: TapeGraphs) -> None:
    g = Cell()
    with torch.no_grad():
        first = solve(g, *inputs(seed=0))
        copies = [t.clone() for t in (first.value, first.status, first.num_steps, first.residual)]
        second = solve(g, *inputs(seed=1))
    assert torch.equal(first.value, copies[0])
    assert torch.equal(first.num_steps, copies[2])
    assert torch.equal(first.residual, copies[3])
    assert first.value.data_ptr() != second.value.data_ptr()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 1:4],
        lambda t: t[:, 2:5].t().contiguous().t(),
        lambda t: t[:1, :3].expand(5, 3),
        lambda t: t[:, ::2],
        lambda t: t.repeat_interleave(9, 1)[:, ::9][:, :3],
    ],
    ids=["slice", "transposed", "expanded", "strided", "far apart"],
)
def test_inputs_in_any_layout(tape: TapeGraphs, view: Callable[[Tensor], Tensor]) -> None:
    g = Cell()
    for seed in range(2):
        numbers = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).double()
        found = []
        for route in (None, "host"):
            base = numbers.clone().requires_grad_()
            with torch.no_grad():
                solve(g, inputs()[0], view(base), route=None)
            solution = solve(g, inputs()[0], view(base), route=route)
            found.append(torch.autograd.grad(solution.value.square().sum(), base)[0])
        assert torch.equal(*found)
    assert tape.log.count("capture") >= 1


def test_the_start_is_not_changed(tape: TapeGraphs) -> None:
    x0, z = inputs()
    for _ in range(2):
        solve(Cell(), x0, z)
    assert torch.equal(x0, inputs()[0])
    assert torch.equal(z, inputs()[1])


# What cannot be captured goes back to the host, and says why.


class HostRead(Cell):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(x, z) if float(x.detach().sum()) < 1e9 else x


class DataDependentShape(Cell):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(x, z) + x[x > 1e9].sum()


class InPlace(Cell):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        self.shift.mul_(1.0)
        return super().forward(x, z)


class RunningStatistics(Cell):
    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.norm = nn.BatchNorm1d(FEATURES, dtype=torch.float64)  # type: ignore[assignment]
        self.norm.num_batches_tracked = None


class OwnGenerator(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        noise = torch.rand(1, dtype=x.dtype, generator=self.generator.manual_seed(0))
        return super().forward(x, z) + 0.1 * noise


class Wrapped(Tensor):
    pass


class Subclass(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.shift = self.shift.as_subclass(Wrapped)


class Counting(Cell):
    """Another function in each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x, z) * (1 - 1e-12 * self.count)


def training(g: nn.Module) -> nn.Module:
    return g.train()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (HostRead, "reads numbers on the host"),
        (DataDependentShape, "shape depends on numbers"),
        (lambda: training(Cell(0.1)), "draws random numbers"),
        (OwnGenerator, "draws random numbers"),
        (InPlace, "changes a tensor of its own in place"),
        (lambda: training(RunningStatistics(0.0)), "changes running statistics"),
        (Subclass, "computes with a Wrapped"),
        (Counting, "another computation than when it was captured"),
    ],
)
@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_what_cannot_be_captured_says_why(
    tape: TapeGraphs, make: Callable[[], Cell], reason: str
) -> None:
    g = make()
    x0, z = inputs()
    with pytest.raises(RuntimeError, match=f"the solve cannot run there: .*{reason}"):
        solve(g, x0, z)
    layer = fpi.FPILayer(g, state_shape=FEATURES)
    for _ in range(2):
        layer(z, x0=x0).sum().backward()
    assert "host loop: torch evaluates g, then one solver step" in layer.explain()
    # Rows that the host saw move with others are not tried on the device.
    moving = isinstance(g, (RunningStatistics, Counting))
    assert ("its rows depend on one another" if moving else reason) in layer.explain()
    assert len(device_loop.plans) == 0


def test_a_warning_that_is_an_error_is_not_remembered(tape: TapeGraphs) -> None:
    """As pytest's filters make one of those that torch gives once in a process or a thread."""

    class WarnsOnce(Cell):
        warned = False

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            if tape.open and not self.warned:
                self.warned = True
                warnings.warn("torch has something to say once", UserWarning, stacklevel=1)
            return super().forward(x, z)

    g = WarnsOnce()
    x0, z = inputs()
    with pytest.raises(RuntimeError, match=r"cannot run there: .*something to say once"):
        solve(g, x0, z)
    assert_like_host(g, x0, z)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_where_an_op_puts_what_it_makes_is_no_part_of_a_trace(where: str) -> None:
    """The seeds of CUDA's attention lie on the host, but on the device inside of a capture."""
    tokens = []
    for device in ("cpu", where):
        recorder = Recorder(torch.device("cpu"), [])
        seed = torch.empty((), dtype=torch.int64, device=device)
        recorder._meet(seed)
        tokens.append(recorder._token(seed))
    assert tokens[0] == tokens[1]


def test_kernels_behind_torchs_back_are_refused(tape: TapeGraphs) -> None:
    class Raw(Cell):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            result = super().forward(x, z)
            tape.hidden += 1
            return result

    with pytest.raises(RuntimeError, match="launches kernels that torch does not see"):
        solve(Raw(), *inputs())


def test_a_device_without_graphs_says_why(tape: TapeGraphs) -> None:
    tape.refusal = "the driver is for CUDA 11.8, the loop needs 12.4"
    with pytest.raises(RuntimeError, match=r"cannot run there: the driver is for CUDA 11\.8"):
        solve(Cell(), *inputs())
    layer = fpi.FPILayer(Cell(), state_shape=FEATURES)
    assert "the driver is for CUDA 11.8" in layer.explain()
    tape.refusal = None
    assert layer.explain().startswith("route    device loop")


def test_an_error_of_g_passes_through_and_leaves_nothing(tape: TapeGraphs) -> None:
    class Late(Cell):
        evaluations = 0

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            self.evaluations += 1
            if self.evaluations == self.limit:
                raise KeyError("of g")
            return super().forward(x, z)

        limit = 0

    x0, z = inputs()
    for limit in (1, 2, 3, 4):  # the warm-up, the trace, the capture, the check
        g = Late()
        g.limit = limit
        with pytest.raises(KeyError if limit == 1 else RuntimeError, match="of g"):
            solve(g, x0, z)
        assert tape.open == 0
        assert len(device_loop.plans) == 0
        device_loop.plans.clear()
        assert_like_host(g, x0, z)
        # In a later solve, with a plan: the host loop meets the error again.
        g.limit = -1
        Late.forward, forward = (lambda self, x, z: 1 / 0), Late.forward  # type: ignore
        with pytest.raises(ZeroDivisionError):
            solve(g, x0, z, route=None)
        Late.forward = forward  # type: ignore[method-assign]
        device_loop.plans.clear()


def test_a_graph_that_is_not_g_is_never_used(
    tape: TapeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = Loop.replay

    def wrong(self: Loop) -> None:
        replay(self)
        self._tape._ops[-1][1][3].add_(1e-3)  # type: ignore[union-attr]

    monkeypatch.setattr(Loop, "replay", wrong)
    with pytest.raises(RuntimeError, match="disagreed with the host loop"):
        solve(Cell(), *inputs())
    g = Cell()
    for _ in range(3):
        assert_same(solve(g, *inputs(), route=None), solve(g, *inputs(), route="host"))
    assert len(device_loop.plans) == 0


# Training.


def test_the_adjoint_is_planned_in_the_forward_pass(tape: TapeGraphs) -> None:
    g = Cell()
    x0, z = inputs()
    solution = solve(g, x0, z.requires_grad_())
    captures = tape.log.count("capture")
    solution.value.sum().backward()
    assert captures == tape.log.count("capture") == 3
    assert tape.log[-3:] == ["replay", "loop", "mark"]


def test_several_forwards_before_a_backward(tape: TapeGraphs) -> None:
    g = Cell()
    found = []
    for route in ("device", "host"):
        zs = [inputs(seed=seed)[1].requires_grad_() for seed in range(3)]
        total = sum(solve(g, inputs()[0], z, route=route).value.square().sum() for z in zs)
        found.append(torch.autograd.grad(total, [*zs, *g.parameters()]))
    assert all(map(torch.equal, *found))


def test_a_graph_that_is_kept(tape: TapeGraphs) -> None:
    g = Cell()
    x0, z = inputs()
    solution = solve(g, x0, z.requires_grad_())
    loss = solution.value.square().sum()
    first = torch.autograd.grad(loss, [z, *g.parameters()], retain_graph=True)
    again = torch.autograd.grad(loss, [z, *g.parameters()])
    assert all(map(torch.equal, first, again))


def test_gradients_of_every_order(tape: TapeGraphs) -> None:
    g = Cell()
    x0, z = inputs(1)
    weights = (g.norm.weight, g.b.bias)

    def value(z: Tensor, *_: Tensor) -> Tensor:
        return solve(g, x0, z, rtol=1e-12).value

    arguments = (z.requires_grad_(), *weights)
    assert torch.autograd.gradcheck(value, arguments)
    assert torch.autograd.gradgradcheck(value, arguments)
    assert tape.log.count("capture") == 3


def test_a_weight_changed_before_backward_is_not_read_by_the_plan(tape: TapeGraphs) -> None:
    """The bias is no part of what autograd saved, so nothing else would notice."""
    found = []
    for route in ("device", "device", "host"):
        torch.manual_seed(1)
        g = Cell()
        x0, z = inputs()
        solution = solve(g, x0, z.requires_grad_(), route=route)
        with torch.no_grad():
            g.b.bias.add_(1.0)
        found.append(torch.autograd.grad(solution.value.sum(), z))
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[1][0], found[2][0])


def test_an_input_changed_before_backward_is_not_read_by_the_plan(tape: TapeGraphs) -> None:
    found = []
    shift = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    for route in ("device", "host"):
        torch.manual_seed(1)
        g = Cell()
        x0, z = inputs()

        def shifted(x: Tensor, z: Tensor, g: Cell = g) -> Tensor:
            return g(x + shift, z.detach().abs())

        solution = solve(shifted, x0, z, route=route)
        z.mul_(3.0)
        found.append(torch.autograd.grad(solution.value.sum(), shift))
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize(
    "adjoint", [fpi.JacobianFree(), fpi.Phantom(k=2), fpi.Neumann(k=3)], ids=str
)
def test_other_adjoints_need_no_plan(tape: TapeGraphs, adjoint: Any) -> None:
    g, (x0, z) = Cell(), inputs()
    for _ in range(2):
        found = gradients(g, x0, z, adjoint=adjoint)
        expected = gradients(g, x0, z, adjoint=adjoint, route="host")
        for mine, other in zip(found, expected, strict=True):
            assert torch.equal(mine.nan_to_num(), other.nan_to_num())
    assert tape.log.count("capture") == 1


@pytest.mark.parametrize("solver", [fpi.GMRES(), fpi.ConjugateGradient()], ids=str)
def test_a_linear_solver_of_the_adjoint_stays_on_the_host(tape: TapeGraphs, solver: Any) -> None:
    g, (x0, z) = Cell(), inputs()
    adjoint = fpi.Implicit(solver=solver)
    with pytest.raises(RuntimeError, match=r"the adjoint cannot run there: .* runs on the host"):
        gradients(g, x0, z, adjoint=adjoint)
    found = gradients(g, x0, z, adjoint=adjoint, route=None)
    assert all(map(torch.equal, found, gradients(g, x0, z, adjoint=adjoint, route="host")))
    layer = fpi.FPILayer(g, state_shape=FEATURES, adjoint=adjoint)
    layer(z.requires_grad_())
    layer(z)
    assert "the adjoint by the host loop" in layer.explain()


def test_solves_without_gradients(tape: TapeGraphs) -> None:
    g, (x0, z) = Cell(), inputs()
    expected = solve(g, x0, z, route="host")
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(solve(g, x0, z), expected)
    assert tape.log.count("capture") == 2


def test_the_forward_pass_does_not_look_at_its_result(
    tape: TapeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device the host would have to wait for the solve."""
    looks: list[str] = []
    value = Late.value
    monkeypatch.setattr(Late, "value", lambda self: looks.append(place) or value(self))
    g, (x0, z) = Cell(), inputs()
    place = "building"
    solve(g, x0, z.requires_grad_())
    place = "forward"
    solution = solve(g, x0, z)
    assert "forward" not in looks
    place = "backward"
    solution.value.sum().backward()
    assert "backward" in looks


@pytest.mark.parametrize("everything", [False, True], ids=["one sample", "all samples"])
@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_samples_found_failed_in_backward_only(tape: TapeGraphs, everything: bool) -> None:
    """Their derivative is NaN, and must not reach the weights of the others."""

    def with_captured(shift: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, z: torch.tanh(0.5 * x + shift) * z.sum(1, keepdim=True)

    x0, z = inputs()
    z[slice(None) if everything else 2] = torch.nan
    for captured in (False, True):
        found = []
        for route in ("device", "device", "host"):
            shift = torch.full((FEATURES,), 0.1, dtype=torch.float64, requires_grad=True)
            inner = shift.exp() if captured else shift
            device_loop.plans.clear()  # g reads another tensor each time
            value = solve(with_captured(inner), x0, z, route=route, rowwise=False).value
            found.append(torch.autograd.grad(value[[0, 1, 3]].sum(), shift)[0])
        assert bool(torch.isfinite(found[2]).all())
        assert torch.allclose(found[0], found[2], rtol=1e-12, atol=0.0)
        assert torch.allclose(found[1], found[2], rtol=1e-12, atol=0.0)


# Which way, and how the caller says so.


def test_a_solve_is_captured_when_it_comes_again(tape: TapeGraphs) -> None:
    layer = fpi.FPILayer(Cell(), state_shape=FEATURES)
    _, z = inputs()
    with torch.no_grad():
        layer(z)
        assert "captured when it comes again" in layer.explain()
        assert tape.log == []
        layer(z)
        assert tape.log.count("capture") == 1
        assert layer.explain().splitlines()[0].endswith("until all samples have stopped")
    layer(z.requires_grad_())
    assert layer.explain().splitlines()[0].endswith("the adjoint likewise")


def test_the_host_route_captures_nothing(tape: TapeGraphs) -> None:
    layer = fpi.FPILayer(Cell(), state_shape=FEATURES, route="host")
    for _ in range(3):
        layer(inputs()[1])
    assert tape.log == []
    assert 'route="host" asks for it' in layer.explain()


def test_a_device_without_graphs_at_all() -> None:
    with pytest.raises(RuntimeError, match="the state is on cpu, which has no CUDA graphs"):
        solve(Cell(), *inputs())
    layer = fpi.FPILayer(Cell(), state_shape=FEATURES)
    layer(inputs()[1])
    assert "the state is on cpu, which has no CUDA graphs)" in layer.explain()


def test_an_unknown_route_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown route 'gpu'\. Valid: None, 'host', 'device'"):
        solve(Cell(), *inputs(), route="gpu")


def test_what_needs_the_host_refuses_the_device(tape: TapeGraphs) -> None:
    g, (x0, z) = Cell(), inputs()
    with pytest.raises(RuntimeError, match="adjoint=Unroll"):
        solve(g, x0, z.requires_grad_(), adjoint=fpi.Unroll())
    with pytest.raises(RuntimeError, match=r"inside torch\.func transforms"):
        torch.func.grad(lambda z: solve(g, x0, z).value.sum())(z.detach())
    with pytest.raises(RuntimeError, match="the batch is empty"):
        solve(g, x0[:0], z[:0])


# Chunks.


@pytest.mark.parametrize("batch", [8, 7, 3, 1])
def test_a_batch_in_chunks_is_solved_as_a_whole(
    tape: TapeGraphs, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = fpi.cells.Dense(3, FEATURES).double()
    row = FEATURES * 8 * (2 * 5 + 4)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3 * row + 1)
    for seed in range(2):
        found = gradients(cell, *inputs(batch, seed))
        expected = gradients(cell, *inputs(batch, seed), route="host")
        for mine, other in zip(found, expected, strict=True):
            assert torch.allclose(mine, other, rtol=1e-9, atol=1e-12)
    whole = fpi.FPILayer(Cell(), state_shape=FEATURES, route="device")  # not known row-wise
    with torch.no_grad():
        whole(inputs(batch)[1])
    kinds = [plan.key for plan in device_loop.plans._idle.values() if plan.key[0] == "solve"]
    sizes = sorted(part.batch for key in kinds for part in key if isinstance(part, Layout))
    assert sizes == {8: [2, 3, 8], 7: [1, 3, 7], 3: [3, 3], 1: [1, 1]}[batch]


# Memory.


def test_the_oldest_plan_makes_room(tape: TapeGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = PlanCache(most_plans=2)
    monkeypatch.setattr(device_loop, "plans", plans)
    g = Cell()
    with torch.no_grad():
        for batch in (2, 3, 4):
            solve(g, *inputs(batch))
        assert len(plans) == 2
        assert tape.log.count("close") == 1
        assert tape.retired > 0
        solve(g, *inputs(4))
        solve(g, *inputs(3))
        assert tape.log.count("capture") == 3
        solve(g, *inputs(2))
    assert tape.log.count("capture") == 4


def test_memory_is_reported_and_given_back(tape: TapeGraphs) -> None:
    plans = device_loop.plans
    g = Cell()
    assert plans.memory() == 0
    with torch.no_grad():
        solve(g, *inputs())
    small = plans.memory()
    assert small >= 5 * FEATURES * 8 * (2 * 5 + 3)
    with torch.no_grad():
        solve(g, *inputs(50))
    assert plans.memory() > 8 * small
    plans.clear()
    assert plans.memory() == len(plans) == 0


def test_plans_go_with_their_module(tape: TapeGraphs) -> None:
    g = Cell()
    solve(g, *inputs())
    assert len(device_loop.plans) == 2
    del g
    gc.collect()
    assert len(device_loop.plans) == 0
    assert tape.log.count("close") == 3


class OnePlan:
    """A plan that counts how often it was closed."""

    def __init__(self, key: tuple[Any, ...], memory: int = 7) -> None:
        self.key = key
        self.memory = memory
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_a_lent_plan_is_nobody_elses() -> None:
    plans = PlanCache()
    plan = OnePlan(("a",))
    plans.lend(plan)
    assert plans.take(("a",)) is None
    assert plans.has(("a",))
    plans.give_back(plan)
    assert plans.take(("b",)) is None
    assert plans.take(("a",)) is plan
    assert plans.take(("a",)) is None
    assert plans.memory() == 7


def test_a_plan_at_work_is_closed_when_it_is_done() -> None:
    plans = PlanCache()
    plan = OnePlan(("a",))
    plans.lend(plan)
    plans.clear()
    assert plan.closed == 0
    plans.give_back(plan)
    assert plan.closed == 1
    assert plans.take(("a",)) is None


def test_large_plans_make_room_for_each_other() -> None:
    plans = PlanCache(most_bytes=100)
    made = [OnePlan((name,), 60) for name in "abc"]
    for plan in made:
        plans.lend(plan)
        plans.give_back(plan)
    assert [plan.closed for plan in made] == [1, 0, 0]
    assert plans.memory() == 120


def test_switches_that_torch_will_not_sum_up() -> None:
    """torch.get_float32_matmul_precision() raises once a single one was set."""
    matmul = torch.backends.cuda.matmul
    flags, before = numeric_flags(), matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert numeric_flags() != flags
    finally:
        matmul.fp32_precision = before
    assert numeric_flags() == flags


def test_a_refusal_is_tried_again_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpi_cuda.device_loop.cache.RETRY_AFTER", 3)
    plans = PlanCache()
    plans.refuse(("a",), Refused("no"))
    assert [plans.refusal(("a",)) for _ in range(4)] == ["no", "no", "no", None]


def test_threads_share_no_memory(tape: TapeGraphs) -> None:
    g = Cell()
    expected = [gradients(g, *inputs(seed=seed), route="host") for seed in range(4)]
    failures: list[str] = []
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        barrier.wait()
        for _ in range(5):
            found = gradients(g, *inputs(seed=seed))
            if not all(map(torch.equal, found, expected[seed])):
                failures.append(f"seed {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_solve_inside_g_does_not_share_its_plan(tape: TapeGraphs) -> None:
    g = Cell()
    x0, z = inputs()

    def outer(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * fpi.fixed_point(g, x, z, **TIGHT).value

    with torch.no_grad():
        solve(g, x0, z)
        expected = solve(outer, x0, z, route="host")
        assert_same(solve(outer, x0, z, route=None), expected)
        assert_same(solve(outer, x0, z, route=None), expected)


def test_the_tape_itself_stands_for_a_graph() -> None:
    """It must be able to show what the tests above look for."""
    graphs = TapeGraphs()
    weight = torch.ones(2)
    out = torch.zeros(2)
    number = 2.0
    tape = Tape(graphs)
    with tape:
        out.copy_(weight * number)
    tape.undo()
    assert out.tolist() == [0.0, 0.0]
    weight.fill_(3.0)
    number = 5.0
    tape.replay()
    assert out.tolist() == [6.0, 6.0]
    weight = torch.full((2,), 7.0)
    tape.replay()
    assert out.tolist() == [6.0, 6.0]
