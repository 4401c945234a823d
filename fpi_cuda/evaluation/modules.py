"""The modules inside a module."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import Tensor, nn


def modules_in(module: nn.Module) -> list[nn.Module]:
    """The module and all inside it, each once; faster than module.modules()."""
    parts = [module]
    if not module._modules:
        return parts
    seen = {id(module)}
    for part in parts:  # which grows
        for inside in part._modules.values():
            if inside is not None and id(inside) not in seen:
                seen.add(id(inside))
                parts.append(inside)
    return parts


def held_by(
    modules: Iterable[nn.Module], *, buffers: bool = True
) -> list[tuple[nn.Module, str, Tensor]]:
    """Every parameter, and with `buffers` every buffer, with the module and the name it has there.

    A tensor that several hold is there several times.
    """
    held = []
    for module in modules:
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        more = module.named_buffers(recurse=False, remove_duplicate=False) if buffers else ()
        held += [(module, name, t) for name, t in itertools.chain(parameters, more)]
    return held
