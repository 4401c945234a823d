"""Solvers of batches of linear systems, for adjoints: GMRES and conjugate gradients.

Both correct, then let the true residual decide. Every sample is a system of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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


# What is left of A v_j after two orthogonalisations is rounding below this share of it: the
# Krylov space is exhausted.
BREAKDOWN = 16.0
# Float64 copies of the basis are made in pieces of at most this many elements.
PIECE = 1 << 22

Correct = Callable[
    [Operator, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
]
"""One round of a solver: from (evaluate, r, norm, target, budget, active) to (d, spent, finite).

evaluate: `apply`, checked, in the working dtype.
r: (B, D) true residual v - A x, in the working dtype; norm: (B,) float64 ||r||.
target: (B,) float64, where to stop; budget: (B,) evaluations that may be spent.
active: (B,) bool; the other samples cost nothing and must not be touched.
d: (B, D) what to add to x; spent: (B,) int32, evaluations.
finite: (B,) bool, False where the operator returned NaN or Inf.
"""


@torch.no_grad()
def gmres(
    apply: Operator,
    v: Tensor,
    *,
    restart: int,
    atol: Tensor,
    max_steps: int,
    arithmetic: torch.dtype | None = None,
) -> SolveResult:
    """Solve A c = v for every sample, from c = 0.

    Args:
        apply: c (B, D) -> A c (B, D), row by row, in the dtype of v.
        v: (B, D).
        restart: size of the Krylov basis. Memory is restart + 4 times v, and restart^2 float64
            numbers per sample.
        atol: (B,) float64; sample i is converged when ||v_i - A_i c_i|| <= atol_i.
        max_steps: cap on the evaluations of `apply` per sample. One of them recomputes the
            residual, so that 1 allows no step at all.
        arithmetic: what autocast gave to products in A; None where it was off.
    Returns:
        SolveResult; num_steps counts evaluations of `apply`, residual is ||v - A c||
        recomputed, and a sample that failed keeps the best c at the end of a cycle.
    Raises:
        ValueError: shapes disagree.
    Source:
        Saad and Schultz, SIAM J. Sci. Stat. Comput. 7(3), 1986, algorithm 4.
    """
    return refine(
        "gmres",
        apply,
        v,
        partial(cycle, restart),
        least=1,
        atol=atol,
        max_steps=max_steps,
        arithmetic=arithmetic,
    )


def cycle(
    restart: int,
    evaluate: Operator,
    r: Tensor,
    norm: Tensor,
    target: Tensor,
    budget: Tensor,
    active: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One cycle: the d of the Krylov space of r that makes ||r - A d|| least. See Correct."""
    batch, dim = r.shape
    size = min(restart, dim, int(budget[active].max()))
    tiny = BREAKDOWN * torch.finfo(r.dtype).eps

    basis = r.new_zeros(batch, size, dim)
    basis[:, 0] = torch.where(active[:, None], r / norm[:, None].to(r.dtype), 0)
    upper = torch.eye(size, dtype=torch.float64, device=r.device).repeat(batch, 1, 1)
    # rotations @ Hessenberg = upper. Keeping the product makes a step a few batched operations
    # instead of one for every earlier Givens rotation.
    rotations = torch.eye(size + 1, dtype=torch.float64, device=r.device).repeat(batch, 1, 1)
    usable = torch.zeros(batch, size, dtype=torch.bool, device=r.device)
    spent = torch.zeros_like(norm, dtype=torch.int32)
    finite = torch.ones_like(active)
    going = active

    for j in range(size):
        going = going & (spent < budget)
        if not bool(going.any()):
            break
        w = evaluate(basis[:, j])
        spent = spent + going.int()
        w_norm = row_norm(w)
        broken = going & ~torch.isfinite(w_norm)
        finite = finite & ~broken
        going = going & ~broken
        w = torch.where(going[:, None], w, 0)

        w, along = orthogonalized(w, basis[:, : j + 1])
        height = row_norm(w)
        height = torch.where(height <= tiny * w_norm, 0.0, height)
        column = torch.cat([along, height[:, None]], 1)

        rotated = torch.bmm(rotations[:, : j + 2, : j + 2], column[:, :, None])[:, :, 0]
        a, b = rotated[:, j], rotated[:, j + 1]
        pivot = torch.hypot(a, b)
        solvable = going & (pivot > tiny * w_norm)
        safe = torch.where(solvable, pivot, 1.0)
        cos = torch.where(solvable, a / safe, 1.0)[:, None]
        sin = torch.where(solvable, b / safe, 0.0)[:, None]
        row, below = rotations[:, j], rotations[:, j + 1]
        rotations[:, j], rotations[:, j + 1] = cos * row + sin * below, cos * below - sin * row
        # A column that adds nothing (A is singular on this space) keeps the identity and gets a
        # zero weight.
        upper[:, :j, j] = torch.where(solvable[:, None], rotated[:, :j], 0.0)
        upper[:, j, j] = safe
        usable[:, j] = solvable

        estimate = norm * rotations[:, j + 1, 0].abs()
        going = solvable & (height > 0) & (estimate > target)
        if j + 1 < size:
            unit = w / torch.where(going, height, 1.0)[:, None].to(w.dtype)
            basis[:, j + 1] = torch.where(going[:, None], unit, 0)

    right = torch.where(usable, norm[:, None] * rotations[:, :size, 0], 0.0)
    weights = torch.linalg.solve_triangular(upper, right[:, :, None], upper=True)[:, :, 0]
    return combine(weights, basis), spent, finite


