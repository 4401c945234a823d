"""What a point that was found with rounded products is worth to the map itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpi_cuda.norms import row_norm
from fpi_cuda.ops.rules import CAP
from fpi_cuda.solution import SolveResult, Status

SHARE = 0.5
"""Of the tolerance, what a solve may use up; the rest is for what rounding moves."""

StopTest = Callable[[Tensor, float, "float | Tensor"], SolveResult]
"""One evaluation of the unrounded map at x (B, D), judged by rtol and atol as any first step is."""


def evaluations_to_judge(rtol: float) -> int:
    """How often `judged` evaluates the map."""
    return 2 if rtol else 1


def judged(
    stop_test: StopTest, x0: Tensor, result: SolveResult, *, rtol: float, atol: float | Tensor
) -> SolveResult:
    """`result` with the residual of the unrounded map, and what follows from that.

    A sample within the tolerance has converged, unless its solve gave it up as lost; one that is
    not, and whose solve thought it was, is STALLED. The evaluations count as steps. They are by
    the kernels, in which no sample depends on the others.

    Args:
        x0: (B, D) where the solve began.
        rtol, atol: of the stop test; atol a number or (B,) float64.
    """
    at = stop_test(result.x, rtol, atol)
    passes = at.status == Status.CONVERGED
    if rtol:
        size = row_norm(x0)
        # At most the norm of g(x0), and that itself from x0 = 0.
        value = stop_test(x0, 0.0, 0.0).residual - size
        cap = CAP * torch.maximum(size, value) + atol
        # Or the solve saw it settle elsewhere, and rounding did not hide the residual.
        settled = (result.status == Status.CONVERGED) & (SHARE * at.residual <= result.residual)
        passes &= (at.residual <= cap) | settled
    status = result.status
    lost = (status == Status.NONFINITE) | (status == Status.DIVERGED)
    failed = torch.where(status == Status.CONVERGED, int(Status.STALLED), status)
    status = torch.where(passes & ~lost, int(Status.CONVERGED), failed).to(torch.int8)
    steps = result.num_steps + evaluations_to_judge(rtol)
    return SolveResult(result.x, status, steps, at.residual)
