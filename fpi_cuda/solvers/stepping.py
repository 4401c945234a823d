"""One step of a solver on every active sample, by the kernels of a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fpi_cuda.options import Anderson, Broyden, FixedPointSolver
from fpi_cuda.solvers.workspace import Workspace

FlatMap = Callable[[Tensor, "Tensor | None"], Tensor]
"""evaluate(x, rows): g on flat states. x is (n, D) and is overwritten by the next step; rows is
None where x holds the whole batch, else (n,) int64, the samples that x holds. The same rows
object is passed until the batch shrinks again."""


class Backend(Protocol):
    """One implementation of the step ops. The schemas are those of csrc/step_ops.cpp."""

    name: str
    scratch: Callable[[Tensor], Tensor | None]
    num_moved: Callable[[Tensor, Tensor, Tensor, Tensor], int]
    anderson_step_: Callable[..., None]
    broyden_step_: Callable[..., None]


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


def apart_from(x: Tensor, gx: Tensor) -> Tensor:
    """gx contiguous, and copied if it lies in the storage of x: g returned x or a view of it."""
    if gx.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        gx = gx.clone()
    return gx.contiguous()
