"""A g that moves with x, though its graph does not lead to x: dg/dx would be left out silently."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fpi_cuda.autograd.closed_over import parts_in, tensors_in
from fpi_cuda.autograd.graph import Edge, edges_of, is_edge_of, leads_to
from fpi_cuda.autograd.one_matrix import waves
from fpi_cuda.autograd.reattach import has_tangent
from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.bound_map import BoundMap
from fpi_cuda.evaluation.context import Habit, habit_of
from fpi_cuda.unconverged import FixedPointWarning, call_site

NOISE = 8.0
"""Roundings of g that its own evaluation may differ by."""
LEAST_STEP = 16.0
"""Roundings that x is moved by at least, relative to its size."""
UNEVEN = 0.7
"""By what share the change of g may differ from that of a part of the step, times the parts. Where
g jumps, as what counts or compares does, it differs by all of it or more."""

MOST_LOOKS = 3
"""Looks at one g that find nothing; whoever leaves x unread on purpose does so every time."""

SPLIT = "SplitWithSizesBackward"
PASSED = ("CloneBackward", "ViewBackward")
"""Nodes that take x apart, and those before it: copies, and the samples of a vmap."""


def notice_cut(
    bound_map: BoundMap,
    x: Tensor,
    columns: Sequence[slice],
    evaluate: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Warn once of a g whose graph does not lead to these columns of x (B, D), if it moves with x.

    A path that is cut beside one that is not cannot be told in this way.

    Args:
        evaluate: g, where it is not bound_map that evaluates it.
    """
    habit = looks_at(bound_map.g)
    if x.numel() == 0 or habit.looks >= MOST_LOOKS:
        return
    habit.looks += 1
    evaluate, x = evaluate or bound_map.damped(1, 1.0), x.detach()
    # Autocast would cache weights without their graph.
    with torch.no_grad(), bound_map.context.solving():
        gx = evaluate(x)
        if not any(moves(evaluate, x, gx, bound_map, part) for part in columns):
            return
    habit.looks = MOST_LOOKS
    line = "" if transforms.active() else line_of(evaluate, x)
    warnings.warn(
        "fixed_point: g(x) moves with x, but its graph does not lead to x, so gradients leave "
        f"dg/dx out. The graph is cut{line}: by detach(), .data, no_grad(), item(), numpy or "
        "torch.tensor() between x and what g returns. Use operations of torch on x itself, or, "
        "to leave dg/dx out on purpose, adjoint=JacobianFree()",
        FixedPointWarning,
        stacklevel=2,
    )


def notice_cut_in_step(bound_map: BoundMap, x: Tensor, gx: Tensor) -> None:
    """The same of a step gx = g(x) of several, x being made by the one before it."""
    sizes, columns = bound_map.layout.sizes, []
    if not (transforms.active() or has_tangent(x)):
        if x.requires_grad and torch.is_grad_enabled():
            columns = unreached(gx, x, sizes)
    elif looks_at(bound_map.g).looks < MOST_LOOKS:
        # A tangent does not say where it came from, nor a graph what other levels have.
        once = bound_map.damped(1, 1.0)

        def seen(x: Tensor) -> Tensor:
            columns.extend(unreached(gx := once(x), x, sizes))
            return gx

        torch.func.vjp(seen, x.detach())
    if columns:
        notice_cut(bound_map, x, columns)


def watching(bound_map: BoundMap) -> Callable[[Tensor, Tensor | None], Tensor]:
    """bound_map.evaluate, looked at in its second call: there x comes from the first one."""
    calls = itertools.count(1)

    def evaluate(x: Tensor, rows: Tensor | None) -> Tensor:
        gx = bound_map.evaluate(x, rows)
        if next(calls) == 2:
            notice_cut_in_step(bound_map, x, gx)
        return gx

    return evaluate


def looks_at(g: Any) -> Habit:
    """Where the looks at this g are counted."""
    return habit_of(g, "graph")


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
    readers = [(node, number) for node, number in found if reads(node, x)]
    if not readers:
        return [slice(None)]
    if len(sizes) == 1 or not all(is_a(node, SPLIT, *PASSED) for node, _ in readers):
        return []
    reached = {number for node, number in readers if is_a(node, SPLIT)}
    parts = zip(sizes, itertools.accumulate(sizes), strict=True)
    return [
        slice(end - size, end)
        for number, (size, end) in enumerate(parts)
        if size and number not in reached
    ]


def is_a(node: Any, *kinds: str) -> bool:
    """Whether a node is of one of these kinds, such as MulBackward."""
    return type(node).__name__.startswith(kinds)


def reads(node: Any, x: Tensor) -> bool:
    """Whether a node is given x, or what is like it."""
    return any(
        before[0] is not None
        and (is_edge_of(before, x) or (is_a(before[0], *PASSED) and reads(before[0], x)))
        for before in node.next_functions
    )


def moves(
    evaluate: Callable[[Tensor], Tensor],
    x: Tensor,
    gx: Tensor,
    bound_map: BoundMap,
    columns: slice,
) -> bool:
    """Whether g changes with the columns of x as something that has a slope does.

    Each part of the state is judged in each row by its own size, and most of those that change must
    do so evenly, for some jumps happen to.

    Args:
        gx: evaluate(x).
        bound_map: what is evaluated, for its arithmetic and the parts of its state.
    """
    kind = torch.finfo(bound_map.arithmetic)
    eps, sizes = kind.eps, list(bound_map.layout.sizes)
    part = x[:, columns].double()
    size = part.abs().amax(1, keepdim=True)
    step = max(eps**0.5, LEAST_STEP * eps) * (part.abs() + torch.where(size > 0, size, 1.0))
    step = step * (0.5 + waves(part, 0).abs())
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


def line_of(evaluate: Callable[[Tensor], Tensor], x: Tensor) -> str:
    """Of the first operation that takes the graph off x (B, D), as " at file:line"; or ""."""
    leaf = x.detach().requires_grad_()
    finder = _CutFinder(leaf)
    with torch.enable_grad(), finder:
        evaluate(leaf)
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
            site = call_site()
            if site and any(leads_to(t, self._x) for t in tensors_in((args, kwargs))):
                self.line = f" at {site.filename}:{site.lineno}"
        return result


def is_cut(result: Any) -> bool:
    """Whether these are numbers that autograd knows nothing of."""
    parts = list(parts_in(result))
    tensors = [t for t in parts if isinstance(t, Tensor)]
    numbers = [t for t in tensors if t.is_floating_point()]
    numbers += [t for t in parts if type(t).__name__ in ("float", "ndarray")]
    return bool(numbers) and not any(t.requires_grad for t in tensors)
