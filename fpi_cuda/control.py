"""Names of the columns of `control`: what the rules remember about one sample between steps.

The order is that of `Control` in csrc/common/control.h, where each is explained.
"""

from __future__ import annotations

CONTROL_FIELDS = (
    "scale0",
    "first",
    "best",
    "previous",
    "gain_residual",
    "gain_step",
    "since_best",
    "patience",
    "picard_length",
    "picard_left",
    "mixing_scale",
    "rejections",
    "growths",
    "columns",
    "head",
    "has_previous",
    "anchored",
)
CONTROL_SIZE = len(CONTROL_FIELDS)
