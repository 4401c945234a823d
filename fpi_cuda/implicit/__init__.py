"""Derivatives of a fixed point, by the implicit function theorem and its approximations."""

from __future__ import annotations

from fpi_cuda.implicit.attach import attach
from fpi_cuda.implicit.cut_graph import watching
from fpi_cuda.implicit.flat_map import FlatMap
from fpi_cuda.implicit.graph import sequence_number
from fpi_cuda.implicit.linearization import Jacobian, Linearization
from fpi_cuda.implicit.live import attach_live, live_solve
from fpi_cuda.implicit.scaling import Apply, Scaling
from fpi_cuda.implicit.strategy import (
    Account,
    DeviceSolve,
    Exact,
    LinearSolve,
    LinearSystem,
    Strategy,
    Truncated,
    residual_in,
)
from fpi_cuda.implicit.unrolled import attach_unrolled
from fpi_cuda.implicit.vmap import merge_innermost

__all__ = [
    "Account",
    "Apply",
    "DeviceSolve",
    "Exact",
    "FlatMap",
    "Jacobian",
    "LinearSolve",
    "LinearSystem",
    "Linearization",
    "Scaling",
    "Strategy",
    "Truncated",
    "attach",
    "attach_live",
    "attach_unrolled",
    "live_solve",
    "merge_innermost",
    "residual_in",
    "sequence_number",
    "watching",
]
