"""One step of a solver on every active sample, by the kernels of a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from fpi_cuda.loops.workspace import Workspace
from fpi_cuda.options import Anderson, Broyden, FixedPointSolver

BoundMap = Callable[[Tensor, "Tensor | None"], Tensor]
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


def step_of(
    backend: Backend, solver: FixedPointSolver, work: Workspace, rtol: float, max_steps: int
) -> tuple[Callable[..., None], tuple[Tensor, ...], dict[str, Any]]:
    """The op that takes a step of `solver`, and what it is given after x, gx and rows each time.

    That is op(x, gx, rows, *arrays, **numbers), in place on every active sample of x.
    """
    account = (work.control, work.atol, work.status, work.num_steps, work.residual)
    points = (work.best, work.anchor, work.f_previous, work.partner_previous)
    history = (*points, work.columns_f, work.columns_g)
    numbers: dict[str, Any] = {"rtol": rtol, "max_steps": max_steps, "scratch": work.scratch}
    if isinstance(solver, Broyden):
        return backend.broyden_step_, (*history, *account), {**numbers, "beta": solver.beta}
    if isinstance(solver, Anderson):
        numbers.update(beta=solver.beta, ridge=solver.ridge)
    else:
        numbers.update(beta=solver.damping, ridge=0.0)
    return backend.anderson_step_, (*history, work.gram, *account), numbers


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
    op, arrays, numbers = step_of(backend, solver, work, rtol, max_steps)
    op(x, gx, rows, *arrays, **numbers)


def apart_from(x: Tensor, gx: Tensor) -> Tensor:
    """gx contiguous, and copied if it lies in the storage of x: g returned x or a view of it."""
    if gx.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        gx = gx.clone()
    return gx.contiguous()
