"""A solve that autograd can follow step by step."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.coupling import Coupling
from fpi_cuda.loops.coupled import JointTest, System, feels, retold, rows_of
from fpi_cuda.loops.stepping import Evaluate, allocate, depth_of
from fpi_cuda.norms import row_norm
from fpi_cuda.ops.noise import EVERY, Noise, noise_of
from fpi_cuda.ops.solver_state import column
from fpi_cuda.options import MOST_STEPS, FixedPointSolver
from fpi_cuda.solution import SolveResult, Status


def unroll(
    evaluate: Evaluate,
    x0: Tensor,
    solver: FixedPointSolver,
    *,
    rtol: float,
    atol: float,
    max_steps: int,
    reference: types.ModuleType,
    arithmetic: torch.dtype | None = None,
    coupling: Coupling | None = None,
) -> SolveResult:
    """Iterate from x0 as `solve` does, with x of the result differentiable, in x0 too.

    Which step is taken is a constant to autograd; what it computes is differentiated, the small
    solve included. Memory grows with the number of steps. Rows that turn out to depend on one
    another are solved once more, as one sample.

    Args:
        evaluate: the flat map; called with rows=None only.
        x0: (B, D), may require grad.
        reference: the module fpi_cuda.ops.reference.
        arithmetic: what autocast gives to products in evaluate; None where it is off.
        coupling: what is known of whether rows depend on one another; None: they do not.
    """
    system = System(evaluate, solver, rtol, atol, max_steps, reference, False, arithmetic, len(x0))
    if coupling is None or len(x0) < 2:
        return unroll_rows(system, x0, reference)
    if not coupling.joint:
        result = unroll_rows(system, x0, reference)
        apart = result._replace(x=result.x.detach())
        with torch.no_grad():
            gx = evaluate(apart.x, None).detach()
        told = apart
        if reference.num_moved(apart.x, gx, apart.status, apart.residual):
            told = retold(apart, gx, atol, rtol)
        if told is apart or not feels(told, apart, gx):
            coupling.is_independent()
            return told._replace(x=result.x)
        coupling.depends()
    return unroll_jointly(system, x0, reference)


def first_state(x0: Tensor, solver: FixedPointSolver, atol: float | Tensor, reference: Any) -> Any:
    """The reference.StepState of a solve that begins at x0."""
    work = allocate(x0.detach(), solver, atol)
    return reference.StepState(
        x=x0,
        best=x0,
        anchor=x0 if len(work.anchor) else work.anchor,
        f_previous=torch.zeros_like(work.f_previous),
        partner_previous=torch.zeros_like(work.partner_previous),
        columns_f=torch.zeros_like(work.columns_f),
        columns_g=torch.zeros_like(work.columns_g),
        gram=torch.zeros_like(work.gram),
        control=work.control,
        status=work.status,
        num_steps=work.num_steps,
        residual=work.residual,
    )


def unroll_rows(system: System, x0: Tensor, reference: Any) -> SolveResult:
    """Every row on its own."""
    solver, max_steps = system.solver, system.max_steps
    state = first_state(x0, solver, system.atol, reference)
    atol = torch.zeros_like(state.residual) + system.atol
    depth = depth_of(solver, x0.shape[1])
    rules = reference.rules_for(x0.dtype, depth, atol, system.rtol, max_steps)
    noise, number = noise_of(system.arithmetic, x0.dtype, max_steps), 0
    first = None
    while bool((state.status == Status.ACTIVE).any()):
        number += 1
        gx = system.evaluate(state.x, None)
        first = gx if first is None else first
        state = reference.step(state, gx, rules, solver)
        if noise is not None and number % EVERY == 0:
            state = measured(noise, system.evaluate, state)
    value = state.best if first is None else stepped_once(x0, first, state.best)
    return SolveResult(value, state.status, state.num_steps, state.residual.detach())


def unroll_jointly(system: System, x0: Tensor, reference: Any) -> SolveResult:
    """All rows as one sample; see fpi_cuda.loops.coupled.joint_solve."""
    solver, shape = system.solver, x0.shape

    def evaluate(y: Tensor, _: Tensor | None) -> Tensor:
        return system.evaluate(y.reshape(shape), None).reshape(1, -1)

    start = x0.reshape(1, -1)
    state = first_state(start, solver, 0.0, reference)
    nothing = torch.zeros_like(state.residual)
    depth = depth_of(solver, start.shape[1])
    rules = reference.rules_for(x0.dtype, depth, nothing, 0.0, MOST_STEPS)
    noise, number = noise_of(system.arithmetic, x0.dtype, system.max_steps), 1
    first = gx = evaluate(start, None)
    scale = torch.maximum(row_norm(start.detach()), row_norm(gx.detach()))
    judge = JointTest(system, scale, len(x0))
    least: float | None = None
    while True:
        at = state.x.detach().reshape(shape)
        residual, passes = judge(at, gx.detach().reshape(shape), state.control)
        if bool(passes.all()):
            value, ended = state.x, Status.CONVERGED
            break
        state = reference.step(state, gx, rules, solver)
        best = float(column(state.control, "best"))
        if best != least:
            least, kept = best, (residual, passes)
        status = Status(int(state.status))
        if status != Status.ACTIVE or number >= system.max_steps:
            value, ended = state.best, status if status != Status.ACTIVE else Status.MAX_STEPS
            residual, passes = kept
            break
        if noise is not None and number % EVERY == 0:
            state = measured(noise, evaluate, state)
        gx = evaluate(state.x, None)
        number += 1
    told = rows_of(
        at,
        torch.full_like(passes, int(ended), dtype=torch.int8),
        passes,
        residual,
        torch.full_like(passes, number, dtype=torch.int32),
    )
    return told._replace(x=stepped_once(start, first, value).reshape(shape))


def measured(noise: Noise, evaluate: Evaluate, state: Any) -> Any:
    """The state after a look at the noise of the map."""
    # Apart from what autograd may have kept.
    control, num_steps = state.control.clone(), state.num_steps.clone()
    state = dataclasses.replace(state, control=control, num_steps=num_steps)
    with torch.no_grad():
        noise.after_step(evaluate, state.x.detach(), None, state)
    return state


def stepped_once(x0: Tensor, gx0: Tensor, best: Tensor) -> Tensor:
    """`best` (B, D), with the derivative of g(x0) in samples that return x0 itself.

    A sample that starts at its fixed point takes no step, and would have no derivative.
    """
    returned = (best == x0).all(1) & torch.isfinite(gx0).all(1)
    # The value of x0, for gx0 - gx0 is zero.
    stood = x0.detach() + (gx0 - gx0.detach())
    return torch.where(returned[:, None], stood, best)
