"""What the Jacobian of g at x says about the solve: will it contract, and can it be made to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.evaluation.state import layout_of
from fpi_cuda.linear_solvers import orthogonalized, working_dtype
from fpi_cuda.norms import row_norm
from fpi_cuda.options import require_count
from fpi_cuda.partial import partial

CERTAIN = 1e-2
"""Error, relative to the radius, below which an estimate is taken for what it is."""

ROUNDING = 1e-15
"""Of the radius and of the number of eigenvalues: by what those of one matrix may differ."""

MARGIN = 10.0
"""What both ways of asking may be short of: the first knows small changes, the second one only."""


def spectral_radius(
    g: Callable[..., Any],
    x: Any,
    *z: Any,
    num_steps: int = 64,
    exact_up_to: int = 256,
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    """The spectral radius of the Jacobian dg/dx of every sample, complex eigenvalues included.

    Below 1 at a fixed point, Picard iteration converges near it, by that factor a step.

    Where x has at most num_steps elements per sample, the Jacobian is formed and the answer is
    exact, but for matrices so far from normal that rounding moves their eigenvalues: the error is
    then what it was seen to move them by. Elsewhere it is the largest Ritz value of num_steps
    Arnoldi steps, if that is certain to 1%; if not, the Jacobian is formed for x of up to
    exact_up_to elements. For larger ones it is the Ritz value all the same: low by a few percent
    where very many eigenvalues lie on one circle, and far too high where the Jacobian is far from
    normal (bidiagonal: 0.9 where 0 is true), for num_steps products cannot tell it from one whose
    powers do not decay. Its error says so.

    Args:
        g: map g(x, *z) -> like x; sample i of the result must depend on sample i of x alone.
        x: tensor (B, ...) or a tuple of them: the point, usually a fixed point.
        z: inputs of g.
        num_steps: vector-Jacobian products spent at first, at least 1. Memory is num_steps + 4
            times x.
        exact_up_to: elements D of a sample up to which D more products are spent, and an
            eigenvalue problem of that size is solved, for each sample that is not certain.
        with_error: return the error too.
        generator: of the starting vectors; None uses torch's default.
    Returns:
        (B,) in the dtype of x, at least float32; without a graph. NaN where g is not finite. With
        with_error=True a pair of that and of (B,) estimated absolute errors: 0 where the answer
        is exact, as large as the radius where nothing is known of it.
    Raises:
        TypeError, ValueError: x is not a state, g(x) is not like x or does not depend on x,
            num_steps below 1, exact_up_to below 0.
    Source:
        Saad, Numerical Methods for Large Eigenvalue Problems, 2nd ed., section 6.2 (Arnoldi) and
        3.2 (residuals and condition numbers).
    """
    require_count("spectral_radius", "num_steps", num_steps, 1)
    require_count("spectral_radius", "exact_up_to", exact_up_to, 0)
    flat, step = bound_map(g, x, z)
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

    dim, dtype = flat.shape[1], working_dtype(flat.dtype)
    with torch.no_grad():
        every = torch.ones(flat.shape[0], dtype=torch.bool, device=flat.device)
        if dim <= num_steps:
            radius, error = largest_of_whole(transposed, flat, every)
        else:
            hessenberg = compressed(transposed, flat, num_steps, generator)
            radius, error = largest_ritz(hessenberg, torch.finfo(dtype).eps)
            uncertain = error > CERTAIN * radius
            if dim <= exact_up_to and bool(uncertain.any()):
                radius[uncertain], error[uncertain] = largest_of_whole(transposed, flat, uncertain)
        radius, error = radius.to(dtype), error.to(dtype)
        return (radius, error) if with_error else radius


def largest_of_whole(
    transposed: Callable[[Tensor], Tensor], flat: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """The radius of the wanted (B,) samples from their whole Jacobians, and its error.

    A matrix and its transpose have the same eigenvalues, and rounding moves those of a matrix far
    from normal outwards, each time by another way.
    """
    dim, rows = flat.shape[1], torch.nonzero(wanted)[:, 0]
    matrix = torch.empty(len(rows), dim, dim, dtype=torch.float64, device=flat.device)
    for column in range(dim):
        unit = torch.zeros_like(flat)
        unit[:, column] = 1
        matrix[:, :, column] = transposed(unit)[rows]
    matrix, finite = without_nonfinite(matrix)
    radius = error = torch.zeros_like(finite, dtype=torch.float64)
    if dim:
        both = torch.stack([matrix, matrix.mT.contiguous()])
        radius, other = torch.linalg.eigvals(both).abs().amax(2).sort(0).values
        error = other - radius
        error = torch.where(error <= dim * ROUNDING * radius, 0.0, error)
    return torch.where(finite, radius, torch.nan), torch.where(finite, error, torch.nan)


def largest_ritz(hessenberg: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The largest Ritz value of (B, m + 1, m) Hessenberg matrices, and how far off it may be.

    A Ritz value is an eigenvalue of a matrix as far away as its residual. How far that moves an
    eigenvalue is asked twice: by its condition number, and by the largest eigenvalue of a matrix
    so far away, for a condition number knows of small changes only, which those of a Jordan block
    are not. Rounding moves it by no more than Bauer and Fike say. Where the answer is not small it
    says nothing, for the Ritz value has not settled: the radius is between 0 and the norm.
    """
    hessenberg, finite = without_nonfinite(hessenberg)
    square = hessenberg[:, :-1]
    size = square.shape[1]
    values, vectors = torch.linalg.eig(square)
    top = values.abs().argmax(1)
    each = torch.arange(len(top), device=top.device)
    radius, vector = values[each, top].abs(), vectors[each, :, top]
    unit = torch.zeros_like(vector).index_put_((each, top), torch.ones_like(vector[:, 0]))
    condition = torch.linalg.solve_ex(vectors.mT, unit[..., None])[0].squeeze(-1).norm(dim=1)
    norm = torch.linalg.matrix_norm(hessenberg, 2)
    residual = hessenberg[:, -1, -1] * vector[:, -1].abs() + size * eps * norm
    away = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(square)
    away = residual[:, None, None] * away / torch.linalg.matrix_norm(away, 2)
    moved = (torch.linalg.eigvals(square + away).abs().amax(1) - radius).abs()
    by_rounding = size * torch.finfo(square.dtype).eps * norm * torch.linalg.cond(vectors)
    error = MARGIN * torch.maximum(residual * condition, moved) + by_rounding
    error = error.nan_to_num(torch.inf)
    error = torch.where(error <= CERTAIN * radius, error, torch.maximum(radius, norm - radius))
    return torch.where(finite, radius, torch.nan), torch.where(finite, error, torch.nan)


