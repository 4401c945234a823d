"""Which tensors an evaluation of g depends on, closures included, read off its autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Edge = tuple[Any, int]
"""(node, which of its outputs): where in the graph a tensor comes from."""


@dataclass
class Frontier:
    """Where the graph of one evaluation ends.

    Attributes:
        leaves: parameters and other leaves that require grad, anchors excepted.
        edges: non-leaf tensors that were there before the evaluation.
        nodes: the nodes of the evaluation itself.
        visited: all edges on the way.
    """

    leaves: list[Tensor] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    nodes: set[Any] = field(default_factory=set)
    visited: set[Edge] = field(default_factory=set)


def edge_of(t: Tensor) -> Edge | None:
    """Where t comes from; None for a leaf."""
    return None if t.grad_fn is None else (t.grad_fn, t.output_nr)


def frontier_of(out: Tensor, known: Iterable[Edge], born_after: int) -> Frontier:
    """Walk the graph of `out` back to what was there before it.

    Args:
        known: edges to stop at.
        born_after: autograd's sequence number when the evaluation began; older nodes of this
            thread belong to captured tensors.
    """
    found = Frontier()
    if not out.requires_grad:
        return found
    start = edge_of(out)
    if start is None:
        if not is_anchor(out):
            found.leaves.append(out)
        return found
    stops = set(known)
    visited = found.visited
    pending = [start]
    while pending:
        edge = pending.pop()
        node = edge[0]
        if node is None or edge in visited:
            continue
        visited.add(edge)
        if edge in stops:
            found.edges.append(edge)
        elif is_leaf_node(node):
            if not is_anchor(node.variable):
                found.leaves.append(node.variable)
        elif node._sequence_nr() < born_after:
            found.edges.append(edge)
        elif node not in found.nodes:
            found.nodes.add(node)
            pending.extend(node.next_functions)
    return found


def edges_of(out: Tensor) -> Iterator[Edge]:
    """The edges of the graph of out, each once; none of a leaf."""
    seen: set[Edge] = set()
    pending: list[Edge] = [(out.grad_fn, out.output_nr)]
    while pending:
        edge = pending.pop()
        if edge[0] is not None and edge not in seen:
            seen.add(edge)
            yield edge
            pending.extend(edge[0].next_functions)


def leads_to(out: Tensor, x: Tensor) -> bool:
    """Whether the graph of out leads to x."""
    return out is x or any(is_edge_of(edge, x) for edge in edges_of(out))


def is_edge_of(edge: Edge, x: Tensor) -> bool:
    """Whether an edge is where x comes from, or x itself, a leaf."""
    node, number = edge
    if x.grad_fn is not None:
        return node is x.grad_fn and number == x.output_nr
    return is_leaf_node(node) and node.variable is x


def depends_beyond(out: Tensor) -> bool:
    """Whether the graph of out leads to a leaf that is no anchor."""
    if not out.requires_grad:
        return False
    if out.grad_fn is None:
        return not is_anchor(out)
    return any(is_leaf_node(node) and not is_anchor(node.variable) for node, _ in edges_of(out))


def is_differentiable_once(out: Tensor) -> bool:
    """Whether the graph of a derivative goes through a backward that has no derivative itself.

    Autograd marks it by a node that raises when it is run, but leads to nothing, so that a
    derivative in given tensors passes it by and comes out too small.
    """
    return any(type(node).__name__ == "Error" for node, _ in edges_of(out))


ANCHOR = "_fpi_cuda_anchor"


def mark_as_anchor(x: Tensor) -> Tensor:
    """x, a leaf made for a derivative in x: it is not among what a fixed point depends on."""
    setattr(x, ANCHOR, True)
    return x


def is_anchor(x: Tensor) -> bool:
    """Whether x is such a leaf, of this solve or of one inside g."""
    return hasattr(x, ANCHOR)


def is_leaf_node(node: Any) -> bool:
    """Whether the node accumulates into a leaf's .grad."""
    return type(node).__name__ == "AccumulateGrad"


class Recorder(TorchFunctionMode):
    """Finds the tensors of given edges among the arguments of torch functions."""

    def __init__(self, wanted: Iterable[Edge]) -> None:
        super().__init__()
        self._wanted = set(wanted)
        self.found: dict[Edge, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Look at the arguments, then call."""
        kwargs = kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                edge = edge_of(leaf)
                if edge in self._wanted:
                    self.found[edge] = leaf
        return func(*args, **kwargs)


class Substitution(TorchFunctionMode):
    """Puts stand-ins in the place of tensors that g closes over.

    Attributes:
        hooks_set: g has set hooks on tensors meanwhile.
        used: ids of the originals that were met.
    """

    def __init__(self, stand_ins: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._pairs = {id(original): (original, other) for original, other in stand_ins}
        self.hooks_set = False
        self.used: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Exchange the arguments, then call."""
        if func is Tensor.register_hook:
            self.hooks_set = True
        args, kwargs = pytree.tree_map_only(Tensor, self._exchange, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _exchange(self, t: Tensor) -> Tensor:
        pair = self._pairs.get(id(t))
        if pair is None:
            return t
        self.used.add(id(t))
        return pair[1]


def sequence_number() -> int:
    """The number that the next autograd node of this thread will get."""
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
