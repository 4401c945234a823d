"""fixed_point: solve x = g(x, *z) and make the solution differentiable."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda import backends, transforms
from fpi_cuda.backends import reference
from fpi_cuda.faithful import Replay
from fpi_cuda.implicit import (
    Account,
    Exact,
    FlatMap,
    LinearSolve,
    Strategy,
    Truncated,
    attach,
    attach_live,
    attach_unrolled,
    live_solve,
    merge_innermost,
    residual_in,
    sequence_number,
)
from fpi_cuda.options import (
    ADJOINTS,
    FIXED_POINT_SOLVERS,
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
    require_count,
    require_instance,
    require_real,
)
from fpi_cuda.result import AdjointRecord, ConvergenceError, Solution, SolveResult
from fpi_cuda.solvers.conjugate_gradient import conjugate_gradient
from fpi_cuda.solvers.gmres import gmres
from fpi_cuda.solvers.loop import Backend, solve
from fpi_cuda.solvers.unroll import unroll
from fpi_cuda.state import Layout, layout_of


def fixed_point(
    g: Callable[..., Any],
    x0: Any,
    *z: Tensor,
    solver: FixedPointSolver = Anderson(),  # noqa: B008
    rtol: float = 1e-4,
    atol: float = 0.0,
    max_steps: int = 100,
    adjoint: Adjoint = Implicit(),  # noqa: B008
    backend: str | None = None,
    rowwise: bool | None = None,
    throw: bool = False,
    **unknown: Any,
) -> Solution:
    """Solve x = g(x, *z) for every sample, and differentiate the solution, not the iteration.

    The value is differentiable, to any order and in forward mode too, in z, in the parameters
    of g and in whatever tensors g closes over; g at the value is evaluated once more for that,
    where grad mode is on. Not converging is a status, not an exception.

    Args:
        g: g(x, *z) -> like x, a function or module. An object that also has `prepare(*z)` and
            `step(x, prepared)`, with g(x, *z) = step(x, prepare(*z)), has prepare called once
            per solve. The same random numbers and the same autocast state are seen by every
            evaluation of one solve and of its derivatives.
        x0: where to start, a floating tensor (B, ...) or a tuple of them; dim 0 is the batch.
            The value does not depend on it, so neither do gradients, but with Unroll().
        z: tensors of any shape, handed to g. Bind anything else with functools.partial.
        solver: Picard, Anderson or Broyden.
        rtol, atol: sample i has converged when ||g(x) - x|| <= atol + rtol ||g(x)||, 2-norms
            over all but dim 0; rtol in [0, 1].
        max_steps: cap on the evaluations of g per sample, at least 1.
        adjoint: how gradients are found: Implicit (exact), JacobianFree, Phantom, Neumann or
            Unroll.
        backend: "reference", "native", "cuda" or "triton"; None takes the best available.
        rowwise: True promises that sample i of g(x, *z) depends on row i of x and of each z
            (and of what prepare returns) only. Stopped samples are then no longer evaluated.
            None takes g.rowwise, False where there is none.
        throw: raise where a sample has not converged.
    Returns:
        Solution: value (like x0), status, num_steps, residual, and adjoint_stats.
    Raises:
        TypeError, ValueError: an option, x0 or z that makes no sense; a g that changes shape,
            dtype or device, or z in place. What g itself raises passes through.
        ConvergenceError: with throw=True.
    Source:
        Jeon, Lee, Choi, Differentiable Forward and Backward Fixed-Point Iteration Layers, IEEE
        Access 2021, eq. (3), (4) and (7) to (9).
    """
    require_known("fixed_point", fixed_point, unknown)
    require_map("fixed_point", g)
    layout = layout_of(x0)
    require_inputs(z)
    options = Options(solver, rtol, atol, max_steps, adjoint, backend, rowwise, throw)
    options.require_sensible("fixed_point")
    solution = solve_merged(g, x0, z, layout, options)
    if throw and not bool(solution.converged.all()):
        raise ConvergenceError(detached(solution))
    return solution


@dataclass(frozen=True)
class Options:
    """What fixed_point is told besides g, x0 and z."""

    solver: FixedPointSolver
    rtol: float
    atol: float
    max_steps: int
    adjoint: Adjoint
    backend: str | None
    rowwise: bool | None
    throw: bool

    def require_sensible(self, owner: str) -> None:
        """Raise unless every option is one that fixed_point can work with."""
        require_instance(owner, "solver", self.solver, FIXED_POINT_SOLVERS)
        require_instance(owner, "adjoint", self.adjoint, ADJOINTS)
        require_real(owner, "rtol", self.rtol, 0.0, 1.0)
        require_real(owner, "atol", self.atol, 0.0)
        require_count(owner, "max_steps", self.max_steps, 1)
        if self.backend is not None and self.backend not in backends.NAMES:
            valid = ", ".join(map(repr, backends.NAMES))
            raise ValueError(f"{owner}: unknown backend {self.backend!r}. Valid: None, {valid}")
        if self.rowwise is not None and not isinstance(self.rowwise, bool):
            raise TypeError(f"{owner}: rowwise must be None or a bool, got {self.rowwise!r}")
        if not isinstance(self.throw, bool):
            raise TypeError(f"{owner}: throw must be a bool, got {self.throw!r}")

    def asks_rowwise(self, g: object) -> bool:
        """Whether g may be evaluated on some of the samples."""
        return bool(getattr(g, "rowwise", False)) if self.rowwise is None else self.rowwise


def require_known(owner: str, function: Callable[..., Any], unknown: dict[str, Any]) -> None:
    """Raise for an option that `function` does not have."""
    if unknown:
        parameters = inspect.signature(function).parameters.values()
        valid = ", ".join(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        raise TypeError(f"{owner}: unknown option {next(iter(unknown))!r}. Valid options: {valid}")


def require_map(owner: str, g: object) -> None:
    """Raise unless g can be evaluated."""
    if not callable(g):
        raise TypeError(f"{owner}: g must be a function or module g(x, *z), got {type(g).__name__}")


def require_inputs(z: tuple[object, ...]) -> None:
    """Raise unless all z are tensors."""
    for index, t in enumerate(z):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"fixed_point: z must be tensors, got z[{index}] of type {type(t).__name__}. "
                "Bind other arguments with functools.partial(g, name=value)"
            )


def solve_merged(
    g: Callable[..., Any], x0: Any, z: tuple[Tensor, ...], layout: Layout, options: Options
) -> Solution:
    """Solve with the innermost torch.func.vmap, if there is one, made part of the batch."""
    merged = merge_innermost(g, x0, z, layout) if transforms.active() else None
    if merged is None:
        return solve_flat(g, x0, z, layout, options)
    solution = solve_merged(merged.g, merged.x0, merged.z, layout_of(merged.x0), options)
    value = solution.value
    return Solution(
        tuple(map(merged.split, value)) if layout.is_tuple else merged.split(value),
        merged.split(solution.status),
        merged.split(solution.num_steps),
        merged.split(solution.residual),
        solution.adjoint_record,
    )


def solve_flat(
    g: Callable[..., Any], x0: Any, z: tuple[Tensor, ...], layout: Layout, options: Options
) -> Solution:
    """Solve on flat states and attach the derivatives."""
    engine = backends.resolve(options.backend, layout.device, layout.dtype)
    replay = Replay(layout.device)
    born_after = sequence_number()
    flat_map = FlatMap(g, layout, z, replay)
    start = layout.flatten(x0)
    record = AdjointRecord()
    if isinstance(options.adjoint, Unroll) and differentiates():
        value, result = unrolled(flat_map, start, options, record, born_after)
    elif transforms.active():
        value, result = solved_live(flat_map, start, options, engine, record)
    else:
        value, result = solved(flat_map, start, options, engine, record, born_after)
    return Solution(
        layout.unflatten(value),
        result.status,
        result.num_steps,
        residual_in(layout.dtype, result.residual),
        record,
    )


def differentiates() -> bool:
    """Whether anything may ask for a derivative of what is computed now."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or transforms.active()


