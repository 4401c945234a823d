"""A map at a point as torch.func sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fpi_cuda.autograd.reattach import MaybeTensor
from fpi_cuda.evaluation import transforms

Inputs = tuple[Tensor, ...]

Pull = Callable[[Tensor], tuple[Tensor, ...]]

Function = Callable[..., tuple[Tensor, Tensor]]
"""(x, *inputs) -> a value, and g there."""

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
        self, evaluate: Callable[..., Tensor], x: Tensor, inputs: Inputs, hidden: Inputs = ()
    ) -> None:
        self._evaluate = evaluate
        # By a backward pass the level that they were wrapped for may have ended.
        self._point = tuple(map(transforms.unwrap_if_dead, (x, *inputs)))
        self._hidden = hidden
        self._places = [i for i, t in enumerate(self._point) if has_slope(t)]
        self._gx: Tensor | None = None

    @property
    def gx(self) -> Tensor:
        """g there, as the latest product has found it."""
        if self._gx is None:
            self.pull  # noqa: B018
        assert self._gx is not None
        return self._gx

    @functools.cached_property
    def pull(self) -> Pull:
        """c -> the derivative of <c, g> in what is floating, by the graph of one evaluation."""
        return self._pull_of(self._value)

    def _value(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        gx = self._evaluate(x, *inputs)
        return gx, gx

    def _product_with(self, y: Tensor, *, transpose: bool) -> Function:
        """J^T y or J y as a function of the point."""

        def product(x: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            there = Transformed(self._evaluate, x, inputs)
            return there.differentiable(y, transpose=transpose), there.gx

        return product

    def _of_floating(self, function: Function) -> tuple[Function, Inputs]:
        """A function of the point as one of what is floating in it, and that."""

        def of_floating(*floating: Tensor) -> tuple[Tensor, Tensor]:
            given = dict(zip(self._places, floating, strict=True))
            return function(*(given.get(i, t) for i, t in enumerate(self._point)))

        return of_floating, tuple(self._point[i] for i in self._places)

    def _pull_of(self, function: Function) -> Pull:
        """c -> the derivative of <c, function> in what is floating."""
        given, floating = self._of_floating(function)
        _, pull, self._gx = torch.func.vjp(given, *floating, has_aux=True)  # type: ignore[misc]
        return pull

    def _along(self, function: Function, tangents: Sequence[MaybeTensor]) -> Tensor:
        """The derivative of a function of the point along tangents."""
        # Zeros with the dimensions of a vmap that the other tangents have, for in-place operations.
        zero = transforms.zero_of(self._point[0], *(t for t in tangents if t is not None))
        along = tuple(
            torch.zeros_like(self._point[i]) + zero if (t := tangents[i]) is None else t
            for i in self._places
        )
        given, floating = self._of_floating(function)
        pushed: Tensor
        _, pushed, self._gx = torch.func.jvp(given, floating, along, has_aux=True)  # type: ignore[misc]
        return pushed

    def _by_place(
        self, found: Sequence[Tensor], function: Function, weight: Tensor
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
                value, _ = function(*(t.detach() for t in self._point))
            if value.requires_grad:
                more = torch.autograd.grad(value, self._hidden, weight, allow_unused=True)
                known.update(enumerate(more, len(self._point) - len(more)))
        return [known.get(i) for i in range(len(self._point))]

    def transposed(self, c: Tensor) -> Tensor:
        """J^T c."""
        return self.pull(c)[0]

    def product(self, t: Tensor) -> Tensor:
        """J t; forward mode runs no backward hook, nor needs it a graph."""
        return self.pushed([t, *[None] * (len(self._point) - 1)])

    def differentiable(self, y: Tensor, *, transpose: bool) -> Tensor:
        """See OpenLinearization."""
        return self.transposed(y) if transpose else self.product(y)

    def pulled(self, c: Tensor) -> list[MaybeTensor]:
        """See OpenLinearization."""
        return self._by_place(self.pull(c), self._value, c)

    def through_product(
        self, y: Tensor, *, transpose: bool
    ) -> Callable[[Tensor], list[MaybeTensor]]:
        """See OpenLinearization."""
        pull = self._pull_of(self._product_with(y, transpose=transpose))
        alone = self._product_with(y.detach(), transpose=transpose)
        return lambda s: self._by_place(pull(s), alone, s)

    def pushed(self, tangents: list[MaybeTensor]) -> Tensor:
        """See OpenLinearization."""
        return self._along(self._value, tangents)

    def pushed_product(self, y: Tensor, tangents: list[MaybeTensor], *, transpose: bool) -> Tensor:
        """See OpenLinearization."""
        return self._along(self._product_with(y, transpose=transpose), tangents)
