"""What g depends on besides x: its z, the parameters of a module, and what it closes over."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fpi_cuda.faithful import fresh_cache
from fpi_cuda.implicit.flat_map import FlatMap
from fpi_cuda.implicit.graft import stand_in
from fpi_cuda.implicit.graph import (
    Edge,
    Recorder,
    Substitution,
    edge_of,
    frontier_of,
    mark_as_anchor,
)
from fpi_cuda.implicit.linearization import OpenLinearization

# Two evaluations of one g at one x may differ by rounding, not by this share.
SAME_VALUE = 1e-2


class Inputs:
    """The tensors with a derivative that one evaluation of g was found to depend on.

    Attributes:
        originals: all of them.
        unnamed: some tensor was computed before the call, is closed over, and could not be
            identified: what needs another evaluation of g has to be refused.
    """

    def __init__(self, flat_map: FlatMap, x: Tensor, gx: Tensor, born_after: int) -> None:
        self._z = flat_map.source_z
        named = flat_map.tensors()
        known: list[Edge] = []
        for t in (*self._z, *named.values()):
            edge = edge_of(t)
            if t.requires_grad and edge is not None:
                known.append(edge)
        frontier = frontier_of(gx, known, born_after)
        leaves = {id(t): t for t in frontier.leaves}
        edges = set(frontier.edges)

        self._named = {name: t for name, t in named.items() if reached(t, leaves, edges)}
        given = [t for t in self._z if reached(t, leaves, edges)]
        explicit = {id(t): t for t in (*given, *self._named.values())}
        self._leaves = [t for t in leaves.values() if id(t) not in explicit]
        captured = edges.difference(edge_of(t) for t in explicit.values())
        found = find_captured(flat_map, x, captured) if captured else []
        self.unnamed = len(found) < len(captured)
        self._exchanged = [*explicit.values(), *found]
        self.originals = [*self._exchanged, *self._leaves]

    def __bool__(self) -> bool:
        return bool(self.originals) or self.unnamed

    def linearize(
        self,
        flat_map: FlatMap,
        x: Tensor,
        expected: Tensor,
        compared: Tensor | None,
    ) -> OpenLinearization:
        """Evaluate g once more, on stand-ins for x and for all that it depends on.

        Args:
            x: (B, D) with the graph that the derivative shall follow.
            expected: (B, D) the value of g when it was evaluated first.
            compared: (B,) bool, the samples that must have that value again; None: all.
        Raises:
            RuntimeError: g can no longer be evaluated as it was then.
        """
        if self.unnamed:
            raise RuntimeError(
                "fixed_point: a second derivative needs every tensor that g depends on, and g "
                "closes over one that was computed before the call and could not be found. Pass "
                "it to g as a z"
            )
        if torch.is_grad_enabled() and any(hasattr(t, "full_tensor") for t in self.originals):
            raise RuntimeError(
                "fixed_point: a second derivative cannot go through a DTensor that g reads. Hand g "
                "its .full_tensor() or .to_local(), computed before the call"
            )
        # Autograd runs the hooks of what it is asked about, and will run them again later.
        hooked = [t for t in self._leaves if t._backward_hooks]
        other = {id(t): stand_in(t) for t in (*self._exchanged, *hooked)}
        z = [other.get(id(t), t.detach()) for t in self._z]
        named = {name: other[id(t)] for name, t in self._named.items()}
        x_leaf = mark_as_anchor(stand_in(x))
        # What g is given as z, or holds as a module, it may close over as well.
        exchange = Substitution([(t, other[id(t)]) for t in (*self._exchanged, *hooked)])
        with torch.enable_grad(), fresh_cache(), exchange if other else contextlib.nullcontext():
            gx = flat_map.with_inputs(x_leaf, z, named)
        leaves = [other.get(id(t), t) for t in self.originals]
        self._require_same_dependence(gx, leaves)
        if compared is None:
            require_same_value(gx, expected)
        else:
            require_same_value(gx[compared], expected[compared])
        return OpenLinearization(x_leaf, gx, leaves, x, self.originals)

    def _require_same_dependence(self, gx: Tensor, leaves: Sequence[Tensor]) -> None:
        """Raise unless gx depends on the leaves, on all of them, and on nothing else."""
        met = {id(t) for t in frontier_of(gx, (), -1).leaves}
        if met != {id(leaf) for leaf in leaves}:
            raise RuntimeError(
                "fixed_point: a second derivative evaluates g again in backward, and there it "
                "depended on other tensors than in the forward pass. Pass what changes between "
                "the two as z, or make g an nn.Module so that its parameters are remembered"
            )


def reached(t: Tensor, leaves: dict[int, Tensor], edges: set[Edge]) -> bool:
    """Whether t is one of the leaves, or the tensor at one of the edges."""
    return id(t) in leaves or edge_of(t) in edges


def find_captured(flat_map: FlatMap, x: Tensor, edges: set[Edge]) -> list[Tensor]:
    """The tensors at `edges` that g closes over, by watching one more evaluation."""
    recorder = Recorder(edges)
    with torch.enable_grad(), recorder:
        flat_map(x.detach())
    return list(recorder.found.values())


def require_same_value(gx: Tensor, expected: Tensor) -> None:
    """Raise if g, evaluated again, is another function."""
    eps = torch.finfo(gx.dtype).eps
    close = torch.isclose(gx, expected, rtol=SAME_VALUE, atol=eps**0.5 * SAME_VALUE, equal_nan=True)
    scale = expected.abs().amax() if expected.numel() else expected.sum()
    off = ~close & ((gx - expected).abs() > SAME_VALUE * scale)
    if bool(off.any()):
        raise RuntimeError(
            "fixed_point: a second derivative evaluates g again in backward, and there it had "
            "another value than in the forward pass. g must be a function of x, z and tensors "
            "that do not change in between"
        )
