"""What cannot be captured goes to the host and says why; which way a solve goes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from loops.device.captured import (
    FEATURES,
    Cell,
    assert_like_host,
    assert_same,
    inputs,
    solve,
)
from tape import Loop, TapeGraphs
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda.loops import device as device_loop
from fpi_cuda.loops.device.trace import Recorder


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


def test_what_needs_the_host_refuses_the_device(tape: TapeGraphs) -> None:
    g, (x0, z) = Cell(), inputs()
    with pytest.raises(RuntimeError, match="adjoint=Unroll"):
        solve(g, x0, z.requires_grad_(), adjoint=fpi.Unroll())
    with pytest.raises(RuntimeError, match=r"inside torch\.func transforms"):
        torch.func.grad(lambda z: solve(g, x0, z).value.sum())(z.detach())
    with pytest.raises(RuntimeError, match="the batch is empty"):
        solve(g, x0[:0], z[:0])
