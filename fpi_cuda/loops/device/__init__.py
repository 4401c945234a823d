"""The solve loop as a CUDA graph that iterates on the device."""

from __future__ import annotations

from fpi_cuda.loops.device.adjoint import DeviceAdjoint
from fpi_cuda.loops.device.cache import PlanCache
from fpi_cuda.loops.device.cuda_graphs import CudaGraphs
from fpi_cuda.loops.device.graphs import Graphs, Refused
from fpi_cuda.loops.device.method import Method
from fpi_cuda.loops.device.planner import solve

plans = PlanCache()
"""The captured solves of this process: plans.memory() is what they hold, plans.clear() frees it."""

GRAPHS: dict[str, Graphs] = {"cuda": CudaGraphs()}
"""What can capture, by device type."""


__all__ = [
    "DeviceAdjoint",
    "Graphs",
    "Method",
    "PlanCache",
    "Refused",
    "plans",
    "solve",
]
