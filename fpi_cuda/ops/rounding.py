"""Products of a fused loop with their operands rounded as tensor cores want them."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.options import PRECISIONS


def product(h: Tensor, weight: Tensor, precision: int) -> Tensor:
    """h @ weight with operands rounded as PRECISIONS[precision] has it."""
    name = PRECISIONS[precision]
    if name == "ieee":
        return h @ weight
    if name == "bf16":
        return round_bf16(h) @ round_bf16(weight)
    (h_high, h_low), (weight_high, weight_low) = map(tf32_parts, (h, weight))
    if name == "tf32":
        return h_high @ weight_high
    return h_high @ weight_high + (h_high @ weight_low + h_low @ weight_high)


def tf32_parts(t: Tensor) -> tuple[Tensor, Tensor]:
    """t in TF32, and what that leaves of it, in TF32 too."""
    high = round_tf32(t)
    return high, round_tf32(t - high)


def round_tf32(t: Tensor) -> Tensor:
    """Float32 to 10 bits after the leading one: to nearest, ties away from zero."""
    # In int32 the sum wraps for a NaN alone.
    rounded = ((t.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(t.isnan(), t, rounded)


def round_bf16(t: Tensor) -> Tensor:
    """Float32 to 7 bits after the leading one: to nearest, ties to even."""
    return t.to(torch.bfloat16).to(torch.float32)
