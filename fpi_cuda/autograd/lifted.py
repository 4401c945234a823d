"""g inside of torch.func transforms: what it closes over becomes an input, found by watching it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpi_cuda.autograd.closed_over import Watch, exchanging, here
from fpi_cuda.autograd.cut_graph import MOST_LOOKS, looks_at, notice_cut, unreached
from fpi_cuda.autograd.equation import Common, Equation, Evaluate, leaf_at
from fpi_cuda.autograd.graph import edge_of, frontier_of, leaves_of, sequence_number
from fpi_cuda.autograd.reattach import has_tangent
from fpi_cuda.autograd.strategy import Strategy, failed
from fpi_cuda.autograd.transformed import HIDDEN, Inputs
from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.bound_map import BoundMap
from fpi_cuda.evaluation.modules import held_by
from fpi_cuda.evaluation.shortcuts import any_backward_hooks
from fpi_cuda.solution import SolveResult

Solve = Callable[[Callable[[Tensor, "Tensor | None"], Tensor], Tensor], SolveResult]
"""solve(evaluate, x0): numbers from numbers."""


class LiftedEquation(Equation):
    """x = g(x) inside of torch.func transforms, where g closes over nothing but its inputs.

    Args:
        bound_map: g as it was called.
        solve: the solver.
        strategy: see Equation; of plain numbers.
        truncation: that of the strategy.
        damping: steps of g that are differentiated, and how long each is.
    """

    def __init__(
        self,
        bound_map: BoundMap,
        solve: Solve,
        strategy: Callable[[Tensor, Tensor], Strategy],
        truncation: int | None,
        damping: tuple[int, float],
    ) -> None:
        self._bound_map = bound_map
        self._around = here.substitution
        self._solve = solve
        layout = bound_map.layout
        self.common = Common(strategy, truncation, bound_map.arithmetic, layout.sizes)
        self._damping = damping
        self._originals = [*bound_map.z]
        self._values = [*bound_map.z]
        self._places: list[tuple[int, nn.Module, str]] = []
        self._inside = False
        self._watch: Watch | None = None
        self._all_seen = False
        self._left = False

    @property
    def inputs(self) -> Inputs:
        """All that g was seen to depend on besides x."""
        return (*self._values, *self.common.hidden)

    def sees_more_at(self, x: Tensor) -> bool:
        """See what g closes over at x (B, D); whether that is more than was known.

        g is evaluated for that, unless x was solved for and the solve has seen it all.

        Raises:
            RuntimeError: g depends on what cannot be found.
        """
        if self._all_seen:
            return False
        at, aside = x.detach(), [t.detach() for t in self._values]
        born_after = sequence_number()
        watch = self._watch = Watch(self._originals)
        gx = self.bound(aside, damped=False)(at)
        self._watch = None
        stochastic = self._bound_map.context.stochastic
        depends = self._left or is_followed(gx)
        if not stochastic:
            given = (at, *aside)
            depends |= transforms.num_batches(gx, *given) > transforms.num_batches(*given)
        leaves, edges = frontier_of(transforms.numbers(gx), (), born_after)[:2]
        del gx  # By now what was made inside is gone.
        more = self._inputs_among(watch.captured())
        numbers = {id(t): i for i, (t, _) in enumerate(more, len(self._originals))}
        self._places += [(numbers[id(t)], m, n) for m, n, t in self._held() if id(t) in numbers]
        self._originals += [t for t, _ in more]
        self._values += [value for _, value in more]
        plain = [transforms.numbers(value) for _, value in more]
        if edges.difference(map(edge_of, plain)):
            raise RuntimeError(HIDDEN)
        # Plain autograd finds them behind g, though no function of torch was given them.
        known = set(map(id, (*plain, *self.common.hidden)))
        hidden = [t for i, t in leaves.items() if i not in known]
        self.common.hidden = (*self.common.hidden, *hidden)
        if depends and not (more or hidden):
            raise RuntimeError(HIDDEN)
        # Of random numbers, the vmap of a jacrev wants to hear nothing.
        self.common.once_only = stochastic
        self._inside |= stochastic or watch.functions
        self.common.hooked |= any_backward_hooks(self._bound_map.g)
        return bool(more or hidden)

    def _inputs_among(self, captured: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """What has to be an input of what g closes over."""
        # functional_call exchanges what modules hold, whether it has a gradient or not.
        held = {id(t) for *_, t in self._held()}
        return [(t, value) for t, value in captured if id(t) in held or matters(value)]

    def _held(self) -> list[tuple[nn.Module, str, Tensor]]:
        """The tensors in modules, and where they lie; not buffers in training, for g may write."""
        training = [m for m in self._bound_map.modules if getattr(m, "training", True)]
        settled = [m for m in self._bound_map.modules if not getattr(m, "training", True)]
        return held_by(training, buffers=False) + held_by(settled)

    def solved(self, whole: Equation, x0: Tensor, inputs: Inputs) -> Inputs:
        """See Equation."""
        evaluate = whole.bound(inputs, damped=False)

        with torch.no_grad(), self._bound_map.context.solving():
            result = self._solve(lambda x, rows: evaluate(x), x0.detach())
        whole.leave_out(failed(result.status), result.x, inputs)
        return (result.x, self._differentiated_at(result.x, whole, inputs), *result[1:])

    def _differentiated_at(self, x: Tensor, whole: Equation, inputs: Inputs) -> Tensor:
        leaf = leaf_at(x) if len(x) else None
        if leaf is None:
            return whole.evaluate(x, *inputs) if len(x) else x.clone()
        watch = self._watch = Watch(self._originals)
        gx = whole.keep(leaf, inputs).gx
        self._watch = None
        self._left = not set(map(id, self.common.hidden)).issuperset(leaves_of(gx))
        more = self._inputs_among(watch.captured())
        self._all_seen = not (self._left or more or watch.blind or transforms.numbers(gx) is not gx)
        once, step, bound_map = whole.bound(inputs, damped=False), gx, self._bound_map
        if self._damping[0] > 1 and looks_at(bound_map.g).looks < MOST_LOOKS:
            with torch.enable_grad():
                step = once(leaf)
        elif self.common.truncation == 0:
            return gx.detach()
        columns = unreached(step, leaf, bound_map.layout.sizes)
        if columns:
            self.common.notices.append(lambda: notice_cut(bound_map, x, columns, once))
        return gx.detach()

    def bound(
        self, inputs: Sequence[Tensor], *, damped: bool, bad: Tensor | None = None
    ) -> Evaluate:
        """See Equation."""
        bad = self.known.bad if bad is None else bad
        # functional_call has put others where modules held some of them.
        pairs = [*zip(self._originals, inputs, strict=False)]
        pairs += [
            (getattr(module, name), inputs[i])
            for i, module, name in self._places
            if hasattr(module, name)
        ]

        def call(function: Callable[[Any], Any], given: Any) -> Any:
            with exchanging(pairs, self._around) as exchange:
                if self._watch is None:
                    result = function(given)
                else:
                    result = self._watch.call(function, given, given=inputs)
            self.common.hooked |= exchange.hooks_set
            return result

        bound_map = self._bound_map.recorded(call).bound(inputs[: len(self._bound_map.z)])
        if bad is not None:
            bound_map = bound_map.replace_failed(bad)
        if damped and self._damping != bound_map.damping:
            bound_map = bound_map.damped(*self._damping)
        if self._inside and not transforms.active():
            # Only there can the arguments of a Function be exchanged, and dropout draws otherwise.
            return lambda x: torch.func.vjp(bound_map, x)[0]
        return bound_map


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
