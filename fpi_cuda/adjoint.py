"""The adjoint that was asked for, made of what solves fixed points and linear systems."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.device_loop import Method, Refused
from fpi_cuda.implicit import (
    Account,
    DeviceSolve,
    Exact,
    FlatMap,
    LinearSolve,
    Strategy,
    Truncated,
)
from fpi_cuda.options import (
    GMRES,
    MAX_DEPTH,
    Adjoint,
    Anderson,
    ConjugateGradient,
    FixedPointSolver,
    Implicit,
    JacobianFree,
    LinearSolver,
    Neumann,
    Phantom,
    Unroll,
)
from fpi_cuda.request import Options
from fpi_cuda.result import SolveResult
from fpi_cuda.row_norm import row_norm
from fpi_cuda.solvers.conjugate_gradient import conjugate_gradient
from fpi_cuda.solvers.gmres import gmres
from fpi_cuda.solvers.loop import Backend, solve


def differentiated_map(flat_map: FlatMap, adjoint: Adjoint) -> FlatMap:
    """The map whose fixed point is differentiated: for Phantom, a few damped steps of g."""
    if isinstance(adjoint, Phantom):
        return flat_map.damped(adjoint.k, adjoint.tau)
    return flat_map


def strategy_for(
    options: Options,
    engine: Backend,
    account: Account,
    dim: int,
    on_device: DeviceSolve | None = None,
) -> Strategy:
    """How the adjoint system is dealt with.

    Args:
        on_device: tried before the solver of the host.
    """
    adjoint = options.adjoint
    if isinstance(adjoint, Neumann):
        return Truncated(account, truncation=adjoint.k)
    if isinstance(adjoint, (JacobianFree, Phantom, Unroll)):
        return Truncated(account, truncation=0)
    rtol = options.rtol if adjoint.rtol is None else adjoint.rtol
    solver_of_system = linear_solve(
        adjoint_solver(options, adjoint, dim), adjoint.max_steps or options.max_steps, engine
    )
    return Exact(account, linear_solve=solver_of_system, rtol=rtol, on_device=on_device)


LOOSEST_BY_ATOL = 1e-2
"""Relative accuracy of an adjoint that an atol alone may come to.

From an x of the size of atol the forward asks for nothing; a gradient should still point downhill.
"""


def with_forward_accuracy(strategy: Strategy, options: Options, x_star: Tensor) -> Strategy:
    """`strategy`, as accurate as the forward was asked to be where its tolerance is not relative.

    The gradient is off by the forward's relative error in any case; an adjoint solved to rtol
    alone, which may be 0, would take steps that nobody sees.

    Args:
        x_star: (B, D) the solution, plain.
    """
    adjoint = options.adjoint
    asked = isinstance(adjoint, Implicit) and adjoint.rtol is None and options.atol > 0
    if not asked or not isinstance(strategy, Exact):
        return strategy
    with torch.no_grad(), transforms.truncated(0):
        most = max(options.rtol, LOOSEST_BY_ATOL)
        # NaN, of samples that failed, asks for nothing either.
        share = (options.rtol + options.atol / row_norm(x_star)).nan_to_num(most)
        return dataclasses.replace(strategy, rtol=share.clamp(max=most))


def adjoint_method(options: Options, engine: Backend, dim: int) -> Method | None:
    """How the adjoint system is iterated; None where it is not.

    Raises:
        Refused: by a solver that has no captured form.
    """
    adjoint = options.adjoint
    if not isinstance(adjoint, Implicit):
        return None
    solver = adjoint_solver(options, adjoint, dim)
    if isinstance(solver, (GMRES, ConjugateGradient)):
        raise Refused(f"{solver} runs on the host")
    return Method(solver, 0.0, adjoint.max_steps or options.max_steps, engine)


def adjoint_solver(
    options: Options, adjoint: Implicit, dim: int
) -> FixedPointSolver | LinearSolver:
    """The solver of the adjoint system."""
    return adjoint.solver or default_adjoint_solver(options.solver, dim)


def default_adjoint_solver(solver: FixedPointSolver, dim: int) -> FixedPointSolver:
    """The forward's solver; for Anderson, as deep as it can be of use, and without a ridge."""
    if not isinstance(solver, Anderson):
        return solver
    depth = max(solver.m, min(MAX_DEPTH, dim))
    return Anderson(m=depth, ridge=0.0, history_dtype=solver.history_dtype)


def linear_solve(
    solver: FixedPointSolver | LinearSolver, max_steps: int, engine: Backend
) -> LinearSolve:
    """The solver of y = M y + b that an adjoint asks for."""

    def run(
        apply: Callable[[Tensor], Tensor],
        apply_transpose: Callable[[Tensor], Tensor],
        b: Tensor,
        atol: Tensor,
    ) -> SolveResult:
        if isinstance(solver, GMRES):
            return gmres(
                lambda y: y - apply(y), b, restart=solver.restart, atol=atol, max_steps=max_steps
            )
        if isinstance(solver, ConjugateGradient):
            return conjugate_gradient(
                lambda y: y - apply(y),
                lambda y: y - apply_transpose(y),
                b,
                atol=atol,
                max_steps=max_steps,
            )
        return solve(
            lambda y, rows: apply(y) + b,
            b,
            solver,
            rtol=0.0,
            atol=atol,
            max_steps=max_steps,
            backend=engine,
        )

    return run
