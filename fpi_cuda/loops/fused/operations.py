"""What a trace of a user's g is made of: torch's operations, under all of their names."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fpi_cuda.activations import DERIVATIVES, FUNCTIONS
from fpi_cuda.loops.nodes import argument
from fpi_cuda.lowered import NotLowered

LINEAR = (F.linear, torch._C._nn.linear)
PRODUCTS = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm", "__matmul__")
ADDMM = (torch.addmm, "addmm")
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_", "__iadd__")
DIFFERENCES = (operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_")
TIMES = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")
QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
NEGATIVES = (operator.neg, torch.neg, "neg")
COPIES = ("contiguous", "clone", torch.clone, operator.pos)
DROPOUT = (F.dropout, torch.dropout)
LERPS = (torch.lerp, "lerp")
JOINS = (torch.cat, torch.concat, torch.concatenate)
POWERS = (operator.pow, torch.pow, "pow", "__pow__")
SQUARES = (torch.square, "square")
TOTALS = (torch.sum, "sum")
MEANS = (torch.mean, "mean")
RESHAPES = (
    torch.squeeze, torch.unsqueeze, torch.flatten, torch.reshape,
    "squeeze", "unsqueeze", "flatten", "reshape", "view",
)  # fmt: skip

ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((torch.tanh, F.tanh, "tanh", torch.tanh_, "tanh_"), "tanh"),
    **dict.fromkeys((torch.relu, F.relu, "relu", torch.relu_, "relu_"), "relu"),
    **dict.fromkeys(
        (torch.sigmoid, F.sigmoid, "sigmoid", torch.sigmoid_, "sigmoid_", torch.special.expit),
        "sigmoid",
    ),
    **dict.fromkeys((F.gelu, torch._C._nn.gelu), "gelu"),
    **dict.fromkeys((F.softplus, torch._C._nn.softplus), "softplus"),
    # Those that a derivative in a trace is made of, see derivative.py.
    **{FUNCTIONS[name]: name for name in DERIVATIVES.values() if name.endswith("_derivative")},
}
GIVEN: dict[str, dict[str, tuple[Any, ...]]] = {
    "relu": {"inplace": (False, True)},
    "gelu": {"approximate": ("none",)},
    "softplus": {"beta": (1,), "threshold": (20,)},
}
"""What an activation may be given besides its input, by name in the order of its arguments."""


def activation_of(node: fx.Node) -> tuple[str, Any]:
    """The name of the activation that a node is, and its argument.

    Raises:
        NotLowered: it is given something that the kernels' activation has not.
    """
    name = ACTIVATIONS[node.target]
    allowed = GIVEN.get(name, {})
    given: dict[str, Any] = dict(zip(allowed, node.args[1:], strict=False)) | dict(node.kwargs)
    u = given.pop("input", None) or node.args[0]
    if len(node.args) > 1 + len(allowed) or not all(
        value in allowed.get(key, ()) for key, value in given.items()
    ):
        raise NotLowered(f"it has {name} with {given or node.args[1:]}")
    return name, u


def product_of(node: fx.Node) -> tuple[Any, Any, Any, bool] | None:
    """h, weight, bias and whether the weight is (inputs, outputs); None for what is no product."""
    target, args = node.target, node.args
    if target in LINEAR:
        h, weight = argument(node, 0, "input"), argument(node, 1, "weight")
        return h, weight, argument(node, 2, "bias"), False
    if node.kwargs:
        return None
    if target in PRODUCTS:
        return args[0], args[1], None, True
    if target in ADDMM:
        return args[1], args[2], args[0], True
    if target is torch.einsum and len(args) in (2, 3):
        return einsum_of(*args)
    return None


def einsum_of(equation: Any, *operands: Any) -> tuple[Any, Any, Any, bool] | None:
    """The same for torch.einsum of rows with a matrix, in either order."""
    if len(operands) == 1:
        operands = tuple(operands[0])
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(operands) != 2 or [len(t) for t in (*terms, result)] != [2, 2, 2]:
        return None
    if terms[0][0] != result[0]:
        terms, operands = terms[::-1], operands[::-1]
    rows, inner = terms[0]
    outer = result[1]
    if rows != result[0] or len({rows, inner, outer}) != 3:
        return None
    if terms[1] not in (outer + inner, inner + outer):
        return None
    return operands[0], operands[1], None, terms[1] == inner + outer


def joined_of(node: fx.Node) -> tuple[Any, ...] | None:
    """What a node puts side by side, each (B, features); None if it does another thing."""
    parts = argument(node, 0, "tensors")
    known = node.target in JOINS and argument(node, 1, "dim") in (-1, 1)
    if not known and not (node.target is torch.hstack and parts):
        return None
    found = tuple(parts)
    return found if all(example(part).dim() == 2 for part in found) else None


def scaled_of(node: fx.Node) -> tuple[Any, Any, float] | None:
    """a, b and number of a + number * b; None for what is no such sum."""
    known = node.target in SUMS or node.target in DIFFERENCES
    number = node.kwargs.get("alpha", 1)
    if not known or set(node.kwargs) - {"alpha"} or type(number) not in (int, float):
        return None
    assert isinstance(number, (int, float))
    return node.args[0], node.args[1], float(-number if node.target in DIFFERENCES else number)


def columns(t: Tensor, start: int, stop: int) -> Tensor:
    """Some columns of t (..., features)."""
    return t[..., start:stop]


def example(node: Any) -> Tensor:
    """What a node gave while g was traced: no numbers, but sizes."""
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(found, Tensor):
        raise NotLowered(f"a product with {node}, which is no tensor")
    return found


def sizes_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's example.

    It is left open whether another call may have another size of dim 0, which samples have: what is
    made of that one may be compared, but not be part of what is recognised.
    """
    shape = example(node).shape
    first = shape[:1]
    if first and isinstance(first[0], torch.SymInt):
        first = (first[0].node.hint or int(first[0]),)
    return (*first, *map(int, shape[1:]))


def called(graph: fx.Graph, function: Callable[..., Any], *args: Any) -> fx.Node:
    """A new node that calls function(*args), with what it would give as its example."""

    def sizes(of: Any) -> Any:
        """Not the example itself, which may be of a transform that is over."""
        if not isinstance(of, fx.Node):
            return of
        return torch.empty(sizes_of(of), dtype=example(of).dtype, device="meta")

    node = graph.call_function(function, args)
    node.meta["example_value"] = function(*map(sizes, args))
    return node
