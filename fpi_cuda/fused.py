"""The fused loop: g, the solver and the stop test in one call, for cells that lower to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.cells.lowering import (
    difference,
    is_lowered_here,
    lowered,
    require_lowerable,
    require_no_decline,
    require_same_map,
    require_shapes,
)
from fpi_cuda.faithful import rehearsed
from fpi_cuda.fused_evaluation import FusedEvaluation
from fpi_cuda.implicit import FlatMap, Jacobian, Linearization
from fpi_cuda.lowered import NotLowered, added_functions
from fpi_cuda.options import FixedPointSolver, LinearSolver
from fpi_cuda.precision import NAMES
from fpi_cuda.result import SolveResult
from fpi_cuda.shortcuts import why_rows_unknown
from fpi_cuda.solvers.fused import FusedMap, solve_fused, why_not_served
from fpi_cuda.solvers.stepping import Backend
from fpi_cuda.solvers.workspace import depth_of

DRAWN = "its weights are drawn at random"


def why_not_fused(
    g: object, engine: Backend, solver: FixedPointSolver, dtype: torch.dtype, *, rowwise: bool
) -> str | None:
    """Why the fused loop cannot run such solves of g, or None if it can.

    Args:
        dtype: of the state.
        rowwise: stopped samples may be left out.
    """
    try:
        require_lowerable(g)
    except NotLowered as reason:
        return str(reason)
    if not rowwise:
        return why_rows_unknown(g) or "rowwise is not True"
    return why_not_served(solver, dtype, engine)


def why_declined(g: object, device: torch.device) -> str | None:
    """Why lower() of a cell that could be fused declines whatever it is given; None if not."""
    try:
        _, random = rehearsed(lambda: require_no_decline(g), device, g, "lower")
    except NotLowered as reason:
        return str(reason)
    return DRAWN if random else None


def fused_map(
    flat_map: FlatMap, engine: Backend, solver: FixedPointSolver, *, rowwise: bool
) -> FusedMap:
    """g with its inputs bound, as the fused loop runs it; under no_grad.

    Raises:
        NotLowered: it cannot, and why.
    """
    layout = flat_map.layout
    g: Any = flat_map.g
    reason = why_not_fused(g, engine, solver, layout.dtype, rowwise=rowwise)
    if reason is not None:
        raise NotLowered(reason)
    if transforms.active():
        raise NotLowered("the call is inside torch.func transforms")
    if layout.is_tuple or len(layout.shapes[0]) != 1:
        raise NotLowered("the state is not one tensor (B, features)")
    if flat_map.replay.autocast_dtype is not None:
        raise NotLowered("autocast is on")
    if flat_map.whole is not None:
        raise NotLowered(flat_map.whole)
    # Not by the replay: the first evaluation of g is yet to come.
    result, random = rehearsed(lambda: lowered(g, flat_map.read), layout.device, g, "lower")
    if random:
        raise NotLowered(DRAWN)
    require_shapes(result, layout)
    for layer in result.layers:
        if layer.activation in added_functions and not hasattr(engine, "CELL_LOOP_TAKES_ADDED"):
            raise NotLowered(f"the {engine.name} backend knows no added {layer.activation!r}")
    return FusedMap.of(result, (*g.parameters(), *g.buffers()))


def why_not_worth(
    fused: FusedMap, engine: Any, solver: FixedPointSolver, batch: int, precision: str
) -> str | None:
    """Why another way is expected to be faster for so many samples, or None if none is."""
    if batch == 0 or not hasattr(engine, "cell_loop_plan"):
        return None
    first, *rest = fused.lowered.layers
    weight = first.weight
    depth = depth_of(solver, weight.shape[1])
    _, reason = engine.cell_loop_plan(
        batch,
        weight.shape[1],
        weight.shape[0] if rest else 0,
        depth,
        weight.dtype,
        NAMES.index(precision) if weight.dtype == torch.float32 else 0,
        weight.device,
    )
    return reason


def require_same_as_step(flat_map: FlatMap, fused: FusedMap, x: Tensor) -> Tensor | None:
    """Raise where a user's lower() does not describe the user's step(), at x (B, D) and near it.

    Returns:
        step() at x (B, D); None where lower() is this package's own.
    Raises:
        ValueError: it does not.
        NotLowered: step() draws random numbers, which lower() cannot.
    """
    if is_lowered_here(flat_map.g):
        return None
    # Besides x itself, for where that is zero, or weights are, an error of the other is hidden.
    size = x.abs().amax(1, keepdim=True)
    size = torch.where(size.isfinite() & (size > 0), size, 1.0)
    away = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype, device=x.device)
    found = []
    for points in (x, x + size * away):
        expected = flat_map.evaluate(points.clone(), None)
        if flat_map.replay.stochastic:
            raise NotLowered("step() draws random numbers")
        require_same_map(type(flat_map.g).__name__, fused.lowered, points, expected)
        found.append(expected)
    return found[0]


def why_no_fused_adjoint(flat_map: FlatMap, fused: FusedMap, x: Tensor) -> str | None:
    """Why the derivative of a fused map at x (B, D) is not for the fused loop, or None."""
    if fused.lowered.x_factor is not None:
        return "the adjoint of a map with an x_factor is none that it runs"
    if is_lowered_here(flat_map.g) or len(x) == 0:
        return None
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        gx = flat_map(leaf)
        v = torch.arange(1, x.numel() + 1, device=x.device).sin().to(x.dtype).reshape(x.shape)
        found = None
        if gx.requires_grad:
            (found,) = torch.autograd.grad(gx, leaf, v, allow_unused=True)
    expected = torch.zeros_like(x) if found is None else found
    with torch.no_grad():
        adjoint = fused.lowered.adjoint(x, torch.zeros_like(x))
        if not bool(difference(adjoint, v, expected)[1].any()):
            return None
    return "step() has another derivative than what lower() describes"


class FusedAdjoint:
    """Solves c = J^T c + b in one loop, J being that of a fused map at its fixed point.

    Args:
        fused: the map.
        solver, max_steps, engine, precision: of the adjoint solve.
        hopeless: (B,) bool, samples without a fixed point to differentiate; None if there are
            none.
        evaluation: what g was evaluated by at the fixed point, if by that.
    """

    def __init__(
        self,
        fused: FusedMap,
        solver: FixedPointSolver | LinearSolver,
        max_steps: int,
        engine: Backend,
        precision: str,
        hopeless: Tensor | None,
        evaluation: FusedEvaluation | None,
    ) -> None:
        self._fused = fused
        self._solver = solver
        self._max_steps = max_steps
        self._engine = engine
        self._precision = precision
        self._hopeless = hopeless
        self._evaluation = evaluation

    def solve(self, matrix: Jacobian, b: Tensor, atol: Tensor) -> SolveResult | None:
        """c (B, D) with ||J^T c + b - c|| <= atol (B,); None where the host has to do it.

        That is where J is not the linearization at the fixed point but one that is itself
        differentiated, and where weights were written to: autograd then has to complain.
        """
        if type(matrix) is not Linearization or not self._fused.unchanged():
            return None
        known = None if self._evaluation is None else self._evaluation.slopes
        return solve_fused(
            self._fused.lowered.adjoint(matrix.x.detach(), b, self._hopeless, known),
            b,
            self._solver,
            rtol=0.0,
            atol=atol,
            max_steps=self._max_steps,
            backend=self._engine,
            precision=self._precision,
        )
