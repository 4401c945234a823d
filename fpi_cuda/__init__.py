"""Fixed-point iteration layers for PyTorch: fast, with exact gradients, honest on convergence."""

from __future__ import annotations

import sys

from fpi_cuda import activations, cells, options, solution
from fpi_cuda._extension import build_info, native_available, version, warn_if_missing
from fpi_cuda.diagnostics import contract_, jacobian_penalty, spectral_radius
from fpi_cuda.fixed_point import fixed_point
from fpi_cuda.layer import FPILayer
from fpi_cuda.loops import device as device_loop
from fpi_cuda.options import (
    GMRES,
    Anderson,
    Broyden,
    ConjugateGradient,
    Implicit,
    JacobianFree,
    Neumann,
    Phantom,
    Picard,
    Unroll,
)
from fpi_cuda.partial import partial
from fpi_cuda.solution import ConvergenceError, Solution, Stats, Status
from fpi_cuda.unconverged import FixedPointWarning

__version__ = version()

__all__ = [
    "GMRES",
    "Anderson",
    "Broyden",
    "ConjugateGradient",
    "ConvergenceError",
    "FPILayer",
    "FixedPointWarning",
    "Implicit",
    "JacobianFree",
    "Neumann",
    "Phantom",
    "Picard",
    "Solution",
    "Stats",
    "Status",
    "Unroll",
    "build_info",
    "cells",
    "contract_",
    "device_loop",
    "fixed_point",
    "jacobian_penalty",
    "native_available",
    "partial",
    "spectral_radius",
]

# Pickles of an earlier layout name these modules.
sys.modules["fpi_cuda.request"] = options
sys.modules["fpi_cuda.result"] = solution
sys.modules["fpi_cuda.elementwise"] = sys.modules["fpi_cuda.cells.activation"] = activations

warn_if_missing()
del version, warn_if_missing
