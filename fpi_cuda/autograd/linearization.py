"""J = dg/dx at one x, as products with J and its transpose."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fpi_cuda.autograd.one_matrix import differ, waves
from fpi_cuda.autograd.reattach import ONCE, MaybeTensor, Tape, gradients, reattached

# <J^T w, J^T w> and <w, J J^T w> may differ by rounding, in g too (autocast), not by this share.
SAME_MATRIX = 0.1

Pull = Callable[[Tensor], list[MaybeTensor]]


run_backward = torch.autograd.Variable._execution_engine.run_backward


class Jacobian(Protocol):
    """Products with a batch of square matrices, (B, D) -> (B, D)."""

    def product(self, t: Tensor) -> Tensor:
        """J t."""

    def transposed(self, c: Tensor) -> Tensor:
        """J^T c."""


class Linearization:
    """Products with dg/dx, from the graph of one evaluation of g, which is kept.

    Under grad mode they are differentiable in the vector, and in nothing else.

    Args:
        x: (B, D) leaf that requires grad.
        gx: (B, D) computed from it.
    """

    def __init__(self, x: Tensor, gx: Tensor) -> None:
        self.x = x
        self.gx = gx

    def transposed(self, c: Tensor) -> Tensor:
        """J^T c."""
        if torch.is_grad_enabled() or not self.gx.requires_grad:
            return gradient(self.gx, self.x, c)
        # torch.autograd.grad without its look at what is given, at every step of an adjoint.
        (found,) = run_backward(
            (self.gx,), (c,), True, False, (self.x,), allow_unreachable=True, accumulate_grad=False
        )
        return torch.zeros_like(c) if found is None else found

    def product(self, t: Tensor) -> Tensor:
        """J t: the derivative of J^T w in w, along t."""
        pulled, weight = self._transpose
        return gradient(pulled, weight, t)

    @functools.cached_property
    def _transpose(self) -> tuple[MaybeTensor, Tensor]:
        """J^T w with its graph, and w, a leaf."""
        with torch.enable_grad():
            weight = torch.zeros_like(self.gx).requires_grad_()
            (pulled,) = Tape([self.gx], [self.x]).pull([weight], create_graph=True)
        with torch.no_grad():
            w = waves(self.gx, 0)
            # Along J^T w itself nothing cancels, and made of size 1, nothing vanishes.
            d = self.transposed(w)
            if d.numel():
                d = d / d.abs().amax().clamp_min(torch.finfo(d.dtype).tiny)
            if differ(
                lambda w: [self.transposed(w)],
                lambda d: gradient(pulled, weight, d[0]),
                w, [d], SAME_MATRIX, 100 * torch.finfo(w.dtype).eps,
            ):  # fmt: skip
                # A backward of the user's own that autograd cannot see through.
                raise RuntimeError(ONCE)
        return pulled, weight


def gradient(out: MaybeTensor, leaf: Tensor, weight: Tensor) -> Tensor:
    """The derivative of <weight, out> in the leaf; differentiable in weight under grad mode."""
    (found,) = gradients([out], [leaf], [weight], create_graph=torch.is_grad_enabled())
    return torch.zeros_like(weight) if found is None else found


class OpenLinearization(Linearization):
    """One that can itself be differentiated, in x and in what else g depends on.

    A list that is returned or taken begins with what belongs to x; the inputs follow.

    Args:
        x, gx: leaf and value, as above.
        leaves: what gx was computed from besides x; see reattached.
        x_original, originals: what x and the leaves stand in for.
    """

    def __init__(
        self,
        x: Tensor,
        gx: Tensor,
        leaves: Sequence[Tensor],
        x_original: Tensor,
        originals: Sequence[Tensor],
    ) -> None:
        super().__init__(x, gx)
        self._originals = [x_original, *originals]
        self._tape = Tape([gx], [x, *leaves])

    def differentiable(self, y: Tensor, *, transpose: bool) -> Tensor:
        """J^T y or J y."""
        (found,) = self._reattached(lambda y: [self._product(y, transpose=transpose)], y)
        return torch.zeros_like(y) if found is None else found

    def pulled(self, c: Tensor) -> list[MaybeTensor]:
        """The derivative of <c, g>."""
        return self._reattached(lambda c: self._tape.pull([c], create_graph=True), c)

    def through_product(self, y: Tensor, *, transpose: bool) -> Pull:
        """s -> the derivative of <J^T y, s> or <J y, s>, y held."""

        def slopes(left: Tensor, right: Tensor) -> list[MaybeTensor]:
            product = self._product(left, transpose=True)
            return Tape([product], self._tape.leaves).pull([right], create_graph=True)

        return lambda s: self._reattached(slopes, *((y, s) if transpose else (s, y)))

    def pushed(self, tangents: list[MaybeTensor]) -> Tensor:
        """The derivative of g along tangents."""
        return self._pushed(lambda: self.gx, [], tangents)

    def pushed_product(self, y: Tensor, tangents: list[MaybeTensor], *, transpose: bool) -> Tensor:
        """The derivative of J^T y or J y, y held, along tangents."""
        return self._pushed(lambda y: self._product(y, transpose=transpose), [y], tangents)

    def _pushed(
        self, make: Callable[..., MaybeTensor], given: list[Tensor], tangents: list[MaybeTensor]
    ) -> Tensor:
        """The derivative of what is made of `given` along tangents of the leaves."""

        def push(*aside: Any) -> list[MaybeTensor]:
            made = make(*aside[: len(given)])
            return Tape([made], self._tape.leaves).push([*aside[len(given) :]])

        (found,) = self._reattached(push, *given, *tangents)
        return torch.zeros_like(self.gx) if found is None else found

    def _product(self, y: Tensor, *, transpose: bool) -> MaybeTensor:
        """J^T y or J y as a function of y and of the leaves; None: zero."""
        if transpose:
            return self._tape.pull([y], create_graph=True)[0]
        return self._tape.push([y, *[None] * (len(self._originals) - 1)])[0]

    def _reattached(
        self, make: Callable[..., list[MaybeTensor]], *given: MaybeTensor
    ) -> list[MaybeTensor]:
        return reattached(make, given, self._tape.leaves, self._originals)
