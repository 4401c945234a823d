"""A solve that autograd can follow step by step."""

from __future__ import annotations

import dataclasses
import types

import torch
from torch import Tensor

from fpi_cuda.options import FixedPointSolver
from fpi_cuda.result import SolveResult, Status
from fpi_cuda.solvers.noise import EVERY, noise_of
from fpi_cuda.solvers.stepping import FlatMap
from fpi_cuda.solvers.workspace import allocate, depth_of


def unroll(
    evaluate: FlatMap,
    x0: Tensor,
    solver: FixedPointSolver,
    *,
    rtol: float,
    atol: float | Tensor,
    max_steps: int,
    reference: types.ModuleType,
    arithmetic: torch.dtype | None = None,
) -> SolveResult:
    """Iterate from x0 as `solve` does, with x of the result differentiable, in x0 too.

    Which step is taken is a constant to autograd; what it computes is differentiated, the small
    solve included. Memory grows with the number of steps.

    Args:
        evaluate: the flat map; called with rows=None only.
        x0: (B, D), may require grad.
        reference: the module fpi_cuda.backends.reference.
        arithmetic: what autocast gives to products in evaluate; None where it is off.
    """
    work = allocate(x0.detach(), solver, atol)
    rules = reference.rules_for(x0.dtype, depth_of(solver, x0.shape[1]), work.atol, rtol, max_steps)
    state = reference.StepState(
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
    noise, number = noise_of(arithmetic, x0.dtype, max_steps), 0
    first = None
    while bool((state.status == Status.ACTIVE).any()):
        number += 1
        gx = evaluate(state.x, None)
        first = gx if first is None else first
        state = reference.step(state, gx, rules, solver)
        if noise is not None and number % EVERY == 0:
            # Apart from what autograd may have kept.
            control, num_steps = state.control.clone(), state.num_steps.clone()
            state = dataclasses.replace(state, control=control, num_steps=num_steps)
            with torch.no_grad():
                noise.after_step(evaluate, state.x.detach(), None, state)
    value = state.best if first is None else stepped_once(x0, first, state.best)
    return SolveResult(value, state.status, state.num_steps, state.residual.detach())


def stepped_once(x0: Tensor, gx0: Tensor, best: Tensor) -> Tensor:
    """`best` (B, D), with the derivative of g(x0) in samples that return x0 itself.

    A sample that starts at its fixed point takes no step, and would have no derivative.
    """
    returned = (best == x0).all(1) & torch.isfinite(gx0).all(1)
    # The value of x0, for gx0 - gx0 is zero.
    stood = x0.detach() + (gx0 - gx0.detach())
    return torch.where(returned[:, None], stood, best)
