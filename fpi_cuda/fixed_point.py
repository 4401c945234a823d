"""fixed_point: solve x = g(x, *z) and make the solution differentiable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.autograd import (
    Account,
    BoundMap,
    attach,
    attach_unrolled,
    sequence_number,
    watching,
)
from fpi_cuda.autograd.fixed_point import FixedPoint
from fpi_cuda.autograd.lifted import LiftedEquation
from fpi_cuda.autograd.solution_check import SolutionCheck
from fpi_cuda.autograd.strategy import Strategy
from fpi_cuda.autograd.vmap import BATCHED, by_samples_of_vmap
from fpi_cuda.coupling import Coupling, coupling_of, exactly, kept_promises, key_of
from fpi_cuda.declined import Declined
from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.context import UNDER_GRAD, being_captured
from fpi_cuda.evaluation.shortcuts import is_rowwise_by_construction
from fpi_cuda.evaluation.state import (
    Layout,
    layout_of,
    require_arity,
    require_batch,
    require_g_reads,
    require_inputs,
    require_known,
    require_map,
    require_numbers,
)
from fpi_cuda.evaluation.tracing import untraced
from fpi_cuda.loops import (
    BEING_CAPTURED,
    IN_TRANSFORM,
    UNROLLED,
    Solved,
    after_decline,
    plan_of,
)
from fpi_cuda.loops.adjoint import (
    adjoint_of,
    differentiated_map,
    prepare,
    strategy_for,
    truncation_of,
)
from fpi_cuda.loops.fused.kept import kept_solution
from fpi_cuda.loops.host import iterate
from fpi_cuda.loops.stepping import Backend
from fpi_cuda.loops.unroll import unroll
from fpi_cuda.ops import reference
from fpi_cuda.options import (
    Adjoint,
    Anderson,
    FixedPointSolver,
    Implicit,
    Options,
    Unroll,
)
from fpi_cuda.solution import (
    AdjointRecord,
    ConvergenceError,
    Route,
    Solution,
    SolveResult,
    Status,
)
from fpi_cuda.unconverged import notice_here


@untraced
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
    batch_dims: int = 1,
    rowwise: bool | None = None,
    route: str | None = None,
    precision: str = "ieee",
    throw: bool = False,
    **unknown: Any,
) -> Solution:
    """Solve x = g(x, *z) for every sample, and differentiate the solution, not the iteration.

    The value is differentiable, to any order and in forward mode too, in z, in the parameters
    of g and in whatever tensors g closes over; g at the value is evaluated once more for that,
    where grad mode is on. Not converging is a status, not an exception: each line that calls
    fixed_point warns of it once (FixedPointWarning), where the solution is on a CUDA device with
    a later call or backward, and once of an adjoint solve that does not converge. A gradient that
    comes in as Inf or NaN goes out so.

    The graph of the value holds g, for derivatives of derivatives. An object that is held by g
    and holds the value is collected all the same; one that holds what was computed from the value,
    with its graph, has to let go of that.

    Args:
        g: g(x, *z) -> like x, a function or module. An object that also has `prepare(*z)` and
            `step(x, prepared)`, with g(x, *z) = step(x, prepare(*z)), has prepare called once
            per solve, unless calling g is more than that: by a hook, a forward() of a subclass
            or one set on the instance, or because the call is not written as
            `return self.step(x, self.prepare(*z))`; then g is called as it is. The same random
            numbers and the same autocast state are seen by every evaluation of one solve and of
            its derivatives.
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
        batch_dims: 1 where dim 0 of every tensor of the state counts samples. 0 makes the whole
            state one sample, of any shapes: status, num_steps and residual are then scalars.
        rowwise: True promises that sample i of g(x, *z) depends on row i of x and of each z
            (and of what prepare returns) only. Stopped samples are then no longer evaluated; a
            promise that g at the solution shows to be broken raises. None takes g.rowwise, and
            without one (or with False) g may couple the rows (nodes of a graph, batch norm): they
            are watched, and solved as one sample once they are seen to depend on one another. The
            residuals are those of all rows together; after a promise, up to rounding.
        route: "fused" runs the whole loop, g included, in one call of native code, for cells that
            lower to it. "device" runs it as a CUDA graph, without the host, for a g that can be
            captured: no host reads, no random numbers. "host" does neither. None takes the first
            of these that can be had.
        precision: of the fused loop's products with weights, for float32 states: "ieee",
            "tf32x3" (rtol from 1e-6), "tf32" (from 1e-3) or "bf16" (from 1e-2), each with sums in
            float32. What is returned is judged by g itself: the residual is that of g, and a
            sample that rounding keeps from the tolerance is STALLED. Other ways of solving, and
            derivatives of derivatives, are as torch computes g.
        throw: raise where a sample has not converged. Inside torch.func.vmap the error numbers
            the samples of all vmaps, those of the first one first.
    Returns:
        Solution: value (like x0), status, num_steps, residual, and adjoint_stats.
    Raises:
        TypeError, ValueError: an option, x0 or z that makes no sense; a g that changes shape,
            dtype or device, or z in place. What g itself raises passes through.
        RuntimeError: a derivative, transform, tracer or route that cannot be served (torch.compile
            can: the solve runs outside of its graph), or a g with another value, or with a z or
            parameter written to, when it is evaluated again.
        ConvergenceError: with throw=True.
    Warns:
        FixedPointWarning: samples contribute no gradient; or g moves with x, but its graph does
            not lead to x (detach, no_grad, numpy), so that gradients leave dg/dx out.
    Source:
        Jeon, Lee, Choi, Differentiable Forward and Backward Fixed-Point Iteration Layers, IEEE
        Access 2021, eq. (3), (4) and (7) to (9).
    """
    require_known("fixed_point", fixed_point, unknown)
    require_map("fixed_point", g)
    options = Options(
        solver, rtol, atol, max_steps, adjoint, backend, rowwise, throw, route, precision,
        batch_dims, notice=notice_here(),
    )  # fmt: skip
    options.require_sensible("fixed_point")
    return solve_as_told(g, x0, z, options)


def solve_as_told(
    g: Callable[..., Any], x0: Any, z: tuple[Tensor, ...], options: Options
) -> Solution:
    """fixed_point, with all of its options in one, which are sensible."""
    found = None if options.route == "host" else kept_solution(g, x0, z, options)
    if found is not None:
        solution, worst = found
        return solution if worst == Status.CONVERGED else report(solution, options)
    layout = layout_of(x0, options.batch_dims)
    require_inputs(z)
    if options.batch_dims:
        require_batch(g, x0)
    require_numbers(*(x0 if layout.is_tuple else (x0,)), *z)
    try:
        if not transforms.active():
            return report(solve_flat(g, x0, z, layout, options), options)
        return solve_inside(g, x0, z, layout, options)
    except (RuntimeError, TypeError) as error:
        if isinstance(error, TypeError):
            require_arity(g, z)
        require_g_reads(z, error)
        raise


solve_untraced = untraced(solve_as_told)
"""For calls that torch.compile looks into."""


def report(solution: Solution, options: Options) -> Solution:
    """Raise or warn of samples that have not converged, as was asked for.

    Raises:
        ConvergenceError: those of all vmaps are numbered, those of the outermost first.
    """
    told = solution
    if transforms.active():
        value = solution.value if isinstance(solution.value, tuple) else (solution.value,)
        status, num_steps, residual, *parts = map(
            transforms.numbers, (solution.status, solution.num_steps, solution.residual, *value)
        )
        told = Solution(tuple(parts), status, num_steps, residual, solution.adjoint_record)
    if not options.throw:
        options.notice.look(told, options.rtol, options.atol)
    elif not bool(told.converged.all()):
        raise ConvergenceError(detached(told))
    return solution


def solve_inside(
    g: Callable[..., Any], x0: Any, z: tuple[Tensor, ...], layout: Layout, options: Options
) -> Solution:
    """Solve inside of torch.func transforms.

    Where steps are followed, the innermost vmap is made part of the batch.
    """
    if not transforms.active():
        return report(solve_flat(g, x0, z, layout, options), options)
    if not isinstance(options.adjoint, Unroll):
        return solve_flat(g, x0, z, layout, options)  # and the numbers are told where they are
    transforms.require_working()
    record = None

    def solve(g: Any, x0: Any, z: tuple[Tensor, ...], inner: Layout) -> list[Tensor]:
        nonlocal record
        whole = options if options.batch_dims else replace(options, batch_dims=1, rowwise=True)
        solution = solve_inside(g, x0, z, inner, whole)
        record = solution.adjoint_record
        value = solution.value if inner.is_tuple else (solution.value,)
        return [*value, solution.status, solution.num_steps, solution.residual]

    found = by_samples_of_vmap(g, x0, z, layout, solve)
    if found is None:
        return report(solve_flat(g, x0, z, layout, options), options)
    *value, status, num_steps, residual = found
    assert record is not None
    return Solution(
        tuple(value) if layout.is_tuple else value[0], status, num_steps, residual, record
    )


def solve_flat(
    g: Callable[..., Any], x0: Any, z: tuple[Tensor, ...], layout: Layout, options: Options
) -> Solution:
    """Solve on flat states and attach the derivatives."""
    born_after = sequence_number()
    start = layout.flatten(x0)
    grad = torch.is_grad_enabled() or transforms.in_dual_level()
    only_host = IN_TRANSFORM if transforms.active() else None
    if isinstance(options.adjoint, Unroll) and (grad or only_host is not None):
        only_host = UNROLLED
    elif only_host is None and being_captured(layout.device):
        if grad:
            raise RuntimeError(UNDER_GRAD)
        only_host = BEING_CAPTURED
    plan = plan_of(g, layout, options, only_host=only_host)
    options, engine, rowwise = plan.options, plan.engine, plan.rowwise
    bound_map = BoundMap(g, layout, z, hoisted=plan.whole is None)
    record = AdjointRecord(options.notice.look_at_adjoint, layout.batch_dims)
    coupling = None if rowwise else coupling_of(bound_map, options)
    if only_host is UNROLLED:
        value, result = unrolled(
            bound_map, start, options, record, coupling, born_after, rowwise=rowwise
        )
    elif only_host is IN_TRANSFORM:
        value, result = solved_lifted(
            bound_map, start, options, engine, record, coupling, rowwise=rowwise
        )
    else:
        solved = None
        with torch.no_grad(), bound_map.context.solving():
            while solved is None:
                try:
                    solved = plan.loop.solve(plan, bound_map, start.detach(), coupling)
                except Declined as reason:
                    plan = after_decline(g, plan, reason)
        done = Solved(plan, bound_map, *solved)
        record.route, record.form = Route(plan.loop.name, plan.reasons), done.form
        if plan.loop.is_rowwise:
            coupling = None
        value, result = reported(done, record, coupling, born_after if grad else None)
    for buffers in bound_map.buffers:
        buffers.over()
    record.joint = coupling is not None and coupling.joint
    _, status, num_steps, residual = result
    residual = residual.to(torch.promote_types(layout.dtype, torch.float32))
    if not layout.batch_dims:
        status, num_steps, residual = status[0], num_steps[0], residual[0]
    return Solution(value, status, num_steps, residual, record)


def reported(
    solved: Solved, record: AdjointRecord, coupling: Coupling | None, born_after: int | None
) -> tuple[Any, SolveResult]:
    """What a loop has solved, as the user's state, with its derivatives.

    Args:
        born_after: autograd's sequence number before bound_map was made; None: nobody can ask for
            a derivative.
    """
    plan, bound_map, result, _ = solved
    options, engine, loop = plan.options, plan.engine, plan.loop
    if born_after is None:
        if not loop.sees_all_rows and rests_on_a_word(bound_map, plan.rowwise):
            result = require_kept_word(solved, coupling)
        if not plan.layout.is_tuple and result.x.shape == plan.layout.shape:
            return result.x, result
        with torch.enable_grad():  # views made under no_grad refuse in-place operations
            return plan.layout.taken_apart(result.x), result
    check = check_of(result, bound_map, options, coupling, plan.rowwise, engine.num_moved)
    account = Account(result.status, record, coupling, late=loop.is_late)
    adjoint = adjoint_of(solved, account, record)
    by_loop = None if adjoint is None else adjoint.solve
    strategy = strategy_for(
        options, engine, account, bound_map, result.x, by_loop, plan.adjoint_solver
    )
    evaluated = differentiated_map(bound_map, options.adjoint)
    evaluate = None if adjoint is None else adjoint.evaluate
    watch = None if loop.is_late else check
    value = attach(evaluated, result.x, watch, strategy, born_after, evaluate)
    if adjoint is not None and adjoint.prepare is not None:
        parts = value if plan.layout.is_tuple else (value,)
        if any(part.requires_grad for part in parts):
            prepare(adjoint.prepare, solved, account, record)
    return value, check.result


def check_of(
    result: SolveResult,
    bound_map: BoundMap,
    options: Options,
    coupling: Coupling | None,
    rowwise: bool,
    num_moved: Callable[[Tensor, Tensor, Tensor, Tensor], int],
) -> SolutionCheck:
    """What looks at g at the solution."""
    on_word = functools.partial(rests_on_a_word, bound_map, rowwise)
    tolerances = options.rtol, options.atol, bound_map.arithmetic
    return SolutionCheck(result, *tolerances, coupling, on_word, num_moved)


def rests_on_a_word(bound_map: BoundMap, rowwise: bool) -> bool:
    """Whether nothing but somebody's word says that rows are independent."""
    may_depend = bound_map.layout.rows_together > 1
    return rowwise and may_depend and not is_rowwise_by_construction(bound_map.g)


