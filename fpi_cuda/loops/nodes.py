"""The nodes of a trace: a graph of torch's functions and methods."""

from __future__ import annotations

import functools
import inspect
import sys
from types import FunctionType
from typing import Any

import torch
from torch import fx


def argument(node: fx.Node, place: int, name: str) -> Any:
    """An argument that may be given by its place or by its name; None where it is not."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def named(target: Any) -> str:
    """What a reader calls an operation."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def has_value(node: fx.Node) -> bool:
    """Whether a node gives something, and is not called for what it does."""
    return node.meta.get("example_value") is not None


def writes(node: fx.Node) -> bool:
    """Whether a node writes over what it is given."""
    name = named(node.target)
    return (
        bool(argument(node, place_of_inplace(node.target), "inplace"))
        or "out" in node.kwargs
        or name in AUGMENTED
        or (name.endswith("_") and not name.endswith("__"))
    )


AUGMENTED = frozenset(
    ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul",
     "iand", "ior", "ixor", "ilshift", "irshift")
)  # fmt: skip
AUGMENTED |= {f"__{name}__" for name in AUGMENTED}


@functools.cache
def place_of_inplace(function: Any) -> int:
    """Which of its arguments is called so; where none is, more than it has."""
    if not isinstance(function, FunctionType):
        return sys.maxsize
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else sys.maxsize


def read_for(*answers: Any) -> set[fx.Node]:
    """These nodes, and those that they are computed from."""
    found: set[fx.Node] = set()
    left = [answer for answer in answers if isinstance(answer, fx.Node)]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def hint_of(number: Any) -> Any:
    """A number as it was in a trace that leaves it open."""
    return number.node.hint if isinstance(number, (torch.SymInt, torch.SymFloat)) else number
