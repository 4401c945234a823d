"""Derivatives of a fixed point, by the implicit function theorem and its approximations."""

from __future__ import annotations

from fpi_cuda.autograd.attach import attach
from fpi_cuda.autograd.cut_graph import watching
from fpi_cuda.autograd.graph import sequence_number
from fpi_cuda.autograd.linearization import Jacobian, Linearization
from fpi_cuda.autograd.scaling import Apply
from fpi_cuda.autograd.strategy import (
    Account,
    DeviceSolve,
    LinearSystem,
    Strategy,
)
from fpi_cuda.autograd.unrolled import attach_unrolled
from fpi_cuda.evaluation.bound_map import BoundMap

__all__ = [
    "Account",
    "Apply",
    "BoundMap",
    "DeviceSolve",
    "Jacobian",
    "LinearSystem",
    "Linearization",
    "Strategy",
    "attach",
    "attach_unrolled",
    "sequence_number",
    "watching",
]
