"""Affine maps x -> A x + b, one matrix per sample, from easy to rho = 0.999 and beyond."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpi_cuda.testing.problem import NUM_SAMPLES, Draw, Problem, register, rowwise

RHOS = torch.tensor([0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999], dtype=torch.float64)
"""Spectral radius of each sample."""

D = 32


def radii(draw: Draw) -> Tensor:
    """(B,) RHOS, kept far enough below 1 to stay there when rounded to the draw's dtype."""
    return RHOS.clamp(max=1 - 2 * torch.finfo(draw.dtype).eps)


@rowwise
def affine(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """A x + b with A (B, d, d); summed row by row so that the batch cannot change a bit."""
    return (A * x[:, None, :]).sum(-1) + b


@rowwise
def scaled(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Elementwise a x + b."""
    return a * x + b


def affine_problem(draw: Draw, A: Tensor, b: Tensor, x0: Tensor | None = None) -> Problem:
    """The problem of `affine` with its exact solution, as rounded to the draw's dtype."""
    A, b = (t.double() for t in draw.cast(A, b))
    identity = torch.eye(A.shape[-1], dtype=torch.float64)
    radius = torch.linalg.eigvals(A).abs().amax().item()
    return draw.problem(
        affine,
        torch.zeros_like(b) if x0 is None else x0,
        (A, b),
        contractive=radius < 1,
        rho=radius,
        x_star=torch.linalg.solve(identity - A, b),
        kappa=1 / torch.linalg.svdvals(identity - A)[:, -1],
        bitwise=True,
    )


def symmetric(draw: Draw, eigenvalues: Tensor) -> Tensor:
    """(B, d, d) symmetric matrices with the given (B, d) eigenvalues."""
    Q = draw.orthogonal(*eigenvalues.shape)
    return Q * eigenvalues[:, None, :] @ Q.mT


def rotations(radius: Tensor, angle: Tensor) -> Tensor:
    """Block diagonal (B, 2k, 2k) of 2x2 rotations by angle (B, k), scaled by radius (B, k)."""
    cos, sin = radius * angle.cos(), radius * angle.sin()
    blocks = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return torch.stack([torch.block_diag(*sample) for sample in blocks])


@register("linear/positive")
def positive(draw: Draw) -> Problem:
    """Symmetric, spectrum uniform on [0, rho]."""
    eigenvalues = draw.uniform(0, 1, NUM_SAMPLES, D)
    eigenvalues[:, 0] = 1
    A = symmetric(draw, radii(draw)[:, None] * eigenvalues)
    return affine_problem(draw, A, draw.normal(NUM_SAMPLES, D))


@register("linear/indefinite")
def indefinite(draw: Draw) -> Problem:
    """Symmetric, spectrum uniform on [-rho, rho]."""
    eigenvalues = draw.uniform(-1, 1, NUM_SAMPLES, D)
    eigenvalues[:, 0] = 1
    A = symmetric(draw, radii(draw)[:, None] * eigenvalues)
    return affine_problem(draw, A, draw.normal(NUM_SAMPLES, D))


@register("linear/negative")
def negative(draw: Draw) -> Problem:
    """Symmetric, spectrum uniform on [-rho, 0]."""
    eigenvalues = draw.uniform(-1, 0, NUM_SAMPLES, D)
    eigenvalues[:, 0] = -1
    A = symmetric(draw, radii(draw)[:, None] * eigenvalues)
    return affine_problem(draw, A, draw.normal(NUM_SAMPLES, D))


@register("linear/ginibre")
def ginibre(draw: Draw) -> Problem:
    """Gaussian entries: eigenvalues fill the disc of radius rho."""
    A = draw.normal(NUM_SAMPLES, D, D)
    radius = torch.linalg.eigvals(A).abs().amax(-1)
    return affine_problem(
        draw, A * (radii(draw) / radius)[:, None, None], draw.normal(NUM_SAMPLES, D)
    )


@register("linear/non-normal")
def non_normal(draw: Draw) -> Problem:
    """Triangular in a random basis: transient growth, then decay at rho."""
    # The strictly upper part lets the residual grow by orders of magnitude before it decays.
    A = draw.normal(NUM_SAMPLES, D, D).triu(1) * (0.6 / math.sqrt(D)) * 2
    A += torch.diag_embed(radii(draw)[:, None] * draw.uniform(0.2, 1, NUM_SAMPLES, D))
    Q = draw.orthogonal(NUM_SAMPLES, D)
    return affine_problem(draw, Q @ A @ Q.mT, draw.normal(NUM_SAMPLES, D))


@register("linear/jordan")
def jordan(draw: Draw) -> Problem:
    """Jordan blocks of size 4: every eigenvalue is defective."""
    block = torch.diag(torch.ones(3, dtype=torch.float64), 1)
    shift = torch.block_diag(*[block] * (D // 4))
    diagonal = torch.diag_embed(radii(draw)[:, None].expand(NUM_SAMPLES, D) * 0.97)
    return affine_problem(draw, diagonal + 0.5 * shift, draw.normal(NUM_SAMPLES, D))


@register("linear/rotations")
def many_rotations(draw: Draw) -> Problem:
    """Complex eigenvalues of radius rho at 16 angles, in a random basis."""
    angle = draw.uniform(0, math.pi, NUM_SAMPLES, D // 2)
    A = rotations(radii(draw)[:, None].expand_as(angle), angle)
    Q = draw.orthogonal(NUM_SAMPLES, D)
    return affine_problem(draw, Q @ A @ Q.mT, draw.normal(NUM_SAMPLES, D))


@register("linear/one-rotation")
def one_rotation(draw: Draw) -> Problem:
    """One pair of complex eigenvalues, repeated: solved by two differences."""
    angle = draw.uniform(0.3, 2.8, NUM_SAMPLES, 1).expand(NUM_SAMPLES, D // 2)
    return affine_problem(
        draw, rotations(radii(draw)[:, None].expand_as(angle), angle), draw.normal(NUM_SAMPLES, D)
    )


@register("linear/clustered")
def clustered(draw: Draw) -> Problem:
    """Diagonal with three tight clusters."""
    centres = torch.tensor([-0.9, 0.1, 1.0], dtype=torch.float64)
    jitter = draw.uniform(0.99, 1.0, NUM_SAMPLES, D)
    eigenvalues = radii(draw)[:, None] * centres[torch.arange(D) % 3] * jitter
    return affine_problem(draw, torch.diag_embed(eigenvalues), draw.normal(NUM_SAMPLES, D))


@register("linear/spread")
def spread(draw: Draw) -> Problem:
    """Diagonal with 1 - eigenvalue spread evenly in the logarithm."""
    exponent = torch.linspace(0, 1, D, dtype=torch.float64)
    eigenvalues = 1 - (1 - radii(draw)[:, None]) ** exponent
    return affine_problem(draw, torch.diag_embed(eigenvalues), draw.normal(NUM_SAMPLES, D))


@register("linear/page-rank")
def page_rank(draw: Draw) -> Problem:
    """A random walk with teleporting: non-negative, not symmetric."""
    links = draw.uniform(0, 1, NUM_SAMPLES, D, D) ** 6
    A = radii(draw)[:, None, None] * links / links.sum(-2, keepdim=True)
    teleport = ((1 - radii(draw)) / D)[:, None].expand(NUM_SAMPLES, D)
    return affine_problem(draw, A, teleport, torch.full((NUM_SAMPLES, D), 1 / D))


@register("linear/wide-diagonal")
def wide_diagonal(draw: Draw) -> Problem:
    """1,024 unknowns, diagonal, spectrum uniform on [-rho, rho]."""
    d = 1024
    a = radii(draw)[:, None] * draw.uniform(-1, 1, NUM_SAMPLES, d)
    a, b = draw.cast(a, draw.normal(NUM_SAMPLES, d))
    slack = 1 - a.double()
    return draw.problem(
        scaled,
        torch.zeros(NUM_SAMPLES, d),
        (a, b),
        contractive=True,
        rho=a.double().abs().amax().item(),
        x_star=b.double() / slack,
        kappa=1 / slack.amin(-1),
        bitwise=True,
    )


@register("linear/extreme-scales")
def extreme_scales(draw: Draw) -> Problem:
    """States from 1e-28 to 1e28."""
    # Squares of these states overflow or vanish in float32.
    scale = 10 ** torch.linspace(-28, 28, NUM_SAMPLES, dtype=torch.float64)
    A = symmetric(draw, draw.uniform(-0.9, 0.9, NUM_SAMPLES, D))
    return affine_problem(draw, A, scale[:, None] * draw.normal(NUM_SAMPLES, D))


@register("expansive/minus-two")
def minus_two(draw: Draw) -> Problem:
    """x -> -k x + b with k from 1.5 to 3."""
    factor = -torch.linspace(1.5, 3, NUM_SAMPLES, dtype=torch.float64)
    A = factor[:, None, None] * torch.eye(4, dtype=torch.float64)
    return affine_problem(draw, A, draw.normal(NUM_SAMPLES, 4))


@register("expansive/rotations")
def expansive_rotations(draw: Draw) -> Problem:
    """Complex eigenvalues of radius 1.02 to 2."""
    radius = torch.linspace(1.02, 2, NUM_SAMPLES, dtype=torch.float64)[:, None]
    angle = draw.uniform(0.7, 2.5, NUM_SAMPLES, 4)
    A = rotations(radius.expand_as(angle), angle)
    return affine_problem(draw, A, draw.normal(NUM_SAMPLES, 8))


@register("expansive/one-bad-direction")
def one_bad_direction(draw: Draw) -> Problem:
    """Contractive but for one eigenvalue from -1.1 to -5."""
    eigenvalues = radii(draw)[:, None] * draw.uniform(-0.9, 0.9, NUM_SAMPLES, D)
    eigenvalues[:, 0] = -torch.linspace(1.1, 5, NUM_SAMPLES, dtype=torch.float64)
    return affine_problem(draw, symmetric(draw, eigenvalues), draw.normal(NUM_SAMPLES, D))


@register("expansive/saddle")
def saddle(draw: Draw) -> Problem:
    """Expansive directions of both signs."""
    eigenvalues = draw.uniform(-2, 0.8, NUM_SAMPLES, 16)
    eigenvalues[:, 0] = torch.linspace(1.2, 3, NUM_SAMPLES, dtype=torch.float64)
    return affine_problem(draw, symmetric(draw, eigenvalues), draw.normal(NUM_SAMPLES, 16))
