"""The solve loop as a CUDA graph that iterates on the device."""

from __future__ import annotations

import torch

from fpi_cuda.device_loop.adjoint import DeviceAdjoint
from fpi_cuda.device_loop.cache import PlanCache
from fpi_cuda.device_loop.chunks import solve
from fpi_cuda.device_loop.cuda_graphs import CudaGraphs
from fpi_cuda.device_loop.graphs import Graphs, Refused
from fpi_cuda.device_loop.method import Method

plans = PlanCache()
"""The captured solves of this process: plans.memory() is what they hold, plans.clear() frees it."""

GRAPHS: dict[str, Graphs] = {"cuda": CudaGraphs()}
"""What can capture, by device type."""


def graphs_for(device: torch.device) -> Graphs:
    """What can capture on this device.

    Raises:
        Refused: nothing can.
    """
    if device.type not in GRAPHS:
        raise Refused(f"the state is on {device.type}, which has no CUDA graphs")
    return GRAPHS[device.type]


__all__ = [
    "DeviceAdjoint",
    "Graphs",
    "Method",
    "PlanCache",
    "Refused",
    "graphs_for",
    "plans",
    "solve",
]
