"""Whether somebody has written to a tensor."""

from __future__ import annotations

import operator

from torch import Tensor

counted_version = operator.attrgetter("_version")
"""How often a tensor was changed in place; raises for inference tensors, which do not count it."""


def version_of(t: Tensor) -> int:
    """The same, and 0 for inference tensors."""
    return 0 if t.is_inference() else counted_version(t)
