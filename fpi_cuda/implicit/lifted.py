"""g inside of torch.func transforms: what it closes over becomes an input, found by watching it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fpi_cuda import transforms
from fpi_cuda.implicit.attach import tensors_saved_as_they_are
from fpi_cuda.implicit.cut_graph import looks_left, notice_cut_lifted, unreached
from fpi_cuda.implicit.flat_map import FlatMap
from fpi_cuda.implicit.graft import MaybeTensor, has_tangent
from fpi_cuda.implicit.graph import (
    Substitution,
    edge_of,
    frontier_of,
    mark_as_anchor,
    sequence_number,
)
from fpi_cuda.implicit.inputs import require_same_value
from fpi_cuda.implicit.linear import Inputs, Opened
from fpi_cuda.implicit.linearization import Jacobian, Linearization
from fpi_cuda.implicit.mending import mended_if_batchwise
from fpi_cuda.implicit.strategy import Strategy, failed
from fpi_cuda.moving_buffers import modules_of
from fpi_cuda.result import SolveResult
from fpi_cuda.weight_cache import laid_aside

Evaluate = Callable[[Tensor], Tensor]
"""x (B, D) -> g(x) (B, D), all else being bound."""

Solve = Callable[[Callable[[Tensor, "Tensor | None"], Tensor], Tensor], SolveResult]
"""solve(evaluate, x0): numbers from numbers."""

Pull = Callable[[Tensor], tuple[Tensor, ...]]

HIDDEN = (
    "fixed_point: inside torch.func transforms g depends on a tensor that it closes over and that "
    "cannot be followed (TorchScript, numpy, compiled code). Pass it to g as a z"
)


class Watch(TorchFunctionMode):
    """Finds the tensors that g uses and that it was neither given nor has made itself.

    Attributes:
        functions: it calls an autograd.Function.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        # Kept, for numbers of what is gone are given anew.
        self._known = {id(t): t for t in given}
        self._used: list[weakref.ref[Tensor]] = []
        self.functions = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Look at what goes in and what comes out."""
        kwargs = kwargs or {}
        for t in pytree.tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and id(t) not in self._known:
                self._known[id(t)] = t
                self._used.append(weakref.ref(t))
        self.functions |= getattr(func, "__name__", "") == "custom_function_call"
        result = func(*args, **kwargs)
        self._known.update((id(t), t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor))
        return result

    def captured(self) -> list[Tensor]:
        """Those that are still there; what transforms inside of g have wrapped is not."""
        self._known.clear()
        return [t for used in self._used if (t := used()) is not None]


class LiftedEquation:
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
        self.truncation = truncation
        self._damping = damping
        born_after = sequence_number()
        watch = Watch([start, *flat_map.source_z])
        with laid_aside(covers=True), watch:
            gx = flat_map.bound(flat_map.source_z)(start.detach())
        self._captured = [t for t in watch.captured() if matters(t)]
        seen = (*flat_map.source_z, *self._captured)
        self._hidden = hidden_leaves(gx, seen, born_after)
        self.inputs: Inputs = (*seen, *self._hidden)
        # Where modules hold some of them: functional_call has put others there by backward.
        self._places = places_of(self._captured, flat_map.g)
        self._functions = watch.functions
        self._bad: Tensor | None = None
        self._notices: list[Callable[[], None]] = []

    # ---- as Linear and FixedPoint see it ----

    def solved(self, x0: Tensor, inputs: Inputs) -> Inputs:
        """See Equation."""
        evaluate = self.bound(inputs, damped=False)

        def plain(x: Tensor, rows: Tensor | None) -> Tensor:
            gx = evaluate(x)
            if transforms.numbers(gx) is not gx:
                raise RuntimeError(HIDDEN)
            return gx

        with torch.no_grad(), self._flat_map.replay.solving():
            result = self._solve(plain, x0.detach())
        gx = self._seen_at(result, inputs)
        return (result.x, gx, *result[1:])

    def matrix(self, x: Tensor, gx: Tensor, inputs: Inputs) -> Jacobian:
        """See Equation."""
        if len(x) == 0:
            return Linearization(x, x)
        leaf = leaf_at(x)
        if leaf is None:
            return Transformed(self.evaluate, x, inputs)
        value = self._recorded(leaf, inputs)
        require_same_value(value, gx, self._flat_map.arithmetic)
        return Linearization(leaf, value)

    def opened(self, x: Tensor, gx: Tensor, inputs: Inputs, bad: Tensor | None = None) -> Opened:
        """See Equation."""
        more = functools.partial(self._pulled_to_hidden, x, inputs)
        return Transformed(self.evaluate, x, inputs, more)

    def _pulled_to_hidden(self, x: Tensor, inputs: Inputs, c: Tensor) -> list[MaybeTensor]:
        """The derivative of <c, g> in leaves that nothing can stand in for: of first order only."""
        if not self._hidden or transforms.active():
            return [None] * len(self._hidden)
        if torch.is_grad_enabled():
            raise RuntimeError(HIDDEN)
        gx = self._recorded(x.detach(), inputs)
        return list(torch.autograd.grad(gx, self._hidden, c, allow_unused=True))

    def at(self, opened: Opened) -> LiftedEquation:
        """See Equation."""
        return self

    def sees(self, bad: Tensor) -> bool:
        """See Equation."""
        return False

    def merged(self, size: int, dims: Sequence[int | None], randomness: str) -> LiftedEquation:
        """See Equation."""
        return MergedEquation(self, size, dims, randomness)

    def look(self) -> None:
        """See Equation."""
        while self._notices:
            self._notices.pop()()

    def _seen_at(self, result: SolveResult, inputs: Inputs) -> Tensor:
        """What is differentiated, at the solution."""
        x, flat_map = result.x, self._flat_map
        if len(x) == 0:
            return x.clone()
        self._mend(result, inputs)
        leaf = leaf_at(x)
        if leaf is None:
            return self.evaluate(x, *inputs)
        gx = self._recorded(leaf, inputs)
        once, step = self.bound(inputs, damped=False), gx
        if self._damping[0] > 1 and looks_left(flat_map.g, used=0):
            with torch.enable_grad():
                step = once(leaf)
        elif self.truncation == 0:
            return gx.detach()
        columns = unreached(step, leaf, flat_map.layout.sizes)
        if columns:
            self._notices.append(lambda: notice_cut_lifted(flat_map, once, x, columns))
        return gx.detach()

    def _recorded(self, leaf: Tensor, inputs: Inputs) -> Tensor:
        """What is differentiated, at a leaf, with its graph."""
        with torch.enable_grad(), tensors_saved_as_they_are():
            return self.evaluate(leaf, *(t.detach() for t in inputs))

    def _mend(self, result: SolveResult, inputs: Inputs) -> None:
        bad = failed(result.status)
        if bool(bad.any()) and not bool(bad.all()):
            flat_map, within = self._with(inputs)
            mended = within(lambda: mended_if_batchwise(flat_map, result.x, bad))
            self._bad = bad if mended is not flat_map else None

    # ---- g ----

    def evaluate(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """What is differentiated: g(x), or a few damped steps of it."""
        return self.bound(inputs, damped=True)(x)

    def bound(self, inputs: Sequence[Tensor], *, damped: bool) -> Evaluate:
        """g with these inputs, what does not depend on x done once."""
        flat_map, within = self._with(inputs)
        bad = self._bad
        if bad is not None:
            flat_map = within(lambda: flat_map.mended(bad))
        if damped:
            flat_map = flat_map.damped(*self._damping)

        def evaluate(x: Tensor) -> Tensor:
            gx: Tensor = within(lambda: flat_map(x))
            return gx

        inside = self._functions or flat_map.replay.stochastic
        if inside and not transforms.active():
            # Only there can the arguments of a Function be exchanged, and dropout draws otherwise.
            return lambda x: torch.func.vjp(evaluate, x)[0]  # type: ignore[no-any-return]
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


class MergedEquation(LiftedEquation):
    """The equation of the samples of a vmap side by side.

    Args:
        inner: that of one of them.
        size, dims, randomness: of the vmap; see Equation.
    """

    def __init__(
        self,
        inner: LiftedEquation,
        size: int,
        dims: Sequence[int | None],
        randomness: str,
    ) -> None:
        self.__dict__.update(inner.__dict__)
        self._inner = inner
        self._vmap = functools.partial(
            torch.func.vmap, in_dims=(0, *dims), randomness=randomness, chunk_size=None
        )
        self._size = size

    def bound(self, inputs: Sequence[Tensor], *, damped: bool) -> Evaluate:
        """See LiftedEquation."""

        def one(x: Tensor, *inputs: Tensor) -> Tensor:
            return self._inner.bound(inputs, damped=damped)(x)

        def evaluate(x: Tensor) -> Tensor:
            if not self._size:
                return x.clone()
            apart = x.reshape(self._size, len(x) // self._size, *x.shape[1:])
            gx: Tensor = self._vmap(one)(apart, *inputs)
            return gx.flatten(0, 1)

        return evaluate

    def _mend(self, result: SolveResult, inputs: Inputs) -> None:
        pass  # which samples failed differs between those of the vmap


def leaf_at(x: Tensor) -> Tensor | None:
    """A leaf with the numbers of x; None where plain autograd would record nothing of it.

    So it is below inference mode, even if torch says that the mode is off.
    """
    with torch.enable_grad():
        leaf = mark_as_anchor(x.detach().requires_grad_())
        return leaf if leaf.clone().requires_grad else None


def matters(t: Tensor) -> bool:
    """Whether t may have a derivative, or the dimension of a vmap."""
    return t.requires_grad or transforms.numbers(t) is not t or has_tangent(t)


def hidden_leaves(gx: Tensor, seen: Sequence[Tensor], born_after: int) -> list[Tensor]:
    """Leaves that plain autograd finds behind g, though no function of torch was given them.

    Raises:
        RuntimeError: it finds what is no leaf.
    """
    plain = [transforms.numbers(t) for t in seen]
    edges = [edge for t in plain if (edge := edge_of(t)) is not None]
    frontier = frontier_of(transforms.numbers(gx), edges, born_after)
    if set(frontier.edges).difference(edges):
        raise RuntimeError(HIDDEN)
    known = {id(t) for t in plain}
    return [t for t in frontier.leaves if id(t) not in known]


def places_of(tensors: Sequence[Tensor], g: object) -> list[tuple[int, dict[str, Any], str]]:
    """(which of the tensors, what holds it, its name there), where it is held by modules of g."""
    by_id = {id(t): i for i, t in enumerate(tensors)}
    holders = [h for m in (modules_of(g) if by_id else ()) for h in (m._parameters, m._buffers)]
    return [
        (by_id[id(t)], held, name) for held in holders for name, t in held.items() if id(t) in by_id
    ]


class Transformed:
    """g at a point as torch.func sees it: its products are functions of x and of its inputs.

    Args:
        evaluate: g(x, *inputs).
        pull_more: c -> the derivative of <c, g> in the last inputs, which nothing stands in for.
    """

    def __init__(
        self,
        evaluate: Callable[..., Tensor],
        x: Tensor,
        inputs: Inputs,
        pull_more: Callable[[Tensor], list[MaybeTensor]] = lambda c: [],
    ) -> None:
        self._evaluate = evaluate
        self._point = (x, *inputs)
        self._pull_more = pull_more
        self._places = [i for i, t in enumerate(self._point) if t.is_floating_point()]
        self._pull = self._pull_through(evaluate)

    def _pull_through(self, function: Callable[..., Tensor]) -> Pull:
        """v -> the derivative of <v, function> in what is floating, at the point."""

        def of_floating(*floating: Tensor) -> Tensor:
            given = dict(zip(self._places, floating, strict=True))
            return function(*(given.get(i, t) for i, t in enumerate(self._point)))

        pull: Pull
        _, pull = torch.func.vjp(of_floating, *(self._point[i] for i in self._places))
        return pull

    def _pull_through_product(self, y: Tensor, *, transpose: bool) -> Pull:
        """The same of J^T y or J y."""

        def product(x: Tensor, *inputs: Tensor) -> Tensor:
            there = Transformed(self._evaluate, x, inputs)
            return there.differentiable(y, transpose=transpose)

        return self._pull_through(product)

    def _by_place(self, found: Sequence[Tensor]) -> list[MaybeTensor]:
        known = dict(zip(self._places, found, strict=True))
        return [known.get(i) for i in range(len(self._point))]

    def _along(self, pull: Pull, tangents: Sequence[MaybeTensor]) -> Tensor:
        """The derivative along tangents of what `pull` pulls back through: `pull` is linear."""
        filled = (
            torch.zeros_like(self._point[i]) if tangents[i] is None else tangents[i]
            for i in self._places
        )
        return along(pull, torch.zeros_like(self._point[0]), tuple(filled))

    def transposed(self, c: Tensor) -> Tensor:
        """J^T c."""
        return self._pull(c)[0]

    def product(self, t: Tensor) -> Tensor:
        """J t."""
        return along(lambda w: self._pull(w)[0], torch.zeros_like(t), t)

    def differentiable(self, y: Tensor, *, transpose: bool) -> Tensor:
        """See Opened."""
        return self.transposed(y) if transpose else self.product(y)

    def pulled(self, c: Tensor) -> list[MaybeTensor]:
        """See Opened."""
        found, more = self._by_place(self._pull(c)), self._pull_more(c)
        return [*found[: len(found) - len(more)], *more]

    def pulled_product(self, left: Tensor, right: Tensor) -> list[MaybeTensor]:
        """See Opened."""
        return self._by_place(self._pull_through_product(left, transpose=True)(right))

    def pushed(self, tangents: list[MaybeTensor]) -> Tensor:
        """See Opened."""
        return self._along(self._pull, tangents)

    def pushed_product(self, y: Tensor, tangents: list[MaybeTensor], *, transpose: bool) -> Tensor:
        """See Opened."""
        return self._along(self._pull_through_product(y, transpose=transpose), tangents)


def along(pull: Callable[[Tensor], Any], nothing: Tensor, tangents: Any) -> Tensor:
    """The derivative along tangents of what `pull` pulls back through, at any argument of it."""
    found: Tensor = torch.func.vjp(pull, nothing)[1](tangents)[0]
    return found
