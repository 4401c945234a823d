"""Whether prepare and step may stand for g, where that takes an evaluation to tell."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fpi_cuda import transforms
from fpi_cuda.capturing import being_captured
from fpi_cuda.faithful import rehearsal
from fpi_cuda.implicit.untouched import Untouched, version_of
from fpi_cuda.shortcuts import is_composition, why_not_hoisted
from fpi_cuda.state import Layout

# Two ways of computing the same differ by rounding, by so many units of the largest in a sample.
MOST_UNITS = 1e3
UNTOLD = "whether step(x, prepare(*z)) is g(x, *z) cannot be told in this call"

_verdicts: weakref.WeakKeyDictionary[Any, tuple[Any, str | None]] = weakref.WeakKeyDictionary()
"""By g: what it was compared for, and why it is called whole."""


def why_whole(g: Any, layout: Layout, z: tuple[Any, ...]) -> str | None:
    """Why g(x, *z) has to be called whole, or None where step(x, prepare(*z)) is the same.

    A class that defines its call beside prepare and step claims that they agree. That is
    compared: once for each shape, and again where parameters have changed.
    """
    reason = why_not_hoisted(g)
    if reason is not None or is_composition(g):
        return reason
    asked = what_it_depends_on(g, layout, z)
    known = verdict_on(g)
    if known is not None and known[0] == asked:
        return known[1]
    if transforms.active() or being_captured(layout.device) or layout.batch == 0:
        return UNTOLD
    reason = compared(g, layout, z)
    with contextlib.suppress(TypeError):  # of what cannot be remembered, it is asked again
        _verdicts[g] = (asked, reason)
    return reason


def why_whole_last(g: Any) -> str | None:
    """The same as far as it is known without inputs: from the class, and the latest solve."""
    reason = why_not_hoisted(g)
    if reason is not None or is_composition(g):
        return reason
    known = verdict_on(g)
    return None if known is None else known[1]


def verdict_on(g: Any) -> tuple[Any, str | None] | None:
    """What g was compared for last, and why it is called whole; None before that."""
    try:
        return _verdicts.get(g)
    except TypeError:
        return None


def what_it_depends_on(g: Any, layout: Layout, z: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a comparison has to be made for anew."""
    shapes = tuple((t.shape, t.dtype) if isinstance(t, Tensor) else type(t) for t in z)
    autocast = torch.is_autocast_enabled(layout.device.type)
    kind: Any = type(g)
    call = kind.forward if isinstance(g, nn.Module) else kind.__call__
    about = (layout, shapes, autocast, *map(weakly, (call, g.step, g.prepare)))
    if not isinstance(g, nn.Module):
        return about
    return (
        *about,
        getattr(g, "training", None),
        tuple((id(p), version_of(p)) for p in g.parameters()),
    )


def weakly(function: Any) -> Hashable:
    """A function or method to be compared by, which is not kept alive by that."""
    function = getattr(function, "__func__", function)
    try:
        return weakref.ref(function)
    except TypeError:  # written in C, and there for ever
        return id(function)


def compared(g: Any, layout: Layout, z: tuple[Any, ...]) -> str | None:
    """Why g(x, *z) is not step(x, prepare(*z)), compared at one x; None where it is."""
    # Zeros would hide what is multiplied with x.
    grid = torch.arange(1, layout.batch * layout.dim + 1, dtype=torch.float64).sin()
    x = grid.to(device=layout.device, dtype=layout.dtype).reshape(layout.batch, layout.dim)
    found: list[Any] = []

    def evaluate() -> str | None:
        for name, way in (
            ("g(x, *z)", lambda: g(layout.unflatten(x.clone()), *z)),
            ("step(x, prepare(*z))", lambda: g.step(layout.unflatten(x.clone()), g.prepare(*z))),
        ):
            try:
                with rehearsal(layout.device):
                    found.append(way())
            except Exception as error:
                return f"{name} raised {type(error).__name__} where the two were compared"
        return None

    with torch.no_grad(), buffers_kept(g):
        with Untouched("z", z, compare=True):
            reason = evaluate()
        if reason is not None:
            return reason
        return None if same(*found) else "step(x, prepare(*z)) is not what g(x, *z) is"


def same(whole: Any, parts: Any) -> bool:
    """Whether two states are the same up to rounding, and finite somewhere."""
    ours, theirs = pytree.tree_leaves(whole), pytree.tree_leaves(parts)
    if len(ours) != len(theirs):
        return False
    finite = False
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return False
        if a.dtype != b.dtype or a.dim() == 0:
            return False
        units = MOST_UNITS * torch.finfo(a.dtype).eps
        a, b = a.double().flatten(1), b.double().flatten(1)
        known = a.isfinite()
        if not bool((known == b.isfinite()).all()):
            return False
        size = a.abs().masked_fill(~known, 0.0).amax(1, keepdim=True)
        if bool(((a - b).abs() > units * size)[known].any()):
            return False
        finite = finite or bool(known.any())
    return finite


@contextlib.contextmanager
def buffers_kept(g: Any) -> Iterator[None]:
    """Undo what evaluations that do not count change in buffers, such as running statistics."""
    kept = [(b, b.clone()) for b in g.buffers()] if isinstance(g, nn.Module) else []
    try:
        yield
    finally:
        for buffer, before in kept:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
