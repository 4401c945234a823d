"""Gradient descent x -> x - step df/dx on energies that are ill-conditioned or near the edge."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.testing.linear import affine, symmetric
from fpi_cuda.testing.problem import NUM_SAMPLES, Draw, Problem, evenly, register

CONDITIONS = torch.tensor([1e1, 3e1, 1e2, 3e2, 1e3, 2e3, 5e3, 1e4], dtype=torch.float64)
"""Condition number of each sample's Hessian."""

D = 32
ROWS = 64


def spectrum(conditions: Tensor, d: int) -> Tensor:
    """(B, d) eigenvalues spread evenly in the logarithm from 1/condition to 1."""
    return conditions[:, None] ** -torch.linspace(0, 1, d, dtype=torch.float64)


def quadratic_descent(x: Tensor, H: Tensor, b: Tensor, step: Tensor) -> Tensor:
    """Descent on x^T H x / 2 - b^T x with H (B, d, d), step (B, 1)."""
    return x - step * affine(x, H, -b)


def quadratic_inputs(draw: Draw, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """H, b and step sizes of `quadratic_descent`; the largest eigenvalue of H is 1."""
    H = symmetric(draw, spectrum(CONDITIONS, D))
    # A right-hand side in proportion to the spectrum keeps x_star of order one.
    b = (H @ draw.normal(NUM_SAMPLES, D, 1)).squeeze(-1)
    return H, b, torch.full((NUM_SAMPLES, 1), step)


@register(
    {
        "energy/quadratic-1.0": (1.0,),
        # The steepest direction flips sign and decays by 0.9 a step.
        "energy/quadratic-1.9": (1.9,),
        # Picard diverges along the steepest direction.
        "energy/quadratic-2.2": (2.2,),
    }
)
def quadratic_problem(draw: Draw, step: float) -> Problem:
    """Descent with step / L, condition numbers 10 to 10,000; it is stable for step below 2."""
    H, b, steps = draw.rounded(*quadratic_inputs(draw, step))
    slopes = torch.linalg.eigvalsh((H + H.mT) / 2)
    return draw.problem(
        quadratic_descent,
        torch.zeros_like(b),
        (H, b, steps),
        contractive=(1 - steps * slopes).abs().amax().item() < 1,
        x_star=torch.linalg.solve(H, b),
        kappa=1 / (steps[:, 0] * torch.linalg.svdvals(H)[:, -1]),
    )


def logistic_descent(x: Tensor, A: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    """Descent on mean(softplus(-A x)) + weight |x|^2 / 2; labels are the signs of A's rows."""
    slope = torch.sigmoid(-(A * x[:, None, :]).sum(-1)) / A.shape[1]
    return x - step * (weight * x - (A * slope[:, :, None]).sum(1))


def logistic_hessian(x: Tensor, A: Tensor, weight: Tensor) -> Tensor:
    """(B, d, d) Hessian of the energy of `logistic_descent`."""
    p = torch.sigmoid((A * x[:, None, :]).sum(-1))
    identity = torch.eye(x.shape[-1], dtype=x.dtype)
    return (A.mT * (p * (1 - p))[:, None, :]) @ A / A.shape[1] + weight[:, :, None] * identity


def logistic_minimum(A: Tensor, weight: Tensor) -> Tensor:
    """(B, d) minimiser, by damped Newton in float64 to rounding."""
    one = torch.ones_like(weight)
    x = torch.zeros(A.shape[0], A.shape[2], dtype=torch.float64)
    for k in range(60):
        downhill = logistic_descent(x, A, weight, one) - x
        move = torch.linalg.solve(logistic_hessian(x, A, weight), downhill)
        x = x + (0.5 if k < 20 else 1.0) * move
    return x


@register(
    {
        "energy/logistic-1.0": (1.0, False),
        "energy/logistic-1.9": (1.9, False),
        # The curvature at x0 exceeds that at the minimum: stable there, unstable on the way.
        "energy/logistic-edge": (1.9, True),
    }
)
def logistic_problem(draw: Draw, step: float, at_minimum: bool) -> Problem:
    """Logistic regression, step / L, with L of the Hessian at the minimum or over all x."""
    features = draw.normal(NUM_SAMPLES, ROWS, D) * spectrum(CONDITIONS, D)[:, None, :].sqrt()
    labels = torch.sign(features.sum(-1) + 0.5 * draw.normal(NUM_SAMPLES, ROWS))
    A, weight = draw.rounded(features * labels[..., None], 0.1 / CONDITIONS[:, None])
    x_star = logistic_minimum(A, weight)
    H = logistic_hessian(x_star if at_minimum else torch.zeros_like(x_star), A, weight)
    (steps,) = draw.rounded(step / torch.linalg.eigvalsh(H)[:, -1:])
    slopes = torch.linalg.eigvalsh(logistic_hessian(x_star, A, weight))
    return draw.problem(
        logistic_descent,
        torch.zeros_like(x_star),
        (A, weight, steps),
        contractive=True,
        x_star=x_star,
        kappa=1 / (steps * slopes).amin(-1),
    )


def double_well_descent(x: Tensor, H: Tensor, b: Tensor, step: Tensor) -> Tensor:
    """Descent on sum((x^2 - 1)^2) / 4 + x^T H x / 2 - b^T x: not convex."""
    return x - step * (x * (x * x - 1) + affine(x, H, -b))


@register("energy/double-well")
def double_well(draw: Draw) -> Problem:
    """A non-convex energy: x0 is near a saddle, the fixed points are minima."""
    H = symmetric(draw, 4 * spectrum(CONDITIONS, D))
    x0, b = 0.1 * draw.normal(NUM_SAMPLES, D), 0.3 * draw.normal(NUM_SAMPLES, D)
    return draw.problem(
        double_well_descent, x0, (H, b, evenly(0.05, 0.3)[:, None]), contractive=True
    )


def shrinkage(x: Tensor, H: Tensor, b: Tensor, step: Tensor, weight: Tensor) -> Tensor:
    """Proximal gradient for x^T H x / 2 - b^T x + weight |x|_1 (ISTA); not smooth."""
    y = quadratic_descent(x, H, b, step)
    return torch.sign(y) * torch.relu(y.abs() - step * weight)


@register("energy/lasso")
def lasso(draw: Draw) -> Problem:
    """Proximal gradient (ISTA): which coordinates are zero changes on the way."""
    H, b, steps = quadratic_inputs(draw, 1.8)
    z = H, b, steps, 0.05 * b.abs().amax(-1, keepdim=True)
    return draw.problem(shrinkage, torch.zeros_like(b), z, contractive=True)


@register("energy/box")
def box(draw: Draw) -> Problem:
    """Projected descent on [-0.5, 0.5]^d: which coordinates are at a bound changes on the way."""
    return draw.problem(
        lambda x, *z: quadratic_descent(x, *z).clamp(-0.5, 0.5),
        torch.zeros(NUM_SAMPLES, D),
        quadratic_inputs(draw, 1.9),
        contractive=True,
    )
