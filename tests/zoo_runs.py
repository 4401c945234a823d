"""Solves of the zoo that several tests look at, each done once."""

from __future__ import annotations

import functools

import pytest
import torch

from bench.zoo import Run, run
from fpi_cuda.testing import names, problem

MAX_STEPS = 1000
SETTINGS = [(torch.float32, 1e-4), (torch.float64, 1e-6)]

settings = pytest.mark.parametrize(
    ("dtype", "rtol"), SETTINGS, ids=lambda value: str(value).removeprefix("torch.")
)
every_problem = pytest.mark.parametrize("name", names())


@functools.cache
def solved(name: str, solver: str, dtype: torch.dtype, rtol: float) -> Run:
    return run(problem(name, dtype), solver, rtol, MAX_STEPS, None, False)
