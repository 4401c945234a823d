"""One to three unknowns: Kepler's equation, the cosine, square roots, the logistic map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpi_cuda.testing.linear import affine_problem, rotations
from fpi_cuda.testing.problem import NUM_SAMPLES, Draw, Problem, register, rowwise


@rowwise
def kepler(x: Tensor, eccentricity: Tensor, anomaly: Tensor) -> Tensor:
    """Kepler's equation E = M + e sin E."""
    return anomaly + eccentricity * torch.sin(x)


@register("scalar/kepler")
def kepler_orbits(draw: Draw) -> Problem:
    """Eccentricity 0.1 to 0.98."""
    eccentricity = torch.linspace(0.1, 0.98, NUM_SAMPLES, dtype=torch.float64)[:, None]
    anomaly = draw.uniform(0.2, 3.0, NUM_SAMPLES, 1)
    e, M = (t.double() for t in draw.cast(eccentricity, anomaly))
    # Newton from pi converges for every eccentricity below 1.
    x = torch.full_like(M, math.pi)
    for _ in range(50):
        x = x - (x - e * torch.sin(x) - M) / (1 - e * torch.cos(x))
    slope = e * torch.cos(x)
    return draw.problem(
        kepler,
        torch.zeros(NUM_SAMPLES, 1),
        (e, M),
        contractive=True,
        rho=slope.abs().amax().item(),
        x_star=x,
        kappa=1 / (1 - slope).squeeze(-1),
        bitwise=True,
    )


@rowwise
def cosine(x: Tensor, scale: Tensor) -> Tensor:
    """cos(scale x) / scale."""
    return torch.cos(scale * x) / scale


@register("scalar/cosine")
def cosine_samples(draw: Draw) -> Problem:
    """Dottie number at eight scales."""
    # A power of two scales exactly, so every dtype has the same fixed point.
    scale = 2.0 ** torch.arange(-4, 4, dtype=torch.float64)[:, None]
    dottie = 0.7390851332151607
    return draw.problem(
        cosine,
        torch.zeros(NUM_SAMPLES, 1),
        (scale,),
        contractive=True,
        rho=math.sin(dottie),
        x_star=dottie / scale,
        kappa=torch.full((NUM_SAMPLES,), 1 / (1 + math.sin(dottie)), dtype=torch.float64),
        bitwise=True,
    )


@rowwise
def babylonian(x: Tensor, a: Tensor) -> Tensor:
    """(x + a / x) / 2: Newton's square root, quadratic without any help."""
    return (x + a / x) / 2


@register("scalar/square-root")
def square_root(draw: Draw) -> Problem:
    """Newton for roots of 1e-3 to 1e4: Picard needs a handful of steps."""
    a = 10 ** torch.linspace(-3, 4, NUM_SAMPLES, dtype=torch.float64)[:, None]
    x0 = torch.ones(NUM_SAMPLES, 1)
    # The negative root is a fixed point too, so none is named.
    return draw.problem(babylonian, x0, (a,), contractive=True, rho=0.0, bitwise=True)


@rowwise
def logistic_map(x: Tensor, r: Tensor) -> Tensor:
    """r x (1 - x): stable below r = 3, cycles above, chaos near 4."""
    return r * x * (1 - x)


def logistic_map_problem(draw: Draw, r: float) -> Problem:
    """Starting points across the interval."""
    growth = torch.full((NUM_SAMPLES, 1), r, dtype=torch.float64)
    x0 = torch.linspace(0.1, 0.85, NUM_SAMPLES, dtype=torch.float64)[:, None]
    # Both 0 and 1 - 1/r are fixed points, so none is named.
    return draw.problem(
        logistic_map, x0, (growth,), contractive=r < 3, rho=abs(2 - r), bitwise=True
    )


@register("scalar/logistic-2.8")
def logistic_stable(draw: Draw) -> Problem:
    """r = 2.8: slope -0.8."""
    return logistic_map_problem(draw, 2.8)


@register("scalar/logistic-3.2")
def logistic_cycle(draw: Draw) -> Problem:
    """r = 3.2: Picard ends in a 2-cycle."""
    return logistic_map_problem(draw, 3.2)


@register("scalar/logistic-3.9")
def logistic_chaos(draw: Draw) -> Problem:
    """r = 3.9: Picard is chaotic."""
    return logistic_map_problem(draw, 3.9)


