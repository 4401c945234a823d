"""What a call costs besides its arithmetic, and whether a sample costs the same in any batch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import fpi_cuda as fpi
from bench import own, spine
from bench.measure import paired_rounds, spread
from fpi_cuda.activations import CODES

FEATURES, RTOL, MOST_STEPS = 128, 1e-4, 300
SCALED_FEATURES, SCALED_STEPS = 32, 10


def bare_op(cell: fpi.cells.Dense, z: Tensor, solver: fpi.FixedPointSolver) -> Any:
    """The solve of a dense cell as one call of the op, on memory that is there already."""
    batch, dim = z.shape[0], cell.A.weight.shape[0]
    x, atol = z.new_zeros(batch, dim), z.new_zeros(batch, dtype=torch.float64)
    status, num_steps = (torch.empty(batch, dtype=t) for t in (torch.int8, torch.int32))
    residual = torch.empty(batch, dtype=torch.float64)
    shift, weight = cell.prepare(z).detach(), cell.A.weight.detach()
    deep = isinstance(solver, fpi.Anderson)
    absent = (None,) * 5
    given = {
        "activation1": CODES[cell.activation], "activation2": CODES["identity"], "carry": 0.0,
        "depth": solver.m if deep else 0, "beta": solver.beta if deep else 1.0,
        "ridge": solver.ridge if deep else 0.0,
        "rtol": RTOL, "max_steps": MOST_STEPS, "precision": 0,
    }  # fmt: skip

    def call() -> Tensor:
        x.zero_()
        torch.ops.fpi_cuda.cell_loop_(
            x, None, weight, None, shift, *absent, atol, status, num_steps, residual, **given
        )
        return x

    return call


def overhead(rounds: int) -> list[dict[str, Any]]:
    """layer(z) at B=1, d=128, over the bare op; and Python calls inside the library."""
    torch.manual_seed(0)
    z = torch.randn(1, FEATURES)
    module = own.Plain(FEATURES)
    cell = fpi.cells.Dense(FEATURES, FEATURES)
    with torch.no_grad():
        for mine, theirs in zip(cell.parameters(), module.parameters(), strict=True):
            mine.copy_(theirs)
    found = []
    for solver in (fpi.Picard(), fpi.Anderson()):
        calls: dict[str, Any] = {"op": bare_op(cell, z, solver)}
        counts = {}
        for g in (cell, module):
            layer = fpi.FPILayer(g, solver=solver, rtol=RTOL, max_steps=MOST_STEPS)
            name = "cells.Dense" if g is cell else "your module"
            calls[name] = lambda layer=layer: layer(z)
            counts[name] = python_calls(layer, z)
        with torch.no_grad():
            times = paired_rounds(calls, rounds, z.device)
        for name, (forward, both) in counts.items():
            ratios = [mine / op for mine, op in zip(times[name], times["op"], strict=True)]
            found.append(
                {
                    "g": name,
                    "solver": type(solver).__name__,
                    "seconds": spread(times[name])["median"],
                    "op_seconds": spread(times["op"])["median"],
                    "over_op": spread(ratios)["median"],
                    "calls": forward,
                    "calls_with_backward": both,
                }
            )
    return found


def python_calls(layer: fpi.FPILayer, z: Tensor) -> tuple[int, int]:
    """Inside fpi_cuda in a later call: forward under no_grad, and forward with backward."""
    with torch.no_grad():
        for _ in range(3):
            layer(z)
        forward = len(spine.traced(lambda: layer(z)).calls)
    z = z.clone().requires_grad_()
    for _ in range(3):
        layer(z).sum().backward()
    return forward, len(spine.traced(lambda: layer(z).sum().backward()).calls)


def scaling(batches: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Seconds per sample and step of the fused loop, a fixed number of steps in every batch."""
    torch.manual_seed(0)
    cell = fpi.cells.Dense(SCALED_FEATURES, SCALED_FEATURES)
    found = []
    for batch in batches:
        z = torch.randn(batch, SCALED_FEATURES)
        row: dict[str, Any] = {"batch": batch}
        for solver in (fpi.Picard(), fpi.Anderson()):
            layer = fpi.FPILayer(cell, solver=solver, rtol=0.0, max_steps=SCALED_STEPS)
            calls = {"layer": functools.partial(layer, z)}
            with torch.no_grad():
                taken = paired_rounds(calls, rounds, z.device)["layer"]
            row[type(solver).__name__] = spread(taken)["median"] / (batch * SCALED_STEPS)
        found.append(row)
    return found
