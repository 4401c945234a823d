"""Conjugate gradients on the normal equations A^T A c = A^T v of a batch, each on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.linear_solvers.linear import Correction, Operator, Round, checked, refine
from fpi_cuda.norms import row_norm
from fpi_cuda.solution import SolveResult


@torch.no_grad()
def conjugate_gradient(
    apply: Operator,
    apply_transpose: Operator,
    v: Tensor,
    *,
    atol: Tensor,
    max_steps: int,
    arithmetic: torch.dtype | None = None,
) -> SolveResult:
    """Solve A c = v for every sample, from c = 0; ||v - A c|| falls with every step.

    Args:
        apply: c (B, D) -> A c (B, D), row by row, in the dtype of v.
        apply_transpose: c -> A^T c, likewise.
        v: (B, D).
        atol: (B,) float64; sample i is converged when ||v_i - A_i c_i|| <= atol_i.
        max_steps: cap on the evaluations of both operators per sample. A step costs one of
            each; one more recomputes the residual.
        arithmetic: what autocast gave to products in A; None where it was off.
    Returns:
        SolveResult; num_steps counts evaluations of both operators, residual is ||v - A c||
        recomputed, and a sample that failed keeps the best c.
    Raises:
        ValueError: shapes disagree.
    Source:
        Hestenes and Stiefel, J. Res. Nat. Bur. Standards 49(6), 1952, section 10; for the
        adjoint of a fixed point, Liao et al., ICML 2018 (CG-RBP).
    """
    forward = checked("conjugate_gradient", apply, v.dtype)
    transpose = checked("conjugate_gradient", apply_transpose, v.dtype)

    def correct(round_: Round) -> Correction:
        return descend(forward, transpose, round_)

    return refine(
        "conjugate_gradient",
        apply,
        v,
        correct,
        least=2,
        atol=atol,
        max_steps=max_steps,
        arithmetic=arithmetic,
    )


def descend(forward: Operator, transpose: Operator, round_: Round) -> Correction:
    """Steps from d = 0 until the residual by recurrence is at the target."""
    r, norm, target, budget, active = round_
    eps = torch.finfo(r.dtype).eps
    d = torch.zeros_like(r)
    s = transpose(r)
    s_norm = row_norm(s)
    spent = active.int()
    finite = ~active | torch.isfinite(s_norm)
    going = active & finite & (s_norm > 0)
    p = torch.where(going[:, None], s, 0)
    gain = torch.zeros_like(norm)  # the largest ||A p|| / ||p|| seen: a lower bound of ||A||

    while True:
        going = going & (spent < budget)
        if not bool(going.any()):
            return Correction(d, spent, finite)
        q = forward(p)
        spent = spent + going.int()
        q_norm = row_norm(q)
        finite = finite & ~(going & ~torch.isfinite(q_norm))
        going = going & finite & (q_norm > 0)
        gain = torch.where(going, torch.maximum(gain, q_norm / row_norm(p)), gain)
        length = torch.where(going, (s_norm / q_norm) ** 2, 0.0)[:, None].to(r.dtype)
        d = torch.where(going[:, None], d + length * p, d)
        r = torch.where(going[:, None], r - length * q, r)
        r_norm = row_norm(r)
        going = going & (r_norm > target) & (spent < budget)
        if not bool(going.any()):
            return Correction(d, spent, finite)

        s = transpose(r)
        spent = spent + going.int()
        s_new = row_norm(s)
        finite = finite & ~(going & ~torch.isfinite(s_new))
        # A residual orthogonal to the range of A, up to rounding, cannot be lowered.
        going = going & finite & (s_new > eps * gain * r_norm)
        turn = torch.where(going, (s_new / s_norm) ** 2, 0.0)[:, None].to(r.dtype)
        p = torch.where(going[:, None], s + turn * p, 0)
        s_norm = torch.where(going, s_new, s_norm)
