"""Solves taken one step at a time: the solvers, the maps, and a batch under way."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.loops.stepping import Workspace, allocate, step
from fpi_cuda.ops.solver_state import column
from fpi_cuda.options import Anderson, Broyden, FixedPointSolver, Picard

SOLVERS: list[FixedPointSolver] = [
    Picard(),
    Picard(damping=0.7),
    Anderson(m=1),
    Anderson(m=5),
    Anderson(m=16, beta=0.6),
    Anderson(m=4, history_dtype=torch.bfloat16),
    Broyden(m=3),
]
# What one rounding of the state may make of a few steps, relative to the largest element.
CLOSE = {
    torch.float32: 2e-5,
    torch.float64: 1e-12,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}


def short(value: object) -> str:
    """An id without spaces."""
    return re.sub(r"\s|torch\.|history_dtype=None|,ridge=0.001", "", repr(value))


@dataclass
class Batch:
    """A solve under way: where it is, and its arrays."""

    x: Tensor
    work: Workspace
    solver: FixedPointSolver


MAPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, z: 0.6 * torch.tanh(x.roll(1, -1)) + z,
    lambda x, z: 0.9 * x + 0.05 * x.flip(-1) + z,
    lambda x, z: -1.3 * x + z,  # diverges under Picard
    lambda x, z: torch.where(x.abs().amax(-1, keepdim=True) > 1.5, torch.nan, 1.5 * x + z),
    lambda x, z: z + 0 * x,  # solved at the second evaluation
    lambda x, z: x + 0 * z,  # solved from the start
    lambda x, z: x + 1 + 0.1 * torch.sin(x + z),  # without a fixed point
]


def g(x: Tensor, z: Tensor, rows: Tensor | None = None) -> Tensor:
    """Sample i by map i, modulo their number."""
    samples = range(len(x)) if rows is None else rows.tolist()
    z = z if rows is None else z[rows]
    out = [MAPS[s % len(MAPS)](x[i : i + 1], z[i : i + 1]) for i, s in enumerate(samples)]
    return torch.cat(out) if out else x.clone()


def begin(
    solver: FixedPointSolver, batch: int, dim: int, dtype: torch.dtype
) -> tuple[Batch, Tensor]:
    """A start of every sample from noise."""
    x = torch.randn(batch, dim, dtype=dtype)
    z = 0.3 * torch.randn(batch, dim, dtype=dtype)
    work = allocate(x, solver, 0.0)
    for array in (work.anchor, work.f_previous, work.partner_previous, work.columns_f,
                  work.columns_g, work.gram):  # fmt: skip
        array.fill_(torch.nan)  # what is allocated empty may hold anything
    return Batch(x.clone(), work, solver), z


def advance(
    b: Batch, z: Tensor, backend: Any, rows: Tensor | None = None, max_steps: int = 50
) -> None:
    """Evaluate g, and take one step."""
    gx = g(b.x, z, rows).contiguous()
    step(backend, b.solver, b.work, b.x, gx, rows, 1e-4, max_steps)


def mixes(dtype: torch.dtype) -> bool:
    """Whether end_first_phase lets a solve in this dtype mix."""
    return dtype in (torch.float32, torch.float64)


def slack(solver: FixedPointSolver, dtype: torch.dtype) -> float:
    """What mixing makes of a rounding: the least-squares problem magnifies it.

    One element of a narrow history that is rounded the other way is off by 2^-8 of itself.
    """
    if getattr(solver, "history_dtype", None) is not None:
        return 1000.0
    return 50.0 if mixes(dtype) else 1.0


def end_first_phase(b: Batch) -> None:
    """Let the solver mix from its second step on, where rounding may decide no more than digits.

    That is not so in half precision, nor where the map has no fixed point to determine a step.
    """
    if mixes(b.x.dtype):
        left = column(b.work.control, "picard_left")
        left[: len(MAPS) - 1].clamp_(max=1)


def arrays(work: Workspace) -> dict[str, Tensor]:
    """The arrays of a workspace by name."""
    named = {field.name: getattr(work, field.name) for field in fields(work)}
    return {name: array for name, array in named.items() if array is not None}


def pairs(*dtypes: torch.dtype) -> list[tuple[FixedPointSolver, torch.dtype]]:
    """Every solver with every dtype that it takes: a narrow history is for float32 states."""
    return [
        (solver, dtype)
        for solver in SOLVERS
        for dtype in dtypes
        if dtype == torch.float32 or getattr(solver, "history_dtype", None) is None
    ]


def assert_same_step(one: Batch, other: Batch, slack: float = 1.0) -> None:
    """Same status and steps, and the same points to a few roundings, `slack` times as many."""
    assert one.work.status.tolist() == other.work.status.tolist()
    assert one.work.num_steps.tolist() == other.work.num_steps.tolist()
    for name, a, b in (
        ("x", one.x, other.x),
        ("best", one.work.best, other.work.best),
        ("residual", one.work.residual[:, None], other.work.residual[:, None]),
    ):
        a, b = a.double().cpu(), b.double().cpu()
        scale = b.abs().amax(-1, keepdim=True).nan_to_num().clamp(min=1)
        error = ((a - b) / scale).abs()
        agrees = (error <= slack * CLOSE[one.x.dtype]) | (a.isnan() & b.isnan()) | (a == b)
        assert agrees.all(), f"{name} is off by {error[~agrees].max():.1e}"
