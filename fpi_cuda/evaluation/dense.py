"""What is not a dense tensor of numbers, by name, and what to do about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

REMEDIES = {
    "DTensor": "use {}.to_local(), or {}.full_tensor() for all of it",
    "MaskedTensor": "use {}.to_tensor(0.0), and hand the mask to g",
    "NestedTensor": "use {}.to_padded_tensor(0.0), and hand the lengths to g",
}
"""For subclasses of torch's own."""


NAMES = hasattr(Tensor, "has_names")
"""Whether dimensions may have names, which torch 2.13 did away with."""


def why_not_dense(t: Tensor, name: str = "") -> tuple[str, str] | None:
    """What t, called `name`, is, and the remedy, unless it is dense; tracers' tensors count as so.

    A subclass that only overrides __torch_function__ holds its own numbers, and is dense.
    """
    # Most are; and Dynamo, which looks into a layer's start, knows no more.
    asked: Any = t
    plain = type(t) is Tensor and not (t.is_nested or t.is_quantized)
    plain = plain and not (NAMES and asked.has_names())
    if (plain and t.layout == torch.strided) or torch.compiler.is_dynamo_compiling():
        return None
    found = _found(t)
    return None if found is None else (found[0], found[1].replace("{}", name))


def _found(t: Tensor) -> tuple[str, str] | None:
    """The same with a place for the name in the remedy."""
    if is_lazy(t):
        return "an uninitialized parameter", "call the module that it belongs to first"
    cls = type(t)
    # A nested or sparse tensor may refuse to be asked anything else.
    if t.is_nested:
        return "a nested tensor", REMEDIES["NestedTensor"]
    if cls.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not isinstance(t, FakeTensor):
        name = cls.__name__
        return f"a {name}", REMEDIES.get(name, "unwrap it, and wrap it again in g")
    if t.layout != torch.strided:
        return str(t.layout), "use {}.to_dense()"
    if t.is_quantized:
        return str(t.dtype), "use {}.dequantize()"
    asked: Any = t
    if NAMES and asked.has_names():
        return "a tensor of dimensions with names", "use {}.rename(None)"
    return None