def solved(
    flat_map: FlatMap,
    start: Tensor,
    options: Options,
    engine: Backend,
    record: AdjointRecord,
    born_after: int,
) -> tuple[Tensor, SolveResult]:
    """The fixed point by the solver, then its derivatives."""
    with torch.no_grad(), flat_map.replay.solving():
        result = solve(
            flat_map.evaluate,
            start.detach(),
            options.solver,
            rtol=options.rtol,
            atol=options.atol,
            max_steps=options.max_steps,
            backend=engine,
            rowwise=options.asks_rowwise(flat_map.g) and flat_map.selectable(),
        )
    if not differentiates():
        return result.x, result
    account = Account(result.status, record)
    differentiated = differentiated_map(flat_map, options.adjoint)
    strategy = strategy_for(options, engine, account, start.shape[1])
    return attach(differentiated, result.x, strategy, born_after), result


def solved_live(
    flat_map: FlatMap,
    start: Tensor,
    options: Options,
    engine: Backend,
    record: AdjointRecord,
) -> tuple[Tensor, SolveResult]:
    """The same inside torch.func transforms; results are those of the samples seen there."""

    def run(evaluate: Any, x0: Tensor) -> SolveResult:
        return solve(
            evaluate,
            x0,
            options.solver,
            rtol=options.rtol,
            atol=options.atol,
            max_steps=options.max_steps,
            backend=engine,
        )

    with flat_map.replay.solving():
        result, frame = live_solve(flat_map, start, run)
    strategy = strategy_for(options, engine, Account(result.status, record), start.shape[1])
    differentiated = differentiated_map(flat_map, options.adjoint)
    value = attach_live(differentiated, result.x, strategy, frame)
    return value, SolveResult(*map(frame.raised, result))


