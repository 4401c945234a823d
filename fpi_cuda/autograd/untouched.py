"""Evaluations of g that write over what they read, noticed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.tensor_version import counted_version

Copies = Sequence[tuple[Tensor, Tensor]]
"""Tensors, each with a copy."""


class Untouched:
    """The tensors that evaluations read, and must not change in place.

    Args:
        name: of what is read.
        read: a tensor, or a tuple or list of them; other values are not looked into.
    Attributes:
        read: as given; nothing that anybody has, for a list, whose tensors may be exchanged.
        counted: the tensors that count how often they are changed.
        uncounted: those that do not (inference mode): only a comparison with a copy tells.
        to_copy: in how many evaluations that is done: from x = 0 the first may change nothing.
    """

    __slots__ = ("_name", "_tensors", "counted", "read", "to_copy", "uncounted")

    def __init__(self, name: str, read: Any) -> None:
        self._name = name
        self.read = object() if isinstance(read, list) else read
        self._tensors: list[Tensor] = []
        self.counted: list[Tensor] = []
        self.uncounted: list[Tensor] = []
        for t in parts_of(read):
            if isinstance(t, Tensor):
                self._tensors.append(t)
                (self.uncounted if t.is_inference() else self.counted).append(t)
        self.to_copy = 2 if self.uncounted else 0

    def copies(self) -> Copies:
        """Dense ones of `uncounted`, for one evaluation."""
        if not self.to_copy:
            return []
        self.to_copy -= 1
        return [(t, t.clone()) for t in self.uncounted if t.layout == torch.strided]

    def require(self, versions: list[int], copies: Copies = ()) -> None:
        """Raise unless all are what they were when copies, and versions of `counted`, were taken.

        Raises:
            ValueError: one was changed.
        """
        if not copies and [*map(counted_version, self.counted)] == versions:
            return
        changed = [
            t for t, v in zip(self.counted, versions, strict=False) if counted_version(t) != v
        ]
        changed += [t for t, copied in copies if not same_numbers(t, copied)]
        for place, t in enumerate(self._tensors):
            if any(t is other for other in changed):
                raise ValueError(
                    f"fixed_point: g must not change {self._name} in place, tensor {place} of it "
                    "was changed. Use out-of-place operations on it"
                )


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether the same bits lie in both, NaN included, whatever transforms they are wrapped for."""
    a, b = transforms.numbers(a), transforms.numbers(b)
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def parts_of(read: Any) -> Sequence[Any]:
    """What g reads, one by one."""
    return read if isinstance(read, (tuple, list)) else (read,)
