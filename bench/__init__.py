"""Benchmarks: convergence throughput against peers, and the paper's experiments."""

from __future__ import annotations

import warnings

import fpi_cuda

# Solves are cut short on purpose here, and every record counts what has not converged.
warnings.filterwarnings("ignore", ".* did not converge", fpi_cuda.FixedPointWarning)
