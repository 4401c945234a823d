"""A map at a point as torch.func sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.autograd.graft import MaybeTensor
from fpi_cuda.autograd.linear import Inputs

Pull = Callable[[Tensor], tuple[Tensor, ...]]


HIDDEN = (
    "fixed_point: inside torch.func transforms g depends on a tensor that it closes over and that "
    "cannot be followed (TorchScript, numpy, compiled code). Pass it to g as a z"
)


def has_slope(t: Tensor) -> bool:
    """Whether there are derivatives in t."""
    return t.is_floating_point() or t.is_complex()


class Transformed:
    """g at a point as torch.func sees it: its products are functions of x and of its inputs.

    Args:
        evaluate: g(x, *inputs).
        hidden: the last inputs, where nothing can stand in for them: leaves of plain autograd that
            g uses wherever it is evaluated. They get a first derivative there.
    """

    def __init__(
        self,
        evaluate: Callable[..., Tensor],
        x: Tensor,
        inputs: Inputs,
        hidden: Inputs = (),
    ) -> None:
        self._evaluate = evaluate
        # By a backward pass the level that they were wrapped for may have ended.
        self._point = tuple(map(transforms.unwrap_if_dead, (x, *inputs)))
        self._hidden = hidden
        self._places = [i for i, t in enumerate(self._point) if has_slope(t)]

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

    def _by_place(
        self, found: Sequence[Tensor], function: Callable[..., Tensor], weight: Tensor
    ) -> list[MaybeTensor]:
        """The derivative of <weight, function> at the point: what was found, and the hidden ones.

        Raises:
            RuntimeError: it shall have a derivative itself, in hidden ones too.
        """
        known: dict[int, MaybeTensor] = dict(zip(self._places, found, strict=True))
        if self._hidden and not transforms.active():
            if torch.is_grad_enabled():
                raise RuntimeError(HIDDEN)
            with torch.enable_grad():
                value = function(*(t.detach() for t in self._point))
            if value.requires_grad:
                more = torch.autograd.grad(value, self._hidden, weight, allow_unused=True)
                known.update(enumerate(more, len(self._point) - len(more)))
        return [known.get(i) for i in range(len(self._point))]

    def _along(self, function: Callable[..., Tensor], tangents: Sequence[MaybeTensor]) -> Tensor:
        """The derivative of a function of the point along tangents."""
        # Zeros with the dimensions of a vmap that the other tangents have, for in-place operations.
        zero = sum(torch.zeros_like(t).sum().real for t in tangents if t is not None)
        filled = (
            torch.zeros_like(self._point[i]) + zero if (t := tangents[i]) is None else t
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
        if not transforms.active() and not torch.is_grad_enabled():
            return self._pulled_alone(c)
        return self._by_place(self.pull(c), self._evaluate, c)

    def _pulled_alone(self, c: Tensor) -> list[MaybeTensor]:
        """The same of numbers alone, where plain autograd will do."""
        with torch.enable_grad():
            given = [t.detach() for t in self._point]
            for i in self._places:
                given[i].requires_grad_()
            gx = self._evaluate(*given)
        if not gx.requires_grad:
            return self._by_place(self.pull(c), self._evaluate, c)  # below inference mode
        moving = [given[i] for i in self._places] + list(self._hidden)
        found = torch.autograd.grad(gx, moving, c, allow_unused=True)
        places = [*self._places, *range(len(given) - len(self._hidden), len(given))]
        known = dict(zip(places, found, strict=True))
        return [known.get(i) for i in range(len(given))]

    def through_product(
        self, y: Tensor, *, transpose: bool
    ) -> Callable[[Tensor], list[MaybeTensor]]:
        """See Opened."""
        product = self._product_at(y, transpose=transpose)
        pull: Pull = torch.func.vjp(self._of_floating(product), *self._floating())[1]
        alone = self._product_at(y.detach(), transpose=transpose)
        return lambda s: self._by_place(pull(s), alone, s)

    def pushed(self, tangents: list[MaybeTensor]) -> Tensor:
        """See Opened."""
        return self._along(self._evaluate, tangents)

    def pushed_product(self, y: Tensor, tangents: list[MaybeTensor], *, transpose: bool) -> Tensor:
        """See Opened."""
        return self._along(self._product_at(y, transpose=transpose), tangents)
