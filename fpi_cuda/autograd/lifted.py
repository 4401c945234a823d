"""g inside of torch.func transforms: what it closes over becomes an input, found by watching it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.autograd.closed_over import (
    Substitution,
    Watch,
    exchanging,
    here,
)
from fpi_cuda.autograd.cut_graph import MOST_LOOKS, looks_at, notice_cut, unreached
from fpi_cuda.autograd.equation import Equation, Evaluate, leaf_at
from fpi_cuda.autograd.flat_map import FlatMap
from fpi_cuda.autograd.graft import has_tangent
from fpi_cuda.autograd.graph import edge_of, frontier_of, leaves_of, sequence_number
from fpi_cuda.autograd.linear import Inputs
from fpi_cuda.autograd.strategy import Strategy, failed
from fpi_cuda.autograd.transformed import HIDDEN
from fpi_cuda.result import SolveResult
from fpi_cuda.shortcuts import any_backward_hooks
from fpi_cuda.weight_cache import laid_aside

Solve = Callable[[Callable[[Tensor, "Tensor | None"], Tensor], Tensor], SolveResult]
"""solve(evaluate, x0): numbers from numbers."""


class LiftedEquation(Equation):
    """x = g(x) inside of torch.func transforms, where g closes over nothing but its inputs.

    Args:
        flat_map: g as it was called.
        solve: the solver.
        strategy: see Equation; of plain numbers.
        truncation: that of the strategy.
        damping: steps of g that are differentiated, and how long each is.
    """

    def __init__(
        self,
        flat_map: FlatMap,
        solve: Solve,
        strategy: Callable[[Tensor, Tensor], Strategy],
        truncation: int | None,
        damping: tuple[int, float],
    ) -> None:
        self._flat_map = flat_map
        self._around = here.substitution
        self._solve = solve
        self.strategy = strategy
        self.arithmetic = flat_map.arithmetic
        self.sizes = flat_map.layout.sizes
        self.truncation = truncation
        self._damping = damping
        self._originals = [*flat_map.z]
        self._values = [*flat_map.z]
        self._places: list[tuple[int, dict[str, Any], str]] = []
        self._inside = False
        self._left: set[int] = set()
        self.changes = []
        self._notices: list[Callable[[], None]] = []

    @property
    def inputs(self) -> Inputs:
        """All that g was seen to depend on besides x."""
        return (*self._values, *self.hidden)

    def sees_more_at(self, x: Tensor) -> bool:
        """Evaluate g at x (B, D) to see what it closes over; whether that is more than was known.

        Raises:
            RuntimeError: g depends on what cannot be found.
        """
        flat_map, z = self._flat_map, self._flat_map.z
        at, aside = x.detach(), [t.detach() for t in self._values]
        watch = Watch([at, *self._originals, *aside])
        exchange = Substitution(zip(self._originals, aside, strict=True))
        born_after = sequence_number()
        with laid_aside(covers=True), exchange, watch:
            gx = flat_map.bound(aside[: len(z)])(at)
        depends = is_followed(gx)
        if not flat_map.replay.stochastic:
            given = (at, *aside)
            depends |= transforms.num_batches(gx, *given) > transforms.num_batches(*given)
        leaves, edges, *_ = frontier_of(transforms.numbers(gx), set(), born_after)
        del gx, _  # By now what was made inside is gone.
        captured = watch.captured()
        # functional_call exchanges them, whether they have a gradient or not.
        places: dict[int, list[tuple[dict[str, Any], str]]] = {id(t): [] for t, _ in captured}
        for module in flat_map.modules:
            # Not buffers in training, which g may write to.
            for held in (
                module._parameters,
                {} if getattr(module, "training", True) else module._buffers,
            ):
                for name, t in held.items():
                    if id(t) in places:
                        places[id(t)].append((held, name))
        more = [(t, value) for t, value in captured if places[id(t)] or matters(value)]
        for t, value in more:
            self._places += [(len(self._originals), *place) for place in places[id(t)]]
            self._originals.append(t)
            self._values.append(value)
        plain = [transforms.numbers(value) for _, value in more]
        if edges.difference(map(edge_of, plain)):
            raise RuntimeError(HIDDEN)
        # Plain autograd finds them behind g, though no function of torch was given them.
        known = set(map(id, (*plain, *self.hidden)))
        hidden = [t for i, t in leaves.items() if i not in known]
        self.hidden = (*self.hidden, *hidden)
        if (depends or self._left) and not (more or hidden):
            raise RuntimeError(HIDDEN)
        # Of random numbers, the vmap of a jacrev wants to hear nothing.
        self.once_only = flat_map.replay.stochastic
        self._inside |= self.once_only or watch.functions
        self.hooked |= watch.hooks_set or any_backward_hooks(flat_map.g)
        return bool(more or hidden)

    def solved_of(self, whole: Equation, x0: Tensor, inputs: Inputs) -> Inputs:
        """See Equation."""
        evaluate = whole.bound(inputs, damped=False)

        with torch.no_grad(), self._flat_map.replay.solving():
            result = self._solve(lambda x, rows: evaluate(x), x0.detach())
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
        self._left = set(leaves_of(gx)) - set(map(id, self.hidden))
        once, step, flat_map = whole.bound(inputs, damped=False), gx, self._flat_map
        if self._damping[0] > 1 and looks_at(flat_map.g).looks < MOST_LOOKS:
            with torch.enable_grad():
                step = once(leaf)
        elif self.truncation == 0:
            return gx.detach()
        columns = unreached(step, leaf, flat_map.layout.sizes)
        if columns:
            self._notices.append(lambda: notice_cut(flat_map, x, columns, once))
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
        z = self._flat_map.z
        pairs = list(zip(self._originals, inputs, strict=False))
        # functional_call has put others where modules held some of them.
        pairs += [(held[name], inputs[i]) for i, held, name in self._places if name in held]

        def within(call: Callable[[], Any]) -> Any:
            with exchanging(pairs, self._around) as exchange:
                result = call()
            self.hooked |= exchange.hooks_set
            return result

        return within(lambda: self._flat_map.bound(inputs[: len(z)])), within


def matters(t: Tensor) -> bool:
    """Whether t may have a derivative, or the dimension of a vmap."""
    return t.requires_grad or transforms.numbers(t) is not t or has_tangent(t)


def is_followed(t: Tensor) -> bool:
    """Whether a transform is after a derivative of t in a tensor of its own."""
    while transforms.numbers(t) is not t:
        # TorchScript takes plain leaves into the graph of the innermost transform.
        leaves = leaves_of(t).values() if t.requires_grad else ()
        if has_tangent(t) or any(transforms.numbers(leaf) is not leaf for leaf in leaves):
            return True
        t = transforms.unwrapped(t)
    return has_tangent(t)
