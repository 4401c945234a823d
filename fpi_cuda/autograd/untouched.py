"""Evaluations of g that write over what they read, noticed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.tensor_version import counted_version


class Untouched:
    """The tensors that evaluations read, and must not change in place.

    Args:
        name: of what is read.
        read: a tensor, or a tuple or list of them; other values are not looked into.
    Attributes:
        read: as given; nothing that anybody has, for a list, whose tensors may be exchanged.
        counted: the tensors that count how often they are changed.
        uncounted: those that do not (inference mode): only a comparison with a copy tells.
    """

    __slots__ = ("_name", "_tensors", "counted", "read", "uncounted")

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

    def versions(self) -> list[int]:
        """How often each of `counted` was changed."""
        return [*map(counted_version, self.counted)]

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Dense ones of `uncounted`, each with a copy."""
        if not self.uncounted:
            return []
        return [(t, t.clone()) for t in self.uncounted if t.layout == torch.strided]

    def require(self, versions: list[int], copies: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Raise unless all are what they were when versions and copies were taken.

        Raises:
            ValueError: one was changed.
        """
        if not copies and self.versions() == versions:
            return
        changed = [
            t for t, v in zip(self.counted, versions, strict=True) if counted_version(t) != v
        ] + [t for t, copied in copies if not same_numbers(t, copied)]
        if changed:
            places = [i for i, t in enumerate(self._tensors) if any(t is c for c in changed)]
            raise ValueError(
                f"fixed_point: g must not change {self._name} in place, tensor {places[0]} of it "
                "was changed. Use out-of-place operations on it"
            )


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether the same bits lie in both, NaN included, whatever transforms they are wrapped for."""
    a, b = transforms.numbers(a), transforms.numbers(b)
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def parts_of(read: Any) -> Sequence[Any]:
    """What g reads, one by one."""
    return read if isinstance(read, (tuple, list)) else (read,)
