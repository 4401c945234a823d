"""The host loop that every fixed-point solver shares: evaluate, step, see who is left."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.coupling import Coupling
from fpi_cuda.loops.coupled import RowWatch, System, solve_jointly
from fpi_cuda.loops.polling import CountAtOnce, CountNever, active_count
from fpi_cuda.loops.stepping import Backend, BoundMap, apart_from, step_of
from fpi_cuda.loops.stepping import step as step
from fpi_cuda.loops.workspace import allocate
from fpi_cuda.ops.noise import EVERY, noise_of
from fpi_cuda.options import FixedPointSolver
from fpi_cuda.solution import SolveResult, Status


def solve(
    evaluate: BoundMap,
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
) -> SolveResult:
    """Iterate from x0 until every sample has stopped.

    Args:
        evaluate: the map on flat states; see BoundMap.
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
    """
    if x0.shape[0] == 0:
        return empty_result(x0)
    with torch.no_grad():
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
        storage = x.untyped_storage().data_ptr()
        rows: Tensor | None = None
        number = 0
        num_active: int | None = x.shape[0]
        while True:
            gx = evaluate(x, rows)
            if gx.untyped_storage().data_ptr() == storage or not gx.is_contiguous():
                gx = apart_from(x, gx)
            if number == 0:
                # Only now: the first evaluation may need a copy of x besides these arrays.
                work = allocate(x0, solver, atol)
                work.scratch = backend.scratch(x0)
                op, arrays, numbers = step_of(backend, solver, work, rtol, max_steps)
                exact = arithmetic is None or arithmetic == x0.dtype
                noise = None if exact else noise_of(arithmetic, x0.dtype, max_steps)
            if watch is not None and watch.looks_early:
                all_active = num_active is None or num_active == x.shape[0]
                if watch.found(x, gx, work, number, all_active=all_active):
                    del arrays  # their memory, for the joint solve
                    return watch.go_on(x, gx, work, number)
            op(x, gx, rows, *arrays, **numbers)
            number += 1
            if number == max_steps:
                break  # and with it every sample that was left
            status = work.status if rows is None else work.status[rows]
            if at_once:
                num_active = status.shape[0] - int(torch.count_nonzero(status))
            else:
                num_active = count.after_step(status)
            if num_active == 0:
                break
            if rowwise and num_active is not None and num_active <= count.pays_below * len(x):
                keep = active_first(status)[:num_active]
                x = x[keep]
                storage = x.untyped_storage().data_ptr()
                rows = keep if rows is None else rows[keep]
            if noise is not None and num_active is not None and number % EVERY == 0:
                noise.after_step(evaluate, x, rows, work)
            del gx  # its memory, for the next evaluation
        del arrays  # their memory, should the rows have to be solved jointly
        result = SolveResult(work.best, work.status, work.num_steps, work.residual)
        return result if watch is None else watch.settled(result, gx, work)


def active_first(status: Tensor) -> Tensor:
    """Rows of `status` (n,), active ones first and in order: int64, without a look at them."""
    return torch.argsort((status != Status.ACTIVE).to(torch.uint8), stable=True)


def empty_result(x0: Tensor) -> SolveResult:
    """The account of a batch without samples."""
    device = x0.device
    return SolveResult(
        x0.clone(),
        torch.zeros(0, dtype=torch.int8, device=device),
        torch.zeros(0, dtype=torch.int32, device=device),
        torch.zeros(0, dtype=torch.float64, device=device),
    )
