"""The host loop that every fixed-point solver shares: evaluate, step, see who is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fpi_cuda.options import Anderson, Broyden, FixedPointSolver
from fpi_cuda.result import SolveResult, Status
from fpi_cuda.solvers.noise import EVERY, noise_of
from fpi_cuda.solvers.polling import active_count
from fpi_cuda.solvers.workspace import Workspace, allocate

FlatMap = Callable[[Tensor, "Tensor | None"], Tensor]
"""evaluate(x, rows): g on flat states. x is (n, D) and is overwritten by the next step; rows is
None where x holds the whole batch, else (n,) int64, the samples that x holds. The same rows
object is passed until the batch shrinks again."""


class Backend(Protocol):
    """One implementation of the step ops. The schemas are those of csrc/step_ops.cpp."""

    name: str
    scratch: Callable[[Tensor], Tensor | None]
    anderson_step_: Callable[..., None]
    broyden_step_: Callable[..., None]


def solve(
    evaluate: FlatMap,
    x0: Tensor,
    solver: FixedPointSolver,
    *,
    rtol: float,
    atol: float | Tensor,
    max_steps: int,
    backend: Backend,
    rowwise: bool = False,
    arithmetic: torch.dtype | None = None,
) -> SolveResult:
    """Iterate from x0 until every sample has stopped.

    Args:
        evaluate: the map on flat states; see FlatMap.
        x0: (B, D), plain, not modified.
        atol: one number, or (B,) float64.
        backend: from fpi_cuda.backends.resolve.
        rowwise: evaluate may be called on some of the rows alone; stopped samples then leave
            the batch, and cost nothing.
        arithmetic: what autocast gives to products in evaluate; None where it is off.
    """
    if x0.shape[0] == 0:
        return empty_result(x0)
    with torch.no_grad():
        x = x0.clone(memory_format=torch.contiguous_format)
        rows: Tensor | None = None
        # Before the arrays are there: the first evaluation may need a copy of x besides.
        gx = apart_from(x, evaluate(x, rows))
        work = allocate(x0, solver, atol)
        work.scratch = backend.scratch(x0)
        count = active_count(x0.device)
        noise = noise_of(arithmetic, x0.dtype, max_steps)
        number = 0
        while True:
            step(backend, solver, work, x, gx, rows, rtol, max_steps)
            del gx  # its memory, for the next evaluation
            number += 1
            if number == max_steps:
                break  # and with it every sample that was left
            status = work.status if rows is None else work.status[rows]
            num_active = count.after_step(status)
            if num_active == 0:
                break
            if rowwise and num_active is not None and num_active <= count.pays_below * len(x):
                keep = active_first(status)[:num_active]
                x = x[keep]
                rows = keep if rows is None else rows[keep]
            if noise is not None and num_active is not None and number % EVERY == 0:
                noise.after_step(evaluate, x, rows, work)
            gx = apart_from(x, evaluate(x, rows))
        return SolveResult(work.best, work.status, work.num_steps, work.residual)


def step(
    backend: Backend,
    solver: FixedPointSolver,
    work: Workspace,
    x: Tensor,
    gx: Tensor,
    rows: Tensor | None,
    rtol: float,
    max_steps: int,
) -> None:
    """One step of `solver` on every active sample of x, in place."""
    account = (work.control, work.atol, work.status, work.num_steps, work.residual)
    points = (work.best, work.anchor, work.f_previous, work.partner_previous)
    history = (*points, work.columns_f, work.columns_g)
    if isinstance(solver, Broyden):
        backend.broyden_step_(
            x, gx, rows, *history, *account,
            rtol=rtol, max_steps=max_steps, beta=solver.beta, scratch=work.scratch,
        )  # fmt: skip
        return
    beta, ridge = (
        (solver.beta, solver.ridge) if isinstance(solver, Anderson) else (solver.damping, 0.0)
    )
    backend.anderson_step_(
        x, gx, rows, *history, work.gram, *account,
        rtol=rtol, max_steps=max_steps,
        beta=beta, ridge=ridge, scratch=work.scratch,
    )  # fmt: skip


def active_first(status: Tensor) -> Tensor:
    """Rows of `status` (n,), active ones first and in order: int64, without a look at them."""
    return torch.argsort((status != Status.ACTIVE).to(torch.uint8), stable=True)


def apart_from(x: Tensor, gx: Tensor) -> Tensor:
    """gx contiguous, and copied if it lies in the storage of x: g returned x or a view of it."""
    if gx.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        gx = gx.clone()
    return gx.contiguous()


def empty_result(x0: Tensor) -> SolveResult:
    """The account of a batch without samples."""
    device = x0.device
    return SolveResult(
        x0.clone(),
        torch.zeros(0, dtype=torch.int8, device=device),
        torch.zeros(0, dtype=torch.int32, device=device),
        torch.zeros(0, dtype=torch.float64, device=device),
    )
