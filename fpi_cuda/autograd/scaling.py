"""Powers of two that bring right-hand sides to about 1, so that a loss scale changes no digit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fpi_cuda.result import SolveResult
from fpi_cuda.row_norm import row_norm

Apply = Callable[[Tensor], Tensor]

LEAST_SPARE = 16
"""Bits without which every row is scaled: those of float16 never suffice."""

ROUNDINGS = 16.0
"""Of a product with the Jacobian: what its rows may be off by."""


class Scale(NamedTuple):
    """What to divide b by.

    Attributes:
        factor: (B, 1) powers of two, in the dtype of b; None for ones.
        differs: 0-dim bool, rows have factors of their own though g may couple them; None: no.
    """

    factor: Tensor | None
    differs: Tensor | None


@dataclass(frozen=True)
class Scaling:
    """How the rows of a right-hand side are scaled.

    A row that is much smaller than another one would vanish in float16 under a common factor.
    Where g couples the rows, factors of their own would make another system of it.

    Attributes:
        coupled: rows are known to depend on one another, or not to; None: unknown, and rows get
            factors of their own only where a common one would cost them digits.
        arithmetic: the narrowest dtype that g is evaluated in; None: that of b.
    """

    coupled: bool | None = None
    arithmetic: torch.dtype | None = None

    def of(self, b: Tensor) -> Scale:
        """The scale of b (B, D); rows that are zero or not finite get any."""
        if b.numel() == 0 or self._is_moderate(b):
            return Scale(None, None)
        exponent, empty = exponents(b)
        if self.coupled is False or len(b) == 1:
            return Scale(powers(exponent, b.dtype), None)
        joint = largest_of(exponent, empty, b.dtype)
        if self.coupled:
            return Scale(powers(joint, b.dtype), None)
        exponent = torch.where(empty, joint, exponent)
        differs = (joint - exponent).amax() > bits_to_spare(self.arithmetic or b.dtype)
        return Scale(powers(torch.where(differs, exponent, joint), b.dtype), differs)

    def _is_moderate(self, b: Tensor) -> bool:
        """Whether no row is so large or small that a power of two would save it a digit."""
        spare = bits_to_spare(self.arithmetic or b.dtype) // 2
        if spare < LEAST_SPARE:
            return False
        low, high = b.abs().amax(1).aminmax()
        return 2.0**-spare <= float(low) and float(high) <= 2.0**spare

    def joint(self) -> Scaling:
        """One factor for all rows."""
        return Scaling(True, self.arithmetic)

    def holds(self, apply: Apply, b: Tensor, scale: Scale, result: SolveResult) -> bool:
        """Whether y = M y + b has the solution of the rows that were scaled one by one.

        It has not where M couples them. Whether it does shows under a common factor, at the
        price of one product.

        Args:
            result: y and its residual, in units of `scale`.
        """
        assert scale.factor is not None
        common = scale.factor.amax()
        ratio = scale.factor.double() / common.double()
        y = (result.x * ratio).to(b.dtype)
        right = (b / common).to(b.dtype)
        product = apply(y)
        gap = row_norm(product.double() + right.double() - y.double())
        noise = self._noise(y, right, product)
        return not bool((gap > 1.5 * result.residual * ratio[:, 0] + noise).any())

    def _noise(self, *terms: Tensor) -> Tensor:
        """(B,) what rounding may add to a sum of `terms` (B, D), underflow included."""
        kind = torch.finfo(self.arithmetic or terms[0].dtype)
        size = torch.stack([row_norm(t) for t in terms]).sum(0)
        smallest = kind.tiny * kind.eps
        return ROUNDINGS * (kind.eps * size + smallest * math.sqrt(terms[0].shape[1]))


def exponents(b: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) int32, the binary exponent of the largest |b| of each row; and rows without one."""
    largest = b.abs().amax(1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
    return torch.frexp(largest.double()).exponent, largest == 0


def common_factor(b: Tensor) -> Tensor:
    """(B, 1) one power of two for all rows of b."""
    return powers(largest_of(*exponents(b), b.dtype), b.dtype)


def largest_of(exponent: Tensor, empty: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1) the largest exponent of all rows that have one."""
    lowest, _ = exponent_range(dtype)
    return exponent.masked_fill(empty, lowest).amax().expand_as(exponent)


def powers(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2 to the exponent, as far as the dtype has it."""
    one = torch.ones_like(exponent, dtype=torch.float64)
    return torch.ldexp(one, exponent.clamp(*exponent_range(dtype))).to(dtype)


def exponent_range(dtype: torch.dtype) -> tuple[int, int]:
    """The least and the largest exponent to scale by."""
    if dtype == torch.float16:
        # Down to the subnormals: no mode flushes them, and their range is needed.
        return -24, 15
    most = int(math.log2(torch.finfo(dtype).max)) - 2
    return -most, most


def bits_to_spare(dtype: torch.dtype) -> int:
    """How much smaller than 1 numbers may be, as an exponent, for products to keep their digits."""
    return int(-math.log2(torch.finfo(dtype).tiny)) // 2 - 3
