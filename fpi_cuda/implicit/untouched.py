"""Evaluations of g that write over what they read, noticed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.tensor_version import version_of


class Untouched:
    """Raises where an evaluation inside changes the tensors that it reads in place.

    Args:
        name: of what is read.
        read: a tensor, or a tuple or list of them; other values are not looked into.
        compare: with a copy, where a tensor counts no versions (inference mode).
    Raises:
        ValueError: one was changed.
    """

    __slots__ = ("_compare", "_copies", "_name", "_parts", "_versions")

    def __init__(self, name: str, read: Any, *, compare: bool) -> None:
        self._name = name
        self._compare = compare
        self._parts = [t for t in parts_of(read) if isinstance(t, Tensor)]

    def __enter__(self) -> None:
        self._versions = [version_of(t) for t in self._parts]
        self._copies: list[tuple[int, Tensor]] = []
        if self._compare:
            for i, t in enumerate(self._parts):
                if t.is_inference() and t.layout == torch.strided:
                    self._copies.append((i, t.clone()))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        changed = [i for i, t in enumerate(self._parts) if version_of(t) != self._versions[i]] + [
            i for i, copied in self._copies if not same_numbers(self._parts[i], copied)
        ]
        if changed:
            raise ValueError(
                f"fixed_point: g must not change {self._name} in place, tensor {min(changed)} of "
                "it was changed. Use out-of-place operations on it"
            )


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether the same bits lie in both, NaN included, whatever transforms they are wrapped for."""
    a, b = transforms.numbers(a), transforms.numbers(b)
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def parts_of(read: Any) -> Sequence[Any]:
    """What g reads, one by one."""
    return read if isinstance(read, (tuple, list)) else (read,)
