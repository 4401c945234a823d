"""Powers of two that bring right-hand sides to about 1, so that a loss scale changes no digit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fpi_cuda import _extension
from fpi_cuda.norms import row_norm
from fpi_cuda.solution import SolveResult

if _extension.module_error is None or TYPE_CHECKING:
    from fpi_cuda._C import row_sizes
else:
    row_sizes = None

Apply = Callable[[Tensor], Tensor]

LEAST_SPARE = 16
"""Bits without which every row is scaled: those of float16 never suffice."""

ROUNDINGS = 16.0
"""Of a product with the Jacobian: what its rows may be off by."""


MOST_NUMBERS = 1 << 14
"""That one look at them all is faster than several operations of torch."""


Sizes = tuple[tuple[float, float], Tensor]


def sizes_of(b: Tensor, rtol: float | Tensor) -> Sizes | None:
    """Of few rows b (B, D): the least and largest of their largest numbers, and rtol ||b|| (B,).

    None where torch has to tell.
    """
    few = 0 < b.numel() <= MOST_NUMBERS and b.dtype == torch.float32 and b.is_cpu
    if row_sizes is None or not few or isinstance(rtol, Tensor) or not b.is_contiguous():
        return None
    atol = torch.empty(len(b), dtype=torch.float64)
    return row_sizes(b.data_ptr(), len(b), b.shape[1], rtol, atol.data_ptr()), atol


def factor_of(
    b: Tensor,
    arithmetic: torch.dtype,
    coupled: bool | None,
    span: tuple[float, float] | None = None,
) -> Tensor | None:
    """(B, 1) powers of two to divide b (B, D) by, in its dtype; None: all rows are about 1.

    A row that is much smaller than another one would vanish in float16 under a common factor.
    Where g couples the rows, factors of their own would make another system of it.

    Args:
        b: rows that are zero or not finite get any factor.
        arithmetic: the narrowest dtype that g is evaluated in.
        coupled: rows are known to depend on one another, or not to; None: unknown, and rows get
            factors of their own only where a common one would cost them digits.
        span: what sizes_of gives.
    """
    if b.numel() == 0:
        return b.new_ones(len(b), 1)
    # How much smaller than 1 numbers may be, as an exponent, for products to keep their digits.
    spare = int(-math.log2(torch.finfo(arithmetic).tiny)) // 2 - 3
    if span is None or spare // 2 < LEAST_SPARE:
        largest = b.abs().amax(1, keepdim=True)
    if spare // 2 >= LEAST_SPARE:
        low, high = largest.aminmax() if span is None else span
        if 2.0 ** -(spare // 2) <= float(low) and float(high) <= 2.0 ** (spare // 2):
            return None
        largest = b.abs().amax(1, keepdim=True)
    largest = largest.nan_to_num(0.0, 0.0, 0.0).double()
    exponent = torch.frexp(largest).exponent
    highest = int(math.log2(torch.finfo(b.dtype).max)) - 2
    lowest = -highest
    if b.dtype == torch.float16:
        # Down to the subnormals: no mode flushes them, and their range is needed.
        lowest, highest = -24, 15
    if coupled is not False and len(b) > 1:
        empty = largest == 0
        common = exponent.masked_fill(empty, lowest).amax()
        exponent = torch.where(empty, common, exponent)
        if coupled or int(common - exponent.amin()) <= spare:
            exponent = common.expand_as(exponent)
    factor = torch.ldexp(torch.ones_like(largest), exponent.clamp(lowest, highest))
    return factor.to(b.dtype)


def is_solved_jointly(
    apply: Apply, b: Tensor, factor: Tensor, result: SolveResult, arithmetic: torch.dtype
) -> bool:
    """Whether y = M y + b has the solution of the rows that were scaled one by one.

    It has not where M couples them. Whether it does shows under a common factor, at the price of
    one product.

    Args:
        result: y and its residual, divided by `factor`.
    """
    common = factor.amax()
    ratio = factor.double() / common.double()
    y = (result.x * ratio).to(b.dtype)
    terms = [apply(y), (b / common).to(b.dtype), y]
    product, right, _ = terms
    gap = row_norm(product.double() + right.double() - y.double())
    # What rounding may add to the sum, underflow included.
    kind = torch.finfo(arithmetic)
    underflow = kind.tiny * kind.eps * math.sqrt(b.shape[1])
    noise = ROUNDINGS * (kind.eps * sum(map(row_norm, terms)) + underflow)
    return not bool((gap > 1.5 * result.residual * ratio[:, 0] + noise).any())
