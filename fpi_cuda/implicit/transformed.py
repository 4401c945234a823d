"""A map at a point as torch.func sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fpi_cuda.implicit.graft import MaybeTensor
from fpi_cuda.implicit.linear import Inputs

Pull = Callable[[Tensor], tuple[Tensor, ...]]


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

    @functools.cached_property
    def pull(self) -> Pull:
        """c -> the derivative of <c, g> in what is floating, by the graph of one evaluation."""
        pull: Pull = torch.func.vjp(self._of_floating(self._evaluate), *self._floating())[1]
        return pull

    def evaluated(self) -> Transformed:
        """This, with a graph that is there."""
        assert self.pull is not None
        return self

    def _floating(self) -> tuple[Tensor, ...]:
        return tuple(self._point[i] for i in self._places)

    def _of_floating(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function of the point, as one of what is floating in it."""

        def of_floating(*floating: Tensor) -> Tensor:
            given = dict(zip(self._places, floating, strict=True))
            return function(*(given.get(i, t) for i, t in enumerate(self._point)))

        return of_floating

    def _product_at(self, y: Tensor, *, transpose: bool) -> Callable[..., Tensor]:
        """J^T y or J y as a function of the point."""

        def product(x: Tensor, *inputs: Tensor) -> Tensor:
            there = Transformed(self._evaluate, x, inputs)
            return there.differentiable(y, transpose=transpose)

        return product

    def _by_place(self, found: Sequence[Tensor]) -> list[MaybeTensor]:
        known = dict(zip(self._places, found, strict=True))
        return [known.get(i) for i in range(len(self._point))]

    def _along(self, function: Callable[..., Tensor], tangents: Sequence[MaybeTensor]) -> Tensor:
        """The derivative of a function of the point along tangents."""
        filled = (
            torch.zeros_like(self._point[i]) if (t := tangents[i]) is None else t
            for i in self._places
        )
        given = self._of_floating(function)
        pushed: Tensor = torch.func.jvp(given, self._floating(), tuple(filled))[1]
        return pushed

    def transposed(self, c: Tensor) -> Tensor:
        """J^T c."""
        return self.pull(c)[0]

    def product(self, t: Tensor) -> Tensor:
        """J t; forward mode runs no backward hook, nor needs it a graph."""
        return self._along(self._evaluate, [t, *[None] * (len(self._point) - 1)])

    def differentiable(self, y: Tensor, *, transpose: bool) -> Tensor:
        """See Opened."""
        return self.transposed(y) if transpose else self.product(y)

    def pulled(self, c: Tensor) -> list[MaybeTensor]:
        """See Opened."""
        found, more = self._by_place(self.pull(c)), self._pull_more(c)
        return [*found[: len(found) - len(more)], *more]

    def through_product(
        self, y: Tensor, *, transpose: bool
    ) -> Callable[[Tensor], list[MaybeTensor]]:
        """See Opened."""
        product = self._of_floating(self._product_at(y, transpose=transpose))
        pull: Pull = torch.func.vjp(product, *self._floating())[1]
        return lambda s: self._by_place(pull(s))

    def pushed(self, tangents: list[MaybeTensor]) -> Tensor:
        """See Opened."""
        return self._along(self._evaluate, tangents)

    def pushed_product(self, y: Tensor, tangents: list[MaybeTensor], *, transpose: bool) -> Tensor:
        """See Opened."""
        return self._along(self._product_at(y, transpose=transpose), tangents)
