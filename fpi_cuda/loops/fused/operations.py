"""What a trace of a user's g is made of: torch's operations, under all of their names."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fpi_cuda.activations import FUNCTIONS
from fpi_cuda.lowered import NotLowered

LINEAR = (F.linear, torch._C._nn.linear)
PRODUCTS = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm", "__matmul__")
ADDMM = (torch.addmm, "addmm")
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
DIFFERENCES = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
TIMES = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
NEGATIVES = (operator.neg, torch.neg, "neg")
COPIES = ("contiguous", "clone", torch.clone)
DROPOUT = (F.dropout, torch.dropout)

ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((torch.tanh, F.tanh, "tanh", torch.tanh_, "tanh_"), "tanh"),
    **dict.fromkeys((torch.relu, F.relu, "relu", torch.relu_, "relu_"), "relu"),
    **dict.fromkeys(
        (torch.sigmoid, F.sigmoid, "sigmoid", torch.sigmoid_, "sigmoid_", torch.special.expit),
        "sigmoid",
    ),
    **dict.fromkeys((F.gelu, torch._C._nn.gelu), "gelu"),
    **dict.fromkeys((F.softplus, torch._C._nn.softplus), "softplus"),
}
GIVEN = {
    "relu": {"inplace": (False, True)},
    "gelu": {"approximate": ("none",)},
    "softplus": {"beta": (1,), "threshold": (20,)},
}
"""What an activation may be given besides its input, by name in the order of its arguments."""


def example(node: Any) -> Tensor:
    """What a node gave while g was traced: no numbers, but sizes."""
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(found, Tensor):
        raise NotLowered(f"a product with {node}, which is no tensor")
    return found


def argument(node: fx.Node, place: int, name: str) -> Any:
    """An argument that may be given by its place or by its name; None where it is not."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def named(target: Any) -> str:
    """What a reader calls an operation."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
