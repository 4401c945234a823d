"""The fused loop: g, the solver and the stop test in one call, for cells that lower to it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from fpi_cuda.activations import CODES
from fpi_cuda.autograd import Account, BoundMap, Jacobian, Linearization
from fpi_cuda.cells.lowering import (
    described,
    difference,
    require_no_decline,
    require_same_map,
    require_shapes,
    why_not_lowerable,
)
from fpi_cuda.coupling import Coupling
from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.context import rehearsed
from fpi_cuda.evaluation.recomputed import tensors_saved_as_they_are
from fpi_cuda.evaluation.same_value import version_of
from fpi_cuda.evaluation.shortcuts import why_rows_unknown
from fpi_cuda.loops.capture import Capture, is_wanted
from fpi_cuda.loops.coupled import retold
from fpi_cuda.loops.fused import kept
from fpi_cuda.loops.fused.cell_layer import FusedEvaluation, fused_evaluation
from fpi_cuda.loops.fused.cell_loop import solve_fused
from fpi_cuda.loops.fused.forms import NO_LOWER, forms, lowered_by
from fpi_cuda.loops.plan import Plan, Solved
from fpi_cuda.loops.stepping import depth_of
from fpi_cuda.lowered import Lowered, NotLowered
from fpi_cuda.options import PRECISIONS, Anderson, FixedPointSolver, Implicit, LinearSolver, Picard
from fpi_cuda.solution import SolveResult

name = "fused"
is_late = False
sees_all_rows = True
is_rowwise = True

DRAWN = "its weights are drawn at random"


def why_not(g: Any, plan: Plan, rehearse: bool) -> str | None:
    """See Loop."""
    layout, options = plan.layout, plan.options
    reason = why_not_served(options.solver, layout.dtype, plan.engine)
    if reason is None and (layout.is_tuple or len(layout.shapes[0]) != 1 or not layout.batch_dims):
        reason = "the state is not one tensor (B, features)"
    if reason is not None:
        return reason
    if not says_how(g):
        if not is_wanted():
            return f"{type(g).__name__} {NO_LOWER}"
        return forms.why_not(g) if rehearse else None
    rows_known = plan.rowwise and options.rowwise is None
    reason = why_not_lowerable(g, plan.whole, rows_known=rows_known)
    if reason is None and not plan.rowwise:
        reason = why_rows_unknown(g) or "rowwise is not True"
    return reason or (why_declined(g, layout.device) if rehearse else None)


def says_how(g: Any) -> bool:
    """Whether g has a lower(); another one may be captured."""
    return callable(getattr(g, "lower", None))


def why_not_served(
    solver: FixedPointSolver | LinearSolver, dtype: torch.dtype, backend: Any
) -> str | None:
    """Why the fused loop of this backend cannot serve this solver and state, or None if it can."""
    if not hasattr(backend, "cell_loop_"):
        return f"the {backend.name} backend has no such loop"
    if dtype not in backend.CELL_LOOP_DTYPES:
        served = " and ".join(str(d).removeprefix("torch.") for d in backend.CELL_LOOP_DTYPES)
        return f"it runs in {served}, the state is {dtype}"
    if not isinstance(solver, (Picard, Anderson)):
        return f"it has Picard and Anderson, not {type(solver).__name__}"
    if isinstance(solver, Anderson) and solver.m > backend.CELL_LOOP_MAX_DEPTH:
        return f"it goes to m={backend.CELL_LOOP_MAX_DEPTH}, the solver has m={solver.m}"
    if isinstance(solver, Anderson) and solver.history_dtype not in (None, dtype):
        return f"it stores the history as the state, not in {solver.history_dtype}"
    return None


def why_declined(g: object, device: torch.device) -> str | None:
    """Why lower() of a cell that could be fused declines whatever it is given; None if not."""
    try:
        _, random = rehearsed(lambda: require_no_decline(g), device, g, "lower")
    except NotLowered as reason:
        return str(reason)
    return DRAWN if random else None


def solve(
    plan: Plan, bound_map: BoundMap, x0: Tensor, coupling: Coupling | None
) -> tuple[SolveResult, FusedMap]:
    """See Loop."""
    options = plan.options
    fused = fused_map(bound_map, x0)
    if options.route is None:
        require_worth(fused, plan)
    result = solve_fused(
        fused.lowered,
        x0,
        options.solver,
        rtol=options.rtol,
        atol=options.atol,
        max_steps=options.max_steps,
        backend=plan.engine,
        precision=options.precision,
    )
    if fused.captured is not None and not fused.captured.verified:
        # Of no concern to a checkpoint, which will not find it again when it recomputes.
        with tensors_saved_as_they_are():
            verify(bound_map, fused, result.x)
    if not fused.ours:
        gx = value_of_step(bound_map, fused, result.x)
        # Terms that cancel may hide a difference in their rounding.
        told = retold(result, gx, options.atol, options.rtol, by_other_code=True)
        if bool((told.status != result.status).any()):
            raise NotLowered("step() is not within the tolerance where lower() was")
        result = told
    else:
        if fused.captured is not None:
            evaluate = functools.partial(bound_map.evaluate, rows=None)
            result = kept.told_by_g(result, evaluate, options)
        kept.keep(bound_map.g, options, plan, fused.lowered, fused.captured)
    return result, fused


replaced = functools.cache(dataclasses.replace)
"""A solver with other options: few are asked for, time and again."""


def adjoint(solved: Solved, account: Account) -> FusedAdjoint:
    """See Loop."""
    plan, bound_map, fused = solved.plan, solved.bound_map, solved.kept
    options, solver = plan.options, plan.adjoint_solver
    assert isinstance(options.adjoint, Implicit)
    reason, engine = None, cast("Any", plan.engine)
    if options.adjoint.solver is not None:
        reason = why_not_served(solver, plan.layout.dtype, engine)
    elif isinstance(solver, Anderson):  # as the forward's is, but it may go deeper
        solver = replaced(solver, m=min(solver.m, engine.CELL_LOOP_MAX_DEPTH))
    reason = reason or why_no_adjoint(bound_map, fused, solved.result.x)
    if reason is not None:
        raise NotLowered(reason)
    evaluate = None
    if fused.ours and hasattr(engine, "cell_layer_") and not transforms.in_dual_level():
        evaluate = fused_evaluation(fused.described, engine)
    return FusedAdjoint(plan, fused, solver, account.failed_forward, evaluate)


class FusedMap(NamedTuple):
    """A lowered map, and what it was made from.

    Attributes:
        described: the map, with its graph.
        lowered: the same without.
        ours: lower() is this package's own, or g was captured: nobody's word is needed for it.
        sources, versions: the tensors that it was made from, and how often each was written to.
        captured: the capture that it was made by, if it was.
    """

    described: Lowered
    lowered: Lowered
    ours: bool
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    captured: Capture | None = None

    @property
    def form(self) -> str | None:
        """What g was recognised as, where it was captured."""
        return None if self.captured is None else self.captured.found.words


def fused_map(bound_map: BoundMap, x0: Tensor) -> FusedMap:
    """g with its inputs bound, as the fused loop runs it.

    Args:
        x0: (B, D) a state.
    Raises:
        NotLowered: it cannot, and why.
    """
    layout = bound_map.layout
    g: Any = bound_map.g
    if bound_map.context.autocast_dtype is not None:
        raise NotLowered("autocast is on")
    captured: Capture | None = None
    held: tuple[Tensor, ...]
    if says_how(g):
        describe = functools.partial(described, g, bound_map.read)
        held = (*g.parameters(), *g.buffers())
    else:
        captured = forms.of(g, x0, bound_map.z)
        given = captured.reads(g, x0, bound_map.z)
        held = tuple(t for t in given if isinstance(t, Tensor) and t is not x0)
        describe = functools.partial(described_by, captured, given)
    # Not by the context: the first evaluation of g is yet to come.
    with torch.enable_grad():
        (result, ours), random = rehearsed(describe, layout.device, g, "lower")
    if random:
        raise NotLowered(DRAWN)
    for layer in result.layers:
        if layer.activation not in CODES:
            raise NotLowered(f"no kernel knows the activation {layer.activation!r}")
    plain = result.detached()
    tensors = plain.tensors()
    require_shapes(plain, tensors, layout)
    sources = (*held, *tensors)
    return FusedMap(result, plain, ours, sources, tuple(map(version_of, sources)), captured)


def described_by(captured: Capture, given: tuple[Any, ...]) -> tuple[Lowered, bool]:
    """The same as `described` for a g that was captured."""
    return lowered_by(captured, given), True


def verify(bound_map: BoundMap, fused: FusedMap, x: Tensor) -> None:
    """Compare what was captured with g itself, in value and derivative, at x (B, D) and near.

    Raises:
        NotLowered: it is another map, or g draws random numbers.
    """
    captured = fused.captured
    assert captured is not None
    reason = None
    for points in points_to_compare(x):
        expected = bound_map.evaluate(points.clone(), None)
        if bound_map.context.stochastic:
            reason = "it draws random numbers"
        elif bool(difference(fused.lowered, points, expected)[1].any()):
            reason = "its trace has another value than it has itself"
    reason = reason or why_other_derivative(bound_map, fused, x)
    if reason is not None:
        forms.refuse(captured, bound_map.g, x, bound_map.z, reason)
        raise NotLowered(reason)
    captured.verified = True


def require_worth(fused: FusedMap, plan: Plan) -> None:
    """Raise NotLowered where another loop is expected to be faster for so many samples."""
    layout, options, engine = plan.layout, plan.options, cast("Any", plan.engine)
    if layout.batch == 0 or not hasattr(engine, "cell_loop_plan"):
        return
    first, *rest = fused.lowered.layers
    _, reason = engine.cell_loop_plan(
        layout.batch,
        layout.dim,
        first.weight.shape[0] if rest else 0,
        depth_of(options.solver, layout.dim),
        layout.dtype,
        PRECISIONS.index(options.precision) if layout.dtype == torch.float32 else 0,
        layout.device,
    )
    if reason is not None:
        raise NotLowered(reason)


def value_of_step(bound_map: BoundMap, fused: FusedMap, x: Tensor) -> Tensor:
    """A user's step() at x (B, D), where lower() was found to describe it there and near.

    Raises:
        ValueError: it does not.
        NotLowered: step() draws random numbers, which lower() cannot.
    """
    found = []
    for points in points_to_compare(x):
        expected = bound_map.evaluate(points.clone(), None)
        if bound_map.context.stochastic:
            raise NotLowered("step() draws random numbers")
        require_same_map(type(bound_map.g).__name__, fused.lowered, points, expected)
        found.append(expected)
    return found[0]


def points_to_compare(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, D), and points around it.

    Where x is zero, or weights are, an error of the other is hidden.
    """
    size = x.abs().amax(1, keepdim=True)
    size = torch.where(size.isfinite() & (size > 0), size, 1.0)
    away = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype, device=x.device)
    return x, x + size * away


