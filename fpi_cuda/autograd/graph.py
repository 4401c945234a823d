"""What an autograd graph says of where a tensor comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Edge = tuple[Any, int]
"""(node, which of its outputs): where in the graph a tensor comes from."""

LEAF = "AccumulateGrad"
TRACKING = "_fpi_cuda_tracking"


class Frontier(NamedTuple):
    """Where the graph of one evaluation ends.

    Attributes:
        leaves: parameters and other leaves that require grad, by id.
        edges: non-leaf tensors that were there before the evaluation.
        tracking: ids of the tracking leaves that it leads to.
        visited: all edges on the way.
    """

    leaves: dict[int, Tensor]
    edges: set[Edge]
    tracking: set[int]
    visited: set[Edge]


def edge_of(t: Tensor) -> Edge | None:
    """Where t comes from; None for a leaf."""
    return None if t.grad_fn is None else (t.grad_fn, t.output_nr)


def frontier_of(out: Tensor, known: Iterable[Tensor], born_after: int) -> Frontier:
    """Walk the graph of `out` back to what was there before it.

    Args:
        known: tensors to stop at.
        born_after: autograd's sequence number when the evaluation began; older nodes of this
            thread belong to captured tensors.
    """
    stops = {(t.grad_fn, t.output_nr) for t in known if t.requires_grad}
    leaves, edges, tracking, visited = found = Frontier({}, set(), set(), set())
    pending: list[Edge] = [(out.grad_fn, out.output_nr)]
    ends = [out] if out.requires_grad and out.grad_fn is None else []
    while pending:
        edge = pending.pop()
        node = edge[0]
        if node is None or edge in visited:
            continue
        visited.add(edge)
        if edge in stops:
            edges.add(edge)
        elif type(node).__name__ == LEAF:
            ends.append(node.variable)
        elif node._sequence_nr() < born_after:
            edges.add(edge)
        else:
            pending.extend(node.next_functions)
    for t in ends:
        if hasattr(t, TRACKING):
            tracking.add(id(t))
        else:
            leaves[id(t)] = t
    return found


def leaves_of(out: Tensor) -> dict[int, Tensor]:
    """The leaves that require grad behind `out`, tracking leaves apart, by id."""
    return frontier_of(out, (), -1).leaves


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
    return type(node).__name__ == LEAF and node.variable is x


def is_differentiable_once(out: Tensor) -> bool:
    """Whether the graph of a derivative goes through a backward that has no derivative itself.

    Autograd marks it by a node that raises when it is run, but leads to nothing, so that a
    derivative in given tensors passes it by and comes out too small.
    """
    return any(type(node).__name__ == "Error" for node, _ in edges_of(out))


def mark_as_tracking_leaf(x: Tensor) -> Tensor:
    """x, a leaf made for a derivative in x: no fixed point depends on it, this one or another."""
    setattr(x, TRACKING, True)
    return x


sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
"""The number that the next autograd node of this thread will get."""
