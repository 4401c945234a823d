"""A map at a point as torch.func sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
        self._pull = self._pull_through(evaluate)

    def _pull_through(self, function: Callable[..., Tensor]) -> Pull:
        """v -> the derivative of <v, function> in what is floating, at the point."""

        def of_floating(*floating: Tensor) -> Tensor:
            given = dict(zip(self._places, floating, strict=True))
            return function(*(given.get(i, t) for i, t in enumerate(self._point)))

        pull: Pull = torch.func.vjp(of_floating, *(self._point[i] for i in self._places))[1]
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

    def through_product(
        self, y: Tensor, *, transpose: bool
    ) -> Callable[[Tensor], list[MaybeTensor]]:
        """See Opened."""
        pull = self._pull_through_product(y, transpose=transpose)
        return lambda s: self._by_place(pull(s))

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