@register("scalar/spiral")
def spiral(draw: Draw) -> Problem:
    """Two unknowns, complex eigenvalues of radius 0.5 to 0.99."""
    radius = torch.linspace(0.5, 0.99, NUM_SAMPLES, dtype=torch.float64)[:, None]
    angle = torch.linspace(0.2, 3.0, NUM_SAMPLES, dtype=torch.float64)[:, None]
    return affine_problem(draw, rotations(radius, angle), draw.normal(NUM_SAMPLES, 2))


@rowwise
def coupled(x: Tensor, c: Tensor) -> Tensor:
    """Three coupled unknowns with sines and an exponential (Burden and Faires, chapter 10)."""
    first = (torch.cos(x[:, 1] * x[:, 2]) + 0.5) / 3
    second = torch.sqrt(x[:, 0] ** 2 + torch.sin(x[:, 2]) + 1.06) / 9 - 0.1
    third = -torch.exp(-x[:, 0] * x[:, 1]) / 20 - (10 * math.pi - 3) / 60
    return c * torch.stack([first, second, third], -1)


@register("scalar/three-unknowns")
def three_unknowns(draw: Draw) -> Problem:
    """Strongly contractive."""
    c = torch.linspace(0.5, 1.2, NUM_SAMPLES, dtype=torch.float64)[:, None]
    x0 = torch.full((NUM_SAMPLES, 3), 0.1)
    return draw.problem(coupled, x0, (c,), contractive=True, bitwise=True)


@rowwise
def logarithm(x: Tensor, c: Tensor) -> Tensor:
    """log(x) + c; NaN for x < 0, so an overshoot leaves the domain."""
    return torch.log(x) + c


@register("domain/logarithm")
def logarithm_samples(draw: Draw) -> Problem:
    """log(x) + c from 0.5: the other fixed point, which repels, is nearby."""
    c = torch.linspace(1.25, 6, NUM_SAMPLES, dtype=torch.float64)[:, None]
    x0 = torch.full((NUM_SAMPLES, 1), 0.5)
    return draw.problem(logarithm, x0, (c,), contractive=True, bitwise=True)


@rowwise
def root(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """sqrt(c - a x); NaN for x > c / a."""
    return torch.sqrt(c - a * x)


@register("domain/square-root")
def root_samples(draw: Draw) -> Problem:
    """sqrt(2 - a x)."""
    a = torch.linspace(0.2, 1.2, NUM_SAMPLES, dtype=torch.float64)[:, None]
    c = torch.full((NUM_SAMPLES, 1), 2.0, dtype=torch.float64)
    a, c = (t.double() for t in draw.cast(a, c))
    x_star = (-a + torch.sqrt(a * a + 4 * c)) / 2
    slope = -a / (2 * x_star)
    return draw.problem(
        root,
        torch.zeros(NUM_SAMPLES, 1),
        (a, c),
        contractive=True,
        rho=slope.abs().amax().item(),
        x_star=x_star,
        kappa=1 / (1 - slope).squeeze(-1),
        bitwise=True,
    )


@rowwise
def reflection(x: Tensor, z: Tensor) -> Tensor:
    """z - x: every point but z / 2 is on a 2-cycle."""
    return z - x


@register("cycle/reflection")
def reflections(draw: Draw) -> Problem:
    """z - x."""
    (z,) = (t.double() for t in draw.cast(draw.normal(NUM_SAMPLES, 3)))
    return draw.problem(
        reflection,
        torch.ones(NUM_SAMPLES, 3),
        (z,),
        rho=1.0,
        x_star=z / 2,
        kappa=torch.full((NUM_SAMPLES,), 0.5, dtype=torch.float64),
        bitwise=True,
    )


@rowwise
def reciprocal(x: Tensor, z: Tensor) -> Tensor:
    """z / x: 2-cycles around the square root of z."""
    return z / x


@register("cycle/reciprocal")
def reciprocals(draw: Draw) -> Problem:
    """z / x."""
    (z,) = (t.double() for t in draw.cast(draw.uniform(1.2, 9, NUM_SAMPLES, 1)))
    # -sqrt(z) is a fixed point too, so none is named.
    return draw.problem(reciprocal, torch.ones(NUM_SAMPLES, 1), (z,), rho=1.0, bitwise=True)


@rowwise
def swap(x: Tensor, z: Tensor) -> Tensor:
    """(x, y) -> (y + z, x - z): 2-cycles around a line of fixed points."""
    return x.flip(-1) + torch.cat([z, -z], -1)


@register("cycle/swap")
def swaps(draw: Draw) -> Problem:
    """A permutation plus an offset that it flips."""
    z = draw.normal(NUM_SAMPLES, 1)
    return draw.problem(swap, torch.zeros(NUM_SAMPLES, 2), (z,), rho=1.0, bitwise=True)