def why_no_adjoint(bound_map: BoundMap, fused: FusedMap, x: Tensor) -> str | None:
    """Why the derivative of a fused map at x (B, D) is not for the fused loop, or None."""
    if fused.lowered.x_factor is not None:
        return "the adjoint of a map with an x_factor is none that it runs"
    return None if fused.ours or len(x) == 0 else why_other_derivative(bound_map, fused, x)


def why_other_derivative(bound_map: BoundMap, fused: FusedMap, x: Tensor) -> str | None:
    """Why the derivative of g at x (B, D) is not that of the fused map, or None."""
    if fused.lowered.x_factor is not None:
        return None  # nobody takes it from there
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        gx = bound_map(leaf)
        v = torch.arange(1, x.numel() + 1, device=x.device).sin().to(x.dtype).reshape(x.shape)
        expected = torch.zeros_like(x)
        if gx.requires_grad:
            (expected,) = torch.autograd.grad(gx, leaf, v, materialize_grads=True)
    with torch.no_grad():
        adjoint = fused.lowered.adjoint(x, torch.zeros_like(x))
        if not bool(difference(adjoint, v, expected)[1].any()):
            return None
    what = "step() has another derivative than what lower() describes"
    return what if says_how(bound_map.g) else "its trace has another derivative than it has itself"


