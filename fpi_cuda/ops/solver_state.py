"""Names of the columns of `control`: what the rules remember about one sample between steps.

The order is that of `Control` in csrc/common/control.h, where each is explained. The tensor is
float64; the counters lie two to a number behind the norms, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = (
    "scale0",
    "first",
    "best",
    "previous",
    "gain_residual",
    "peak",
    "peak_norm",
    "anchored",
)
COUNTERS = (
    "best_relative",
    "floor",
    "gain_step",
    "growth_step",
    "since_best",
    "patience",
    "picard_length",
    "picard_left",
    "mixing_scale",
    "rejections",
    "columns",
    "head",
    "has_previous",
    "unused",
)
CONTROL_FIELDS = NORMS + COUNTERS
CONTROL_SIZE = len(NORMS) + len(COUNTERS) // 2


def column(control: Tensor, name: str) -> Tensor:
    """(B,) a view of one column of `control` (B, CONTROL_SIZE), in the dtype it is kept in."""
    if name in NORMS:
        return control[:, NORMS.index(name)]
    return control.view(torch.float32)[:, counter_at(name)]


def counter_at(name: str) -> int:
    """Which float32 of a sample's row a counter is."""
    return 2 * len(NORMS) + COUNTERS.index(name)
