"""The solve loop as a CUDA graph that iterates on the device."""

from __future__ import annotations

from fpi_cuda.device_loop.adjoint import DeviceAdjoint
from fpi_cuda.device_loop.cache import PlanCache
from fpi_cuda.device_loop.cuda_graphs import CudaGraphs
from fpi_cuda.device_loop.graphs import Graphs, Refused
from fpi_cuda.device_loop.method import Method
from fpi_cuda.device_loop.planner import solve

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
