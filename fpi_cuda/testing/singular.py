"""Maps whose history is degenerate: constants, identities, projections, nilpotent steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpi_cuda.testing.linear import affine, affine_problem
from fpi_cuda.testing.networks import symmetric_normal, tanh_cell
from fpi_cuda.testing.problem import NUM_SAMPLES, Draw, Problem, register, rowwise

D = 16


@rowwise
def constant(x: Tensor, z: Tensor) -> Tensor:
    """z whatever x is."""
    return torch.where(torch.isnan(x), x, z)


@register("singular/constant")
def constants(draw: Draw) -> Problem:
    """g does not depend on x."""
    (z,) = (t.double() for t in draw.cast(draw.normal(NUM_SAMPLES, D)))
    kappa = torch.ones(NUM_SAMPLES, dtype=torch.float64)
    x0 = torch.zeros(NUM_SAMPLES, D)
    return draw.problem(
        constant, x0, (z,), contractive=True, rho=0.0, x_star=z, kappa=kappa, bitwise=True
    )


@rowwise
def identity(x: Tensor, z: Tensor) -> Tensor:
    """x + 0 z: every point is fixed."""
    return x + 0 * z


@register("singular/identity")
def identities(draw: Draw) -> Problem:
    """x0 is already solved."""
    x0, z = draw.normal(NUM_SAMPLES, D), draw.normal(NUM_SAMPLES, D)
    return draw.problem(identity, x0, (z,), rho=1.0, bitwise=True)


@register("singular/nilpotent")
def nilpotent(draw: Draw) -> Problem:
    """A shift, scaled by 0.5 to 2."""
    # A^d = 0, yet ||A|| is large: Picard grows for d - 1 steps and is then exact.
    size = torch.linspace(0.5, 2, NUM_SAMPLES, dtype=torch.float64)
    shift = torch.diag(torch.ones(7, dtype=torch.float64), 1)
    return affine_problem(draw, size[:, None, None] * shift, draw.normal(NUM_SAMPLES, 8))


@register("singular/projection")
def projection(draw: Draw) -> Problem:
    """A projection plus an offset orthogonal to its range."""
    Q = draw.orthogonal(NUM_SAMPLES, D)[:, :, :5]
    P = Q @ Q.mT
    b = draw.normal(NUM_SAMPLES, D, 1)
    offset = (b - P @ b).squeeze(-1)
    x0 = draw.normal(NUM_SAMPLES, D)
    return draw.problem(affine, x0, (P, offset), contractive=True, rho=1.0, bitwise=True)


@register("singular/alternating-projections")
def alternating_projections(draw: Draw) -> Problem:
    """Two lines per plane at angles 0.05 to 1.2."""
    # Two lines per plane at a small angle: the rate is its squared cosine; 1 is an eigenvalue.
    angle = torch.linspace(0.05, 1.2, NUM_SAMPLES, dtype=torch.float64)
    flat = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    u = torch.stack([angle.cos(), angle.sin()], -1)
    pair = u[:, :, None] * u[:, None, :] @ flat
    fixed = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    A = torch.stack([torch.block_diag(p, p, fixed) for p in pair])
    x0, b = draw.normal(NUM_SAMPLES, 6), torch.zeros(NUM_SAMPLES, 6)
    return draw.problem(affine, x0, (A, b), contractive=True, rho=1.0, bitwise=True)


@rowwise
def one_active_coordinate(x: Tensor, z: Tensor) -> Tensor:
    """Only the first coordinate moves: differences are all parallel."""
    first = torch.cos(x[:, :1]) + 0 * z[:, :1]
    return torch.cat([first, z[:, 1:]], -1)


@register("singular/parallel-differences")
def parallel_differences(draw: Draw) -> Problem:
    """All differences are multiples of one vector."""
    z = draw.normal(NUM_SAMPLES, D)
    x0 = torch.zeros(NUM_SAMPLES, D)
    return draw.problem(one_active_coordinate, x0, (z,), contractive=True, bitwise=True)


@register("nan/tanh")
def tanh_with_nan(draw: Draw) -> Problem:
    """The contractive tanh cell; z of three samples holds NaN or Inf."""
    W, z = symmetric_normal(draw, 0.9), 0.1 * draw.normal(NUM_SAMPLES, 64)
    exists = torch.ones(NUM_SAMPLES, dtype=torch.bool)
    for row, value in ((2, math.nan), (5, math.inf)):
        z[row, 3] = value
        exists[row] = value == math.inf
    z[6] = math.nan
    exists[6] = False
    problem = draw.problem(tanh_cell, torch.zeros(NUM_SAMPLES, 64), (W, z), bitwise=True)
    return Problem(**{**vars(problem), "has_fixed_point": exists})
