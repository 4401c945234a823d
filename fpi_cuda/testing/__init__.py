"""The zoo of fixed-point problems that decides how the solvers are designed and tested."""

from __future__ import annotations

import torch

from fpi_cuda import ops
from fpi_cuda.testing import energy, linear, networks, small_maps
from fpi_cuda.testing.problem import NUM_SAMPLES, Problem, names, problem, zoo

__all__ = ["NUM_SAMPLES", "Problem", "backends_available", "names", "problem", "zoo"]
_FAMILIES = (linear, networks, energy, small_maps)


def backends_available(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[str, ...]:
    """Names of the backends that take states of this device and dtype; "reference" always does."""
    device = torch.device(device)
    return tuple(name for name in ops.NAMES if ops.why_not(name, device, dtype) is None)
