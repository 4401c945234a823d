"""The cell loop op in plain torch: the oracle of every other backend, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.activations import FUNCTIONS
from fpi_cuda.ops.reference import anderson_step_
from fpi_cuda.ops.rounding import product
from fpi_cuda.ops.solver_state import CONTROL_SIZE
from fpi_cuda.solution import Status

BY_CODE = tuple(FUNCTIONS.values())


def layer(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    factor: Tensor | None,
    activation: int,
    precision: int,
) -> Tensor:
    """factor * activation(weight h + bias + shift)."""
    u = product(h, weight.mT, precision)
    for term in (bias, shift):
        u = u if term is None else u + term
    y = BY_CODE[activation](u)
    return y if factor is None else y * factor


def cell_loop_(
    x: Tensor,
    x_factor: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    shift1: Tensor | None,
    factor1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    shift2: Tensor | None,
    factor2: Tensor | None,
    atol: Tensor,
    status: Tensor,
    num_steps: Tensor,
    residual: Tensor,
    *,
    activation1: int,
    activation2: int,
    carry: float,
    depth: int,
    rtol: float,
    max_steps: int,
    beta: float,
    ridge: float,
    precision: int,
) -> None:
    """Solve x = h2(h1(x_factor x)) + carry x for every sample, in place.

    h1 and h2 are factor * activation(weight h + bias + shift), row by row; without weight2 there
    is no h2. None stands for a term that is missing.

    Args:
        x: (B, D) where to start; overwritten with the fixed point, or the best point seen.
        x_factor: (B, D). weight1: (H, D), weight2: (D, H), with any strides; without weight2,
            H = D. bias1: (H,). shift1, factor1: (B, H). bias2: (D,). shift2, factor2: (B, D).
        atol: (B,) float64.
        status: (B,) int8. num_steps: (B,) int32. residual: (B,) float64. All overwritten.
        activation1, activation2: see fpi_cuda.activations.CODES.
        depth: of Anderson's history, 0 to 16; 0 for Picard.
        rtol, max_steps, beta, ridge: as in anderson_step_.
        precision: of the products with the weights, a place in options.PRECISIONS.
    """
    batch, dim = x.shape
    apart = batch if depth and x.dtype not in (torch.float32, torch.float64) else 0
    narrow = torch.promote_types(x.dtype, torch.float32)
    best = x.clone()
    anchor = x.new_empty((batch if depth else 0, dim))
    previous = [x.new_empty((apart, dim), dtype=narrow) for _ in range(2)]
    columns = [x.new_empty((batch, depth, dim)) for _ in range(2)]
    gram = x.new_empty((batch, depth * (depth + 1) // 2), dtype=torch.float64)
    control = x.new_zeros((batch, CONTROL_SIZE), dtype=torch.float64)
    status.zero_()
    num_steps.zero_()
    while bool((status == Status.ACTIVE).any()):
        h = x if x_factor is None else x * x_factor
        gx = layer(h, weight1, bias1, shift1, factor1, activation1, precision)
        if weight2 is not None:
            gx = layer(gx, weight2, bias2, shift2, factor2, activation2, precision)
        if carry:
            gx = gx + carry * x
        anderson_step_(
            x, gx, None, best, anchor, previous[0], previous[1], columns[0], columns[1], gram,
            control, atol, status, num_steps, residual,
            rtol=rtol, max_steps=max_steps, beta=beta, ridge=ridge,
        )  # fmt: skip
    x.copy_(best)


def cell_layer_(
    out: Tensor,
    slope: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    factor: Tensor | None,
    *,
    activation: int,
    derivative: int,
) -> None:
    """out = factor * activation(u) and slope = factor * derivative(u), u = weight h + bias + shift.

    Args:
        out, slope: (B, outputs), overwritten.
        h: (B, inputs). weight: (outputs, inputs), with any strides. bias: (outputs,).
        shift, factor: (B, outputs).
        activation, derivative: see fpi_cuda.activations.CODES.
    """
    out.copy_(layer(h, weight, bias, shift, factor, activation, 0))
    if slope is not None:
        slope.copy_(layer(h, weight, bias, shift, factor, derivative, 0))


def weight_gradient_(out: Tensor, delta: Tensor, h: Tensor) -> None:
    """out (outputs, inputs) = the sum over samples of delta (B, outputs) times h (B, inputs)."""
    torch.mm(delta.mT, h, out=out)
