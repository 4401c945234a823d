"""A g that moves with x, though its graph does not lead to x: dg/dx would be left out silently."""

from __future__ import annotations

import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fpi_cuda import transforms
from fpi_cuda.autograd.flat_map import FlatMap
from fpi_cuda.autograd.graft import has_tangent
from fpi_cuda.autograd.graph import Edge, edges_of, is_edge_of, leads_to
from fpi_cuda.unconverged import FixedPointWarning

NOISE = 8.0
"""Roundings of g that its own evaluation may differ by."""
LEAST_STEP = 16.0
"""Roundings that x is moved by at least, relative to its size."""
UNEVEN = 0.7
"""By what share the change of g may differ from that of a part of the step, times the parts. Where
g jumps, as what counts or compares does, it differs by all of it or more."""

MOST_LOOKS = 3
"""Looks at one g that find nothing; whoever leaves x unread on purpose does so every time."""

PASSED = ("CloneBackward", "ViewBackward")
"""Nodes between x and those that take it apart: copies, and the samples of a vmap."""

_looked: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""How often each g has been looked at; a function counts by its code."""


def notice_cut_lifted(
    flat_map: FlatMap, evaluate: Callable[[Tensor], Tensor], x: Tensor, columns: Sequence[slice]
) -> None:
    """The same of g as torch.func transforms see it."""
    _notice(flat_map, evaluate, x, columns, str)


def notice_cut(flat_map: FlatMap, x: Tensor, columns: Sequence[slice]) -> None:
    """Warn once of a g whose graph does not lead to these columns of x (B, D), if it moves with x.

    A path that is cut beside one that is not cannot be told in this way.
    """
    once = flat_map.damped(1, 1.0)
    _notice(flat_map, once, x.detach(), columns, lambda: line_of(once, x))


def notice_cut_in_step(flat_map: FlatMap, x: Tensor, gx: Tensor) -> None:
    """The same of a step gx = g(x) of several, x being made by the one before it."""
    if transforms.active() or has_tangent(x):
        if looks_left(flat_map.g, used=0):
            # A tangent does not say where it came from, nor a graph what other levels have.
            once, at = flat_map.damped(1, 1.0), x.detach()
            columns = []

            def seen(x: Tensor) -> Tensor:
                columns.extend(unreached(gx := once(x), x, flat_map.layout.sizes))
                return gx

            torch.func.vjp(seen, at)
            if columns:
                notice_cut_lifted(flat_map, once, at, columns)
    elif x.requires_grad and torch.is_grad_enabled():
        columns = unreached(gx, x, flat_map.layout.sizes)
        if columns:
            notice_cut(flat_map, x, columns)


def _notice(
    flat_map: FlatMap,
    evaluate: Callable[[Tensor], Tensor],
    x: Tensor,
    columns: Sequence[slice],
    locate: Callable[[], str],
) -> None:
    left = looks_left(flat_map.g)
    if not left:
        return
    # Autocast would cache weights without their graph.
    with torch.no_grad(), flat_map.replay.solving():
        gx = evaluate(x)
        moved = any(moves(evaluate, x, gx, flat_map, part) for part in columns)
    if moved:
        looks_left(flat_map.g, used=left)
        line = locate()
        where = f" at {line}" if line else ""
        warnings.warn(
            "fixed_point: g(x) moves with x, but its graph does not lead to x, so gradients leave "
            f"dg/dx out. The graph is cut{where}: by detach(), .data, no_grad(), item(), numpy or "
            "torch.tensor() between x and what g returns. Use operations of torch on x itself, or, "
            "to leave dg/dx out on purpose, adjoint=JacobianFree()",
            FixedPointWarning,
            stacklevel=3,
        )


def unreached(
    out: Tensor, x: Tensor, sizes: Sequence[int], edges: Iterable[Edge] | None = None
) -> list[slice]:
    """Columns of x (B, D) that the graph of `out` does not lead to.

    Args:
        sizes: of the parts of the state, columns that g is given as a tensor each.
        edges: of the graph; None: they are looked for.
    """
    if out is x:
        return []
    found = list(edges_of(out) if edges is None else edges)
    if not any(is_edge_of(edge, x) for edge in found):
        return [slice(None)]
    if len(sizes) == 1:
        return []
    starts = list(itertools.accumulate(sizes, initial=0))
    reached = set()
    for edge in found:
        node, number = edge
        if not reads(node, x):
            continue
        name = name_of(node)
        if name == "SplitWithSizesBackward":
            reached.add(number)
        elif name == "SliceBackward":
            reached |= {i for i, start in enumerate(starts) if start == node._saved_start}
        elif name not in PASSED:
            return []
    return [
        slice(start, start + size)
        for place, (start, size) in enumerate(zip(starts, sizes, strict=False))
        if size and place not in reached
    ]


def name_of(node: Any) -> str:
    """Its kind, such as MulBackward."""
    return type(node).__name__.rstrip("0123456789")


def reads(node: Any, x: Tensor) -> bool:
    """Whether a node is given x, or what is like it."""
    return any(
        before[0] is not None
        and (is_edge_of(before, x) or (name_of(before[0]) in PASSED and reads(before[0], x)))
        for before in node.next_functions
    )


def moves(
    evaluate: Callable[[Tensor], Tensor],
    x: Tensor,
    gx: Tensor,
    flat_map: FlatMap,
    columns: slice,
) -> bool:
    """Whether g changes with the columns of x as something that has a slope does.

    Each part of the state is judged in each row by its own size, and most of those that change must
    do so evenly, for some jumps happen to.

    Args:
        gx: evaluate(x).
        flat_map: what is evaluated, for its arithmetic and the parts of its state.
    """
    if x.numel() == 0:
        return False
    kind = torch.finfo(flat_map.arithmetic)
    eps, sizes = kind.eps, list(flat_map.layout.sizes)
    part = x[:, columns].double()
    size = part.abs().amax(1, keepdim=True)
    uneven = torch.arange(1, part.numel() + 1, dtype=torch.float64, device=x.device).sin().abs()
    step = max(eps**0.5, LEAST_STEP * eps) * (part.abs() + torch.where(size > 0, size, 1.0))
    step = step * (0.5 + uneven.reshape(part.shape))
    gx = gx.double()

    def change(share: float) -> Tensor:
        there = x.clone()
        there[:, columns] = (part + share * step).to(x.dtype)
        return (evaluate(there).double() - gx).nan_to_num(0.0, 0.0, 0.0)

    def norms(t: Tensor) -> Tensor:
        """(B, parts)"""
        return torch.stack([t.norm(dim=1) for t in t.split(sizes, 1)], 1)

    whole = change(1.0)
    moved = norms(whole)
    beyond = moved > NOISE * eps * norms(gx.nan_to_num(0.0, 0.0, 0.0))
    if not bool(beyond.any()):
        return False
    # In 16 bits the whole step is so large that counts of jumps grow evenly with it.
    pieces = 8 if kind.bits == 16 else 2
    even = beyond & (norms(whole - pieces * change(1 / pieces)) <= UNEVEN * moved)
    return bool(2 * even.sum() >= beyond.sum())


def looks_left(g: Any, used: int = 1) -> int:
    """How many looks at this g were left, before these were used."""
    key = getattr(g, "__func__", g)
    key = getattr(key, "__code__", key)
    try:
        looks = _looked.get(key, 0)
        _looked[key] = looks + used
    except TypeError:  # no hash, or no weak reference
        return MOST_LOOKS
    return max(0, MOST_LOOKS - looks)


def line_of(flat_map: FlatMap, x: Tensor) -> str:
    """file:line of the first operation that takes the graph off what depends on x; or ""."""
    leaf = x.detach().requires_grad_()
    finder = _CutFinder(leaf)
    with torch.enable_grad(), finder:
        flat_map(leaf)
    return finder.line


class _CutFinder(TorchFunctionMode):
    """Looks for a call that is given what depends on x and returns numbers that do not."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._x = x
        self.line = ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call, then compare what went in with what came out."""
        result = func(*args, **(kwargs or {}))
        if not self.line and is_cut(result):
            given = pytree.tree_leaves((args, kwargs))
            if any(isinstance(t, Tensor) and leads_to(t, self._x) for t in given):
                self.line = line_outside()
        return result


def is_cut(result: Any) -> bool:
    """Whether these are numbers that autograd knows nothing of."""
    leaves = pytree.tree_leaves(result)
    if any(isinstance(t, Tensor) and t.requires_grad for t in leaves):
        return False
    return any(
        t.is_floating_point() if isinstance(t, Tensor) else type(t).__name__ in ("float", "ndarray")
        for t in leaves
    )


def line_outside() -> str:
    """file:line of the caller, torch and this package left out."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "fpi_cuda"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def watching(flat_map: FlatMap) -> Callable[[Tensor, Tensor | None], Tensor]:
    """flat_map.evaluate, looked at in its second call: there x comes from the first one."""
    calls = 0

    def evaluate(x: Tensor, rows: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        gx = flat_map.evaluate(x, rows)
        if calls == 2:
            notice_cut_in_step(flat_map, x, gx)
        return gx

    return evaluate
