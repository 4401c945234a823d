"""Buffers that an evaluation of g changes: they change once per solve, as in one call of a module.

Batch norm counts its batches and averages their statistics; spectral norm goes on with its power
iteration, and its weight with it. A solve evaluates g many times. Each evaluation starts from the
buffers of the first, so g stays one map, and what remains is what the last one made of them, which
is at the solution where a derivative is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fpi_cuda.module_tree import parts_of

# Names of the buffers that a module in training mode was seen to change, in g and in its prepare.
Seen = weakref.WeakKeyDictionary[nn.Module, frozenset[str]]
_seen_in: dict[str, Seen] = {
    "g": weakref.WeakKeyDictionary(),
    "prepare": weakref.WeakKeyDictionary(),
}


class MovingBuffers:
    """What evaluations of one g change, from its first one on.

    Args:
        modules: those with buffers.
        of: "g", or its "prepare".
    """

    def __init__(self, modules: list[nn.Module], of: str) -> None:
        self._modules = modules
        self._seen = _seen_in[of]
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        self._over = False

    def over(self) -> None:
        """The solve has ended: whatever is evaluated from now on leaves no trace."""
        self._over = True

    @contextlib.contextmanager
    def one_evaluation(self) -> Iterator[None]:
        """See the function of this name."""
        if self._kept is None:
            before = self._candidates()
            yield
            self._kept = [
                (t, old) for module, _, t, old in before if module in self._seen or not same(t, old)
            ]
            self._remember(before)
            return
        outside = [(t, t.detach().clone()) for t, _ in self._kept] if self._over else []
        put(self._kept)
        try:
            yield
        finally:
            put(outside)

    def _candidates(self) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
        return [
            (module, name, t, t.detach().clone())
            for module in self._modules
            for name, t in module._buffers.items()
            if t is not None and name in self._seen.get(module, module._buffers)
        ]

    def _remember(self, before: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
        kept = {id(t) for t, _ in self._kept or ()}
        for module in self._modules:
            if module not in self._seen:
                names = [name for m, name, t, _ in before if m is module and id(t) in kept]
                self._seen[module] = frozenset(names)


def one_evaluation(buffers: MovingBuffers | None) -> contextlib.AbstractContextManager[None]:
    """Around an evaluation of g: it finds the buffers as the first one found them."""
    return contextlib.nullcontext() if buffers is None else buffers.one_evaluation()


def same(t: Tensor, old: Tensor) -> bool:
    """Whether the same numbers lie in both, NaN included."""
    return bool(torch.isclose(t, old, rtol=0.0, atol=0.0, equal_nan=True).all())


def put(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Write the second of each pair into the first.

    Not counted as a change: where a graph has saved the buffer, the numbers that it saved are back
    when it is read.
    """
    with torch.no_grad():
        for t, numbers in pairs:
            t.data.copy_(numbers)


def moving_buffers(g: object) -> tuple[MovingBuffers | None, MovingBuffers | None]:
    """What evaluations of g, and of its prepare, may change; None where there is nothing."""
    modules = [m for m in modules_of(g) if m._buffers and getattr(m, "training", False)]
    return (
        (MovingBuffers(modules, "g"), MovingBuffers(modules, "prepare"))
        if modules
        else (None, None)
    )


def modules_of(g: object) -> list[nn.Module]:
    """The modules that g is made of, as far as they can be seen."""
    if isinstance(g, nn.Module):
        return parts_of(g)
    found: dict[int, nn.Module] = {}
    for owner in owners_of(g):
        for module in parts_of(owner):
            found[id(module)] = module
    return list(found.values())


def owners_of(g: object, depth: int = 2) -> Iterator[nn.Module]:
    """Modules that g is, is bound to, closes over, or holds."""
    if isinstance(g, nn.Module):
        yield g
        return
    if depth == 0:
        return
    parts: list[Any] = []
    if isinstance(g, functools.partial):
        parts = [g.func, *g.args, *g.keywords.values()]
    elif isinstance(g, types.MethodType):
        parts = [g.__self__, g.__func__]
    elif isinstance(g, types.FunctionType):
        for cell in g.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                parts.append(cell.cell_contents)
    elif hasattr(g, "__dict__") and not isinstance(g, (type, types.ModuleType)):
        parts = list(vars(g).values())
    for part in parts:
        if callable(part):
            yield from owners_of(part, depth - 1)
