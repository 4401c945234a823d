"""What the products of a fused loop are computed in, and what tolerance that can reach."""

from __future__ import annotations

import torch
from torch import Tensor

FLOORS = {"ieee": 0.0, "tf32x3": 1e-6, "tf32": 1e-3, "bf16": 1e-2}
"""The least rtol to ask for. Rounding moves g of the built-in cells by up to 2.4e-7, 2.4e-4 and
1.9e-3 of its norm, and half of the tolerance is left for that. Plain float32 needs no such rule: a
sample that cannot get there is STALLED."""

NAMES = tuple(FLOORS)
"""In the order of csrc/common/precision.h."""


def require_precision(
    owner: str, precision: object, rtol: float, atol: float, *, what: str = "rtol"
) -> None:
    """Raise unless `precision` is one of NAMES and can reach the tolerance.

    Args:
        what: the name of the option that rtol was given as.
    """
    if not isinstance(precision, str) or precision not in FLOORS:
        raise ValueError(
            f"{owner}: precision must be one of {', '.join(map(repr, NAMES))}, got {precision!r}"
        )
    floor = FLOORS[precision]
    # An absolute tolerance is in the units of x: what it amounts to shows at the end of a solve.
    if rtol < floor and atol == 0.0:
        fine = [name for name in NAMES if FLOORS[name] <= rtol]
        raise ValueError(
            f'{owner}: precision="{precision}" reaches tolerances of {floor:g} and above, got '
            f'{what}={rtol:g}. Loosen {what}, or use precision="{fine[-1]}"'
        )


def product(h: Tensor, weight: Tensor, precision: int) -> Tensor:
    """h @ weight with operands rounded as NAMES[precision] has it."""
    name = NAMES[precision]
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
