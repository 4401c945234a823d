"""Maps of a formula or a matrix: one to three unknowns, degenerate histories, no fixed point."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fpi_cuda.testing.linear import affine, affine_problem, rotations
from fpi_cuda.testing.networks import symmetric, tanh_cell
from fpi_cuda.testing.problem import NUM_SAMPLES, Draw, Map, Problem, evenly, register

Range = tuple[float, float]
D = 16
# The fixed point of the cosine.
DOTTIE = 0.7390851332151607
# The projection of the plane on its first axis.
AXIS = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))


@register(
    {
        "no-fixed-point/shift": (lambda x, z: x + z, (-4, 4), (1, 1)),
        # Relative to x, the drift never gets small.
        "no-fixed-point/growing-drift": (lambda x, z: x + z * (1 + x.abs()), (-1, 1), (0.25, 2)),
        # For z > -1. It overflows within a few steps.
        "no-fixed-point/exponential": (lambda x, z: torch.exp(x) + z, (0, 0), (-0.5, 2)),
        # The residual falls towards z and never below.
        "no-fixed-point/hyperbola": (lambda x, z: torch.sqrt(x * x + 1) + z, (-1, 1), (0.3, 1)),
        "no-fixed-point/softplus": (
            lambda x, z: functional.softplus(x) + z,
            (-2, 2),
            (1, 1),
            False,
        ),
        # It jumps over the diagonal.
        "no-fixed-point/jump": (lambda x, z: torch.where(x <= 0, z, -z), (0, 0), (0.5, 4)),
    }
)
def no_fixed_point(draw: Draw, g: Map, start: Range, z: Range, bitwise: bool = True) -> Problem:
    """||g(x) - x|| stays above a tenth of the start's size wherever x is."""
    return spread_problem(draw, g, start, z, exists=False, bitwise=bitwise)


@register("no-fixed-point/shift-wide")
def wide_shift(draw: Draw) -> Problem:
    """x + z with 64 unknowns."""
    z = draw.normal(NUM_SAMPLES, 64)
    return draw.problem(lambda x, z: x + z, torch.zeros_like(z), (z,), exists=False)


@register("no-fixed-point/screw")
def screw(draw: Draw) -> Problem:
    """Rotations in three planes and a shift along their axis."""
    turn = rotations(evenly(0.5, 1.0)[:, None], draw.uniform(0.3, 2.8, NUM_SAMPLES, 3))
    one = torch.ones(1, 1, dtype=torch.float64)
    A = torch.stack([torch.block_diag(sample, one) for sample in turn])
    b = draw.uniform(0.5, 1.5, NUM_SAMPLES, 7)
    return draw.problem(affine, torch.zeros_like(b), (A, b), exists=False)


@register("no-fixed-point/projection-drift")
def projection_drift(draw: Draw) -> Problem:
    """A projection plus an offset in its range, that nothing can cancel."""
    # Along the axes, so that rounding leaves P a projection.
    kept = (torch.arange(D) < 5).double()
    P, offset = torch.diag(kept).expand(NUM_SAMPLES, D, D), kept * draw.normal(NUM_SAMPLES, D)
    return draw.problem(affine, torch.zeros_like(offset), (P, offset), exists=False)


@register("scalar/kepler")
def kepler_orbits(draw: Draw) -> Problem:
    """Kepler's equation E = M + e sin E, eccentricity 0.1 to 0.98."""
    e, M = draw.rounded(evenly(0.1, 0.98)[:, None], draw.uniform(0.2, 3.0, NUM_SAMPLES, 1))
    # Newton from pi converges for every eccentricity below 1.
    x = torch.full_like(M, math.pi)
    for _ in range(50):
        x = x - (x - e * torch.sin(x) - M) / (1 - e * torch.cos(x))
    return draw.problem(
        lambda x, e, M: M + e * torch.sin(x),
        torch.zeros_like(M),
        (e, M),
        contractive=True,
        x_star=x,
        kappa=1 / (1 - e * torch.cos(x)).squeeze(-1),
    )


