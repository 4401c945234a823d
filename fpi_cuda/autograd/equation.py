"""A fixed point as an equation: the map, all that it depends on, and how it is solved with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpi_cuda.autograd.backward_hooks import CHANGED, products_differ
from fpi_cuda.autograd.graph import mark_as_tracking_leaf
from fpi_cuda.autograd.linear import Opened
from fpi_cuda.autograd.linearization import Jacobian, Linearization
from fpi_cuda.autograd.scaling import Apply
from fpi_cuda.autograd.strategy import Strategy
from fpi_cuda.autograd.transformed import Inputs, Transformed
from fpi_cuda.evaluation.bound_map import has_rows, replace_rows
from fpi_cuda.evaluation.recomputed import tensors_saved_as_they_are
from fpi_cuda.evaluation.same_value import require_same_value, same_value

Evaluate = Callable[[Tensor], Tensor]
"""x (B, D) -> g(x) (B, D), all else being bound."""


@dataclass
class Common:
    """What an equation has in common with those of several like it side by side.

    Attributes:
        strategy: strategy(status, x): how linear systems are solved for samples whose solve ended
            so, at plain numbers.
        truncation: that of the strategy.
        arithmetic: what g is evaluated in.
        sizes: of the parts of the state, which add up to D.
        once_only: a backward pass may come where g cannot be evaluated.
        hooked: hooks in g may change gradients.
        changes: whether they do; None: that was not seen yet.
        hidden: the last inputs, where nothing can stand in for them.
        notices: to be given once somebody asks for derivatives.
    """

    strategy: Callable[[Tensor, Tensor], Strategy]
    truncation: int | None
    arithmetic: torch.dtype
    sizes: Sequence[int]
    once_only: bool = False
    hooked: bool = False
    changes: bool | None = None
    hidden: Inputs = ()
    notices: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class Known:
    """What is known of the solution of an equation.

    Attributes:
        jacobian: there, where its graph was recorded.
        bad: (B,) bool, samples that failed, to be evaluated where another one is; None: none.
        merged: the same of equations of several like this side by side, by how they are merged.
    """

    jacobian: Linearization | None = None
    bad: Tensor | None = None
    merged: dict[tuple[Any, ...], Known] = field(default_factory=dict)

    def leaves_out(self) -> bool:
        """Whether samples failed, here or side by side, that can be evaluated elsewhere."""
        return self.bad is not None or any(known.leaves_out() for known in self.merged.values())


class Equation:
    """x = g(x, *inputs), for FixedPoint and Linear; both ask for it at every level of torch.func.

    Attributes:
        common: what does not depend on the level.
    """

    common: Common

    @functools.cached_property
    def known(self) -> Known:
        """What a solve has found."""
        return Known()

    def bound(
        self, inputs: Sequence[Tensor], *, damped: bool, bad: Tensor | None = None
    ) -> Evaluate:
        """g with these inputs, what does not depend on x done once.

        Args:
            damped: what is differentiated, which may be a few damped steps of g.
            bad: (B,) bool, samples to evaluate where another one is; None: those that are known.
        """
        raise NotImplementedError

    def solved(self, whole: Equation, x0: Tensor, inputs: Inputs) -> Inputs:
        """x (B, D), what is differentiated at x, status (B,), and more of plain numbers.

        Args:
            whole: whose solution it is: this equation, or that of several like it side by side.
        """
        raise NotImplementedError

    def look(self) -> None:
        """Somebody asks for derivatives of the solution: see whether they are whole."""
        while self.common.notices:
            self.common.notices.pop()()

    def leave_out(self, bad: Tensor, x: Tensor, inputs: Inputs) -> None:
        """Evaluate bad samples where another one is from now on, if that leaves the others alone.

        Their derivative is zero times whatever g's derivative is there, which may be NaN.
        """
        if not bool(bad.any()) or bool(bad.all()):
            return
        # Not under no_grad: autocast would cache weights without their graph.
        with torch.enable_grad():
            expected = self.evaluate(x, *inputs)[~bad]
            self.known.bad = bad
            moved = self.evaluate(x, *inputs)[~bad]
            if not same_value(moved, expected, x.dtype, self.common.sizes):
                self.known.bad = None

    def evaluate(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """What is differentiated."""
        return self.bound(inputs, damped=True)(x)

    def keep(self, leaf: Tensor, inputs: Inputs) -> Linearization:
        """Record the graph of what is differentiated, and have it at hand for `matrix`."""
        with torch.enable_grad(), tensors_saved_as_they_are():
            gx = self.evaluate(leaf, *(t.detach() for t in inputs))
        found = self.known.jacobian = Linearization(leaf, gx)
        return found

    def matrix(self, x: Tensor, gx: Tensor, inputs: Inputs, *, transpose: bool) -> Jacobian:
        """The Jacobian at plain numbers, of one sample at least.

        Args:
            transpose: J^T y is asked for; else J y.
            gx: what is differentiated, as it was when the equation was solved.
        Raises:
            RuntimeError: it is another map by now.
        """
        common, by_graph, leaf = self.common, self.known.jacobian, leaf_at(x)
        if leaf is None:
            return Transformed(self.evaluate, x, inputs)
        if by_graph is None or not torch.equal(by_graph.x, x):
            by_graph = self.keep(leaf, inputs)
            require_same_value(by_graph.gx, gx, common.arithmetic, common.sizes)
        if not common.hooked:
            return by_graph
        there = Transformed(self.evaluate, x, inputs)
        if common.changes is None and common.truncation != 0:
            transposed = by_graph.transposed
            common.changes = products_differ(
                lambda w: [transposed(w)], lambda d: there.product(d[0]), x, [x], common.arithmetic
            )
        # Forward mode runs no hook on gradients.
        return by_graph if transpose else Products(there.product, by_graph.transposed)

    def require_true_products(self) -> None:
        """Raise where hooks make the products with the Jacobian those of no function."""
        if self.common.changes:
            raise RuntimeError(CHANGED)

    def opened(self, x: Tensor, gx: Tensor, inputs: Inputs, bad: Tensor | None = None) -> Opened:
        """g at x, as the levels that are active see it.

        Args:
            bad: (B,) bool, samples to evaluate where another one is, of what is linearized.
        """
        evaluate = self.evaluate
        if bad is not None:
            evaluate = functools.partial(self.evaluate_without, bad)
        return Transformed(evaluate, x, inputs, self.common.hidden)

    def evaluate_without(self, bad: Tensor, x: Tensor, *inputs: Tensor) -> Tensor:
        """What is differentiated, bad samples (B,) where another one is."""
        return self.bound(inputs, damped=True, bad=bad)(x)

    def merged(self, size: int, dims: Sequence[int | None], randomness: str) -> Equation:
        """The equation of the samples of a vmap side by side.

        Args:
            dims: the dimension of the vmap in each input.
        """
        return MergedEquation(self, size, tuple(dims), randomness)

    def with_sides(self, size: int) -> Equation:
        """The equation of `size` copies of the samples, for as many right-hand sides each."""
        return ManySides(self, size)


class Products(NamedTuple):
    """A Jacobian that is known by its products alone."""

    product: Apply
    transposed: Apply


class EquationOfMany(Equation):
    """An equation for several samples in the place of each one of another equation."""

    def __init__(self, one: Equation, size: int) -> None:
        self._one = one
        self._size = size
        self.common = one.common

    def solved(self, whole: Equation, x0: Tensor, inputs: Inputs) -> Inputs:
        """See Equation."""
        return self._one.solved(whole, x0, inputs)


class MergedEquation(EquationOfMany):
    """See Equation.merged; `one` is the equation of each sample of the vmap."""

    def __init__(
        self, one: Equation, size: int, dims: tuple[int | None, ...], randomness: str
    ) -> None:
        super().__init__(one, size)
        self._dims = dims
        self._vmap = functools.partial(torch.func.vmap, in_dims=(0, *dims), randomness=randomness)
        self.known = one.known.merged.setdefault((size, dims, randomness), Known())

    def bound(
        self, inputs: Sequence[Tensor], *, damped: bool, bad: Tensor | None = None
    ) -> Evaluate:
        """See Equation."""
        bad = self.known.bad if bad is None else bad
        if bad is not None:
            pairs = zip(inputs, self._dims, strict=True)
            inputs = [self._without_bad(t, dim, bad) for t, dim in pairs]

        def of_one(x: Tensor, *inputs: Tensor) -> Tensor:
            return self._one.bound(inputs, damped=damped)(x)

        def evaluate(x: Tensor) -> Tensor:
            if not self._size:
                return x.clone()
            if bad is not None:
                x = replace_rows(x, bad)
            apart = x.reshape(self._size, len(x) // self._size, *x.shape[1:])
            gx: Tensor = self._vmap(of_one)(apart, *inputs)
            return gx.flatten(0, 1)

        return evaluate

    def _without_bad(self, t: Tensor, dim: int | None, bad: Tensor) -> Tensor:
        """An input with what bad samples have in it replaced, as far as it is theirs alone."""
        apart = bad.reshape(self._size, -1)
        rows = apart.shape[1]
        if dim is None:
            mine = apart.all(0)
            return replace_rows(t, mine) if has_rows(t, rows) else t
        first = t.movedim(dim, 0)
        if first.dim() > 1 and first.shape[1] == rows:
            replaced = replace_rows(first.flatten(0, 1), bad).reshape(first.shape)
        else:
            replaced = replace_rows(first, apart.all(1))
        return replaced.movedim(0, dim)


class ManySides(EquationOfMany):
    """See Equation.with_sides; rows lie as (outer, size, B), `one` having (outer, B)."""

    def __init__(self, one: Equation, size: int, outer: int = 1) -> None:
        super().__init__(one, size)
        self._outer = outer

    def apart(self, t: Tensor) -> Tensor:
        """(size, outer B, ...)"""
        rows = t.reshape(self._outer, self._size, -1, *t.shape[1:])
        return rows.transpose(0, 1).flatten(1, 2)

    def of_each(self, apply: Apply) -> Apply:
        """What `apply` does to (outer B, ...), one side after the other."""

        def of_all(t: Tensor) -> Tensor:
            if len(t) == 0:
                return t.clone()
            found = torch.stack([apply(side) for side in self.apart(t)])
            rows = found.reshape(self._size, self._outer, -1, *found.shape[2:])
            return rows.transpose(0, 1).flatten(0, 2)

        return of_all

    def bound(
        self, inputs: Sequence[Tensor], *, damped: bool, bad: Tensor | None = None
    ) -> Evaluate:
        """See Equation; g need not be evaluated under a vmap here."""
        return self.of_each(self._one.bound(inputs, damped=damped))

    def matrix(self, x: Tensor, gx: Tensor, inputs: Inputs, *, transpose: bool) -> Jacobian:
        """See Equation."""
        first, there = self.apart(x)[0], self.apart(gx)[0]
        one = self._one.matrix(first, there, inputs, transpose=transpose)
        return Products(self.of_each(one.product), self.of_each(one.transposed))

    def merged(self, size: int, dims: Sequence[int | None], randomness: str) -> Equation:
        """See Equation; what the Jacobian is known of stays together."""
        one = self._one.merged(size, dims, randomness)
        return ManySides(one, self._size, size * self._outer)


def leaf_at(x: Tensor) -> Tensor | None:
    """A leaf with the numbers of x; None where plain autograd would record nothing of it.

    So it is below inference mode, even if torch says that the mode is off.
    """
    with torch.enable_grad():
        leaf = mark_as_tracking_leaf(x.detach().requires_grad_())
        return leaf if leaf.clone().requires_grad else None
