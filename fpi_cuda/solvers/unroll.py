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
    while bool((state.status == Status.ACTIVE).any()):
        number += 1
        state = reference.step(state, evaluate(state.x, None), rules, solver)
        if noise is not None and number % EVERY == 0:
            # Apart from what autograd may have kept.
            control, num_steps = state.control.clone(), state.num_steps.clone()
            state = dataclasses.replace(state, control=control, num_steps=num_steps)
            with torch.no_grad():
                noise.after_step(evaluate, state.x.detach(), None, state)
    return SolveResult(state.best, state.status, state.num_steps, state.residual.detach())
