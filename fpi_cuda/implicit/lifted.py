"""g inside of torch.func transforms: what it closes over becomes an input, found by watching it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.implicit.closed_over import Substitution, Watch
from fpi_cuda.implicit.cut_graph import looks_left, notice_cut_lifted, unreached
from fpi_cuda.implicit.equation import Equation, Evaluate, leaf_at
from fpi_cuda.implicit.flat_map import FlatMap
from fpi_cuda.implicit.graft import has_tangent
from fpi_cuda.implicit.graph import Edge, edge_of, frontier_of, sequence_number
from fpi_cuda.implicit.linear import Inputs
from fpi_cuda.implicit.strategy import Strategy, failed
from fpi_cuda.implicit.transformed import HIDDEN
from fpi_cuda.moving_buffers import modules_of
from fpi_cuda.result import SolveResult
from fpi_cuda.weight_cache import laid_aside

Solve = Callable[[Callable[[Tensor, "Tensor | None"], Tensor], Tensor], SolveResult]
"""solve(evaluate, x0): numbers from numbers."""


class LiftedEquation(Equation):
    """x = g(x) inside of torch.func transforms, where g closes over nothing but its inputs.

    Args:
        flat_map: g as it was called.
        start: (B, D) where g is evaluated to see what it closes over.
        solve: the solver.
        strategy: see Equation; of plain numbers.
        truncation: that of the strategy.
    Attributes:
        inputs: all that g depends on besides x.
    """

    def __init__(
        self,
        flat_map: FlatMap,
        start: Tensor,
        solve: Solve,
        strategy: Callable[[Tensor, Tensor], Strategy],
        truncation: int | None,
        damping: tuple[int, float],
    ) -> None:
        self._flat_map = flat_map
        self._solve = solve
        self.strategy = strategy
        self.arithmetic = flat_map.arithmetic
        self.sizes = flat_map.layout.sizes
        self.truncation = truncation
        self._damping = damping
        z, born_after = flat_map.source_z, sequence_number()
        watch = Watch([start, *z])
        with laid_aside(covers=True), watch:
            leaves, edges = ends_of(flat_map.bound(z)(start.detach()), z, born_after)
        # By now what was made inside is gone.
        self._captured = [t for t in watch.captured() if matters(t)]
        plain = [transforms.numbers(t) for t in (*z, *self._captured)]
        if edges.difference(map(edge_of, plain)):
            raise RuntimeError(HIDDEN)
        # Plain autograd finds them behind g, though no function of torch was given them.
        self.hidden = tuple(t for i, t in leaves.items() if i not in set(map(id, plain)))
        self.inputs: Inputs = (*z, *self._captured, *self.hidden)
        # Where modules hold some of them: functional_call has put others there by backward.
        self._places = places_of(self._captured, flat_map.g)
        # Of random numbers, the vmap of a jacrev wants to hear nothing.
        self.once_only = flat_map.replay.stochastic
        self._inside = self.once_only or watch.functions
        self._notices: list[Callable[[], None]] = []

    def solved_of(self, whole: Equation, x0: Tensor, inputs: Inputs) -> Inputs:
        """See Equation."""
        evaluate = whole.bound(inputs, damped=False)

        def plain(x: Tensor, rows: Tensor | None) -> Tensor:
            gx = evaluate(x)
            if transforms.numbers(gx) is not gx:
                raise RuntimeError(HIDDEN)
            return gx

        with torch.no_grad(), self._flat_map.replay.solving():
            result = self._solve(plain, x0.detach())
        whole.leave_out(failed(result.status), result.x, inputs)
        return (result.x, self._differentiated_at(result.x, whole, inputs), *result[1:])

    def look(self) -> None:
        """See Equation."""
        while self._notices:
            self._notices.pop()()

    def _differentiated_at(self, x: Tensor, whole: Equation, inputs: Inputs) -> Tensor:
        leaf = leaf_at(x) if len(x) else None
        if leaf is None:
            return whole.evaluate(x, *inputs) if len(x) else x.clone()
        gx = whole.recorded(leaf, inputs)
        if frontier_of(gx, set(), -1).leaves.keys() - set(map(id, self.hidden)):
            raise RuntimeError(HIDDEN)
        once, step, flat_map = whole.bound(inputs, damped=False), gx, self._flat_map
        if self._damping[0] > 1 and looks_left(flat_map.g, used=0):
            with torch.enable_grad():
                step = once(leaf)
        elif self.truncation == 0:
            return gx.detach()
        columns = unreached(step, leaf, flat_map.layout.sizes)
        if columns:
            self._notices.append(lambda: notice_cut_lifted(flat_map, once, x, columns))
        return gx.detach()

    def bound(self, inputs: Sequence[Tensor], *, damped: bool) -> Evaluate:
        """g with these inputs, what does not depend on x done once."""
        flat_map, within = self._with(inputs)
        bad = self.bad
        if bad is not None:
            flat_map = within(lambda: flat_map.mended(bad))
        if damped:
            flat_map = flat_map.damped(*self._damping)

        def evaluate(x: Tensor) -> Tensor:
            gx: Tensor = within(lambda: flat_map(x))
            return gx

        if self._inside and not transforms.active():
            # Only there can the arguments of a Function be exchanged, and dropout draws otherwise.
            return lambda x: torch.func.vjp(evaluate, x)[0]
        return evaluate

    def _with(self, inputs: Sequence[Tensor]) -> tuple[FlatMap, Callable[[Callable[[], Any]], Any]]:
        """g with these inputs, and what has to surround its evaluations."""
        num_z = len(self._flat_map.source_z)
        z, captured = inputs[:num_z], inputs[num_z : num_z + len(self._captured)]
        pairs = list(zip(self._captured, captured, strict=True))
        pairs += [(held[name], captured[i]) for i, held, name in self._places if name in held]

        def within(call: Callable[[], Any]) -> Any:
            with laid_aside(covers=True), Substitution(pairs):
                return call()

        return within(lambda: self._flat_map.bound(z)), within


def matters(t: Tensor) -> bool:
    """Whether t may have a derivative, or the dimension of a vmap."""
    return t.requires_grad or transforms.numbers(t) is not t or has_tangent(t)


def ends_of(
    gx: Tensor, z: Sequence[Tensor], born_after: int
) -> tuple[dict[int, Tensor], set[Edge]]:
    """What the graph of gx in plain autograd leads to: see Frontier; z apart."""
    known = {edge for t in z if (edge := edge_of(transforms.numbers(t))) is not None}
    leaves, edges, *_ = frontier_of(transforms.numbers(gx), known, born_after)
    return leaves, edges - known


def places_of(tensors: Sequence[Tensor], g: object) -> list[tuple[int, dict[str, Any], str]]:
    """(which of the tensors, what holds it, its name there), where it is held by modules of g."""
    by_id = {id(t): i for i, t in enumerate(tensors)}
    holders = [h for m in (modules_of(g) if by_id else ()) for h in (m._parameters, m._buffers)]
    return [
        (by_id[id(t)], held, name) for held in holders for name, t in held.items() if id(t) in by_id
    ]