def without_nonfinite(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices (B, ...), zero where one holds NaN or Inf, and (B,) bool which do not."""
    finite = torch.isfinite(matrix).flatten(1).all(1)
    return torch.where(finite[:, None, None], matrix, 0), finite


def compressed(
    transposed: Callable[[Tensor], Tensor],
    flat: Tensor,
    size: int,
    generator: torch.Generator | None,
) -> Tensor:
    """(B, size + 1, size) float64: each transposed Jacobian on its own Krylov space."""
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
        w, along = orthogonalized(w, basis[:, : j + 1])
        height = row_norm(w)
        # NaN passes through, so that the sample is known by it in the end.
        going = ~(height <= tiny * w_norm)
        hessenberg[:, : j + 1, j] = along
        hessenberg[:, j + 1, j] = torch.where(going, height, 0.0)
        if j + 1 < size:
            unit = w / torch.where(going, height, 1.0)[:, None].to(dtype)
            basis[:, j + 1] = torch.where(going[:, None], unit, 0)
    return hessenberg


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
    flat, step = bound_map(g, x, z)
    if flat.numel() == 0:
        raise ValueError(f"jacobian_penalty: x is empty, got {tuple(flat.shape)} when flat")
    total = torch.zeros((), dtype=working_dtype(flat.dtype), device=flat.device)
    for _ in range(num_probes):
        signs = torch.randint(0, 2, flat.shape, device=flat.device, generator=generator)
        product = partial(pairing(step, (2 * signs - 1).to(flat.dtype)), flat)
        total = total + (product.to(total.dtype) ** 2).sum()
    return total / (num_probes * flat.numel())


def pairing(step: Callable[[Tensor], Tensor], probe: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> <probe, step(x)>, (B,): its gradient is the transposed Jacobian times probe."""
    return lambda x: (step(x) * probe).sum(-1)


def bound_map(
    g: Callable[..., Any], x: Any, z: tuple[Any, ...]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """x as (B, D), and the map (B, D) -> (B, D) that g is on it."""
    layout = layout_of(x)

    def step(flat: Tensor) -> Tensor:
        gx = g(layout.unflatten(flat), *z)
        layout.require_like(gx, layout.batch)
        return layout.flatten(gx)

    return layout.flatten(x), step
