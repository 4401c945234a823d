"""Maps without a fixed point: every one keeps ||g(x) - x|| above a tenth of the start's size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fpi_cuda.testing.linear import affine, rotations
from fpi_cuda.testing.problem import NUM_SAMPLES, Draw, Map, Problem, register, rowwise


def hopeless(draw: Draw, g: Map, x0: Tensor, *z: Tensor) -> Problem:
    """A problem without a fixed point."""
    return draw.problem(g, x0, z, exists=False, bitwise=True)


def starts(low: float, high: float) -> Tensor:
    """(B, 1) values evenly from low to high."""
    return torch.linspace(low, high, NUM_SAMPLES, dtype=torch.float64)[:, None]


@rowwise
def shift(x: Tensor, z: Tensor) -> Tensor:
    """x + z."""
    return x + z


@register("no-fixed-point/shift")
def unit_shift(draw: Draw) -> Problem:
    """x + 1."""
    return hopeless(draw, shift, starts(-4, 4), torch.ones(NUM_SAMPLES, 1))


@register("no-fixed-point/shift-wide")
def wide_shift(draw: Draw) -> Problem:
    """x + z with 64 unknowns."""
    return hopeless(draw, shift, torch.zeros(NUM_SAMPLES, 64), draw.normal(NUM_SAMPLES, 64))


@rowwise
def growing(x: Tensor, z: Tensor) -> Tensor:
    """x + z (1 + |x|): the drift grows with the distance."""
    return x + z * (1 + x.abs())


@register("no-fixed-point/growing-drift")
def growing_drift(draw: Draw) -> Problem:
    """Relative to x, the drift never gets small."""
    return hopeless(draw, growing, starts(-1, 1), starts(0.25, 2))


@rowwise
def exponential(x: Tensor, z: Tensor) -> Tensor:
    """exp(x) + z; without a fixed point for z > -1. It overflows within a few steps."""
    return torch.exp(x) + z


@register("no-fixed-point/exponential")
def exponentials(draw: Draw) -> Problem:
    """exp(x) + z."""
    return hopeless(draw, exponential, torch.zeros(NUM_SAMPLES, 1), starts(-0.5, 2))


@rowwise
def hyperbola(x: Tensor, z: Tensor) -> Tensor:
    """sqrt(x^2 + 1) + z: an asymptote of slope one, a distance z from the diagonal."""
    return torch.sqrt(x * x + 1) + z


@register("no-fixed-point/hyperbola")
def hyperbolas(draw: Draw) -> Problem:
    """The residual falls towards z and never below."""
    return hopeless(draw, hyperbola, starts(-1, 1), starts(0.3, 1))


@rowwise
def soft_shift(x: Tensor, z: Tensor) -> Tensor:
    """softplus(x) + z."""
    return functional.softplus(x) + z


@register("no-fixed-point/softplus")
def soft_shifts(draw: Draw) -> Problem:
    """softplus(x) + 1."""
    problem = hopeless(draw, soft_shift, starts(-2, 2), torch.ones(NUM_SAMPLES, 1))
    return Problem(**{**vars(problem), "bitwise": False})


@register("no-fixed-point/screw")
def screw(draw: Draw) -> Problem:
    """Rotations in three planes and a shift along their axis."""
    angle = draw.uniform(0.3, 2.8, NUM_SAMPLES, 3)
    radius = torch.linspace(0.5, 1.0, NUM_SAMPLES, dtype=torch.float64)[:, None]
    turn = rotations(radius.expand_as(angle), angle)
    one = torch.ones(1, 1, dtype=torch.float64)
    A = torch.stack([torch.block_diag(sample, one) for sample in turn])
    b = draw.uniform(0.5, 1.5, NUM_SAMPLES, 7)
    return hopeless(draw, affine, torch.zeros(NUM_SAMPLES, 7), A, b)


@register("no-fixed-point/projection-drift")
def projection_drift(draw: Draw) -> Problem:
    """A projection plus an offset in its range."""
    # Along the axes, so that rounding leaves P a projection. The offset lies in its range:
    # nothing can cancel it.
    kept = (torch.arange(16) < 5).double()
    P = torch.diag(kept).expand(NUM_SAMPLES, 16, 16)
    offset = kept * draw.normal(NUM_SAMPLES, 16)
    return hopeless(draw, affine, torch.zeros(NUM_SAMPLES, 16), P, offset)


@rowwise
def jump(x: Tensor, z: Tensor) -> Tensor:
    """z where x <= 0, -z elsewhere: it jumps over the diagonal."""
    return torch.where(x <= 0, z, -z)


@register("no-fixed-point/jump")
def jumps(draw: Draw) -> Problem:
    """A discontinuity where the fixed point would be."""
    return hopeless(draw, jump, torch.zeros(NUM_SAMPLES, 1), starts(0.5, 4))