def orthogonalized(w: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """w (B, D) less its parts along known (B, n, D), and float64 (B, n), those parts.

    Twice is enough: one pass of classical Gram-Schmidt leaves the basis dependent.
    """
    first = dots(known, w)
    w = w - combine(first, known)
    second = dots(known, w)
    return w - combine(second, known), first + second


def dots(basis: Tensor, w: Tensor) -> Tensor:
    """(B, k) float64 inner products of basis (B, k, D) with w (B, D)."""
    batch, count = basis.shape[:2]
    total = torch.zeros(batch, count, dtype=torch.float64, device=w.device)
    width = max(1, PIECE // max(1, batch * count))
    for piece, part in zip(basis.split(width, 2), w.split(width, 1), strict=True):
        total += torch.bmm(piece.double(), part.double()[:, :, None])[:, :, 0]
    return total


def combine(weights: Tensor, basis: Tensor) -> Tensor:
    """(B, D) sum over k of weights (B, k) times basis (B, k, D)."""
    return torch.bmm(weights[:, None].to(basis.dtype), basis)[:, 0]


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
    return refine(
        "conjugate_gradient",
        apply,
        v,
        partial(descend, checked("conjugate_gradient", apply_transpose, v.dtype)),
        least=2,
        atol=atol,
        max_steps=max_steps,
        arithmetic=arithmetic,
    )


def descend(
    transpose: Operator,
    forward: Operator,
    r: Tensor,
    norm: Tensor,
    target: Tensor,
    budget: Tensor,
    active: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps from d = 0 until the residual by recurrence is at the target. See Correct."""
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
            return d, spent, finite
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
            return d, spent, finite

        s = transpose(r)
        spent = spent + going.int()
        s_new = row_norm(s)
        finite = finite & ~(going & ~torch.isfinite(s_new))
        # A residual orthogonal to the range of A, up to rounding, cannot be lowered.
        going = going & finite & (s_new > eps * gain * r_norm)
        turn = torch.where(going, (s_new / s_norm) ** 2, 0.0)[:, None].to(r.dtype)
        p = torch.where(going[:, None], s + turn * p, 0)
        s_norm = torch.where(going, s_new, s_norm)


def refine(
    operation: str,
    apply: Operator,
    v: Tensor,
    correct: Correct,
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
        d, spent, finite = correct(evaluate, r, residual, target, budget, active)
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
