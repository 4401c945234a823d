"""The floor of residuals where g is evaluated in coarser arithmetic than its state is stored in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.ops.solver_state import column
from fpi_cuda.solution import Status

EVERY = 20
"""Steps from one look to the next, and without a gain of a tenth before a sample is measured."""
ORDER = 4
"""Of the differences that are taken; a measurement takes one evaluation more."""
# Of the arithmetic's epsilon, relative to x: over all points each number of x is rounded to another
# neighbour about once, while the fourth difference of what is smooth goes with the fourth power.
DISPLACEMENT = 0.25
# Noise leaves the same estimate in every order of differences; what is smooth does not.
CONSISTENT = 4.0
# Of an epsilon: kinks of a g that is exact leave less than this, products that round leave more.
LEAST = 1.0 / 128.0
# The floor in standard deviations of the noise: a residual holds several of them, and g hands on to
# the next what it does not contract.
DEVIATIONS = 16.0
MOST = 8.0
"""Epsilons of the arithmetic that a floor is at most."""
MEASURED = 1e-30
"""Marks a sample in which no noise was found."""

Map = Callable[[Tensor], Tensor]
"""x (n, D) -> what is computed of it (n, D), row by row."""


@dataclass(frozen=True)
class Noise:
    """Measures the noise of a map in the samples of a solve that gain no more, once in each.

    Attributes:
        arithmetic: of 16 bits, the dtype that products may be computed in.
        max_steps: of the solve; what is left of them limits the measuring too.
    """

    arithmetic: torch.dtype
    max_steps: int

    def after_step(
        self,
        evaluate: Callable[[Tensor, Tensor | None], Tensor],
        x: Tensor,
        rows: Tensor | None,
        work: Any,
    ) -> None:
        """Set the floor of samples of a fixed-point solve that have gained nothing for a while.

        What it evaluates counts as steps of theirs. A look makes the host wait for the device.

        Args:
            evaluate: see fpi_cuda.loops.stepping.Evaluate.
            x: (n, D) the present points of the samples `rows`, (n,) or None for all.
            work: has control, status and num_steps; see fpi_cuda.loops.stepping.Workspace.
        """
        some = slice(None) if rows is None else rows
        num_steps = work.num_steps[some]
        idle = num_steps - column(work.control, "gain_step")[some] >= EVERY
        idle &= work.status[some] == Status.ACTIVE
        floor = column(work.control, "floor")
        mine = floor[some]
        relative = column(work.control, "best_relative")[some]
        work.num_steps[some] = self.measure(
            lambda y: evaluate(y, rows), x, num_steps, idle, relative, mine
        )
        floor[some] = mine

    def measure(
        self,
        evaluate: Map,
        x: Tensor,
        num_steps: Tensor,
        idle: Tensor,
        relative: Tensor,
        floor: Tensor,
    ) -> Tensor:
        """(n,) num_steps with what is spent now; writes the floor of samples near it.

        Args:
            num_steps: (n,) int32, evaluations spent so far.
            idle: (n,) bool, samples that gain no more.
            relative: (n,) their residual over the terms of it.
            floor: (n,) 0 where nothing was measured; then the floor, or MEASURED for none.
        """
        epsilon = torch.finfo(self.arithmetic).eps
        chosen = idle & (relative <= MOST * epsilon) & (floor == 0)
        chosen &= num_steps + ORDER + 1 < self.max_steps
        if bool(chosen.any()):
            found = noise_floor(evaluate, x, epsilon)
            floor.copy_(torch.where(chosen, found.to(floor.dtype), floor))
        return num_steps + (ORDER + 1) * chosen.int()


def noise_of(arithmetic: torch.dtype | None, state: torch.dtype, max_steps: int) -> Noise | None:
    """For a solve whose map may compute in `arithmetic`; None where it is the state's or finer."""
    if arithmetic is None or torch.finfo(arithmetic).eps <= torch.finfo(state).eps:
        return None
    return Noise(arithmetic, max_steps)


def noise_floor(evaluate: Map, x: Tensor, epsilon: float) -> Tensor:
    """(n,) what the noise of the map makes of a residual at best, relative to the map's value."""
    values = [evaluate(displaced(x, k * DISPLACEMENT * epsilon)) for k in range(ORDER + 1)]
    noise = relative_noise(torch.stack([value.double() for value in values]))
    heard = noise >= LEAST * epsilon
    return torch.where(heard, DEVIATIONS * noise, MEASURED).clamp(max=MOST * epsilon)


def displaced(x: Tensor, by: float) -> Tensor:
    """x (n, D), each number changed by about `by` of itself; by the same part in every sample."""
    place = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    # Fractions of multiples of irrational numbers: as good as random, and nobody's generator moves.
    size = 0.75 + 0.5 * torch.frac(place * math.sqrt(5.0))
    sign = torch.where(torch.frac(place * math.sqrt(2.0)) < 0.5, -1.0, 1.0)
    return x * (1 + by * sign * size).to(x.dtype)


def relative_noise(values: Tensor) -> Tensor:
    """(n,) standard deviation of the noise in g over ||g||, 0 where differences look smooth.

    Args:
        values: (ORDER + 1, n, D) float64, g at points in line, at equal distances.
    Source:
        More and Wild, Estimating Computational Noise, SIAM J. Sci. Comput. 33(3), 2011.
    """
    norm = values[0].norm(dim=1)
    estimates = []
    differences = values
    for order in range(1, ORDER + 1):
        differences = differences.diff(dim=0)
        share = math.factorial(order) ** 2 / math.factorial(2 * order)
        estimates.append((share * differences.square().sum(2).mean(0)).sqrt() / norm)
    lower, last = estimates[-2:]
    alike = (last <= CONSISTENT * lower) & (lower <= CONSISTENT * last)
    return torch.where(alike, last, 0.0)
