"""Buffers that an evaluation of g changes: they change once per solve, as in one call of a module.

Batch norm counts its batches and averages their statistics; spectral norm goes on with its power
iteration, and its weight with it. A solve evaluates g many times. Each evaluation starts from the
buffers of the first, so g stays one map, and what remains is what the last one made of them, which
is at the solution where a derivative is asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.same_value import version_of

LARGEST = 1 << 20
"""Elements of a buffer of which every solve makes a copy in case that it moves; of a larger one it
does so once a solve has moved it."""


_large_movers: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""Large buffers, by name, that a solve has moved."""


class Kept:
    """A buffer as the first evaluation found it.

    A large one that nobody knew to move is kept as the first evaluation left it: then this is what
    remains of the solve.
    """

    def __init__(self, module: nn.Module, name: str, t: Tensor) -> None:
        self.module, self.name, self.t = module, name, t
        # Kernels of norms write to buffers without being counted; batch norm counts its batches.
        counter = module.num_batches_tracked if isinstance(module, _BatchNorm) else None
        self.watched = [t]
        if counter is not None and not counter.is_inference():
            self.watched.append(counter)
        self.versions = [version_of(w) for w in self.watched]
        norm = isinstance(module, _NormBase)
        self.moved = norm and len(self.watched) == 1
        large = t.numel() > LARGEST and not norm
        self.late = large and name not in _large_movers.get(module, ())
        self.numbers = None if self.late else copy_of(t)

    def look(self) -> None:
        """Note whether it was written to, or another tensor was put in its place."""
        if self.moved:
            return
        now = self.module._buffers.get(self.name)
        written = [version_of(w) for w in self.watched] != self.versions
        if self.t.is_inference() and self.numbers is not None:
            written = written or not torch.equal(self.t, self.numbers)
        self.moved = written or now is not self.t
        if self.moved and self.late:
            _large_movers.setdefault(self.module, set()).add(self.name)
            self.numbers = copy_of(self.t if now is None else now)

    def put_back(self) -> None:
        """Make it what the first evaluation found.

        Not counted as a change: where a graph has saved the buffer, the numbers that it saved are
        back when it is read.
        """
        self.module._buffers[self.name] = self.t
        assert self.numbers is not None
        overwrite(self.t, self.numbers)


def copy_of(t: Tensor) -> Tensor:
    """The numbers of t: a buffer is no matter of derivatives."""
    with torch._C._DisableFuncTorch():
        return transforms.numbers(t).detach().clone()


def overwrite(t: Tensor, numbers: Tensor) -> None:
    """Write to t, as if nothing had happened to it."""
    with torch._C._DisableFuncTorch():
        transforms.numbers(t).data.copy_(numbers)


class MovingBuffers:
    """What evaluations of one g change, from its first one on.

    Args:
        modules: those with buffers.
        run: makes an evaluation.
    """

    def __init__(self, modules: list[nn.Module], run: Callable[..., Any]) -> None:
        self._modules = modules
        self._run = run
        self._kept: list[Kept] | None = None
        self._over = False

    def over(self) -> None:
        """The solve has ended: whatever is evaluated from now on leaves no trace."""
        self._over = True
        with torch.no_grad():
            for kept in self._kept or ():
                if kept.late and kept.moved:
                    kept.put_back()

    def __call__(self, *evaluations: Callable[[], Any]) -> Any:
        """run(*evaluations), which finds the buffers as the first one found them."""
        outside: list[tuple[Kept, Tensor | None]] = []
        if self._kept is None:
            self._kept = [
                Kept(module, name, t)
                for module in self._modules
                for name, t in module._buffers.items()
                if t is not None
            ]
        else:
            outside = [(kept, kept.module._buffers[kept.name]) for kept in self._kept if kept.moved]
        copies = [copy_of(t) for _, t in outside if t is not None] if self._over else []
        with torch.no_grad():
            for kept, _ in outside:
                kept.put_back()
        try:
            result = self._run(*evaluations)
            # What starts from zeros may move only later.
            for kept in self._kept:
                kept.look()
            return result
        finally:
            if self._over:
                with torch.no_grad():
                    for (kept, t), numbers in zip(outside, copies, strict=True):
                        kept.module._buffers[kept.name] = t
                        assert t is not None
                        overwrite(t, numbers)
