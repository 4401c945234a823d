"""Rows that may depend on one another: found out while they are solved apart, then solved jointly.

Apart, every row has its own history and stops on its own; that is right only while a row that has
stopped keeps its residual whatever the others do. So stopped rows are looked at again, and in the
end all of them. Where one has moved, all rows become one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fpi_cuda.coupling import Coupling
from fpi_cuda.loops.stepping import (
    Backend,
    Evaluate,
    HostWork,
    Workspace,
    allocate,
    apart_from,
    depth_of,
    step,
)
from fpi_cuda.norms import beyond_rounding, difference_norm, differs, row_norm
from fpi_cuda.ops.noise import EVERY, noise_of
from fpi_cuda.ops.rules import drift_limits
from fpi_cuda.ops.solver_state import column
from fpi_cuda.options import MOST_STEPS, FixedPointSolver
from fpi_cuda.solution import SolveResult, Status


class System(NamedTuple):
    """What is solved, row by row or jointly.

    Attributes:
        evaluate, solver, rtol, max_steps, backend, arithmetic: as in loops.host.iterate.
        atol: one number, or (B,) float64.
        linear: the tolerance is that of all rows together, ||atol||: a right-hand side may be zero
            in some of them.
        together: how many rows in succession may depend on one another.
    """

    evaluate: Evaluate
    solver: FixedPointSolver
    rtol: float
    atol: float | Tensor
    max_steps: int
    backend: Backend
    linear: bool
    arithmetic: torch.dtype | None
    together: int

    def value(self, x: Tensor) -> Tensor:
        """The map at x (B, D), in memory of its own."""
        return apart_from(x, self.evaluate(x, None))


class RowWatch:
    """Looks for rows that depend on others during a solve of each row on its own.

    Args:
        x0: (B, D) where it begins, never written to; B > 1.
        coupling: what is known, and will be.
        blind: the host can read nothing, for the solve is being captured.
    Attributes:
        looks_early: whether `found` may find anything.
    """

    def __init__(self, system: System, x0: Tensor, coupling: Coupling, *, blind: bool) -> None:
        self._system = system
        self._x0 = x0
        self._coupling = coupling
        self._first: Tensor | None = None
        self._next_look = 1
        self._blind = blind
        self.looks_early = not (blind or coupling.independent)

    def found(
        self, x: Tensor, gx: Tensor, work: Workspace | HostWork, number: int, *, all_active: bool
    ) -> bool:
        """Whether rows were seen to depend on others.

        Args:
            gx: g(x), evaluation `number` + 1.
            all_active: no row has stopped, as far as the host knows.
        """
        if number == 0:
            self._first = gx
            return False
        if number >= self._next_look and not all_active:
            self._next_look = 2 * number
            if self._moved_out(x, gx, work):
                return True
        if number == 1 and depth_of(self._system.solver, x.shape[1]) and self._probe_shows(x, gx):
            return True
        if number == 2:
            self._first = None
        return False

    def go_on(self, x: Tensor, gx: Tensor, work: Workspace | HostWork, number: int) -> SolveResult:
        """Solve jointly from here; arguments as in `found`, which was true."""
        self._coupling.depends()
        work.forget()
        scale = group_norm(column(work.control, "scale0"), self._system)
        if self._first is not None:
            # Nothing is lost: the second point is that of the joint solve too.
            return joint_solve(self._system, self._x0, self._first, 1, scale, known=(x, gx))
        return joint_solve(self._system, x, gx, number + 1, scale)

    def settled(self, result: SolveResult, gx: Tensor, work: Workspace | HostWork) -> SolveResult:
        """`result` of the rows on their own, if it is true of all rows together.

        Args:
            gx: the latest evaluation, at result.x; of rows that failed in the last step, perhaps at
                another point.
        """
        system = self._system
        if self._blind:
            gx = system.value(result.x)
            return retold(result, gx, work.atol, system.rtol, by_other_code=True)
        if not system.backend.num_moved(result.x, gx, result.status, result.residual):
            if not self._coupling.independent:
                self._coupling.is_independent()
            return result
        work.forget()
        if bool((result.status != Status.CONVERGED).any()):
            gx = system.value(result.x)
            if not system.backend.num_moved(result.x, gx, result.status, result.residual):
                self._coupling.is_independent()
                return result
        told = retold(result, gx, work.atol, system.rtol)
        if not feels(told, result, gx):
            self._coupling.is_independent()
            return told
        self._coupling.depends()
        number = int(result.num_steps.max())
        if bool((told.status == Status.CONVERGED).all()):
            return told
        if system.linear:
            # As with the Krylov solvers: what rows spent on their own counts, and limits nothing.
            system = system._replace(max_steps=number + system.max_steps)
        elif number >= system.max_steps:
            return told
        scale = group_norm(column(work.control, "scale0"), self._system)
        return joint_solve(system, result.x, gx, number, scale)

    def _moved_out(self, x: Tensor, gx: Tensor, work: Workspace | HostWork) -> bool:
        """Whether a row that had converged no longer has, because others have moved."""
        system = self._system
        if not system.backend.num_moved(x, gx, work.status, work.residual):
            return False
        recorded = SolveResult(x, work.status, work.num_steps, work.residual)
        told = retold(recorded, gx, work.atol, system.rtol)
        return bool((told.status != work.status).any())

    def _probe_shows(self, x: Tensor, gx: Tensor) -> bool:
        """Whether g changes in rows that stay, where the other half goes back to x0."""
        return rows_feel(self._system.value, x, gx, self._x0)


def rows_feel(apply: Callable[[Tensor], Tensor], x: Tensor, gx: Tensor, other: Tensor) -> bool:
    """Whether a row of the map's value changes where only other rows of its argument do.

    Args:
        gx: apply(x).
        other: (B, D) where half of the rows are moved to. Rows of one half are not told apart.
    """
    rows = torch.arange(len(x), device=x.device)
    # Fibonacci hashing: a half without a pattern that a graph could have too.
    away = rows * 2654435761 % 4294967296 < 2147483648
    change = difference_norm(apply(torch.where(away[:, None], other, x)), gx)
    return bool((~away & beyond_rounding(change, gx, x)).any())


LEVELS = 8
"""Powers of two that rows are multiplied by to tell them apart: few enough for float16."""


def rows_mix(apply: Callable[[Tensor], Tensor], like: Tensor, together: int) -> bool:
    """Whether a row of a linear map's value depends on any other row of its argument.

    It does if the map does not commute with multiples of the rows, another one for each. The
    multiples are powers of two, which change no rounding. Costs 1 + log_LEVELS(together) products.

    Args:
        like: (B, D) whose shape and dtype the argument has.
        together: how many rows in succession may depend on one another.
    """
    # No number is zero, and no two rows are alike, so that nothing cancels.
    y = torch.arange(1, like.numel() + 1, device=like.device, dtype=torch.float64).sin()
    y = y.to(like.dtype).reshape(like.shape)
    product = apply(y)
    rows = torch.arange(len(like), device=like.device) % together
    place = 1
    while place < together:
        digit = rows // place % LEVELS - LEVELS // 2
        multiple = torch.exp2(digit.double()).to(like.dtype)[:, None]
        scaled, expected = multiple * y, multiple * product
        change = difference_norm(apply(scaled), expected)
        if bool(beyond_rounding(change, expected, scaled).any()):
            return True
        place *= LEVELS
    return False


def retold(
    result: SolveResult,
    gx: Tensor,
    atol: float | Tensor,
    rtol: float,
    *,
    by_other_code: bool = False,
) -> SolveResult:
    """`result` with the residuals that rows have all together; without a look at the numbers.

    Args:
        gx: g(result.x).
        by_other_code: it was computed in another way than for the solver, so that rounding differs.
    """
    residual = difference_norm(gx, result.x)
    moved = differs(residual, result.residual)
    if by_other_code:
        moved = beyond_rounding((residual - result.residual).abs(), gx, result.x)
    fails = ~(residual <= atol + rtol * row_norm(gx))
    lost = moved & fails & (result.status == Status.CONVERGED)
    status = torch.where(lost, int(Status.MAX_STEPS), result.status).to(torch.int8)
    return result._replace(status=status, residual=torch.where(moved, residual, result.residual))


def feels(told: SolveResult, result: SolveResult, gx: Tensor) -> bool:
    """Whether what `retold` makes of a result shows that rows depend on one another."""
    change = (told.residual - result.residual).abs()
    shows = (told.status != result.status) | beyond_rounding(change, gx, result.x)
    return bool(shows.any())


def solve_jointly(system: System, x0: Tensor) -> SolveResult:
    """Solve all rows that belong together as one sample, from x0 (B, D)."""
    gx = system.value(x0)
    sizes = torch.stack([group_norm(row_norm(t), system) for t in (x0, gx)])
    return joint_solve(system, x0, gx, 1, sizes.amax(0))


def group_norm(sizes: Tensor, system: System) -> Tensor:
    """(groups,) the norms of rows that may depend on one another, from those of the rows (B,)."""
    return sizes.reshape(-1, system.together).norm(dim=1)


def joint_solve(
    system: System,
    x: Tensor,
    gx: Tensor,
    number: int,
    scale: Tensor,
    known: tuple[Tensor, Tensor] | None = None,
) -> SolveResult:
    """Iterate with rows that belong together as one sample, until each is within its tolerance.

    Args:
        x: (B, D) where to begin, not modified. gx: g(x).
        number: evaluations so far, that of gx included.
        scale: (groups,) max(||x0||, ||g(x0)||), against which drifting is told.
        known: a further point and g there, in case that this solve comes by.
    Returns:
        SolveResult whose num_steps counts all evaluations of a group, for each of its rows. Rows
        within their own tolerance are CONVERGED even where the whole ended MAX_STEPS or STALLED.
    """
    shape, solver, backend = x.shape, system.solver, system.backend
    each = system.together
    x = x.reshape(len(x) // each, -1).clone(memory_format=torch.contiguous_format)
    work = allocate(x, solver, 0.0, backend.scratch(x))
    judge = JointTest(system, scale, shape[0])
    noise = noise_of(system.arithmetic, x.dtype, system.max_steps)
    least = torch.full_like(work.residual, torch.nan)
    residual, passes = judge(x.view(shape), gx, work.control)
    kept_residual, kept_passes = residual, passes

    def whole(y: Tensor, _: Tensor | None) -> Tensor:
        return system.value(y.view(shape)).reshape(x.shape)

    while True:
        active = work.status == Status.ACTIVE
        done = active & passes.view(-1, each).all(1)
        if bool(done.any()):
            rows = done.repeat_interleave(each)
            kept_residual = torch.where(rows, residual, kept_residual)
            kept_passes = kept_passes | rows
            work.best.copy_(torch.where(done[:, None], x, work.best))
            work.status.masked_fill_(done, int(Status.CONVERGED))
            work.num_steps.masked_fill_(done, number)
            active = active & ~done
            if not bool(active.any()):
                break
        step(backend, solver, work, x, gx.reshape(x.shape), None, 0.0, MOST_STEPS)
        best = column(work.control, "best")
        # Where the point just judged is the best one so far, that is what will be told of.
        better = active & (best != least)
        least = torch.where(better, best, least)
        rows = better.repeat_interleave(each)
        kept_residual = torch.where(rows, residual, kept_residual)
        kept_passes = torch.where(rows, passes, kept_passes)
        work.num_steps.masked_fill_(active, number)
        if number >= system.max_steps:
            work.status.masked_fill_(work.status == Status.ACTIVE, int(Status.MAX_STEPS))
        if bool((work.status != Status.ACTIVE).all()):
            break
        if noise is not None and number % EVERY == 0:
            noise.after_step(whole, x, None, work)
        at = x.view(shape)
        again = known is not None and torch.equal(known[0], at)
        gx = known[1] if known is not None and again else system.value(at)
        known = None
        number += 1
        residual, passes = judge(at, gx, work.control)
    status = work.status.repeat_interleave(each)
    return rows_of(
        work.best.view(shape), status, kept_passes, kept_residual,
        work.num_steps.repeat_interleave(each),
    )  # fmt: skip


class JointTest:
    """The stop test of rows at one point, each group of them together.

    Args:
        scale: as in joint_solve.
        rows: B.
    """

    def __init__(self, system: System, scale: Tensor, rows: int) -> None:
        self._system = system
        self._scale = scale
        self._each = torch.zeros(rows, dtype=torch.float64, device=scale.device) + system.atol
        self._total = group_norm(self._each, system)

    def __call__(self, x: Tensor, gx: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) residual, and (B,) whether the row is within its tolerance.

        Args:
            control: what the rules remember of each joint sample.
        """
        system = self._system
        residual = difference_norm(gx, x)
        total = group_norm(residual, system)
        if system.linear:
            return residual, (total <= self._total).repeat_interleave(system.together)
        size = row_norm(gx)
        whole = group_norm(size, system)
        rounding = torch.finfo(x.dtype).eps * whole
        peak, peak_norm = column(control, "peak"), column(control, "peak_norm")
        cap, most_hidden = drift_limits(self._scale, peak, peak_norm, whole, rounding)
        told = (total <= cap + self._total) & (rounding <= most_hidden + self._total)
        within = residual <= self._each + system.rtol * size
        return residual, within & told.repeat_interleave(system.together)


def rows_of(
    x: Tensor, ended: Tensor, passes: Tensor, residual: Tensor, num_steps: Tensor
) -> SolveResult:
    """The account of every row, where some were solved as one.

    Args:
        ended: (B,) how the sample ended that the row is part of.
        passes: (B,) whether the row is within its own tolerance.
    """
    lost = (ended == Status.DIVERGED) | (ended == Status.NONFINITE)
    status = torch.where(passes & ~lost, int(Status.CONVERGED), ended).to(torch.int8)
    return SolveResult(x, status, num_steps.int(), residual)


def jointly(
    apply: Callable[[Tensor], Tensor], like: Tensor, rows: int
) -> Callable[[Tensor], Tensor]:
    """A map of (B, D) as one of (B / rows, rows D)."""
    return lambda y: apply(y.reshape(like.shape)).reshape(len(like) // rows, -1)
