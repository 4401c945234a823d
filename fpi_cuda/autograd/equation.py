"""A fixed point as an equation: the map, all that it depends on, and how it is solved with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpi_cuda.autograd.backward_hooks import CHANGED, differ, waves
from fpi_cuda.autograd.flat_map import has_rows, replace_rows
from fpi_cuda.autograd.graph import mark_as_anchor
from fpi_cuda.autograd.linear import Inputs, Opened
from fpi_cuda.autograd.linearization import Jacobian, Linearization
from fpi_cuda.autograd.same_value import require_same_value, same_value
from fpi_cuda.autograd.strategy import Strategy
from fpi_cuda.autograd.transformed import Transformed
from fpi_cuda.recomputed import tensors_saved_as_they_are

Evaluate = Callable[[Tensor], Tensor]
"""x (B, D) -> g(x) (B, D), all else being bound."""


class Equation:
    """x = g(x, *inputs), for FixedPoint and Linear; both ask for it at every level of torch.func.

    Attributes:
        strategy: strategy(status, x): how linear systems are solved for samples whose solve ended
            so, at plain numbers.
        truncation: that of the strategy.
        arithmetic: what g is evaluated in.
        sizes: of the parts of the state, which add up to D.
        once_only: a backward pass may come where g cannot be evaluated.
        hooked: hooks in g may change gradients.
        changes: whether they do, once that was seen.
        bad: (B,) bool, samples that failed, to be evaluated where another one is; None: none.
        hidden: the last inputs, where nothing can stand in for them.
    """

    strategy: Callable[[Tensor, Tensor], Strategy]
    truncation: int | None
    arithmetic: torch.dtype
    sizes: Sequence[int]
    once_only = False
    hidden: Inputs = ()
    bad: Tensor | None = None
    hooked = False
    changes: list[bool]

    def bound(self, inputs: Sequence[Tensor], *, damped: bool) -> Evaluate:
        """g with these inputs, what does not depend on x done once.

        Args:
            damped: what is differentiated, which may be a few damped steps of g.
        """
        raise NotImplementedError

    def solved(self, x0: Tensor, inputs: Inputs) -> Inputs:
        """x (B, D), what is differentiated at x, status (B,), and more of plain numbers."""
        return self.solved_of(self, x0, inputs)

    def solved_of(self, whole: Equation, x0: Tensor, inputs: Inputs) -> Inputs:
        """The same of an equation that is this one, or that of several like this side by side."""
        raise NotImplementedError

    def look(self) -> None:
        """Somebody asks for derivatives of the solution: see whether they are whole."""

    def leave_out(self, bad: Tensor, x: Tensor, inputs: Inputs) -> None:
        """Evaluate bad samples where another one is from now on, if that leaves the others alone.

        Their derivative is zero times whatever g's derivative is there, which may be NaN.
        """
        if not bool(bad.any()) or bool(bad.all()):
            return
        # Not under no_grad: autocast would cache weights without their graph.
        with torch.enable_grad():
            expected = self.evaluate(x, *inputs)[~bad]
            self.bad = bad
            moved = self.evaluate(x, *inputs)[~bad]
            if not same_value(moved, expected, x.dtype, self.sizes):
                self.bad = None

    def evaluate(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """What is differentiated."""
        return self.bound(inputs, damped=True)(x)

    def recorded(self, leaf: Tensor, inputs: Inputs) -> Tensor:
        """The same at a leaf, with its graph."""
        with torch.enable_grad(), tensors_saved_as_they_are():
            return self.evaluate(leaf, *(t.detach() for t in inputs))

    def matrix(self, x: Tensor, gx: Tensor, inputs: Inputs, *, transpose: bool) -> Jacobian:
        """The Jacobian at plain numbers.

        Args:
            transpose: J^T y is asked for; else J y.
            gx: what is differentiated, as it was when the equation was solved.
        Raises:
            RuntimeError: it is another map by now.
        """
        if len(x) == 0:
            return Linearization(x, x)
        leaf = leaf_at(x)
        there = Transformed(self.evaluate, x, inputs)
        if leaf is None:
            return there
        value = self.recorded(leaf, inputs)
        require_same_value(value, gx, self.arithmetic, self.sizes)
        by_graph = Linearization(leaf, value)
        if not self.hooked:
            return by_graph
        if not self.changes and self.truncation != 0:
            w, t = waves(value, 0), waves(leaf, 1)
            pushed, pulled = there.product(t), by_graph.transposed(w)
            self.changes.append(differ(pushed, w, [pulled], [t], self.arithmetic))
        return by_graph if transpose else ByForwardMode(by_graph, there)

    def require_true_products(self) -> None:
        """Raise where hooks make the products with the Jacobian those of no function."""
        if any(self.changes):
            raise RuntimeError(CHANGED)

    def opened(self, x: Tensor, gx: Tensor, inputs: Inputs, bad: Tensor | None = None) -> Opened:
        """g at x, as the levels that are active see it.

        Args:
            bad: (B,) bool, samples to evaluate where another one is.
        """
        return Transformed(self.evaluate, x, inputs, self.hidden)

    def at(self, opened: Opened) -> Equation:
        """This equation, for whatever asks for g at that point."""
        return self

    def sees(self, bad: Tensor) -> bool:
        """Whether samples failed (B,) that g can be evaluated without."""
        return False

    def merged(self, size: int, dims: Sequence[int | None], randomness: str) -> Equation:
        """The equation of the samples of a vmap side by side.

        Args:
            dims: the dimension of the vmap in each input.
        """
        return MergedEquation(self, size, dims, randomness)


class ByForwardMode(NamedTuple):
    """A Jacobian whose products are those of forward mode, which runs no hook on gradients."""

    by_graph: Jacobian
    there: Transformed

    def product(self, t: Tensor) -> Tensor:
        """J t."""
        return self.there.product(t)

    def transposed(self, c: Tensor) -> Tensor:
        """J^T c."""
        return self.by_graph.transposed(c)


SHARED = (
    "strategy", "look", "truncation", "arithmetic", "sizes", "once_only", "hooked", "changes",
    "hidden",
)  # fmt: skip
"""What is the same for an equation and for that of several side by side."""


class MergedEquation(Equation):
    """See Equation.merged; `one` is the equation of each sample of the vmap."""

    def __init__(
        self, one: Equation, size: int, dims: Sequence[int | None], randomness: str
    ) -> None:
        self._one = one
        self._size = size
        self._dims = dims
        self._vmap = functools.partial(torch.func.vmap, in_dims=(0, *dims), randomness=randomness)
        for name in SHARED:
            setattr(self, name, getattr(one, name))

    def bound(self, inputs: Sequence[Tensor], *, damped: bool) -> Evaluate:
        """See Equation."""
        bad = self.bad
        if bad is not None:
            inputs = [self._without_bad(t, dim) for t, dim in zip(inputs, self._dims, strict=True)]

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

    def _without_bad(self, t: Tensor, dim: int | None) -> Tensor:
        """An input with what bad samples have in it replaced, as far as it is theirs alone."""
        assert self.bad is not None
        bad = self.bad.reshape(self._size, -1)
        rows = bad.shape[1]
        if dim is None:
            mine = bad.all(0)
            return replace_rows(t, mine) if has_rows(t, rows) else t
        first = t.movedim(dim, 0)
        if first.dim() > 1 and first.shape[1] == rows:
            flat = replace_rows(first.flatten(0, 1), self.bad)
            first = flat.reshape(first.shape)
        else:
            mine = bad.all(1)
            first = replace_rows(first, mine)
        return first.movedim(0, dim)

    def solved_of(self, whole: Equation, x0: Tensor, inputs: Inputs) -> Inputs:
        """See Equation."""
        return self._one.solved_of(whole, x0, inputs)


def leaf_at(x: Tensor) -> Tensor | None:
    """A leaf with the numbers of x; None where plain autograd would record nothing of it.

    So it is below inference mode, even if torch says that the mode is off.
    """
    with torch.enable_grad():
        leaf = mark_as_anchor(x.detach().requires_grad_())
        return leaf if leaf.clone().requires_grad else None