def unrolled(
    flat_map: FlatMap, start: Tensor, options: Options, record: AdjointRecord, born_after: int
) -> tuple[Tensor, SolveResult]:
    """The fixed point with the graph of every step that led to it."""

    def run(flat_map: FlatMap, x0: Tensor) -> SolveResult:
        with flat_map.replay.solving():
            return unroll(
                flat_map.evaluate,
                x0,
                options.solver,
                rtol=options.rtol,
                atol=options.atol,
                max_steps=options.max_steps,
                reference=reference,
            )

    result = run(flat_map, start)
    value = attach_unrolled(flat_map, start, result, run, record, born_after)
    return value, result._replace(x=value)


def differentiated_map(flat_map: FlatMap, adjoint: Adjoint) -> FlatMap:
    """The map whose fixed point is differentiated: for Phantom, a few damped steps of g."""
    if isinstance(adjoint, Phantom):
        return flat_map.damped(adjoint.k, adjoint.tau)
    return flat_map


def strategy_for(options: Options, engine: Backend, account: Account, dim: int) -> Strategy:
    """How the adjoint system is dealt with."""
    adjoint = options.adjoint
    if isinstance(adjoint, Neumann):
        return Truncated(account, truncation=adjoint.k)
    if isinstance(adjoint, (JacobianFree, Phantom, Unroll)):
        return Truncated(account, truncation=0)
    solver = adjoint.solver or default_adjoint_solver(options.solver, dim)
    rtol = options.rtol if adjoint.rtol is None else adjoint.rtol
    max_steps = adjoint.max_steps or options.max_steps
    solver_of_system = linear_solve(solver, max_steps, engine)
    return Exact(account, linear_solve=solver_of_system, rtol=rtol)


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


def detached(solution: Solution) -> Solution:
    """The solution without its graph."""
    value = solution.value
    value = tuple(t.detach() for t in value) if isinstance(value, tuple) else value.detach()
    return Solution(
        value,
        solution.status,
        solution.num_steps,
        solution.residual,
        solution.adjoint_record,
    )


def explain(options: Options, g: object, device: torch.device, dtype: torch.dtype) -> str:
    """Which way a solve goes, and why, for states of this device and dtype."""
    engine = backends.resolve(options.backend, device, dtype).name
    reason = "asked for"
    if options.backend is None:
        missing = backends.why_not_native(device, dtype)
        reason = "the best available" if missing is None else f"native is unavailable: {missing}"
    compacted = options.asks_rowwise(g)
    adjoint = options.adjoint
    lines = [
        f"solver: {options.solver}, rtol={options.rtol}, atol={options.atol}, "
        f"max_steps={options.max_steps}",
        "route: host loop; g by torch, one solver step on the whole batch after it",
        f"backend: {engine} for {dtype} on {device} ({reason})",
        "active batch: "
        + (
            "stopped samples are no longer evaluated (g is row-wise)"
            if compacted
            else "all samples are evaluated until the last one stops (g is not known row-wise)"
        ),
        f"adjoint: {adjoint}",
    ]
    if isinstance(adjoint, Implicit) and adjoint.solver is None:
        lines.append("adjoint solver: the forward's; an Anderson deeper and without a ridge")
    if isinstance(adjoint, Unroll):
        lines.append("under grad mode the solver's steps run in plain torch, to be differentiated")
    return "\n".join(lines)
