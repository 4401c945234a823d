"""What a point that was found with rounded products is worth to the map itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.lowered import Lowered
from fpi_cuda.result import SolveResult, Status
from fpi_cuda.row_norm import row_norm

SHARE = 0.5
"""Of the tolerance, what a solve may use up; the rest is for what rounding moves."""
# Against the size of x0 and g(x0), as csrc/common/decide.h has it: drifting off is no convergence.
LARGEST_TOLERANCE = 0.1


def evaluations_to_judge(rtol: float) -> int:
    """How often `judged` evaluates the map."""
    return 2 if rtol else 1


def judged(
    lowered: Lowered, x0: Tensor, result: SolveResult, *, rtol: float, atol: float | Tensor
) -> SolveResult:
    """`result` with the residual of the map as torch evaluates it, and what follows from that.

    A sample within the tolerance has converged, unless its solve gave it up as lost; one that is
    not, and whose solve thought it was, is STALLED. The evaluations count as steps.

    Args:
        lowered: the map that was solved for.
        x0: (B, D) where the solve began.
        rtol, atol: of the stop test; atol a number or (B,) float64.
    """
    value = lowered(result.x)
    residual = row_norm(value - result.x)
    tolerance = torch.zeros_like(residual)
    if rtol:
        start = torch.maximum(row_norm(x0), row_norm(lowered(x0)))
        tolerance = torch.minimum(rtol * row_norm(value), LARGEST_TOLERANCE * start)
    # A tolerance may be infinite too, where g overflows.
    passes = (residual <= tolerance + atol) & residual.isfinite()
    status = result.status
    lost = (status == Status.NONFINITE) | (status == Status.DIVERGED)
    failed = torch.where(status == Status.CONVERGED, int(Status.STALLED), status)
    status = torch.where(passes & ~lost, int(Status.CONVERGED), failed).to(torch.int8)
    steps = result.num_steps + evaluations_to_judge(rtol)
    return SolveResult(result.x, status, steps, residual)
