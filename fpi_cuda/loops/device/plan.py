"""Captured solves: what tells them apart, the memory of each, and the graphs that iterate there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fpi_cuda.autograd import BoundMap, Linearization
from fpi_cuda.coupling import site_of
from fpi_cuda.loops.device.cuda_graphs import CapturedGraph, CudaGraphs, Refused
from fpi_cuda.loops.device.trace import Call, Recorder, require_repeatable, require_same
from fpi_cuda.loops.host import iterate
from fpi_cuda.loops.stepping import Backend, allocate, apart_from, reset, step_of
from fpi_cuda.norms import row_norm
from fpi_cuda.options import FixedPointSolver
from fpi_cuda.solution import SolveResult, Status

Key = tuple[Hashable, ...]

DISAGREES = "its first solve disagreed with the host loop ({}), so the captured graph is not g"

# The check of an adjoint's plan wants many steps; what backward asks for is passed to solve.
CHECKED_TO = 1e-4
# Gaps between the numbers of a view are kept up to this many times its own size.
MOST_GAPS = 4


class Method(NamedTuple):
    """How a system is solved: all that a captured step holds besides the map.

    Attributes:
        solver, rtol, max_steps, backend: as in fpi_cuda.loops.host.iterate. The floor is that of
            the state's dtype, under autocast too: a captured step measures no noise of g.
    """

    solver: FixedPointSolver
    rtol: float
    max_steps: int
    backend: Backend


def key_of(kind: str, bound_map: BoundMap, method: Method) -> Key:
    """Where the plan of such a solve is kept; kind is "solve" or "adjoint".

    A key need not tell two maps apart, since the plan's trace does; it spares the attempt.
    """
    return (
        kind,
        site_of(bound_map.g),
        bound_map.layout,
        tuple(form_of(t, kind == "adjoint") for t in pytree.tree_leaves(bound_map.read)),
        method,
        bound_map.damping,
        bound_map.context.autocast_key,
        numeric_flags(),
    )


def form_of(value: Any, with_graph: bool) -> Hashable:
    """Shape, strides and dtype of a tensor; of anything else the type."""
    if not isinstance(value, Tensor):
        return type(value).__qualname__
    strides = value.stride() if value.layout == torch.strided else None
    form = (type(value), value.device, value.dtype, tuple(value.shape), strides)
    return (*form, with_graph and value.requires_grad)


def numeric_flags() -> Hashable:
    """Global switches that decide which kernels an op becomes, and which torch does not record."""
    backends: Any = torch.backends
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    # Asked one by one: the switches over all of them raise where a user has set single ones.
    return (
        *(op.fp32_precision for op in (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul)),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )


class Plan:
    """What two kinds of captured solves share. One call at a time may use it.

    Its iterate, and copies of what g reads besides, lie at addresses that stay.

    Attributes:
        key: where the cache keeps it.
        calls: what one evaluation computed when it was captured.
        solve: for a map that may have become another; Refused: it has, and the plan is of no use.
    """

    solve: Callable[..., SolveResult]

    def __init__(
        self, key: Key, bound_map: BoundMap, x: Tensor, method: Method, graphs: CudaGraphs
    ) -> None:
        self.key = key
        self.calls: list[Call] = []
        self._graphs = graphs
        self._method = method
        self._device = x.device
        with torch.inference_mode(False), torch.no_grad():
            self._x = torch.empty_like(x.detach(), memory_format=torch.contiguous_format)
            scratch = method.backend.scratch(self._x)
            self._work = allocate(self._x, method.solver, 0.0, scratch)
            self._rounds = torch.zeros(1, dtype=torch.int32, device=x.device)
            self._static_inputs = [
                empty_with_strides(t.detach()).requires_grad_(t.requires_grad)
                for t in read_on_device(bound_map)
            ]
        arrays = [array for array in vars(self._work).values() if array is not None]
        self._tensors = [self._x, self._rounds, *arrays, *self._static_inputs]
        self._fence = graphs.fence(x.device)
        self._captured: list[CapturedGraph] = []

    @property
    def memory(self) -> int:
        """Bytes that it holds, each storage once."""
        storages = [t.untyped_storage() for t in self._tensors]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(sizes.values()) + sum(graph.memory for graph in self._captured)

    def close(self) -> None:
        """Give the memory back."""
        self._fence.retire(self._tensors)
        while self._captured:
            self._captured.pop().close()

    def _begin(self, x0: Tensor, atol: float | Tensor) -> None:
        """Make it a solve from x0 that has not begun."""
        self._x.copy_(x0)
        reset(self._work, self._x, atol)

    def _on_static_inputs(self, bound_map: BoundMap) -> BoundMap:
        """`bound_map` on the copies of what it reads, which get its numbers."""
        remaining = iter(self._static_inputs)

        def static(t: Any) -> Any:
            # Numbers of the host are compared one by one, for a graph holds them as constants.
            if not is_on(self._device, t):
                return t
            copy = next(remaining)
            with torch.no_grad():
                unexpanded(copy).copy_(unexpanded(t.detach()))
            return copy

        return bound_map.reading(pytree.tree_map(static, bound_map.read))

    def _recorder(self, launches: Callable[[], int] | None = None) -> Recorder:
        return Recorder(self._device, self._static_inputs, launches)

    def _step(self, gx: Tensor) -> None:
        """One step of every active sample, from g at x."""
        solver, rtol, max_steps, backend = self._method
        op, arrays, numbers = step_of(backend, solver, self._work, rtol, max_steps)
        op(self._x, apart_from(self._x, gx), None, *arrays, **numbers)

    def _captured_solve(
        self,
        recorder: Recorder,
        bodies: Sequence[Callable[[], None]],
        evaluate: Callable[[Tensor, Tensor | None], Tensor],
        x0: Tensor,
        atol: float | Tensor,
    ) -> SolveResult:
        """Capture the bodies, the last of which is repeated, and solve.

        Args:
            recorder: of what the bodies compute.
            evaluate: the map, for the host loop, with which this solve from x0 has to agree.
        """
        *once, body = bodies
        with self._graphs.session(self._device) as session:
            self._captured += map(session.capture, once)
            self._captured.append(
                session.capture_loop(body, self._work.status, self._rounds, self._method.max_steps)
            )
        require_same(recorder, self.calls)
        result = self._finish()
        expected = iterate(evaluate, x0, atol=atol, **self._method._asdict())
        require_agreement(result, expected)
        return result

    def _finish(self) -> SolveResult:
        """Run what was captured, the loop last, and copy what it came to."""
        for graph in self._captured:
            graph.replay()
        work = self._work
        found = (work.best, work.status, work.num_steps, work.residual)
        result = SolveResult(*map(torch.clone, found))
        self._fence.mark()
        return result


class SolvePlan(Plan):
    """A captured solve of x = g(x)."""

    def warm_up(self, bound_map: BoundMap, x0: Tensor, atol: float | Tensor) -> None:
        """One evaluation of g: what its kernels set up then must not happen in a capture."""
        self._begin(x0, atol)
        self._on_static_inputs(bound_map).evaluate(self._x, None)

    def build(self, bound_map: BoundMap, x0: Tensor, atol: float | Tensor) -> SolveResult:
        """Capture g as it is now, solve, and compare with the host loop.

        Raises:
            Refused: g cannot be captured, or not so that it could be used again.
        """
        on_copies, recorder, gx = self._first_evaluation(bound_map, x0, atol)
        require_repeatable(recorder, on_copies)
        self.calls = recorder.calls
        self._step(gx)
        again = self._recorder(self._graphs.launches)

        def body() -> None:
            self._step(on_copies.recorded(again.record).evaluate(self._x, None))

        return self._captured_solve(again, (body,), bound_map.evaluate, x0, atol)

    def solve(self, bound_map: BoundMap, x0: Tensor, atol: float | Tensor) -> SolveResult:
        """See Plan; the first step is the test of whether g is the same."""
        self._fence.wait()
        _, recorder, gx = self._first_evaluation(bound_map, x0, atol)
        require_same(recorder, self.calls)
        self._step(gx)
        return self._finish()

    def _first_evaluation(
        self, bound_map: BoundMap, x0: Tensor, atol: float | Tensor
    ) -> tuple[BoundMap, Recorder, Tensor]:
        on_copies = self._on_static_inputs(bound_map)
        self._begin(x0, atol)
        recorder = self._recorder()
        return on_copies, recorder, on_copies.recorded(recorder.record).evaluate(self._x, None)


class AdjointPlan(Plan):
    """A captured solve of c = J^T c + b, J = dg/dx at a point.

    Attributes:
        calls_at_point: what the evaluation of g there computed; the product J^T c follows in calls.
    """

    def __init__(
        self, key: Key, bound_map: BoundMap, x: Tensor, method: Method, graphs: CudaGraphs
    ) -> None:
        super().__init__(key, bound_map, x, method, graphs)
        self.calls_at_point: list[Call] = []
        with torch.inference_mode(False), torch.no_grad():
            self._point = torch.empty_like(self._x)
            self._b = torch.empty_like(self._x)
        self._tensors += [self._point, self._b]

    def build(self, bound_map: BoundMap, point: Tensor) -> None:
        """Capture g and its derivative at a point (B, D), and compare with the host loop.

        Raises:
            Refused: it cannot be captured, or not so that it could be used again.
        """
        b = probe_like(point)
        atol = CHECKED_TO * row_norm(b)
        on_copies = self._begin_at(bound_map, point, b, atol)
        self._linearized(on_copies).transposed(self._x)  # see SolvePlan.warm_up
        recorder = self._recorder()
        eager = self._linearized(on_copies.recorded(recorder.record))
        self.calls_at_point = list(recorder.calls)
        product = recorder.record(eager.transposed, self._x)
        require_repeatable(recorder, on_copies)
        self.calls = recorder.calls
        if eager.gx.requires_grad and len(self.calls) <= len(self.calls_at_point) + 1:
            raise Refused("what autograd computes was not seen")
        again = self._recorder(self._graphs.launches)
        captured: list[Linearization] = []

        def at_point() -> None:
            captured.append(self._linearized(on_copies.recorded(again.record)))

        def body() -> None:
            self._step(again.record(captured[0].transposed, self._x) + self._b)

        self._step(product + self._b)
        self._captured_solve(
            again, (at_point, body), lambda c, rows: eager.transposed(c) + b, b, atol
        )

    def solve(
        self,
        bound_map: BoundMap,
        recorder: Recorder,
        matrix: Linearization,
        b: Tensor,
        atol: Tensor,
    ) -> SolveResult:
        """See Plan; at the point of `matrix`, whose evaluation of g is in the recorder."""
        self._fence.wait()
        self._begin_at(bound_map, matrix.x, b, atol)
        onward = recorder.fork()
        product = onward.record(matrix.transposed, self._x)
        require_same(onward, self.calls)
        self._step(product + self._b)
        return self._finish()

    def _begin_at(self, bound_map: BoundMap, point: Tensor, b: Tensor, atol: Tensor) -> BoundMap:
        self._point.copy_(point.detach())
        on_copies = self._on_static_inputs(bound_map)
        self._b.copy_(b)
        self._begin(b, atol)
        return on_copies

    def _linearized(self, on_copies: BoundMap) -> Linearization:
        # A leaf of its own each time: autograd would have one of an earlier evaluation wait for
        # that one's stream, which a capture must not touch.
        x = self._point.detach().requires_grad_()
        with torch.enable_grad():
            return Linearization(x, on_copies(x))


def is_on(device: torch.device, value: Any) -> bool:
    """Whether a value is a tensor that lies there."""
    return isinstance(value, Tensor) and value.device == device


def read_on_device(bound_map: BoundMap) -> list[Tensor]:
    """The tensors that g reads besides x, but for those of the host."""
    device = bound_map.layout.device
    return [t for t in pytree.tree_leaves(bound_map.read) if is_on(device, t)]


def empty_with_strides(t: Tensor) -> Tensor:
    """Memory of its own for a tensor like t, with the strides of t where that is affordable.

    What an op computes does not depend on strides, but which kernel does, and so its rounding.
    """
    base = unexpanded(t)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(base.shape, base.stride(), strict=True))
    if base.numel() == 0 or extent > MOST_GAPS * base.numel():
        return torch.empty_like(t, memory_format=torch.preserve_format)
    memory = torch.empty_strided(base.shape, base.stride(), dtype=t.dtype, device=t.device)
    return memory.expand(t.shape)


def unexpanded(t: Tensor) -> Tensor:
    """t without the repetitions that expand made."""
    for dim, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t


def probe_like(x: Tensor) -> Tensor:
    """(B, D) with every number in [-1, 1] and no symmetry that an error could hide behind."""
    angle = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device)
    return angle.mul_(0.754877666).sin_().reshape(x.shape).to(x.dtype)


def require_agreement(result: SolveResult, expected: SolveResult) -> None:
    """Raise Refused unless two solves of one problem ended alike.

    Where g repeats its bits they end equal. Where it does not, samples that converged must have
    done so at the same point, up to a hundred times what each is known to.
    """
    pairs = zip(result, expected, strict=True)
    if all(torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True) for a, b in pairs):
        return
    if not torch.equal(result.status, expected.status):
        raise Refused(DISAGREES.format("another status"))
    good = expected.status == Status.CONVERGED
    gap = row_norm(result.x - expected.x)
    rounding = torch.finfo(result.x.dtype).eps * row_norm(expected.x)
    known_to = result.residual + expected.residual + rounding
    if bool((good & ~(gap <= 100 * known_to)).any()):
        raise Refused(DISAGREES.format("another point"))
    if not bool(good.any()):
        raise Refused(DISAGREES.format("no sample converged, and their points differ"))
