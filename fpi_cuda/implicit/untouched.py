"""Evaluations of g that write over what they read, noticed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fpi_cuda import transforms


@contextlib.contextmanager
def untouched(name: str, read: Any, *, compare: bool) -> Iterator[None]:
    """Raise where an evaluation changes the tensors that it reads in place.

    Args:
        name: of what is read.
        read: a tensor, or a tuple or list of them; other values are not looked into.
        compare: with a copy, where a tensor counts no versions (inference mode).
    Raises:
        ValueError: one was changed.
    """
    parts = [t for t in parts_of(read) if isinstance(t, Tensor)]
    versions = [version_of(t) for t in parts]
    uncounted = [compare and t.is_inference() and t.layout == torch.strided for t in parts]
    copies = [t.clone() if copied else None for t, copied in zip(parts, uncounted, strict=True)]
    yield
    for i, (t, version, copied) in enumerate(zip(parts, versions, copies, strict=True)):
        if version != version_of(t) or (copied is not None and not same_numbers(t, copied)):
            raise ValueError(
                f"fixed_point: g must not change {name} in place, tensor {i} of it was changed. "
                "Use out-of-place operations on it"
            )


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether the same bits lie in both, NaN included, whatever transforms they are wrapped for."""
    a, b = transforms.numbers(a), transforms.numbers(b)
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def version_of(t: Tensor) -> int:
    """How often t was changed in place; 0 for inference tensors, which do not count it."""
    return 0 if t.is_inference() else t._version


def parts_of(read: Any) -> Sequence[Any]:
    """What g reads, one by one."""
    return read if isinstance(read, (tuple, list)) else (read,)
