"""What g depends on besides x: its z, the parameters of a module, and what it closes over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpi_cuda import transforms
from fpi_cuda.autograd.backward_hooks import require_true_products
from fpi_cuda.autograd.closed_over import (
    Substitution,
    Watch,
    exchanging,
    here,
)
from fpi_cuda.autograd.cut_graph import unreached
from fpi_cuda.autograd.flat_map import FlatMap
from fpi_cuda.autograd.graft import has_tangent, stand_in
from fpi_cuda.autograd.graph import edge_of, frontier_of, leaves_of, mark_as_anchor
from fpi_cuda.autograd.linearization import OpenLinearization
from fpi_cuda.autograd.same_value import CHANGED, require_same_value
from fpi_cuda.module_tree import held_by
from fpi_cuda.shortcuts import any_backward_hooks
from fpi_cuda.tensor_version import counted_version, version_of

UNNAMED = (
    "fixed_point: a second derivative needs every tensor that g depends on, and g closes over one "
    "that was computed before the call and could not be found. Pass it to g as a z"
)

TANGENT = (
    "fixed_point: the tangent of a gradient needs tensors with tangents that g closes over to "
    "require grad too. Call requires_grad_() on them, or pass them to g as z"
)


class Inputs:
    """The tensors with a derivative that one evaluation of g was found to depend on.

    Attributes:
        originals: all of them.
        unreached: columns of x that the graph of the evaluation does not lead to.
        unnamed: some tensor was computed before the call, is closed over, and could not be
            identified: what needs another evaluation of g has to be refused.
    """

    def __init__(self, flat_map: FlatMap, x: Tensor, gx: Tensor, born_after: int) -> None:
        self._z = flat_map.z
        self._around = here.substitution
        known = {(t.grad_fn, t.output_nr) for t in self._z if t.requires_grad}
        leaves, edges, anchors, visited = frontier_of(gx, known, born_after)

        def matters(t: Tensor) -> bool:
            there = id(t) in leaves or (t.grad_fn, t.output_nr) in edges
            return there or has_tangent(t)

        explicit = {id(t): t for t in self._z if matters(t)}
        captured = edges - {(t.grad_fn, t.output_nr) for t in explicit.values()}
        found: dict[Any, Tensor] = {}
        # Where modules hold some of them: functional_call has put others there by backward.
        self._places: list[tuple[Tensor, nn.Module, str]] = []
        exchanged = captured or any(type(t) is not nn.Parameter for t in leaves.values())
        if exchanged or isinstance(flat_map.g, nn.Module):
            for module, name, t in held_by(flat_map.modules):
                edge = edge_of(t) if captured else None
                if id(t) in leaves or edge in captured:
                    self._places.append((t, module, name))
                    found |= {edge: t} if edge in captured else {}
        if captured - found.keys():
            used = used_by(flat_map, x, [x, *self._z, *found.values()])
            found |= {edge: t for t in used if (edge := edge_of(t)) in captured}
        self.unnamed = not captured <= found.keys()
        self._leaves = [t for t in leaves.values() if id(t) not in explicit]
        self.originals = [*explicit.values(), *found.values(), *self._leaves]
        # Of every z: what a change in it does need not show in the value of g at x.
        watched = {id(t): t for t in (*self._z, *self.originals)}
        self._versions = [
            (t, 0 if t.is_inference() else counted_version(t)) for t in watched.values()
        ]
        layout = flat_map.layout
        whole = not x.requires_grad or (len(layout.shapes) == 1 and id(x) in anchors)
        self.unreached = [] if whole else unreached(gx, x, layout.sizes, visited)

    def opened(
        self, flat_map: FlatMap, x: Tensor, expected: Tensor, inputs: Sequence[Tensor],
        bad: Tensor | None,
    ) -> OpenLinearization:  # fmt: skip
        """Evaluate g once more, on stand-ins for x and for all that it depends on.

        Args:
            x: (B, D) with the graph that the derivative shall follow.
            expected: (B, D) the value of g when it was evaluated first.
            inputs: like `originals`, likewise.
            bad: (B,) bool, samples that need not have that value again; None: all must.
        Raises:
            RuntimeError: g can no longer be evaluated as it was then.
        """
        self._require_usable()
        # Autograd runs the hooks of what it is asked about, and will run them again later.
        own = {id(t) for t in self._leaves if not t._backward_hooks}
        aside = [t if id(t) in own else stand_in(t) for t in self.originals]
        x_leaf = mark_as_anchor(stand_in(x))
        with torch.enable_grad():
            gx, exchange = self._evaluated(flat_map, x_leaf, aside)
        if exchange.hooks_set or any_backward_hooks(flat_map.g):
            moving = [t for t in aside if id(t) not in own]

            def evaluate(given: Sequence[Tensor]) -> Tensor:
                rest = iter(given[1:])
                again = [t if id(t) in own else next(rest) for t in aside]
                return self._evaluated(flat_map, given[0], again)[0]

            require_true_products(evaluate, gx, [x_leaf, *moving], flat_map.arithmetic)
        if set(leaves_of(gx)) != {id(leaf) for leaf in aside}:
            # An energy makes a leaf of an x that does not require grad, to differentiate in it.
            with torch.enable_grad():
                again = [gx, *(self._evaluated(flat_map, x.detach(), aside)[0] for _ in range(2))]
            self._require_made_inside(again, aside)
        rows = slice(None) if bad is None else ~bad
        require_same_value(gx[rows], expected[rows], flat_map.arithmetic, flat_map.layout.sizes)
        return OpenLinearization(x_leaf, gx, aside, x, inputs)

    def evaluate(self, flat_map: FlatMap, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """g(x) with others in the place of `originals`, for torch.func."""
        return self._evaluated(flat_map, x, inputs)[0]

    def require_all_exchanged(self, flat_map: FlatMap, x: Tensor) -> None:
        """Raise unless something else can stand in for everything that g depends on."""
        self._require_usable()
        with torch.enable_grad():
            gx, _ = self._evaluated(flat_map, x, [t.detach() for t in self.originals])
        left = set(leaves_of(gx))
        while transforms.numbers(gx) is not gx:  # TorchScript takes leaves into the graph inside
            gx = transforms.unwrapped(gx)
            left |= set(leaves_of(gx))
        if not left.isdisjoint(map(id, self._leaves)):
            raise RuntimeError(UNNAMED)

    def require_all_tangents(self, flat_map: FlatMap, x: Tensor) -> None:
        """Raise where g closes over tensors with tangents that were not found to matter."""
        known = set(map(id, self.originals))
        for t in used_by(flat_map, x, [x, *self._z]):
            if id(t) not in known and has_tangent(t):
                raise RuntimeError(TANGENT)

    def _evaluated(
        self, flat_map: FlatMap, x: Tensor, given: Sequence[Tensor]
    ) -> tuple[Tensor, Substitution]:
        now = {id(t): other for t, other in zip(self.originals, given, strict=True)}
        z = [now.get(id(t), t.detach()) for t in self._z]
        # What g is given as z it may close over as well.
        pairs = [(t, now[id(t)]) for t in self.originals if now[id(t)] is not t]
        pairs += [(getattr(module, name, t), now[id(t)]) for t, module, name in self._places]
        with exchanging(pairs, self._around) as exchange:
            return flat_map.bound(z)(x), exchange

    def _require_usable(self) -> None:
        if self.unnamed:
            raise RuntimeError(UNNAMED)
        if torch.is_grad_enabled() and any(hasattr(t, "full_tensor") for t in self.originals):
            raise RuntimeError(
                "fixed_point: a second derivative cannot go through a DTensor that g reads. Hand g "
                "its .full_tensor() or .to_local(), computed before the call"
            )
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        """Raise where z, or a tensor with a derivative, was written to since g was evaluated."""
        for t, version in self._versions:
            if version_of(t) != version:
                of = f"z[{place}]" if (place := place_in(t, self._z)) is not None else "a tensor"
                what = f"{of} of shape {tuple(t.shape)} had been changed in place"
                raise RuntimeError(CHANGED.format(what=what))

    def _require_made_inside(self, values: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        """Raise unless g depends on the same tensors always, but for leaves that it makes anew.

        Args:
            values: of g, where x requires grad; then twice where it does not, as it was at first.
        """
        known = {id(leaf) for leaf in leaves}
        missing = known.difference(leaves_of(values[0]))
        fresh, first, second = (set(leaves_of(gx)) - known for gx in values)
        made = len(first) == len(second) == len(missing) and not first & second
        if not made or fresh & (first | second) or not missing <= {id(t) for t in self._leaves}:
            raise RuntimeError(
                "fixed_point: a second derivative evaluates g again in backward, and there it "
                "depended on other tensors than in the forward pass. Pass what changes between "
                "the two as z, or make g an nn.Module so that its parameters are remembered"
            )


def used_by(flat_map: FlatMap, x: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
    """What one more evaluation of g uses besides what it is given."""
    watch = Watch(given)
    with torch.enable_grad(), watch:
        flat_map(x.detach())
    return [t for _, t in watch.captured()]


def place_in(t: Tensor, z: Sequence[object]) -> int | None:
    """Which of z is t; None if none is."""
    return next((i for i, other in enumerate(z) if other is t), None)