def require_kept_word(solved: Solved, coupling: Coupling | None) -> SolveResult:
    """The result, told by a g that was promised to be row-wise on all rows together.

    Where the host does not wait for the solve, it does so once for solves of this kind.
    """
    plan, bound_map, result, kept = solved
    unwatched, options = plan.loop.is_late, plan.options
    if being_captured(bound_map.layout.device):
        return result
    if unwatched:
        key = (exactly(bound_map.g), *key_of(bound_map, options)[1:])
        if key in kept_promises:
            return result
    else:
        all_done = bool((result.status == Status.CONVERGED).all())
        if all_done and all_stopped_at_once(result):
            return result
        # What has not moved since it stopped does not depend on what has.
        told = (result.x, kept[0], result.status, result.residual) if kept else None
        if told is not None and not plan.engine.num_moved(*told):
            return result
    check = check_of(result, bound_map, options, coupling, plan.rowwise, plan.engine.num_moved)
    with torch.no_grad(), bound_map.context.solving():
        check(result.x, bound_map.evaluate(result.x, None))
    if unwatched:
        kept_promises.add(key)
    return check.result


def all_stopped_at_once(result: SolveResult) -> bool:
    """Whether the latest evaluation was that of all rows, at the points returned."""
    return bool((result.num_steps == result.num_steps[0]).all())


