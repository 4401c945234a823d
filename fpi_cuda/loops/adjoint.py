"""The adjoint that was asked for, made of what solves fixed points and linear systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.autograd import (
    Account,
    Apply,
    BoundMap,
    DeviceSolve,
    LinearSystem,
    Strategy,
)
from fpi_cuda.coupling import Coupling
from fpi_cuda.declined import Declined
from fpi_cuda.linear_solvers import conjugate_gradient, gmres
from fpi_cuda.loops.coupled import feels, jointly, retold, rows_mix
from fpi_cuda.loops.host import iterate
from fpi_cuda.loops.plan import LoopAdjoint, Plan, Prepare, Solved, Unavailable
from fpi_cuda.loops.stepping import Backend
from fpi_cuda.norms import difference_norm, num_moved, row_norm
from fpi_cuda.options import (
    GMRES,
    Adjoint,
    ConjugateGradient,
    FixedPointSolver,
    Implicit,
    LinearSolver,
    Neumann,
    Options,
    Phantom,
)
from fpi_cuda.solution import AdjointRecord, Route, SolveResult, Status


def differentiated_map(bound_map: BoundMap, adjoint: Adjoint) -> BoundMap:
    """The map whose fixed point is differentiated: for Phantom, a few damped steps of g."""
    if isinstance(adjoint, Phantom):
        return bound_map.damped(adjoint.k, adjoint.tau)
    return bound_map


def truncation_of(adjoint: Adjoint) -> int | None:
    """Terms of the series that stands for the solution of the adjoint system; None: none does."""
    if isinstance(adjoint, Neumann):
        return adjoint.k
    return None if isinstance(adjoint, Implicit) else 0


def strategy_for(
    options: Options,
    engine: Backend,
    account: Account,
    bound_map: BoundMap,
    x_star: Tensor,
    on_device: DeviceSolve | None = None,
    solver: FixedPointSolver | LinearSolver | None = None,
) -> Strategy:
    """How the adjoint system is dealt with.

    Args:
        bound_map: the map of the fixed point.
        x_star: (B, D) the solution, plain.
        on_device: tried before the solver of the host.
        solver: of the system, where that is known already.
    """
    adjoint, arithmetic = options.adjoint, bound_map.arithmetic
    if not isinstance(adjoint, Implicit):
        return Strategy(account, arithmetic, truncation_of(adjoint))
    rtol = accuracy_of_forward(options, x_star) if adjoint.rtol is None else adjoint.rtol
    system = SystemSolve(
        solver or options.adjoint_solver(bound_map.layout.dim),
        options.adjoint_steps,
        engine,
        arithmetic,
    )
    return Strategy(account, arithmetic, linear_solve=system, rtol=rtol, on_device=on_device)


LOOSEST_BY_ATOL = 1e-2
"""Relative accuracy of an adjoint that an atol alone may come to.

