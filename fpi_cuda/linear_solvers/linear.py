"""What GMRES and conjugate gradients share: correct, then let the true residual decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fpi_cuda.norms import row_norm
from fpi_cuda.ops.noise import noise_of
from fpi_cuda.ops.rules import GAIN, least_floor
from fpi_cuda.solution import SolveResult, Status

Operator = Callable[[Tensor], Tensor]
"""c (B, D) -> A c (B, D), row by row: A is another matrix for every sample."""

# A correction aims a little below the tolerance, so that rounding between its own estimate and
# the true residual seldom costs another round.
AIM = 0.9


class Correction(NamedTuple):
    """One round of a solver.

    Attributes:
        d: (B, D) what to add to x.
        num_steps: (B,) int32, evaluations spent.
        finite: (B,) bool, False where the operator returned NaN or Inf.
    """

    d: Tensor
    num_steps: Tensor
    finite: Tensor


class Round(NamedTuple):
    """What a solver is given for one round.

    Attributes:
        r: (B, D) true residual v - A x, in the working dtype.
        norm: (B,) float64 ||r||.
        target: (B,) float64, where to stop.
        budget: (B,) evaluations that may be spent.
        active: (B,) bool; the other samples cost nothing and must not be touched.
    """

    r: Tensor
    norm: Tensor
    target: Tensor
    budget: Tensor
    active: Tensor


def refine(
    operation: str,
    apply: Operator,
    v: Tensor,
    correct: Callable[[Round], Correction],
    *,
    least: int,
    atol: Tensor,
    max_steps: int,
    arithmetic: torch.dtype | None = None,
) -> SolveResult:
    """Solve A c = v by rounds of `correct`, each judged by the recomputed ||v - A c||.

    Args:
        operation: the name that errors begin with.
        apply: c -> A c.
        v: (B, D) right-hand sides.
        correct: approximate solution of A d = r.
        least: evaluations below which `correct` can do nothing.
        atol: (B,) float64.
        max_steps: cap on the evaluations of each sample, the checks included.
        arithmetic: what autocast gave to products in A; None where it was off. The floor of a
            sample that gains no more is then that of the noise of A.
    Raises:
        ValueError: v is not a floating (B, D), or atol not (B,).
    """
    if v.dim() != 2 or not v.is_floating_point():
        raise ValueError(
            f"{operation}: v must be floating and of shape (B, D), "
            f"got {tuple(v.shape)} of {v.dtype}"
        )
    if atol.shape != v.shape[:1]:
        raise ValueError(
            f"{operation}: atol must hold one tolerance per sample, "
            f"got v={tuple(v.shape)}, atol={tuple(atol.shape)}"
        )
    rounding = least_floor(torch.finfo(v.dtype).eps)
    noisy = v.new_zeros(v.shape[:1], dtype=torch.float64)
    noise = noise_of(arithmetic, v.dtype, max_steps)
    work = working_dtype(v.dtype)
    evaluate = checked(operation, apply, v.dtype)
    x = torch.zeros_like(v)
    r = v.to(work)
    v_norm = row_norm(r)
    residual = v_norm
    num_steps = torch.zeros_like(residual, dtype=torch.int32)
    status = torch.full_like(num_steps, Status.ACTIVE, dtype=torch.int8)
    status = status.masked_fill(residual <= atol, Status.CONVERGED)
    status = status.masked_fill(~torch.isfinite(residual), Status.NONFINITE)

    while True:
        active = status == Status.ACTIVE
        budget = max_steps - num_steps - 1
        status = status.masked_fill(active & (budget < least), Status.MAX_STEPS)
        active = active & (budget >= least)
        if not bool(active.any()):
            return SolveResult(x, status, num_steps, residual)

        target = torch.maximum(AIM * atol, torch.finfo(work).eps * residual)
        d, spent, finite = correct(Round(r, residual, target, budget, active))
        tried = active & finite
        x_new = torch.where(tried[:, None], (x.to(work) + d).to(v.dtype), x)
        product = evaluate(x_new)
        r_new = v.to(work) - product
        residual_new = row_norm(r_new)
        num_steps = num_steps + torch.where(active, spent + tried.int(), 0)

        finite = finite & torch.isfinite(residual_new)
        better = active & finite & (residual_new < residual)
        scale = torch.maximum(v_norm, torch.maximum(row_norm(x_new), row_norm(product)))
        lowest = torch.minimum(residual, residual_new)
        # A round that gains less, with the residual at the floor, has only moved the rounding
        # about, and so would more rounds.
        idle = active & finite & ~(residual_new <= GAIN * residual)
        if noise is not None:
            num_steps = noise.measure(evaluate, x_new, num_steps, idle, lowest / scale, noisy)
        stalled = idle & (lowest <= noisy.clamp(min=rounding) * scale)
        x = torch.where(better[:, None], x_new, x)
        r = torch.where(better[:, None], r_new, r)
        residual = torch.where(better, residual_new, residual)
        status = status.masked_fill(stalled, Status.STALLED)
        status = status.masked_fill(active & ~finite, Status.NONFINITE)
        status = status.masked_fill(active & (residual <= atol), Status.CONVERGED)


def checked(operation: str, apply: Operator, dtype: torch.dtype) -> Operator:
    """`apply` on c rounded to `dtype`, its result checked and in the working dtype."""

    def evaluate(c: Tensor) -> Tensor:
        product = apply(c.to(dtype))
        if product.shape != c.shape:
            raise ValueError(
                f"{operation}: the operator must return the shape of its argument, "
                f"got c={tuple(c.shape)}, A c={tuple(product.shape)}"
            )
        return product.to(working_dtype(dtype))

    return evaluate


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of bases and residuals: at least float32."""
    return torch.promote_types(dtype, torch.float32)
