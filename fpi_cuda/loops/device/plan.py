"""One solve, captured: its memory, and the graph that iterates there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpi_cuda.autograd import BoundMap, Linearization
from fpi_cuda.loops.device.cache import Key
from fpi_cuda.loops.device.graphs import Graphs, Refused, Replayable
from fpi_cuda.loops.device.memory import Arena, Standins, bytes_of
from fpi_cuda.loops.device.method import Method
from fpi_cuda.loops.device.trace import Call, Recorder, require_repeatable, require_same
from fpi_cuda.solution import SolveResult


class Plan:
    """What two kinds of captured solves share. One call at a time may use it.

    Attributes:
        key: where the cache keeps it.
        calls: what one evaluation computed when it was captured.
    """

    def __init__(
        self, key: Key, bound_map: BoundMap, x: Tensor, method: Method, graphs: Graphs
    ) -> None:
        self.key = key
        self.calls: list[Call] = []
        self._graphs = graphs
        self._arena = Arena(x, method)
        self._standins = Standins(bound_map)
        self._fence = graphs.fence(x.device)
        self._captured: list[Replayable] = []

    @property
    def memory(self) -> int:
        """Bytes that it holds."""
        return bytes_of(self._tensors()) + sum(graph.memory for graph in self._captured)

    def close(self) -> None:
        """Give the memory back."""
        self._fence.retire(self._tensors())
        while self._captured:
            self._captured.pop().close()

    def _recorder(self, launches: Callable[[], int] | None = None) -> Recorder:
        return Recorder(self._arena.x.device, self._standins.leaves, launches)

    def _finish(self) -> SolveResult:
        """Run the loop, which was captured last."""
        self._captured[-1].replay()
        result = self._arena.result()
        self._fence.mark()
        return result

    def _tensors(self) -> list[Tensor]:
        return self._arena.tensors() + self._standins.leaves


class SolvePlan(Plan):
    """A captured solve of x = g(x)."""

    def warm_up(self, bound_map: BoundMap, x0: Tensor, atol: float | Tensor) -> None:
        """One evaluation of g: what its kernels set up then must not happen in a capture."""
        self._arena.begin(x0, atol)
        self._standins.map_of(bound_map).evaluate(self._arena.x, None)

    def build(self, bound_map: BoundMap, x0: Tensor, atol: float | Tensor) -> SolveResult:
        """Capture g as it is now, and solve.

        Raises:
            Refused: g cannot be captured, or not so that it could be used again.
        """
        on_copies = self._standins.map_of(bound_map)
        self._arena.begin(x0, atol)
        recorder = self._recorder()
        gx = on_copies.recorded(recorder.record).evaluate(self._arena.x, None)
        require_repeatable(recorder, on_copies)
        self.calls = recorder.calls
        self._arena.step(gx)
        again: list[Recorder] = []

        def body() -> None:
            again.append(self._recorder(self._graphs.launches))
            self._arena.step(on_copies.recorded(again[0].record).evaluate(self._arena.x, None))

        with self._graphs.session(x0.device) as session:
            self._captured.append(self._arena.loop(session, body))
        require_same(again[0], self.calls)
        return self._finish()

    def solve(self, bound_map: BoundMap, x0: Tensor, atol: float | Tensor) -> SolveResult:
        """Solve for a g that may have become another; its first step is the test of that.

        Raises:
            Refused: it has; the plan is of no use any more.
        """
        self._fence.wait()
        on_copies = self._standins.map_of(bound_map)
        self._arena.begin(x0, atol)
        recorder = self._recorder()
        gx = on_copies.recorded(recorder.record).evaluate(self._arena.x, None)
        require_same(recorder, self.calls)
        self._arena.step(gx)
        return self._finish()


class AdjointPlan(Plan):
    """A captured solve of c = J^T c + b, J = dg/dx at an x.

    Attributes:
        calls_at_x: what the evaluation of g at x computed; the product J^T c follows in calls.
    """

    def __init__(
        self, key: Key, bound_map: BoundMap, x: Tensor, method: Method, graphs: Graphs
    ) -> None:
        super().__init__(key, bound_map, x, method, graphs)
        self.calls_at_x: list[Call] = []
        with torch.inference_mode(False), torch.no_grad():
            self._x = torch.empty_like(self._arena.x)
            self._b = torch.empty_like(self._arena.x)

    def build(
        self, bound_map: BoundMap, x: Tensor, b: Tensor, atol: Tensor
    ) -> tuple[SolveResult, Linearization]:
        """Capture g and its derivative at x, and solve; also give what the host can solve with.

        Raises:
            Refused: it cannot be captured, or not so that it could be used again.
        """
        on_copies = self._set_point(bound_map, x)
        self._begin(b, atol)
        warm = self._linearized(on_copies)
        warm.transposed(self._arena.x)
        recorder = self._recorder()
        eager = self._linearized(on_copies.recorded(recorder.record))
        self.calls_at_x = list(recorder.calls)
        product = recorder.record(eager.transposed, self._arena.x)
        require_repeatable(recorder, on_copies)
        self.calls = recorder.calls
        if eager.gx.requires_grad and len(self.calls) <= len(self.calls_at_x) + 1:
            raise Refused("what autograd computes was not seen")
        again: list[Recorder] = []
        captured: list[Linearization] = []

        def at_x() -> None:
            again.append(self._recorder(self._graphs.launches))
            captured.append(self._linearized(on_copies.recorded(again[0].record)))

        def body() -> None:
            self._step(again[0].record(captured[0].transposed, self._arena.x))

        self._step(product)
        with self._graphs.session(x.device) as session:
            self._captured.append(session.capture(at_x))
            self._captured.append(self._arena.loop(session, body))
        require_same(again[0], self.calls)
        self._captured[0].replay()
        return self._finish(), eager

    def solve(
        self,
        bound_map: BoundMap,
        recorder: Recorder,
        matrix: Linearization,
        b: Tensor,
        atol: Tensor,
    ) -> SolveResult:
        """Solve at the point of `matrix`, whose evaluation of g is in the recorder.

        Raises:
            Refused: g or its derivative is another; the plan is of no use any more.
        """
        self._fence.wait()
        self._set_point(bound_map, matrix.x)
        self._begin(b, atol)
        onward = recorder.fork()
        product = onward.record(matrix.transposed, self._arena.x)
        require_same(onward, self.calls)
        self._step(product)
        self._captured[0].replay()
        return self._finish()

    def _set_point(self, bound_map: BoundMap, x: Tensor) -> BoundMap:
        self._x.copy_(x.detach())
        return self._standins.map_of(bound_map)

    def _begin(self, b: Tensor, atol: Tensor) -> None:
        self._b.copy_(b)
        self._arena.begin(b, atol)

    def _linearized(self, on_copies: BoundMap) -> Linearization:
        # A leaf of its own each time: autograd would have one of an earlier evaluation wait for
        # that one's stream, which a capture must not touch.
        x = self._x.detach().requires_grad_()
        with torch.enable_grad():
            return Linearization(x, on_copies(x))

    def _step(self, product: Tensor) -> None:
        self._arena.step(product + self._b)

    def _tensors(self) -> list[Tensor]:
        return [*super()._tensors(), self._x, self._b]
