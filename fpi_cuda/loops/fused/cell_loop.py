"""A whole solve of a lowered map in one call of native code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.activations import CODES
from fpi_cuda.loops.fused.verify_rounded import SHARE, evaluations_to_judge, judged
from fpi_cuda.loops.iteration import empty_result
from fpi_cuda.loops.workspace import depth_of
from fpi_cuda.lowered import Lowered
from fpi_cuda.options import Anderson, FixedPointSolver, LinearSolver, Picard
from fpi_cuda.precision import NAMES
from fpi_cuda.solution import SolveResult

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
        precision: of the products with the weights, one of fpi_cuda.precision.NAMES. A float64
            state, and a cap that leaves no step besides those that judge, are for "ieee".
    """
    if precision != "ieee" and x0.dtype == torch.float32 and len(x0):
        room = max_steps - evaluations_to_judge(rtol)
        if room >= 1:
            result = run(
                lowered, x0, solver, rtol=SHARE * rtol, atol=SHARE * atol, max_steps=room,
                backend=backend, precision=precision,
            )  # fmt: skip
            return judged(StopTest(lowered, backend), x0, result, rtol=rtol, atol=atol)
    return run(
        lowered, x0, solver, rtol=rtol, atol=atol, max_steps=max_steps, backend=backend,
        precision="ieee",
    )  # fmt: skip


@dataclass(frozen=True)
class StopTest:
    """One evaluation of the map at x (B, D) in its own precision; see verify_rounded."""

    lowered: Lowered
    backend: Any

    def __call__(self, x: Tensor, rtol: float, atol: float | Tensor) -> SolveResult:
        """Of x itself: residual, and whether it is within rtol and atol."""
        return run(
            self.lowered, x, Picard(), rtol=rtol, atol=atol, max_steps=1, backend=self.backend,
            precision="ieee",
        )  # fmt: skip


def run(
    lowered: Lowered,
    x0: Tensor,
    solver: FixedPointSolver | LinearSolver,
    *,
    rtol: float,
    atol: float | Tensor,
    max_steps: int,
    backend: Any,
    precision: str,
) -> SolveResult:
    """One call of the op; arguments as in solve_fused."""
    assert isinstance(solver, (Picard, Anderson))
    batch, dim = x0.shape
    if batch == 0:
        return empty_result(x0)
    beta, ridge = (
        (solver.beta, solver.ridge) if isinstance(solver, Anderson) else (solver.damping, 0.0)
    )
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
            precision=NAMES.index(precision),
        )
    return SolveResult(x, status, num_steps, residual)
