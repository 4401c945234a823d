"""A module evaluated with other tensors, while other threads evaluate it with its own.

torch.func.functional_call exchanges them in the module itself: who calls it meanwhile computes
with the stand-ins, and its gradient ends in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def called_with(module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...]) -> Any:
    """module(*args) with tensors in the place of the parameters and buffers of these names."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        return torch.func.functional_call(module, dict(tensors), args)
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    other = {id(named[name]): t for name, t in tensors.items()}
    return replica(module, other, {})(*args)


def replica(module: nn.Module, other: dict[int, Tensor], made: dict[int, nn.Module]) -> nn.Module:
    """The module with its children once more, holding the same but for some tensors.

    Args:
        other: by the id of the tensor that each takes the place of.
        made: replicas by the id of the module; those of the children are added.
    """
    if id(module) in made:
        return made[id(module)]
    # Not the class's own __new__, which may make a class of its own: torch.fx.GraphModule.
    again = object.__new__(type(module))
    made[id(module)] = again
    state = module.__dict__.copy()
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: other.get(id(t), t) for name, t in state[kind].items()}
    state["_modules"] = {
        name: child if child is None else replica(child, other, made)
        for name, child in state["_modules"].items()
    }
    again.__dict__ = state
    return again