From an x of the size of atol the forward asks for nothing; a gradient should still point downhill.
"""


def accuracy_of_forward(options: Options, x_star: Tensor) -> float | Tensor:
    """Relative accuracy that the forward was asked for: one number, or (B,) float64.

    The gradient is off by the forward's relative error in any case; an adjoint solved to rtol
    alone, which may be 0, would take steps that nobody sees.
    """
    if options.atol <= 0:
        return options.rtol
    with torch.no_grad():
        most = max(options.rtol, LOOSEST_BY_ATOL)
        # NaN, of samples that failed, asks for nothing either.
        share = (options.rtol + options.atol / row_norm(x_star)).nan_to_num(most)
        return share.clamp(max=most)


@dataclass(frozen=True)
class SystemSolve:
    """How y = M y + b is solved: as a fixed point, or as (I - M) y = b in Krylov spaces.

    Attributes:
        arithmetic: what products in g are rounded to, and so those with its Jacobian.
    """

    solver: FixedPointSolver | LinearSolver
    max_steps: int
    engine: Backend
    arithmetic: torch.dtype

    def __call__(
        self, system: LinearSystem, coupling: Coupling | None, found: SolveResult | None
    ) -> SolveResult:
        """See LinearSolve."""
        krylov = isinstance(self.solver, (GMRES, ConjugateGradient))
        if krylov and coupling is not None and coupling.joint:
            return self._joint(system, coupling.together)
        if coupling is None:
            return self._rows(system, None)
        if found is None and not krylov:
            found = self._rows(system, coupling)
            worst = found.status.max().item()
            if coupling.joint or worst <= Status.CONVERGED:
                return found
            # What is only short of steps has come nearer to the solution that its rows have apart.
            idle = (found.x == system.b).all(1) & (found.status != Status.CONVERGED)
            if worst < Status.DIVERGED and not bool(idle.any()):
                return found
        return self._corrected(system, coupling, found or self._rows(system, None))

    def _rows(self, system: LinearSystem, coupling: Coupling | None) -> SolveResult:
        solver, b = self.solver, system.b
        limits: dict[str, Any] = {
            "atol": system.atol,
            "max_steps": self.max_steps,
            "arithmetic": self.arithmetic,
        }

        def minus(product: Apply) -> Apply:
            return lambda y: y - product(y)

        if isinstance(solver, GMRES):
            return gmres(minus(system.apply), b, restart=solver.restart, **limits)
        if isinstance(solver, ConjugateGradient):
            return conjugate_gradient(
                minus(system.apply), minus(system.apply_transpose), b, **limits
            )
        return iterate(
            lambda y, rows: system.apply(y) + b,
            b,
            solver,
            rtol=0.0,
            backend=self.engine,
            coupling=coupling,
            linear=True,
            **limits,
        )

    def _joint(self, system: LinearSystem, rows: int) -> SolveResult:
        apply, transpose, b, atol = system
        total = atol.reshape(-1, rows).norm(dim=1)
        right = b.reshape(len(total), -1)
        whole = self._rows(
            LinearSystem(jointly(apply, b, rows), jointly(transpose, b, rows), right, total), None
        )
        y = whole.x.view(b.shape)
        residual = difference_norm(apply(y) + b, y)
        status, num_steps = (t.repeat_interleave(rows) for t in (whole.status, whole.num_steps))
        return SolveResult(y, status, num_steps, residual)

    def _corrected(
        self, system: LinearSystem, coupling: Coupling, found: SolveResult
    ) -> SolveResult:
        """`found`, of rows on their own, if it is true of all rows together; else the joint one."""
        left = system.apply(found.x) + system.b
        told = found
        if num_moved(found.x, left, found.status, found.residual):
            told = retold(found, left, system.atol, 0.0)
        if told is found or not feels(told, found, left):
            failed = bool((told.status != Status.CONVERGED).any())
            # What is no solution may be as far as rows get on their own.
            if not failed or not rows_mix(system.apply, system.b, coupling.together):
                coupling.is_independent()
                return told
        coupling.depends()
        more = self(system._replace(b=left - found.x), coupling, None)
        return more._replace(x=found.x + more.x, num_steps=found.num_steps.max() + more.num_steps)


def adjoint_of(solved: Solved, account: Account, record: AdjointRecord) -> LoopAdjoint | None:
    """How the loop that ran solves the adjoint too; None: the host does, as after any solve.

    Raises:
        Unavailable: route asks for one that cannot.
    """
    adjoint = solved.plan.loop.adjoint
    if adjoint is None or not isinstance(solved.plan.options.adjoint, Implicit):
        return None
    try:
        found = adjoint(solved, account)
    except Declined as reason:
        leave_adjoint_to_host(solved.plan, record, str(reason))
        return None
    if found.prepare is None:
        record.adjoint_route = Route(solved.plan.loop.name)
    return found


def prepare(by: Prepare, solved: Solved, account: Account, record: AdjointRecord) -> None:
    """Make an adjoint solve ready, after g was evaluated at the solution.

    Raises:
        Unavailable: route asks for one that cannot.
    """
    name = solved.plan.loop.name
    try:
        reason = by(solved.result.x, account)
    except Declined as declined:
        leave_adjoint_to_host(solved.plan, record, str(declined))
    else:
        record.adjoint_route = Route(name) if reason is None else by_host(name, reason)


def leave_adjoint_to_host(plan: Plan, record: AdjointRecord, reason: str) -> None:
    """Note why the host solves the adjoint, unless it was asked not to."""
    name = plan.loop.name
    if plan.options.route == name:
        raise Unavailable(name, "the adjoint", reason)
    record.adjoint_route = by_host(name, reason)


def by_host(name: str, reason: str) -> Route:
    """The host's, where one loop gave a reason."""
    return Route("host", ((name, reason),))
