"""Affine maps x -> A x + b, one matrix per sample, from easy to rho = 0.999 and beyond."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpi_cuda.testing.problem import NUM_SAMPLES, Draw, Problem, evenly, register

RHOS = torch.tensor([0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999], dtype=torch.float64)
"""Spectral radius of each sample."""

D = 32


def radii(draw: Draw) -> Tensor:
    """(B, 1) RHOS, kept far enough below 1 to stay there when rounded to the draw's dtype."""
    return RHOS.clamp(max=1 - 2 * torch.finfo(draw.dtype).eps)[:, None]


def affine(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """A x + b with A (B, d, d); summed row by row so that the batch cannot change a bit."""
    return (A * x[:, None, :]).sum(-1) + b


def affine_problem(
    draw: Draw, A: Tensor, b: Tensor | None = None, x0: Tensor | None = None
) -> Problem:
    """The problem of `affine`, by default from zero with a Gaussian b, and its exact solution."""
    A, b = draw.rounded(A, draw.normal(*A.shape[:2]) if b is None else b)
    matrix = torch.eye(A.shape[-1], dtype=torch.float64) - A
    return draw.problem(
        affine,
        torch.zeros_like(b) if x0 is None else x0,
        (A, b),
        contractive=torch.linalg.eigvals(A).abs().amax().item() < 1,
        x_star=torch.linalg.solve(matrix, b),
        kappa=1 / torch.linalg.svdvals(matrix)[:, -1],
    )


def symmetric(draw: Draw, eigenvalues: Tensor) -> Tensor:
    """(B, d, d) symmetric matrices with the given (B, d) eigenvalues."""
    Q = draw.orthogonal(*eigenvalues.shape)
    return Q * eigenvalues[:, None, :] @ Q.mT


def rotations(radius: Tensor, angle: Tensor) -> Tensor:
    """Block diagonal (B, 2k, 2k) of 2x2 rotations by angle (B, k), scaled by radius (B, 1)."""
    cos, sin = radius * angle.cos(), radius * angle.sin()
    blocks = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return torch.stack([torch.block_diag(*sample) for sample in blocks])


@register(
    {
        "linear/positive": (0, 1, 1),
        "linear/indefinite": (-1, 1, 1),
        "linear/negative": (-1, 0, -1),
    }
)
def uniform_spectrum(draw: Draw, low: float, high: float, first: float) -> Problem:
    """Symmetric, spectrum uniform on [low rho, high rho], with first rho in it."""
    eigenvalues = draw.uniform(low, high, NUM_SAMPLES, D)
    eigenvalues[:, 0] = first
    return affine_problem(draw, symmetric(draw, radii(draw) * eigenvalues))


@register("linear/ginibre")
def ginibre(draw: Draw) -> Problem:
    """Gaussian entries: eigenvalues fill the disc of radius rho."""
    A = draw.normal(NUM_SAMPLES, D, D)
    radius = torch.linalg.eigvals(A).abs().amax(-1, keepdim=True)
    return affine_problem(draw, A * (radii(draw) / radius)[..., None])


@register("linear/non-normal")
def non_normal(draw: Draw) -> Problem:
    """Triangular in a random basis: transient growth, then decay at rho."""
    # The strictly upper part lets the residual grow by orders of magnitude before it decays.
    A = draw.normal(NUM_SAMPLES, D, D).triu(1) * (0.6 / math.sqrt(D)) * 2
    A += torch.diag_embed(radii(draw) * draw.uniform(0.2, 1, NUM_SAMPLES, D))
    Q = draw.orthogonal(NUM_SAMPLES, D)
    return affine_problem(draw, Q @ A @ Q.mT)


@register("linear/jordan")
def jordan(draw: Draw) -> Problem:
    """Jordan blocks of size 4: every eigenvalue is defective."""
    block = torch.diag(torch.ones(3, dtype=torch.float64), 1)
    shift = torch.block_diag(*[block] * (D // 4))
    diagonal = torch.diag_embed(radii(draw).expand(NUM_SAMPLES, D) * 0.97)
    return affine_problem(draw, diagonal + 0.5 * shift)


@register("linear/rotations")
def many_rotations(draw: Draw) -> Problem:
    """Complex eigenvalues of radius rho at 16 angles, in a random basis."""
    A = rotations(radii(draw), draw.uniform(0, math.pi, NUM_SAMPLES, D // 2))
    Q = draw.orthogonal(NUM_SAMPLES, D)
    return affine_problem(draw, Q @ A @ Q.mT)


@register("linear/one-rotation")
def one_rotation(draw: Draw) -> Problem:
    """One pair of complex eigenvalues, repeated: solved by two differences."""
    angle = draw.uniform(0.3, 2.8, NUM_SAMPLES, 1).expand(NUM_SAMPLES, D // 2)
    return affine_problem(draw, rotations(radii(draw), angle))


@register("linear/clustered")
def clustered(draw: Draw) -> Problem:
    """Diagonal with three tight clusters."""
    centres = torch.tensor([-0.9, 0.1, 1.0], dtype=torch.float64)[torch.arange(D) % 3]
    jitter = draw.uniform(0.99, 1.0, NUM_SAMPLES, D)
    return affine_problem(draw, torch.diag_embed(radii(draw) * centres * jitter))


@register("linear/spread")
def spread(draw: Draw) -> Problem:
    """Diagonal with 1 - eigenvalue spread evenly in the logarithm."""
    exponent = torch.linspace(0, 1, D, dtype=torch.float64)
    return affine_problem(draw, torch.diag_embed(1 - (1 - radii(draw)) ** exponent))


@register("linear/page-rank")
def page_rank(draw: Draw) -> Problem:
    """A random walk with teleporting: non-negative, not symmetric."""
    links = draw.uniform(0, 1, NUM_SAMPLES, D, D) ** 6
    A = radii(draw)[..., None] * links / links.sum(-2, keepdim=True)
    teleport = ((1 - radii(draw)) / D).expand(NUM_SAMPLES, D)
    return affine_problem(draw, A, teleport, torch.full((NUM_SAMPLES, D), 1 / D))


@register("linear/wide-diagonal")
def wide_diagonal(draw: Draw) -> Problem:
    """1,024 unknowns, diagonal, spectrum uniform on [-rho, rho]."""
    a = radii(draw) * draw.uniform(-1, 1, NUM_SAMPLES, 1024)
    a, b = draw.rounded(a, draw.normal(*a.shape))
    return draw.problem(
        lambda x, a, b: a * x + b,
        torch.zeros_like(a),
        (a, b),
        contractive=True,
        x_star=b / (1 - a),
        kappa=1 / (1 - a).amin(-1),
    )


@register("linear/extreme-scales")
def extreme_scales(draw: Draw) -> Problem:
    """States from 1e-28 to 1e28: their squares overflow or vanish in float32."""
    A = symmetric(draw, draw.uniform(-0.9, 0.9, NUM_SAMPLES, D))
    return affine_problem(draw, A, 10 ** evenly(-28, 28)[:, None] * draw.normal(NUM_SAMPLES, D))


@register("expansive/minus-two")
def minus_two(draw: Draw) -> Problem:
    """x -> -k x + b with k from 1.5 to 3."""
    A = -evenly(1.5, 3)[:, None, None] * torch.eye(4, dtype=torch.float64)
    return affine_problem(draw, A)


@register("expansive/rotations")
def expansive_rotations(draw: Draw) -> Problem:
    """Complex eigenvalues of radius 1.02 to 2."""
    angle = draw.uniform(0.7, 2.5, NUM_SAMPLES, 4)
    return affine_problem(draw, rotations(evenly(1.02, 2)[:, None], angle))


@register(
    {
        # Contractive but for one eigenvalue.
        "expansive/one-bad-direction": (-0.9, 0.9, -evenly(1.1, 5), D, True),
        # Expansive directions of both signs.
        "expansive/saddle": (-2, 0.8, evenly(1.2, 3), 16, False),
    }
)
def expansive_spectrum(
    draw: Draw, low: float, high: float, first: Tensor, d: int, by_rho: bool
) -> Problem:
    """Symmetric, spectrum uniform on [low, high], that times rho or not, but for the first."""
    eigenvalues = draw.uniform(low, high, NUM_SAMPLES, d) * (radii(draw) if by_rho else 1)
    eigenvalues[:, 0] = first
    return affine_problem(draw, symmetric(draw, eigenvalues))
