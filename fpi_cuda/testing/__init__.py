"""The zoo of fixed-point problems that decides how the solvers are designed and tested."""

from __future__ import annotations

from fpi_cuda.testing import energy, linear, networks, no_fixed_point, scalar, singular, trained
from fpi_cuda.testing.available import backends_available
from fpi_cuda.testing.problem import NUM_SAMPLES, Problem, names, problem, zoo

__all__ = ["NUM_SAMPLES", "Problem", "backends_available", "names", "problem", "zoo"]
_FAMILIES = (linear, networks, energy, scalar, singular, no_fixed_point, trained)
