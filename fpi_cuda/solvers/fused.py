"""A whole solve of a lowered map in one call of native code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.lowered import ACTIVATIONS, Layer, Lowered
from fpi_cuda.options import Anderson, FixedPointSolver, LinearSolver, Picard
from fpi_cuda.result import SolveResult
from fpi_cuda.solvers.loop import empty_result


@dataclass(frozen=True)
class FusedMap:
    """A lowered map, and whether it still is what it was made from.

    Attributes:
        lowered: the map.
        sources, versions: the tensors that it was made from, and how often each was written to.
    """

    lowered: Lowered
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, lowered: Lowered, parameters: tuple[Tensor, ...]) -> FusedMap:
        """The map as it is now, made from parameters and from its own tensors."""
        sources = (*parameters, *lowered.tensors())
        return cls(lowered, sources, tuple(map(version_of, sources)))

    def unchanged(self) -> bool:
        """Whether nobody has written to the sources since."""
        return self.versions == tuple(map(version_of, self.sources))


def version_of(t: Tensor) -> int:
    """How often t was written to; 0 where that is not counted."""
    return 0 if t.is_inference() else t._version


DTYPES = (torch.float32, torch.float64)


def why_not_served(solver: FixedPointSolver | LinearSolver, dtype: torch.dtype) -> str | None:
    """Why the fused loop cannot serve this solver and state, or None if it can."""
    if dtype not in DTYPES:
        return f"it runs in float32 and float64, the state is {dtype}"
    if not isinstance(solver, (Picard, Anderson)):
        return f"it has Picard and Anderson, not {type(solver).__name__}"
    if isinstance(solver, Anderson) and solver.history_dtype not in (None, dtype):
        return f"it stores the history as the state, not in {solver.history_dtype}"
    return None


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
) -> SolveResult:
    """Iterate the map from x0 until every sample has stopped; a sample that has stopped is free.

    Args:
        lowered: without a graph, of x0's shape, dtype and device.
        x0: (B, D), plain, not modified.
        solver: Picard or Anderson.
        atol: one number, or (B,) float64.
        backend: that has cell_loop_, in the schema of csrc/cell_ops.cpp.
    """
    assert isinstance(solver, (Picard, Anderson))
    batch = x0.shape[0]
    if batch == 0:
        return empty_result(x0)
    depth, beta, ridge = (
        (solver.m, solver.beta, solver.ridge)
        if isinstance(solver, Anderson)
        else (0, solver.damping, 0.0)
    )
    first, *rest = lowered.layers
    second = rest[0] if rest else Layer(first.weight)
    with torch.no_grad():
        x = x0.clone(memory_format=torch.contiguous_format)
        status = torch.zeros(batch, dtype=torch.int8, device=x.device)
        num_steps = torch.zeros(batch, dtype=torch.int32, device=x.device)
        residual = torch.zeros(batch, dtype=torch.float64, device=x.device)
        backend.cell_loop_(
            x,
            lowered.x_factor,
            *first.tensors(),
            *(second.tensors() if rest else NO_LAYER),
            torch.as_tensor(atol, dtype=torch.float64, device=x.device).expand(batch).contiguous(),
            status,
            num_steps,
            residual,
            activation1=ACTIVATIONS.index(first.activation),
            activation2=ACTIVATIONS.index(second.activation),
            carry=lowered.carry,
            depth=depth,
            rtol=rtol,
            max_steps=max_steps,
            beta=beta,
            ridge=ridge,
        )
    return SolveResult(x, status, num_steps, residual)
