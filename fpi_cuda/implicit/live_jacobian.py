"""Matrices for the samples of all vmaps side by side, whichever torch.func levels are live."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.implicit.linearization import Jacobian, Linearization
from fpi_cuda.implicit.scaling import Apply
from fpi_cuda.transforms import Frame, Restore


class LiveJacobian(Jacobian, Protocol):
    """A matrix for plain (N, D) that may have to be evaluated at the levels live by then."""

    def bound(self, restored: Restore) -> LiveJacobian:
        """The matrix for use outside of all levels; `restored` enters them again."""


class PlainJacobian:
    """A matrix that is known from a plain graph, whatever levels are live."""

    def __init__(self, matrix: Jacobian) -> None:
        self._matrix = matrix

    def product(self, t: Tensor) -> Tensor:
        """M t."""
        return self._matrix.product(t)

    def transposed(self, c: Tensor) -> Tensor:
        """M^T c."""
        return self._matrix.transposed(c)

    def bound(self, restored: Restore) -> PlainJacobian:
        """See LiveJacobian."""
        return self


class TransposedJacobian:
    """The transpose of a matrix."""

    def __init__(self, matrix: LiveJacobian) -> None:
        self._matrix = matrix

    def product(self, t: Tensor) -> Tensor:
        """M^T t."""
        return self._matrix.transposed(t)

    def transposed(self, c: Tensor) -> Tensor:
        """M c."""
        return self._matrix.product(c)

    def bound(self, restored: Restore) -> TransposedJacobian:
        """See LiveJacobian."""
        return TransposedJacobian(self._matrix.bound(restored))


class LevelJacobian:
    """A matrix known from the graph of some transform, where plain autograd records nothing.

    That is so for transforms entered under no_grad.

    Args:
        pull: c -> M^T c at the current levels.
        frame: where (N, D) belongs at these levels.
    """

    def __init__(self, pull: Apply, frame: Frame) -> None:
        self._pull = pull
        self._frame = frame
        self._restored: Restore | None = None
        self._push: Callable[[Tensor], tuple[Tensor]] | None = None

    def transposed(self, c: Tensor) -> Tensor:
        """M^T c."""
        assert self._restored is not None
        with self._restored():
            return self._frame.lower(self._pull(self._frame.raised(c)))

    def product(self, t: Tensor) -> Tensor:
        """M t, the derivative of M^T c in c, along t."""
        assert self._restored is not None
        with self._restored():
            if self._push is None:
                nothing = torch.zeros_like(self._frame.raised(t))
                self._push = torch.func.vjp(self._pull, nothing)[1]
            return self._frame.lower(self._push(self._frame.raised(t))[0])

    def bound(self, restored: Restore) -> LevelJacobian:
        """See LiveJacobian."""
        other = copy.copy(self)
        other._restored = restored
        return other


class SpreadJacobian:
    """A matrix applied to several right-hand sides at once."""

    def __init__(self, matrix: LiveJacobian, spread: Spread) -> None:
        self._matrix = matrix
        self._spread = spread

    def product(self, t: Tensor) -> Tensor:
        """M t."""
        return self._each(self._matrix.product, t)

    def transposed(self, c: Tensor) -> Tensor:
        """M^T c."""
        return self._each(self._matrix.transposed, c)

    def bound(self, restored: Restore) -> SpreadJacobian:
        """See LiveJacobian."""
        return SpreadJacobian(self._matrix.bound(restored), self._spread)

    def _each(self, apply: Apply, t: Tensor) -> Tensor:
        parts = [apply(part) for part in self._spread.apart(t)]
        return self._spread.together(torch.stack(parts))


class FlatJacobian:
    """A matrix on (..., D), for (N, D)."""

    def __init__(self, matrix: Linearization) -> None:
        self._matrix = matrix

    def product(self, t: Tensor) -> Tensor:
        """M t."""
        return self._matrix.product(t.reshape(self._matrix.gx.shape)).reshape(t.shape)

    def transposed(self, c: Tensor) -> Tensor:
        """M^T c."""
        return self._matrix.transposed(c.reshape(self._matrix.gx.shape)).reshape(c.shape)


class Spread:
    """How N samples become N R: each of them with R right-hand sides.

    Args:
        sizes: dimensions whose product is N R, as they lie in a plain tensor.
        added: which of them number the right-hand sides.
    """

    def __init__(self, sizes: Sequence[int], added: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._added = tuple(added)
        self.num_sides = math.prod(self._sizes[i] for i in self._added)

    def rows(self, t: Tensor) -> Tensor:
        """(N,) repeated for every right-hand side: (N R,)."""
        kept = [1 if i in self._added else size for i, size in enumerate(self._sizes)]
        with transforms.truncated(0):
            return t.reshape(kept).expand(self._sizes).reshape(-1)

    def apart(self, t: Tensor) -> Tensor:
        """(N R, D) -> (R, N, D)."""
        front = t.reshape(*self._sizes, -1).movedim(self._added, self._front)
        return front.reshape(self.num_sides, -1, t.shape[-1])

    def together(self, t: Tensor) -> Tensor:
        """(R, N, D) -> (N R, D)."""
        added = [self._sizes[i] for i in self._added]
        kept = [size for i, size in enumerate(self._sizes) if i not in self._added]
        split = t.reshape(*added, *kept, -1).movedim(self._front, self._added)
        return split.reshape(-1, t.shape[-1])

    @property
    def _front(self) -> tuple[int, ...]:
        return tuple(range(len(self._added)))
