"""Whether somebody has written to a tensor."""

from __future__ import annotations

from torch import Tensor


def version_of(t: Tensor) -> int:
    """How often t was changed in place; 0 for inference tensors, which do not count it."""
    return 0 if t.is_inference() else t._version