@register("scalar/cosine")
def cosine(draw: Draw) -> Problem:
    """Dottie's number at eight scales."""
    # A power of two scales exactly, so every dtype has the same fixed point.
    scale = 2.0 ** torch.arange(-4, 4, dtype=torch.float64)[:, None]
    return draw.problem(
        lambda x, scale: torch.cos(scale * x) / scale,
        torch.zeros_like(scale),
        (scale,),
        contractive=True,
        x_star=DOTTIE / scale,
        kappa=torch.full((NUM_SAMPLES,), 1 / (1 + math.sin(DOTTIE)), dtype=torch.float64),
    )


@register("scalar/square-root")
def square_root(draw: Draw) -> Problem:
    """Newton for roots of 1e-3 to 1e4: quadratic, so that Picard needs a handful of steps."""
    a = 10 ** evenly(-3, 4)[:, None]
    # The negative root is a fixed point too, so none is named.
    return draw.problem(lambda x, a: (x + a / x) / 2, torch.ones_like(a), (a,), contractive=True)


def logistic_map(x: Tensor, r: Tensor) -> Tensor:
    """r x (1 - x): stable below r = 3, cycles above, chaos near 4."""
    return r * x * (1 - x)


@register(
    {
        "scalar/logistic-2.8": (logistic_map, (0.1, 0.85), (2.8, 2.8), True),
        # Picard ends in a 2-cycle.
        "scalar/logistic-3.2": (logistic_map, (0.1, 0.85), (3.2, 3.2)),
        # Picard is chaotic.
        "scalar/logistic-3.9": (logistic_map, (0.1, 0.85), (3.9, 3.9)),
        # An overshoot leaves the domain, and the other fixed point, which repels, is nearby.
        "domain/logarithm": (lambda x, c: torch.log(x) + c, (0.5, 0.5), (1.25, 6), True),
    }
)
def spread_problem(
    draw: Draw, g: Map, start: Range, z: Range, contractive: bool = False, **known: bool
) -> Problem:
    """One unknown and one input, each spread evenly over the samples from low to high."""
    # Where there are two fixed points, none is named.
    x0, inputs = evenly(*start)[:, None], (evenly(*z)[:, None],)
    return draw.problem(g, x0, inputs, contractive=contractive, **known)


@register("scalar/spiral")
def spiral(draw: Draw) -> Problem:
    """Two unknowns, complex eigenvalues of radius 0.5 to 0.99."""
    return affine_problem(draw, rotations(evenly(0.5, 0.99)[:, None], evenly(0.2, 3.0)[:, None]))


def coupled(x: Tensor, c: Tensor) -> Tensor:
    """Three coupled unknowns with sines and an exponential (Burden and Faires, chapter 10)."""
    first = (torch.cos(x[:, 1] * x[:, 2]) + 0.5) / 3
    second = torch.sqrt(x[:, 0] ** 2 + torch.sin(x[:, 2]) + 1.06) / 9 - 0.1
    third = -torch.exp(-x[:, 0] * x[:, 1]) / 20 - (10 * math.pi - 3) / 60
    return c * torch.stack([first, second, third], -1)


@register("scalar/three-unknowns")
def three_unknowns(draw: Draw) -> Problem:
    """Strongly contractive."""
    c = evenly(0.5, 1.2)[:, None]
    return draw.problem(coupled, torch.full((NUM_SAMPLES, 3), 0.1), (c,), contractive=True)


@register("domain/square-root")
def root(draw: Draw) -> Problem:
    """sqrt(2 - a x); NaN for x > 2 / a."""
    a, c = draw.rounded(evenly(0.2, 1.2)[:, None], torch.full((NUM_SAMPLES, 1), 2.0))
    x_star = (-a + torch.sqrt(a * a + 4 * c)) / 2
    return draw.problem(
        lambda x, a, c: torch.sqrt(c - a * x),
        torch.zeros_like(a),
        (a, c),
        contractive=True,
        x_star=x_star,
        kappa=1 / (1 + a / (2 * x_star)).squeeze(-1),
    )


@register("cycle/reflection")
def reflection(draw: Draw) -> Problem:
    """z - x: every point but z / 2 is on a 2-cycle."""
    (z,) = draw.rounded(draw.normal(NUM_SAMPLES, 3))
    kappa = torch.full((NUM_SAMPLES,), 0.5, dtype=torch.float64)
    return draw.problem(lambda x, z: z - x, torch.ones_like(z), (z,), x_star=z / 2, kappa=kappa)


