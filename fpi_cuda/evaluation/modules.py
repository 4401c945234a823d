"""The modules that g is or holds, and what they hold."""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections import deque
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOST_SEEN = 256
"""Objects that are looked into for modules, and modules for what they hold besides. Objects that
hold nothing do not count."""


MOST_HELD = 64
"""Entries of a list or dict that are looked into."""


MOST_VISITED = 512
"""Objects that are looked at in all."""


ATOMS = (Tensor, type, types.ModuleType, str, bytes, int, float, complex, type(None), torch.dtype)


EVERY_MODULE_HAS = frozenset(nn.Module().__dict__)


NUMBERS_OF_CONVOLUTIONS = ("transposed", "_reversed_padding_repeated_twice")


@functools.lru_cache(256)
def numbers_of(kind: Any) -> frozenset[str]:
    """Names under which a module of this class holds none but those that torch looks into."""
    if not kind.__module__.startswith("torch.nn."):
        return EVERY_MODULE_HAS
    return EVERY_MODULE_HAS.union(getattr(kind, "__constants__", ()), NUMBERS_OF_CONVOLUTIONS)


def modules_in(module: nn.Module) -> list[nn.Module]:
    """The module and all inside it, each once; faster than module.modules()."""
    parts = [module]
    if not module._modules:
        return parts
    seen = {id(module)}
    for part in parts:  # which grows
        held = part._modules
        for inside in held.values() if held else ():
            if inside is not None and id(inside) not in seen:
                seen.add(id(inside))
                parts.append(inside)
    return parts


def held_by(
    modules: Iterable[nn.Module], *, buffers: bool = True, among: Container[int] | None = None
) -> list[tuple[nn.Module, str, Tensor]]:
    """Every parameter, and with `buffers` every buffer, with the module and the name it has there.

    A tensor that several hold is there several times.

    Args:
        among: only tensors whose id is in it.
    """
    return [
        (module, name, t)
        for module in modules
        for tensors in ((module._parameters, module._buffers) if buffers else (module._parameters,))
        for name, t in tensors.items()
        if t is not None and (among is None or id(t) in among)
    ]


def modules_of(g: object) -> list[nn.Module]:
    """Modules that g is, is bound to, closes over, names, or holds, as far as they can be seen."""
    found: dict[int, nn.Module] = {}
    seen: dict[int, object] = {}  # kept, for numbers of what is gone are given anew
    budget = MOST_SEEN
    pending = deque([g])
    while pending and budget and len(seen) < MOST_VISITED:
        part = pending.popleft()
        if isinstance(part, ATOMS) or id(part) in seen or id(part) in found:
            continue
        if isinstance(part, nn.Module):
            new = [module for module in modules_in(part) if id(module) not in found]
            for number, module in enumerate(new):
                found[id(module)] = module
                if number < budget:
                    # What it holds where torch does not look for modules.
                    kind: Any = type(module)
                    if module.__dict__.keys() <= numbers_of(kind):
                        continue
                    pending += [
                        value
                        for name, value in module.__dict__.items()
                        if name not in EVERY_MODULE_HAS and not isinstance(value, ATOMS)
                    ]
            budget -= min(budget, len(new))
        else:
            seen[id(part)] = part
            held = [value for value in values_in(part) if not isinstance(value, ATOMS)]
            pending.extend(held)
            budget -= bool(held)
    return list(found.values())


def values_in(g: Any) -> list[Any]:
    """What an object holds, as far as it shows."""
    if isinstance(g, functools.partial):
        return [g.func, *g.args, *g.keywords.values()]
    if isinstance(g, types.MethodType):
        return [g.__self__, g.__func__]
    if isinstance(g, types.FunctionType):
        parts = list(g.__defaults__ or ()) + list((g.__kwdefaults__ or {}).values())
        for cell in g.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                parts.append(cell.cell_contents)
        if not (g.__module__ or "").startswith("torch."):
            named = map(g.__globals__.get, g.__code__.co_names)
            # By type, for a proxy may not like to be asked what it is.
            parts += [v for v in named if issubclass(type(v), (nn.Module, types.FunctionType))]
        return parts
    if isinstance(g, (dict, tuple, list, set, frozenset, deque)):
        values = g.values() if isinstance(g, dict) else g
        return list(itertools.islice(values, MOST_HELD))
    parts = []
    # Whatever an object of the user's own raises where it is asked for what it has not got.
    with contextlib.suppress(Exception):
        parts += itertools.islice(vars(g).values(), MOST_HELD)
    for name in getattr(type(g), "__slots__", ()):
        with contextlib.suppress(Exception):
            parts.append(getattr(g, name))
    return parts


def whose_buffers_may_move(modules: list[nn.Module]) -> list[nn.Module]:
    """Those in training that have any."""
    return [m for m in modules if m._buffers and getattr(m, "training", False)]
