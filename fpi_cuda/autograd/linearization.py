"""J = dg/dx at one x, as products with J and its transpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fpi_cuda.autograd.graft import ONCE, MaybeTensor, Tape, graft, stand_in

# <J^T w, J^T w> and <w, J J^T w> may differ by rounding, in g too (autocast), not by this share.
SAME_MATRIX = 0.1
# Of the largest change by rounding that a few products show: chance may make them small.
ROUNDINGS = 4.0

Pull = Callable[[Tensor], list[MaybeTensor]]


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
        self._weight: Tensor | None = None
        self._pulled: Tensor | None = None

    def transposed(self, c: Tensor) -> Tensor:
        """J^T c."""
        if not self.gx.requires_grad:
            return torch.zeros_like(c)
        return gradient(self.gx, self.x, c)

    def product(self, t: Tensor) -> Tensor:
        """J t: the derivative of J^T w in w, along t."""
        if self._weight is None:
            with torch.enable_grad():
                self._weight = torch.zeros_like(self.gx).requires_grad_()
                tape = Tape([self.gx] if self.gx.requires_grad else [], [self.x])
                weights: list[MaybeTensor] = [self._weight] * len(tape.outputs)
                (self._pulled,) = tape.pull(weights, create_graph=True)
                self._require_one_matrix()
        return self._along(t)

    def _along(self, t: Tensor) -> Tensor:
        if self._pulled is None or not self._pulled.requires_grad:
            return torch.zeros_like(t)
        assert self._weight is not None
        return gradient(self._pulled, self._weight, t)

    def _require_one_matrix(self) -> None:
        """Raise unless <J^T w, J^T w> = <w, J J^T w> for some w.

        A backward of the user's own that autograd cannot see through makes J t too small.
        """
        with torch.no_grad():
            w = torch.arange(1, self.gx.numel() + 1, device=self.gx.device).sin()
            w = w.reshape(self.gx.shape).to(self.gx.dtype)
            p = self.transposed(w)
            q = self._along(p)
            size = inner(p, p)
            gap = (inner(w, q) - size).abs() - SAME_MATRIX * size
            sizes = size.sqrt() + inner(q, q).sqrt()
            if bool(gap <= 100 * torch.finfo(w.dtype).eps * inner(w, w).sqrt() * sizes):
                return
            # It may round to fewer digits inside, or be what is left of numbers that cancel.
            off_p = torch.stack([inner(o, o).sqrt() for o in offs(self.transposed, w, p)])
            off_q = torch.stack([inner(w, o).abs() for o in offs(self._along, p, q)])
            if bool(gap > ROUNDINGS * (off_p.amax() * size.sqrt() + off_q.amax())):
                raise RuntimeError(ONCE)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> in float64."""
    return (a.double() * b.double()).sum()


def offs(apply: Callable[[Tensor], Tensor], t: Tensor, product: Tensor) -> list[Tensor]:
    """What a linear map's own rounding changes in `product`, apply(t), a few times over."""
    # Multiples that are no powers of two are rounded to other neighbours.
    return [apply(t * k) / k - product for k in (1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875)]


def gradient(out: Tensor, leaf: Tensor, weight: Tensor) -> Tensor:
    """The derivative of <weight, out> in the leaf; differentiable in weight under grad mode."""
    (found,) = torch.autograd.grad(
        out,
        leaf,
        weight,
        retain_graph=True,
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    return torch.zeros_like(weight) if found is None else found


class OpenLinearization(Linearization):
    """One that can itself be differentiated, in x and in what else g depends on.

    Args:
        x, gx: leaf and value, as above.
        leaves: what gx was computed from besides x; see graft.
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
        self.leaves = [x, *leaves]
        self.originals = [x_original, *originals]
        self.tape = Tape([gx] if gx.requires_grad else [], self.leaves)

    def differentiable(self, y: Tensor, *, transpose: bool) -> Tensor:
        """See Opened."""
        (found,) = self._reattached(lambda y: [self._product(y, transpose=transpose)], y)
        return torch.zeros_like(y) if found is None else found

    def pulled(self, c: Tensor) -> list[MaybeTensor]:
        """See Opened."""
        outputs = self.tape.outputs
        return self._reattached(lambda c: self.tape.pull([c] * len(outputs), create_graph=True), c)

    def through_product(self, y: Tensor, *, transpose: bool) -> Pull:
        """See Opened."""

        def slopes(left: Tensor, right: Tensor) -> list[MaybeTensor]:
            product = self._moving_product(left, transpose=True)
            return Tape(product, self.leaves).pull([right] * len(product), create_graph=True)

        return lambda s: self._reattached(slopes, *((y, s) if transpose else (s, y)))

    def pushed(self, tangents: list[MaybeTensor]) -> Tensor:
        """See Opened."""
        return self._pushed(lambda: self.tape.outputs, [], tangents)

    def pushed_product(self, y: Tensor, tangents: list[MaybeTensor], *, transpose: bool) -> Tensor:
        """See Opened."""
        return self._pushed(lambda y: self._moving_product(y, transpose=transpose), [y], tangents)

    def _pushed(
        self,
        make: Callable[..., list[Tensor]],
        given: list[MaybeTensor],
        tangents: list[MaybeTensor],
    ) -> Tensor:
        """The derivative of what is made, if that is anything, along tangents of the leaves."""

        def push(*aside: MaybeTensor) -> list[MaybeTensor]:
            outputs = make(*aside[: len(given)])
            return Tape(outputs, self.leaves).push([*aside[len(given) :]]) or [None]

        (found,) = self._reattached(push, *given, *tangents)
        return torch.zeros_like(self.gx) if found is None else found

    def _product(self, y: Tensor, *, transpose: bool) -> MaybeTensor:
        """J^T y or J y as a function of y and of the leaves; None: zero."""
        if not self.tape.outputs:
            return None
        if transpose:
            return self.tape.pull([y], create_graph=True)[0]
        return self.tape.push([y, *[None] * (len(self.leaves) - 1)])[0]

    def _moving_product(self, y: Tensor, *, transpose: bool) -> list[Tensor]:
        """The same in a list, which is empty where there is nothing to differentiate."""
        product = self._product(y, transpose=transpose)
        return [product] if product is not None and product.requires_grad else []

    def _reattached(
        self, make: Callable[..., list[MaybeTensor]], *given: MaybeTensor
    ) -> list[MaybeTensor]:
        """make(*given), from stand-ins and the leaves, as a function of given and the originals."""
        aside = [None if t is None else stand_in(t) for t in given]
        with torch.enable_grad():
            outputs = make(*aside)
        leaves = [*self.leaves, *(t for t in aside if t is not None)]
        return graft(outputs, leaves, [*self.originals, *(t for t in given if t is not None)])