@register("cycle/reciprocal")
def reciprocal(draw: Draw) -> Problem:
    """z / x: 2-cycles around the square root of z."""
    z = draw.uniform(1.2, 9, NUM_SAMPLES, 1)
    # -sqrt(z) is a fixed point too, so none is named.
    return draw.problem(lambda x, z: z / x, torch.ones_like(z), (z,))


@register("cycle/swap")
def swap(draw: Draw) -> Problem:
    """(x, y) -> (y + z, x - z): 2-cycles around a line of fixed points."""
    z = draw.normal(NUM_SAMPLES, 1)
    return draw.problem(
        lambda x, z: x.flip(-1) + torch.cat([z, -z], -1), torch.zeros(NUM_SAMPLES, 2), (z,)
    )


@register("singular/constant")
def constant(draw: Draw) -> Problem:
    """g does not depend on x, NaN apart."""
    (z,) = draw.rounded(draw.normal(NUM_SAMPLES, D))
    return draw.problem(
        lambda x, z: torch.where(torch.isnan(x), x, z),
        torch.zeros_like(z),
        (z,),
        contractive=True,
        x_star=z,
        kappa=torch.ones(NUM_SAMPLES, dtype=torch.float64),
    )


@register("singular/identity")
def identity(draw: Draw) -> Problem:
    """x0 is already solved: every point is fixed."""
    x0, z = draw.normal(NUM_SAMPLES, D), draw.normal(NUM_SAMPLES, D)
    return draw.problem(lambda x, z: x + 0 * z, x0, (z,))


@register("singular/nilpotent")
def nilpotent(draw: Draw) -> Problem:
    """A shift, scaled by 0.5 to 2."""
    # A^d = 0, yet ||A|| is large: Picard grows for d - 1 steps and is then exact.
    shift = torch.diag(torch.ones(7, dtype=torch.float64), 1)
    return affine_problem(draw, evenly(0.5, 2)[:, None, None] * shift)


@register("singular/projection")
def projection(draw: Draw) -> Problem:
    """A projection plus an offset orthogonal to its range."""
    Q = draw.orthogonal(NUM_SAMPLES, D)[:, :, :5]
    P = Q @ Q.mT
    b = draw.normal(NUM_SAMPLES, D, 1)
    offset = (b - P @ b).squeeze(-1)
    return draw.problem(affine, draw.normal(NUM_SAMPLES, D), (P, offset), contractive=True)


@register("singular/alternating-projections")
def alternating_projections(draw: Draw) -> Problem:
    """Two lines per plane at angles 0.05 to 1.2."""
    # Two lines per plane at a small angle: the rate is its squared cosine; 1 is an eigenvalue.
    angle = evenly(0.05, 1.2)
    u = torch.stack([angle.cos(), angle.sin()], -1)
    pair = u[:, :, None] * u[:, None, :] @ AXIS
    A = torch.stack([torch.block_diag(p, p, AXIS) for p in pair])
    x0 = draw.normal(NUM_SAMPLES, 6)
    return draw.problem(affine, x0, (A, torch.zeros_like(x0)), contractive=True)


def one_active_coordinate(x: Tensor, z: Tensor) -> Tensor:
    """Only the first coordinate moves."""
    first = torch.cos(x[:, :1]) + 0 * z[:, :1]
    return torch.cat([first, z[:, 1:]], -1)


@register("singular/parallel-differences")
def parallel_differences(draw: Draw) -> Problem:
    """All differences are multiples of one vector."""
    z = draw.normal(NUM_SAMPLES, D)
    return draw.problem(one_active_coordinate, torch.zeros_like(z), (z,), contractive=True)


@register("nan/tanh")
def tanh_with_nan(draw: Draw) -> Problem:
    """The contractive tanh cell; z of three samples holds NaN or Inf."""
    W, z = symmetric(draw, 0.9), 0.1 * draw.normal(NUM_SAMPLES, 64)
    z[2, 3], z[5, 3], z[6] = math.nan, math.inf, math.nan
    return draw.problem(tanh_cell, torch.zeros_like(z), (W, z), exists=~z.isnan().any(1))
