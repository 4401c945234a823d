"""A whole solve of a lowered map in one call of native code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpi_cuda.activations import CODES
from fpi_cuda.loops.stepping import depth_of, empty_result, numbers_of
from fpi_cuda.lowered import Lowered
from fpi_cuda.norms import row_norm
from fpi_cuda.ops.rules import CAP
from fpi_cuda.options import PRECISIONS, Anderson, FixedPointSolver, LinearSolver, Picard
from fpi_cuda.solution import SolveResult, Status

SHARE = 0.5
"""Of the tolerance, what a solve with rounded products may use up; the rest is for what rounding
moves."""

NO_LAYER = (None, None, None, None)


def solve_fused(
    lowered: Lowered,
    x0: Tensor,
    solver: FixedPointSolver | LinearSolver,
    *,
    rtol: float,
    atol: float | Tensor,
    max_steps: int,
    backend: Any,
    precision: str = "ieee",
) -> SolveResult:
    """Iterate the map from x0 until every sample has stopped; a sample that has stopped is free.

    With rounded products, the map itself has the last word on what was reached.

    Args:
        lowered: without a graph, of x0's shape, dtype and device.
        x0: (B, D), plain, not modified.
        solver: Picard or Anderson.
        atol: one number, or (B,) float64.
        backend: that has cell_loop_, in the schema of csrc/cell_ops.cpp.
        precision: of the products with the weights, one of options.PRECISIONS. A float64
            state, and a cap that leaves no step besides those that verify, are for "ieee".
    """
    room = max_steps - evaluations_to_verify(rtol)
    if precision == "ieee" or x0.dtype != torch.float32 or room < 1:
        return run(lowered, x0, solver, rtol=rtol, atol=atol, max_steps=max_steps, backend=backend)
    result = run(
        lowered, x0, solver, rtol=SHARE * rtol, atol=SHARE * atol, max_steps=room,
        backend=backend, precision=precision,
    )  # fmt: skip
    return verify_rounded(lowered, x0, result, rtol=rtol, atol=atol, backend=backend)


def evaluations_to_verify(rtol: float) -> int:
    """How often `verify_rounded` evaluates the map."""
    return 2 if rtol else 1


def verify_rounded(
    lowered: Lowered,
    x0: Tensor,
    result: SolveResult,
    *,
    rtol: float,
    atol: float | Tensor,
    backend: Any,
) -> SolveResult:
    """`result` with the residual of the unrounded map, and what follows from that.

    A sample within the tolerance has converged, unless its solve gave it up as lost; one that is
    not, and whose solve thought it was, is STALLED. The evaluations count as steps. They are by
    the kernels, in which no sample depends on the others.

    Args:
        x0: (B, D) where the solve began.
        rtol, atol: of the stop test; atol a number or (B,) float64.
    """
    first_step: dict[str, Any] = {"max_steps": 1, "backend": backend}
    at = run(lowered, result.x, Picard(), rtol=rtol, atol=atol, **first_step)
    passes = at.status == Status.CONVERGED
    if rtol:
        size = row_norm(x0)
        # At most the norm of g(x0), and that itself from x0 = 0.
        value = run(lowered, x0, Picard(), rtol=0.0, atol=0.0, **first_step).residual - size
        cap = CAP * torch.maximum(size, value) + atol
        # Or the solve saw it settle elsewhere, and rounding did not hide the residual.
        settled = (result.status == Status.CONVERGED) & (SHARE * at.residual <= result.residual)
        passes &= (at.residual <= cap) | settled
    status = result.status
    lost = (status == Status.NONFINITE) | (status == Status.DIVERGED)
    failed = torch.where(status == Status.CONVERGED, int(Status.STALLED), status)
    status = torch.where(passes & ~lost, int(Status.CONVERGED), failed).to(torch.int8)
    steps = result.num_steps + evaluations_to_verify(rtol)
    return SolveResult(result.x, status, steps, at.residual)


def run(
    lowered: Lowered,
    x0: Tensor,
    solver: FixedPointSolver | LinearSolver,
    *,
    rtol: float,
    atol: float | Tensor,
    max_steps: int,
    backend: Any,
    precision: str = "ieee",
) -> SolveResult:
    """One call of the op; arguments as in solve_fused."""
    assert isinstance(solver, (Picard, Anderson))
    batch, dim = x0.shape
    if batch == 0:
        return empty_result(x0)
    beta, ridge = numbers_of(solver)
    first, *rest = lowered.layers
    with torch.no_grad():
        x = x0.clone(memory_format=torch.contiguous_format)
        status = torch.zeros(batch, dtype=torch.int8, device=x.device)
        num_steps = torch.zeros(batch, dtype=torch.int32, device=x.device)
        residual = torch.zeros(batch, dtype=torch.float64, device=x.device)
        backend.cell_loop_(
            x,
            lowered.x_factor,
            *first.tensors(),
            *(rest[0].tensors() if rest else NO_LAYER),
            torch.as_tensor(atol, dtype=torch.float64, device=x.device).expand(batch).contiguous(),
            status,
            num_steps,
            residual,
            activation1=CODES[first.activation],
            activation2=CODES[rest[0].activation if rest else "identity"],
            carry=lowered.carry,
            depth=depth_of(solver, dim),
            rtol=rtol,
            max_steps=max_steps,
            beta=beta,
            ridge=ridge,
            precision=PRECISIONS.index(precision),
        )
    return SolveResult(x, status, num_steps, residual)
