"""The host's loop: torch evaluates g, then one step of the solver advances all samples."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from fpi_cuda.autograd import BoundMap
from fpi_cuda.coupling import Coupling
from fpi_cuda.evaluation.context import being_captured
from fpi_cuda.loops.coupled import RowWatch, System, solve_jointly
from fpi_cuda.loops.plan import Plan
from fpi_cuda.loops.stepping import (
    Backend,
    Evaluate,
    HostWork,
    Workspace,
    allocate,
    apart_from,
    empty_result,
    is_native,
    step_of,
)
from fpi_cuda.loops.traced import stand_in
from fpi_cuda.ops.noise import EVERY, noise_of
from fpi_cuda.options import FixedPointSolver
from fpi_cuda.solution import SolveResult, Status

if TYPE_CHECKING:
    from fpi_cuda._C import HostSteps

ALREADY = contextlib.nullcontext()
"""In the place of no_grad under it."""

name = "host"
is_late = False
sees_all_rows = False
is_rowwise = False
why_not = None
adjoint = None


def solve(
    plan: Plan, bound_map: BoundMap, x0: Tensor, coupling: Coupling | None
) -> tuple[SolveResult, list[Tensor]]:
    """See Loop. What is kept is the latest value of g, if that was of all rows together."""
    options = plan.options
    latest: list[Tensor] = []
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # whose tensors do not count how often they are changed
            return solve(plan, bound_map, x0, coupling)
    found = stand_in(bound_map)
    result = iterate(
        bound_map.evaluator(x0, found),
        x0,
        options.solver,
        rtol=options.rtol,
        atol=options.atol,
        max_steps=options.max_steps,
        backend=plan.engine,
        rowwise=plan.rowwise and plan.layout.batch > 1 and bound_map.selectable(),
        coupling=coupling,
        arithmetic=bound_map.arithmetic,
        latest=latest,
    )
    if found is not None:
        found.over()
    return result, latest


def iterate(
    evaluate: Evaluate,
    x0: Tensor,
    solver: FixedPointSolver,
    *,
    rtol: float,
    atol: float | Tensor,
    max_steps: int,
    backend: Backend,
    rowwise: bool = False,
    coupling: Coupling | None = None,
    linear: bool = False,
    arithmetic: torch.dtype | None = None,
    latest: list[Tensor] | None = None,
) -> SolveResult:
    """Iterate from x0 until every sample has stopped.

    Args:
        evaluate: the map on flat states; see Evaluate.
        x0: (B, D), plain, not modified.
        atol: one number, or (B,) float64.
        backend: from fpi_cuda.ops.resolve.
        rowwise: evaluate may be called on some of the rows alone; stopped samples then leave
            the batch, and cost nothing.
        coupling: nobody promised that the rows are independent, and this is what is known of it:
            they are watched, and solved as one sample once they are seen to depend on one another.
            None: it was promised.
        linear: jointly, the tolerance is ||atol||; see fpi_cuda.loops.coupled.
        arithmetic: what autocast gives to products in evaluate; None where it is off.
        latest: gets the latest value of the map, if that was of all rows together: at x of the
            result, but for rows that failed.
    """
    if x0.shape[0] == 0:
        return empty_result(x0)
    with torch.no_grad() if torch.is_grad_enabled() else ALREADY:
        watch = None
        if coupling is not None:
            system = System(
                evaluate, solver, rtol, atol, max_steps, backend, linear, arithmetic,
                coupling.together,
            )  # fmt: skip
            if coupling.joint:
                return solve_jointly(system, x0)
        count = active_count(x0.device)
        at_once = isinstance(count, CountAtOnce)
        if coupling is not None:
            watch = RowWatch(system, x0, coupling, blind=isinstance(count, CountNever))
        x = x0.clone(memory_format=torch.contiguous_format)
        address, dim = x.data_ptr(), x.shape[1]
        rows: Tensor | None = None
        steps: HostSteps | None = None
        work: Workspace | HostWork
        number, idle = 0, 0
        num_active: int | None = x.shape[0]
        while True:
            gx = evaluate(x, rows)
            # What lies in the storage of x begins where it does, for x fills it.
            if gx.data_ptr() == address or not gx.is_contiguous() or gx.is_neg():
                gx = apart_from(x, gx)
            if number == 0:
                # Only now: the first evaluation may need a copy of x besides these arrays.
                if at_once and is_native(backend):
                    work = HostWork(x, solver, atol, rtol, max_steps)
                    steps = work.steps
                else:
                    work = allocate(x0, solver, atol, backend.scratch(x0))
                    op, arrays, numbers = step_of(backend, solver, work, rtol, max_steps)
                exact = arithmetic is None or arithmetic == x0.dtype
                noise = None if exact else noise_of(arithmetic, x0.dtype, max_steps)
            if watch is not None and watch.looks_early:
                all_active = num_active is None or num_active == x.shape[0]
                gx = gx.view(x.shape)
                if watch.found(x, gx, work, number, all_active=all_active):
                    arrays = ()  # their memory, for the joint solve
                    return watch.go_on(x, gx, work, number)
            number += 1
            if steps is not None:
                num_active = steps.step(gx.data_ptr())
            else:
                op(x, gx.view(x.shape), rows, *arrays, **numbers)
            if number == max_steps:
                break  # and with it every sample that was left
            if steps is None:
                num_active = count.after_step(work.status if rows is None else work.status[rows])
            if num_active == 0:
                break
            if rowwise and num_active is not None and num_active <= count.pays_below * len(x):
                idle += (len(x) - num_active) * max(dim, LEAST_DIM)
                # Whoever has given a promise for rows that leave is held to it on all of them: that
                # takes an evaluation more.
                whole = x.numel() if rows is None else 0
                if idle >= (count.idle_below and max(count.idle_below, whole)):
                    idle = 0
                    if steps is not None:
                        left = torch.empty((num_active, dim), dtype=x.dtype, device=x.device)
                        keep = torch.empty(num_active, dtype=torch.int64, device=x.device)
                        steps.gather(left.data_ptr(), keep.data_ptr())
                        x, rows = left, keep  # only now may those before be freed
                    else:
                        status = work.status if rows is None else work.status[rows]
                        keep = active_first(status)[:num_active]
                        x = x[keep]
                        rows = keep if rows is None else rows[keep]
                    address = x.data_ptr()
            if noise is not None and num_active is not None and number % EVERY == 0:
                noise.after_step(evaluate, x, rows, work)
            del gx  # its memory, for the next evaluation
        arrays = ()  # their memory, should the rows have to be solved jointly
        result = SolveResult(work.best, work.status, work.num_steps, work.residual)
        gx = gx.view(x.shape)
        if latest is not None and rows is None:
            latest.append(gx)
        return result if watch is None else watch.settled(result, gx, work)


LEAST_DIM = 128
"""Elements of a sample below which evaluating it costs no less."""


def active_first(status: Tensor) -> Tensor:
    """Rows of `status` (n,), active ones first and in order: int64, without a look at them."""
    return torch.argsort((status != Status.ACTIVE).to(torch.uint8), stable=True)


class ActiveCount(Protocol):
    """What the host loop asks after every step.

    Attributes:
        pays_below: share of active samples from which on it pays that the others leave the batch.
        idle_below: elements of stopped samples that are evaluated in vain before they do.
    """

    pays_below: float
    idle_below: int

    def after_step(self, status: Tensor) -> int | None:
        """An upper bound on the active samples of `status` (n,): active ones never come back.

        None as long as nothing is known.
        """


def active_count(device: torch.device) -> ActiveCount:
    """The way to count on this device."""
    if device.type != "cuda":
        return CountAtOnce()
    if being_captured(device):
        return CountNever()
    stream = torch.cuda.current_stream(device)
    return CountLater(lambda: StreamEvent(stream), pinned=True)


class CountAtOnce:
    """Reads the status itself: on the CPU it is there."""

    # Gathering the active rows costs about as much as a step on a fifth of them, and where they are
    # few, as evaluating as many elements as this.
    pays_below = 0.8
    idle_below = 8192

    def after_step(self, status: Tensor) -> int:
        """The active samples now."""
        return len(status) - int(torch.count_nonzero(status))


class CountNever:
    """Knows nothing: while a solve is being captured there is nothing to know."""

    pays_below = 0.0
    idle_below = 0

    def after_step(self, status: Tensor) -> None:
        """None."""


class Event(Protocol):
    """A mark in the device's queue."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class StreamEvent:
    """An event on `stream`, recorded as it is made."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)
        self.query = self._event.query
        self.synchronize = self._event.synchronize


class Pending(NamedTuple):
    """A count on its way: of `total` samples, `stopped` have stopped once `event` has passed."""

    event: Event
    stopped: Tensor
    total: int


class CountLater:
    """Has the count copied to pinned memory, and reads it a step or two later.

    The device always holds a step that is not begun, so it never waits for the host to look. The
    host waits only when it is LAG steps ahead: further ahead, it would queue evaluations that
    nobody needs. Steps taken after every sample has stopped change nothing.

    Args:
        record: puts an event behind what is queued so far.
        pinned: copies may run beside the host; needs a CUDA device.
    """

    LAG = 2

    # A gather is a dozen launches here, and may change which kernels evaluate g.
    pays_below = 0.5
    idle_below = 0

    def __init__(self, record: Callable[[], Event], *, pinned: bool) -> None:
        self._record = record
        self._memory = torch.empty(self.LAG + 1, dtype=torch.int64, pin_memory=pinned)
        self._turn = 0
        self._pending: deque[Pending] = deque()
        self._known: int | None = None

    def after_step(self, status: Tensor) -> int | None:
        """The active samples as of at most LAG steps ago."""
        stopped = self._memory[self._turn]
        self._turn = (self._turn + 1) % len(self._memory)
        stopped.copy_(torch.count_nonzero(status), non_blocking=True)
        self._pending.append(Pending(self._record(), stopped, len(status)))
        if len(self._pending) > self.LAG:
            self._pending[0].event.synchronize()
        while self._pending and self._pending[0].event.query():
            passed = self._pending.popleft()
            self._known = passed.total - int(passed.stopped)
        return self._known