@dataclass(frozen=True)
class FusedAdjoint:
    """Solves c = J^T c + b in one loop, J being that of a fused map at its fixed point.

    Attributes:
        plan: of the solve. fused: its map.
        solver: of the adjoint system.
        failed_forward: (B,) bool, samples without a fixed point to differentiate; None if there are
            none.
        evaluate: see LoopAdjoint.
    """

    plan: Plan
    fused: FusedMap
    solver: FixedPointSolver | LinearSolver
    failed_forward: Tensor | None
    evaluate: FusedEvaluation | None
    prepare: ClassVar[None] = None

    def solve(self, matrix: Jacobian, b: Tensor, atol: Tensor) -> SolveResult | None:
        """See LoopAdjoint.

        The host's are a J that is not the linearization at the fixed point but one that is itself
        differentiated, and weights that were written to: autograd then has to complain.
        """
        fused = self.fused
        unchanged = fused.versions == tuple(map(version_of, fused.sources))
        if type(matrix) is not Linearization or not unchanged:
            return None
        known = None if self.evaluate is None else self.evaluate.slopes
        return solve_fused(
            fused.lowered.adjoint(matrix.x.detach(), b, self.failed_forward, known),
            b,
            self.solver,
            rtol=0.0,
            atol=atol,
            max_steps=self.plan.options.adjoint_steps,
            backend=self.plan.engine,
            precision=self.plan.options.precision,
        )
