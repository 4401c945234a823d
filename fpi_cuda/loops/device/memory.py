"""The memory that a captured solve works in: its iterates, and copies of what g reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fpi_cuda.autograd import BoundMap
from fpi_cuda.loops.device.graphs import Replayable, Session
from fpi_cuda.loops.device.method import Method
from fpi_cuda.loops.stepping import allocate, apart_from, reset, step
from fpi_cuda.solution import SolveResult


class Arena:
    """Where the iterates of one solve lie, at addresses that stay.

    Attributes:
        x: (B, D) the iterate.
        work: the solver's arrays.
        rounds: (1,) int32, rounds of the captured loop.
    """

    def __init__(self, x0: Tensor, method: Method) -> None:
        with torch.inference_mode(False), torch.no_grad():
            start = x0.detach()
            self.x = torch.empty_like(start, memory_format=torch.contiguous_format)
            self.work = allocate(self.x, method.solver, 0.0)
            self.work.scratch = method.backend.scratch(self.x)
            self.rounds = torch.zeros(1, dtype=torch.int32, device=x0.device)
        self._method = method

    def begin(self, x0: Tensor, atol: float | Tensor) -> None:
        """Make it a solve from x0 that has not begun."""
        self.x.copy_(x0)
        reset(self.work, self.x, atol)

    def step(self, gx: Tensor) -> None:
        """One step of every active sample, from g at x."""
        method = self._method
        step(
            method.backend, method.solver, self.work, self.x, apart_from(self.x, gx), None,
            method.rtol, method.max_steps,
        )  # fmt: skip

    def loop(self, session: Session, body: Callable[[], None]) -> Replayable:
        """`body` captured, repeated until every sample has stopped."""
        return session.capture_loop(body, self.work.status, self.rounds, self._method.max_steps)

    def result(self) -> SolveResult:
        """Copies that the next solve leaves alone."""
        work = self.work
        return SolveResult(
            *map(torch.clone, (work.best, work.status, work.num_steps, work.residual))
        )

    def tensors(self) -> list[Tensor]:
        """All of it."""
        arrays = [array for array in vars(self.work).values() if array is not None]
        return [self.x, self.rounds, *arrays]


class Standins:
    """Copies of what g reads besides x, at addresses that stay.

    Attributes:
        leaves: the tensors.
    """

    def __init__(self, bound_map: BoundMap) -> None:
        self._device = bound_map.layout.device
        with torch.inference_mode(False), torch.no_grad():
            self.leaves = [
                self._like(t) for t in pytree.tree_leaves(bound_map.read) if self._copied(t)
            ]

    def map_of(self, bound_map: BoundMap) -> BoundMap:
        """`bound_map` on the copies, which get its numbers."""
        remaining = iter(self.leaves)

        def standin(t: Any) -> Any:
            if not self._copied(t):
                return t
            copy = next(remaining)
            with torch.no_grad():
                unexpanded(copy).copy_(unexpanded(t.detach()))
            return copy

        return bound_map.reading(pytree.tree_map(standin, bound_map.read))

    def _copied(self, t: Any) -> bool:
        # Numbers of the host are compared one by one, for a graph holds them as constants.
        return isinstance(t, Tensor) and t.device == self._device

    def _like(self, t: Tensor) -> Tensor:
        return empty_with_strides(t.detach()).requires_grad_(t.requires_grad)


# Gaps between the numbers of a view are kept up to this many times its own size.
MOST_GAPS = 4


def empty_with_strides(t: Tensor) -> Tensor:
    """Memory of its own for a tensor like t, with the strides of t where that is affordable.

    What an op computes does not depend on strides, but which kernel does, and so its rounding.
    """
    base = unexpanded(t)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(base.shape, base.stride(), strict=True))
    if base.numel() == 0 or extent > MOST_GAPS * base.numel():
        return torch.empty_like(t, memory_format=torch.preserve_format)
    memory = torch.empty_strided(base.shape, base.stride(), dtype=t.dtype, device=t.device)
    return memory.expand(t.shape)


def unexpanded(t: Tensor) -> Tensor:
    """t without the repetitions that expand made."""
    for dim, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory, each storage once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())
