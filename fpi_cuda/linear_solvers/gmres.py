"""Restarted GMRES on a batch: every sample has its own Krylov basis and its own stop test."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.linear_solvers.linear import Correction, Operator, Round, checked, refine
from fpi_cuda.norms import row_norm
from fpi_cuda.solution import SolveResult

# What is left of A v_j after two orthogonalisations is rounding below this share of it: the
# Krylov space is exhausted.
BREAKDOWN = 16.0
# Float64 copies of the basis are made in pieces of at most this many elements.
PIECE = 1 << 22


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
    evaluate = checked("gmres", apply, v.dtype)

    def correct(round_: Round) -> Correction:
        return cycle(evaluate, round_, restart)

    return refine(
        "gmres", apply, v, correct, least=1, atol=atol, max_steps=max_steps, arithmetic=arithmetic
    )


def cycle(evaluate: Operator, round_: Round, restart: int) -> Correction:
    """One cycle: the d of the Krylov space of r that makes ||r - A d|| least."""
    r, norm, target, budget, active = round_
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
    return Correction(combine(weights, basis), spent, finite)


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
