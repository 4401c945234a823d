"""Which operations of a trace may write over what nobody reads after them.

Their numbers are the same, to the bit, and memory that lies in the caches is used again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fpi_cuda.loops.nodes import hint_of, named

BINARY = {
    **dict.fromkeys((operator.add, torch.add, "add"), "add_"),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), "mul_"),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), "sub_"),
    **dict.fromkeys((operator.truediv, torch.div, "div"), "div_"),
}
"""The method that writes the same over its first operand."""

COMMUTE = ("add_", "mul_")

UNARY = frozenset(
    ("abs", "ceil", "cos", "erf", "exp", "expm1", "floor", "log", "log1p", "neg", "reciprocal",
     "relu", "round", "rsqrt", "sigmoid", "sin", "sqrt", "square", "tanh")
)  # fmt: skip
"""Functions and methods of one argument, which have a method of the name with an underscore."""


def overwriting(
    operations: list[fx.Node], answer: fx.Node, places: dict[fx.Node, int]
) -> dict[fx.Node, tuple[str, tuple[Any, ...]]]:
    """The operations that may, each with a method for it and its arguments.

    Args:
        operations: in turn, of one function; none of them writes over anything yet.
        answer: what that function returns.
        places: which memory each node's value lies in, operations or not.
    """
    inside = {*operations}
    given = {places.get(n) for node in operations for n in node.all_input_nodes if n not in inside}
    merged: dict[int, int] = {}

    def place_of(node: Any) -> int | None:
        place = places.get(node) if isinstance(node, fx.Node) else None
        while place in merged:
            place = merged[place]
        return place

    last: dict[int | None, int] = {}
    for turn, node in enumerate(operations):
        for read in node.all_input_nodes:
            last[places.get(read)] = turn
    last[places.get(answer)] = len(operations)
    found: dict[fx.Node, tuple[str, tuple[Any, ...]]] = {}
    for turn, node in enumerate(operations):
        for method, target, *others in ways_of(node):
            place, mine = place_of(target), places.get(node)
            if (
                target in inside
                and place is not None
                and mine is not None
                and mine != place
                and place not in given
                and last[place] == turn
                and not any(place_of(other) == place for other in others)
                and alike(target, node)
            ):
                found[node] = (method, (target, *others))
                merged[mine] = place
                last[place] = last.get(mine, turn)
                break
    return found


def ways_of(node: fx.Node) -> Iterator[tuple[Any, ...]]:
    """Methods that would compute a node, each with what it writes over and its other argument."""
    target, args = node.target, node.args
    if node.kwargs:
        return
    if len(args) == 1 and named(target) in UNARY and is_torchs(node):
        yield f"{named(target)}_", args[0]
    elif len(args) == 2 and target in BINARY:
        method = BINARY[target]
        yield method, *args
        if method in COMMUTE:
            yield method, *reversed(args)


def is_torchs(node: fx.Node) -> bool:
    """Whether a node calls a method, or the function of torch with that name."""
    name = named(node.target)
    return node.op == "call_method" or node.target is getattr(torch, name, None)


def alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes give tensors of the same dtype that lie in the same way."""
    one, other = a.meta.get("example_value"), b.meta.get("example_value")
    return (
        isinstance(one, Tensor)
        and isinstance(other, Tensor)
        and one.dtype is other.dtype
        and one.device == other.device
        and [*map(hint_of, one.shape)] == [*map(hint_of, other.shape)]
        and [*map(hint_of, one.stride())] == [*map(hint_of, other.stride())]
    )
