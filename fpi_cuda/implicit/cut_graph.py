"""A g that moves with x, though its graph does not lead to x: dg/dx would be left out silently."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fpi_cuda import transforms
from fpi_cuda.implicit.flat_map import FlatMap
from fpi_cuda.implicit.graph import Frontier, is_leaf_node, leads_to
from fpi_cuda.unconverged import FixedPointWarning

NOISE = 8.0
"""Roundings of g that its own evaluation may differ by."""
STEP = 1024.0
"""Roundings that x is moved by, relative to its size."""
STEP_IN_16_BITS = 16.0
STEEPEST = 10.0
"""A g that moves further than this times x has jumped: what counts or compares has no slope."""
SHARE_IN_16_BITS = 0.25
"""Of the numbers of g, how many have to move where steps are so large that some will jump."""

_noticed: weakref.WeakSet[Any] = weakref.WeakSet()


def notice_cut(
    g: Any,
    evaluate: Callable[[Tensor], Tensor],
    x: Tensor,
    arithmetic: torch.dtype,
    columns: Sequence[slice] = (slice(None),),
    locate: Callable[[], str] = str,
) -> None:
    """Warn once of g that its derivative in x is lost, if g moves with x.

    A path that is cut beside one that is not cannot be told in this way.

    Args:
        evaluate: x -> g(x), plain (B, D).
        x: (B, D) where g's graph was found not to lead to x.
        columns: of x, those that it does not lead to.
        locate: the line that cuts the graph, or "".
    """
    if any(moves(evaluate, x, arithmetic, part) for part in columns) and first_of(g):
        line = locate()
        where = f" at {line}" if line else ""
        warnings.warn(
            "fixed_point: g(x) moves with x, but its graph does not lead to x, so gradients leave "
            f"dg/dx out. The graph is cut{where}: by detach(), .data, no_grad(), item(), numpy or "
            "torch.tensor() between x and what g returns. Use operations of torch on x itself, or, "
            "to leave dg/dx out on purpose, adjoint=JacobianFree()",
            FixedPointWarning,
            stacklevel=2,
        )


def notice_cut_of(flat_map: FlatMap, x: Tensor, columns: Sequence[slice] = (slice(None),)) -> None:
    """The same of a map in plain autograd."""

    def evaluate(x: Tensor) -> Tensor:
        # Autocast would cache weights without their graph.
        with torch.no_grad(), flat_map.replay.solving():
            return once(x)

    once = flat_map.damped(1, 1.0)
    notice_cut(
        flat_map.g, evaluate, x.detach(), flat_map.arithmetic, columns, lambda: line_of(once, x)
    )


def columns_unreached(flat_map: FlatMap, x: Tensor, frontier: Frontier) -> list[slice]:
    """Columns of the anchor x (B, D), by parts of the state, that a graph does not lead to."""
    if not any(t is x for t in frontier.anchors):
        return [slice(None)]
    sizes = flat_map.layout.sizes
    if len(sizes) == 1:
        return []
    # The state was made of x by one split.
    splits = {
        node: nr
        for node, nr in frontier.visited
        if type(node).__name__.startswith("SplitWithSizesBackward") and is_made_of(node, x)
    }
    if not splits:
        return []
    reached = {nr for node, nr in frontier.visited if node in splits}
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [
        slice(end - size, end)
        for place, (size, end) in enumerate(zip(sizes, ends, strict=True))
        if size and place not in reached
    ]


def is_made_of(node: Any, x: Tensor) -> bool:
    """Whether a node reads the leaf x, or a copy of it."""
    for before, _ in node.next_functions:
        if before is None:
            continue
        if is_leaf_node(before):
            return before.variable is x
        return type(before).__name__.startswith("CloneBackward") and is_made_of(before, x)
    return False


def moves(
    evaluate: Callable[[Tensor], Tensor], x: Tensor, arithmetic: torch.dtype, columns: slice
) -> bool:
    """Whether g changes with the columns of x as something that has a slope does."""
    if x.numel() == 0:
        return False
    kind = torch.finfo(arithmetic)
    share, roundings = (0.0, STEP) if kind.bits > 16 else (SHARE_IN_16_BITS, STEP_IN_16_BITS)
    part = x[:, columns].double()
    size = part.abs().amax(1, keepdim=True)
    uneven = torch.arange(1, part.numel() + 1, dtype=torch.float64, device=x.device).sin().abs()
    step = roundings * kind.eps * (part.abs() + torch.where(size > 0, size, 1.0))
    there = x.clone()
    there[:, columns] = (part + step * (0.5 + uneven.reshape(part.shape))).to(x.dtype)
    gx = evaluate(x).double()
    difference = (evaluate(there).double() - gx).nan_to_num(0.0, 0.0, 0.0)
    change = torch.linalg.vector_norm(difference)
    moved = torch.linalg.vector_norm(there.double() - x.double())
    noise = NOISE * kind.eps * torch.linalg.vector_norm(gx.nan_to_num(0.0, 0.0, 0.0))
    everywhere = (difference != 0).double().mean() >= share
    return bool((change > noise) & (change <= STEEPEST * moved) & everywhere)


def first_of(g: Any) -> bool:
    """Whether nobody has asked about this g; a function counts by its code."""
    key = getattr(g, "__func__", g)
    key = getattr(key, "__code__", key)
    try:
        known = key in _noticed
        _noticed.add(key)
    except TypeError:  # no hash, or no weak reference
        return True
    return not known


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
        looks = calls == 2 and x.requires_grad and torch.is_grad_enabled()
        if looks and not transforms.active() and not leads_to(gx, x):
            notice_cut_of(flat_map, x)
        return gx

    return evaluate