def solved_lifted(
    bound_map: BoundMap,
    start: Tensor,
    options: Options,
    engine: Backend,
    record: AdjointRecord,
    coupling: Coupling | None,
    *,
    rowwise: bool,
) -> tuple[Any, SolveResult]:
    """The same inside torch.func transforms."""

    def run(evaluate: Any, x0: Tensor) -> SolveResult:
        result = iterate(
            evaluate,
            x0,
            options.solver,
            rtol=options.rtol,
            atol=options.atol,
            max_steps=options.max_steps,
            backend=engine,
            coupling=coupling,
            arithmetic=bound_map.arithmetic,
        )
        if rests_on_a_word(bound_map, rowwise):
            check = check_of(result, bound_map, options, coupling, rowwise, engine.num_moved)
            check(result.x, evaluate(result.x, None))
            result = check.result
        layout = replace(bound_map.layout, batch=len(result.x))
        whole = layout if layout.batch_dims else replace(layout, batch_dims=1)
        told = Solution(whole.unflatten(result.x), *result[1:], record)
        report(told, options)
        return result

    def strategy(status: Tensor, x: Tensor) -> Strategy:
        account = Account(status, record, coupling)
        return strategy_for(options, engine, account, bound_map, x)

    damping = differentiated_map(bound_map, options.adjoint).damping
    equation = LiftedEquation(bound_map, run, strategy, truncation_of(options.adjoint), damping)
    equation.sees_more_at(start)
    x, _, *told = FixedPoint.apply(equation, start, *equation.inputs)
    # What g closes over at the solution alone, it may find on the way.
    while equation.sees_more_at(x):
        x, *_ = FixedPoint.apply(equation, x, *equation.inputs)
    return bound_map.layout.unflatten(x.clone(), writable=True), SolveResult(x, *told)


def unrolled(
    bound_map: BoundMap,
    start: Tensor,
    options: Options,
    record: AdjointRecord,
    coupling: Coupling | None,
    born_after: int,
    *,
    rowwise: bool,
) -> tuple[Any, SolveResult]:
    """The fixed point with the graph of every step that led to it."""

    def run(bound_map: BoundMap, x0: Tensor) -> SolveResult:
        with bound_map.context.solving():
            return unroll(
                watching(bound_map),
                x0,
                options.solver,
                rtol=options.rtol,
                atol=options.atol,
                max_steps=options.max_steps,
                reference=reference,
                arithmetic=bound_map.arithmetic,
                coupling=coupling,
            )

    try:
        result = run(bound_map, start)
    except RuntimeError as error:
        if transforms.active() and "vmap" in str(error):
            raise RuntimeError(BATCHED) from error
        raise
    if rests_on_a_word(bound_map, rowwise):
        x = result.x.detach()
        with torch.no_grad(), bound_map.context.solving():
            check = check_of(result, bound_map, options, coupling, rowwise, reference.num_moved)
            check(x, bound_map.evaluate(x, None))
        result = check.result
    value = attach_unrolled(bound_map, start, result, run, record, born_after)
    return value, result


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
