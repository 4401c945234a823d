"""What the Jacobian of g at x says about the solve: will it contract, and can it be made to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.options import require_count
from fpi_cuda.partial import partial
from fpi_cuda.row_norm import row_norm
from fpi_cuda.solvers.gmres import combine, dots
from fpi_cuda.solvers.linear import working_dtype
from fpi_cuda.state import layout_of


def spectral_radius(
    g: Callable[..., Any],
    x: Any,
    *z: Any,
    num_steps: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The spectral radius of the Jacobian dg/dx of every sample, complex eigenvalues included.

    Below 1 at a fixed point, Picard iteration converges near it, by that factor a step.

    Where x has at most num_steps elements per sample, the Jacobian is formed and the answer is
    exact. Elsewhere it is the largest Ritz value of num_steps Arnoldi steps: good to a few
    tenths of a percent where one eigenvalue or pair stands out, low by a few percent where very
    many lie on one circle.

    Args:
        g: map g(x, *z) -> like x; sample i of the result must depend on sample i of x alone.
        x: tensor (B, ...) or a tuple of them: the point, usually a fixed point.
        z: inputs of g.
        num_steps: vector-Jacobian products spent, at least 1. Memory is num_steps + 4 times x.
        generator: of the starting vectors; None uses torch's default.
    Returns:
        (B,) in the dtype of x, at least float32; without a graph. NaN where g is not finite.
    Raises:
        TypeError, ValueError: x is not a state, g(x) is not like x or does not depend on x,
            num_steps below 1.
    Source:
        Saad, Numerical Methods for Large Eigenvalue Problems, 2nd ed., section 6.2 (Arnoldi).
    """
    require_count("spectral_radius", "num_steps", num_steps, 1)
    flat, step = flat_map(g, x, z)
    with torch.inference_mode(False), torch.enable_grad():
        # A copy, for a tensor made in inference mode cannot require grad.
        at = flat.detach().clone().requires_grad_()
        value = step(at)

    def transposed(v: Tensor) -> Tensor:
        if value.requires_grad:
            (product,) = torch.autograd.grad(
                value, at, v.to(at.dtype), retain_graph=True, allow_unused=True
            )
            if product is not None:
                return product.to(working_dtype(at.dtype))
        raise ValueError(
            "spectral_radius: g does not depend on x; is it computed under no_grad or from "
            "x.detach()?"
        )

    with torch.no_grad():
        small = flat.shape[1] <= num_steps
        matrix = (
            whole(transposed, flat) if small else compressed(transposed, flat, num_steps, generator)
        )
        finite = torch.isfinite(matrix).flatten(1).all(1)
        matrix = torch.where(finite[:, None, None], matrix, 0)
        if matrix.shape[1] == 0:
            radius = torch.zeros_like(finite, dtype=torch.float64)
        else:
            radius = torch.linalg.eigvals(matrix).abs().amax(1)
        return torch.where(finite, radius, float("nan")).to(working_dtype(flat.dtype))


def whole(transposed: Callable[[Tensor], Tensor], flat: Tensor) -> Tensor:
    """(B, D, D) float64: the transpose of each sample's Jacobian, column by column."""
    batch, dim = flat.shape
    matrix = torch.empty(batch, dim, dim, dtype=torch.float64, device=flat.device)
    for column in range(dim):
        unit = torch.zeros_like(flat)
        unit[:, column] = 1
        matrix[:, :, column] = transposed(unit)
    return matrix


def compressed(
    transposed: Callable[[Tensor], Tensor],
    flat: Tensor,
    size: int,
    generator: torch.Generator | None,
) -> Tensor:
    """(B, size, size) float64: each transposed Jacobian on its own Krylov space."""
    batch, dim = flat.shape
    dtype = working_dtype(flat.dtype)
    # What is left of a product after orthogonalisation is rounding below this share of it.
    tiny = 16 * torch.finfo(dtype).eps
    basis = torch.zeros(batch, size, dim, dtype=dtype, device=flat.device)
    start = torch.randn(batch, dim, dtype=dtype, device=flat.device, generator=generator)
    basis[:, 0] = start / row_norm(start)[:, None].to(dtype)
    hessenberg = torch.zeros(batch, size + 1, size, dtype=torch.float64, device=flat.device)
    for j in range(size):
        w = transposed(basis[:, j])
        w_norm = row_norm(w)
        known = basis[:, : j + 1]
        first = dots(known, w)
        w = w - combine(first, known)
        second = dots(known, w)
        w = w - combine(second, known)
        height = row_norm(w)
        # NaN passes through, so that the sample is known by it in the end.
        going = ~(height <= tiny * w_norm)
        hessenberg[:, : j + 1, j] = first + second
        hessenberg[:, j + 1, j] = torch.where(going, height, 0.0)
        if j + 1 < size:
            unit = w / torch.where(going, height, 1.0)[:, None].to(dtype)
            basis[:, j + 1] = torch.where(going[:, None], unit, 0)
    return hessenberg[:, :size]


def jacobian_penalty(
    g: Callable[..., Any],
    x: Any,
    *z: Any,
    num_probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hutchinson's estimate of ||dg/dx||_F^2 / D, the mean over the samples: add it to a loss.

    It pulls the Jacobian at the fixed point towards zero, so that solves stay short as training
    goes on.

    Args:
        g: map g(x, *z) -> like x; sample i of the result must depend on sample i of x alone.
        x: tensor (B, ...) or a tuple of them, D elements per sample: the fixed point.
        z: inputs of g.
        num_probes: random sign vectors averaged over, at least 1; each costs one
            vector-Jacobian product.
        generator: of the sign vectors; None uses torch's default.
    Returns:
        Scalar in the dtype of x, at least float32; differentiable in x, z and g's parameters.
    Raises:
        TypeError, ValueError: x is not a state or is empty, g(x) is not like x or does not
            depend on x, num_probes below 1.
    Source:
        Bai, Koltun, Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML
        2021, equation (5).
    """
    require_count("jacobian_penalty", "num_probes", num_probes, 1)
    flat, step = flat_map(g, x, z)
    if flat.numel() == 0:
        raise ValueError(f"jacobian_penalty: x is empty, got {tuple(flat.shape)} when flat")
    total = torch.zeros((), dtype=working_dtype(flat.dtype), device=flat.device)
    for _ in range(num_probes):
        signs = torch.randint(0, 2, flat.shape, device=flat.device, generator=generator)
        probe = (2 * signs - 1).to(flat.dtype)
        product = partial(pairing(step, probe), flat)
        total = total + (product.to(total.dtype) ** 2).sum()
    return total / (num_probes * flat.numel())


def pairing(step: Callable[[Tensor], Tensor], probe: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> <probe, step(x)>, (B,): its gradient is the transposed Jacobian times probe."""
    return lambda x: (step(x) * probe).sum(-1)


def flat_map(
    g: Callable[..., Any], x: Any, z: tuple[Any, ...]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """x as (B, D), and the map (B, D) -> (B, D) that g is on it."""
    layout = layout_of(x)

    def step(flat: Tensor) -> Tensor:
        gx = g(layout.unflatten(flat), *z)
        layout.require_like(gx, layout.batch)
        return layout.flatten(gx)

    return layout.flatten(x), step
