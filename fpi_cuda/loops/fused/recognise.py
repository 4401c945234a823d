"""A traced g as one or two layers, with what depends on z alone taken out of the loop."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from fpi_cuda.lowered import Layer, Lowered, NotLowered

@dataclass(frozen=True)
class X:
    """times * x, with times a number or what gives (B, D)."""

    times: Any = 1.0


@dataclass(frozen=True)
class Sum:
    """weight h + terms + carry * x, (B, outputs).

    Attributes:
        weight: gives (outputs, inputs).
        h: an X or a Value.
        terms: what is broadcast to (B, outputs).
    """

    weight: Any
    h: Any
    outputs: int
    terms: tuple[Any, ...] = ()
    carry: float = 0.0


@dataclass(frozen=True)
class Value:
    """factor * activation(sum) + carry * x, with a sum that has no carry."""

    activation: str
    sum: Sum
    factor: Any = 1.0
    carry: float = 0.0


@dataclass(frozen=True)
class Form:
    """What a traced g was recognised as.

    Attributes:
        activations: of its layers.
        carry: see Lowered.
        hoisted: what does not depend on x: called as the trace is, it returns weight, bias, shift
            and factor of each layer in turn, and x_factor.
        words: the same for people.
    """

    activations: tuple[str, ...]
    carry: float
    hoisted: Callable[..., tuple[Any, ...]]
    words: str

    def lowered(self, tensors: tuple[Any, ...]) -> Lowered:
        """The map made of what hoisted() has returned."""
        layers = tuple(
            Layer(tensors[4 * i], activation, *tensors[4 * i + 1 : 4 * i + 4])
            for i, activation in enumerate(self.activations)
        )
        return Lowered(layers, tensors[-1], self.carry)


def recognised(graph: fx.Graph, x: fx.Node) -> Form:
    """The form of a traced g.

    Args:
        graph: of torch's functions and methods, each with what it gives as "example_value".
        x: the state (B, D) in it.
    Raises:
        NotLowered: it is none that the kernels run, and why.
    """
    return Reader(graph, x).form()


class Reader:
    """Reads a graph once, from x to its output; arguments as in `recognised`."""

    def __init__(self, graph: fx.Graph, x: fx.Node) -> None:
        self.graph = graph
        self.x = x
        self.width = int(example(x).shape[1])
        self.hoisted = fx.Graph()
        self.tracer = GraphAppendingTracer(self.hoisted)
        # By node: what it is of x, or what gives it without x.
        self.values: dict[fx.Node, Any] = {}

    def form(self) -> Form:
        """See `recognised`."""
        answer = None
        for node in self.graph.nodes:
            if node.op == "output":
                found = node.args[0]
                answer = found[0] if isinstance(found, (tuple, list)) else found
            elif node.op == "placeholder":
                copy = self.hoisted.node_copy(node)
                self.values[node] = fx.Proxy(copy, self.tracer)
                if node is self.x:
                    self.given, self.values[node] = self.values[node], X()
            elif node.op not in ("call_function", "call_method"):
                raise NotLowered(f"it holds {node.target}, which is no input of its trace")
            else:
                self.values[node] = self.value_of(node)
        return self.finished(self.values.get(answer) if isinstance(answer, fx.Node) else None)

    def value_of(self, node: fx.Node) -> Any:
        """What a node is."""
        if any(self.is_of_x(n) for n in node.all_input_nodes):
            return self.step(node)
        if writes(node):
            require_own(node)
        if node.meta.get("example_value") is None:
            raise NotLowered(f"{named(node.target)} is called for what it does")
        copy = self.hoisted.node_copy(node, lambda n: self.values[n].node)
        return fx.Proxy(copy, self.tracer)

    def is_of_x(self, argument: Any) -> bool:
        """Whether x has a part in an argument."""
        if not isinstance(argument, fx.Node):
            return False
        return isinstance(self.values[argument], (X, Sum, Value))

    def read(self, argument: Any) -> Any:
        """The value of an argument: a number, what gives a tensor, or what it is of x."""
        if isinstance(argument, fx.Node):
            return self.values[argument]
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return float(argument)
        raise NotLowered(f"it computes with {argument!r}")

    def step(self, node: fx.Node) -> Any:
        """What a node that depends on x is."""
        target, args = node.target, node.args
        if writes(node):
            require_own(node)
        if target in ACTIVATIONS:
            return self.activated(ACTIVATIONS[target], node)
        if target in DROPOUT and not dropped(node):
            return self.read(args[0])
        if target in LINEAR:
            bias = argument(node, 2, "bias")
            weight = argument(node, 1, "weight")
            return self.product(argument(node, 0, "input"), weight, bias, transposed=False)
        plain = not node.kwargs
        if target in PRODUCTS and plain:
            return self.product(args[0], args[1], None, transposed=True)
        if target in ADDMM and plain:
            return self.product(args[1], args[2], args[0], transposed=True)
        if target in SUMS and plain:
            return self.plus(self.read(args[0]), self.read(args[1]))
        if target in DIFFERENCES and plain:
            return self.plus(self.read(args[0]), self.times(self.read(args[1]), -1.0))
        if target in TIMES and plain:
            return self.times(self.read(args[0]), self.read(args[1]))
        if target in QUOTIENTS and plain and not self.is_of_x(args[1]):
            return self.times(self.read(args[0]), 1.0 / self.read(args[1]))
        if target in NEGATIVES and plain:
            return self.times(self.read(args[0]), -1.0)
        if target in COPIES and len(args) == 1 and plain:
            return self.read(args[0])
        raise NotLowered(f"the kernels have no {named(target)} of x in this form")

    def activated(self, name: str, node: fx.Node) -> Value:
        """activation(v)."""
        allowed = GIVEN.get(name, {})
        given = dict(zip(allowed, node.args[1:], strict=False)) | dict(node.kwargs)
        v = self.read(given.pop("input", None) or node.args[0])
        if len(node.args) > 1 + len(allowed) or not all(
            value in allowed.get(key, ()) for key, value in given.items()
        ):
            raise NotLowered(f"it has {name} with {given or node.args[1:]}")
        return Value(name, self.summed(v, f"{name} of what is no product with a weight"))

    def summed(self, v: Any, otherwise: str) -> Sum:
        """v as a sum without a carry."""
        if isinstance(v, Value) and v.activation == "identity" and is_one(v.factor):
            v = replace(v.sum, carry=v.carry)
        if not isinstance(v, Sum):
            raise NotLowered(otherwise)
        if v.carry == 0.0:
            return v
        if not isinstance(v.h, X) or not is_one(v.h.times) or v.outputs != self.width:
            raise NotLowered("x is added to what is not A x with a square A")
        # carry * x as part of the weight.
        return replace(v, weight=self.call(with_diagonal, v.weight, v.carry), carry=0.0)

    def product(self, h: Any, weight: Any, bias: Any, *, transposed: bool) -> Sum:
        """h times a weight in which x has no part."""
        if not self.is_of_x(h) or self.is_of_x(weight) or self.is_of_x(bias):
            raise NotLowered("a weight depends on x")
        sizes = example(weight).shape if isinstance(weight, fx.Node) else ()
        if len(sizes) != 2 or example(h).dim() != 2:
            raise NotLowered("a product is none of (B, inputs) with a matrix")
        v, given = self.values[h], self.values[weight]
        if isinstance(v, Sum):
            v = Value("identity", self.summed(v, ""))
        if isinstance(v, Value) and v.carry:
            raise NotLowered("x is added to what a layer inside gives")
        outputs = int(sizes[1] if transposed else sizes[0])
        terms = () if bias is None else (self.read(bias),)
        return Sum(given.t() if transposed else given, v, outputs, terms)

    def plus(self, a: Any, b: Any) -> Any:
        """a + b."""
        if not isinstance(a, (X, Sum, Value)):
            a, b = b, a
        if isinstance(a, X):
            a, b = (b, a) if isinstance(b, (X, Sum, Value)) else (a, b)
        if not isinstance(b, (X, Sum, Value)):
            if isinstance(a, Value) and a.activation == "identity" and is_one(a.factor):
                a = replace(a.sum, carry=a.carry)
            if isinstance(a, Sum):
                return replace(a, terms=(*a.terms, b))
            raise NotLowered("something is added to x, or behind an activation")
        if not isinstance(b, X) or not isinstance(b.times, float):
            raise NotLowered("it adds two values of x")
        if isinstance(a, X):
            return X(a.times + b.times)
        if (a.outputs if isinstance(a, Sum) else a.sum.outputs) != self.width:
            raise NotLowered("x is added to another number of features")
        return replace(a, carry=a.carry + b.times)

    def times(self, a: Any, b: Any) -> Any:
        """a * b."""
        if not isinstance(a, (X, Sum, Value)):
            a, b = b, a
        if isinstance(b, (X, Sum, Value)):
            raise NotLowered("it multiplies two values of x")
        if not isinstance(a, (X, Sum, Value)):
            return a * b
        if isinstance(a, X):
            return X(a.times * b)
        if a.carry and not isinstance(b, float):
            raise NotLowered("a sum with x is multiplied by a tensor")
        carry = a.carry * b if a.carry else 0.0
        if isinstance(a, Sum) and is_scalar(b):
            return Sum(a.weight * b, a.h, a.outputs, tuple(t * b for t in a.terms), carry)
        if isinstance(a, Sum):
            a = Value("identity", a)
        return replace(a, factor=a.factor * b, carry=carry)

    def finished(self, answer: Any) -> Form:
        """The form of what g returns."""
        if isinstance(answer, Sum):
            answer = Value("identity", replace(answer, carry=0.0), carry=answer.carry)
        if not isinstance(answer, Value):
            raise NotLowered("its value has no product of a weight with x")
        layers, carry, h = [answer], answer.carry, answer.sum.h
        while isinstance(h, Value):
            layers.insert(0, h)
            h = h.sum.h
        if len(layers) > 2:
            raise NotLowered(f"it has {len(layers)} layers, and the kernels run one or two")
        if answer.sum.outputs != self.width:
            raise NotLowered(f"its value has {answer.sum.outputs} features, x has {self.width}")
        outputs: list[Any] = []
        for layer in layers:
            width = layer.sum.outputs
            bias, shift = None, None
            if layer.sum.terms:
                both = self.call(bias_and_shift, self.given, width, *layer.sum.terms)
                bias, shift = both[0], both[1]
            outputs += layer.sum.weight, bias, shift, self.rows(layer.factor, width)
        if isinstance(h.times, float) and not is_one(h.times):
            outputs[0] = outputs[0] * h.times
            h = X()
        outputs.append(self.rows(h.times, self.width))
        self.hoisted.output(tuple(o.node if isinstance(o, fx.Proxy) else o for o in outputs))
        self.hoisted.eliminate_dead_code()
        module = fx.GraphModule(torch.nn.Module(), self.hoisted)
        # Its function alone: a call of the module would look for hooks.
        names = tuple(layer.activation for layer in layers)
        return Form(names, carry, module.forward, in_words(layers, outputs, carry))

    def rows(self, factor: Any, width: int) -> Any:
        """A factor as (B, width); None for one."""
        return None if is_one(factor) else self.call(as_rows, self.given, width, factor)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Proxy:
        """What function(*args) gives, as a part of what is hoisted."""
        nodes = [a.node if isinstance(a, fx.Proxy) else a for a in args]
        return fx.Proxy(self.hoisted.call_function(function, tuple(nodes)), self.tracer)


def in_words(layers: list[Value], outputs: list[Any], carry: float) -> str:
    """A form as a formula."""
    h = "x" if outputs[-1] is None else "(c x)"
    for place, layer in enumerate(layers):
        number = str(place + 1) if len(layers) > 1 else ""
        u = f"W{number} {h}{f' + b{number}' if layer.sum.terms else ''}"
        h = u if layer.activation == "identity" else f"{layer.activation}({u})"
        if outputs[4 * place + 3] is not None:
            h = f"a{number} ({h})" if h is u else f"a{number} {h}"
    return f"{h} + {carry:g} x" if carry else h


def is_one(factor: Any) -> bool:
    """Whether a factor is the number one."""
    return isinstance(factor, float) and factor == 1.0


def is_scalar(factor: Any) -> bool:
    """Whether a factor is a number, or a tensor that holds one and has no dimensions."""
    if isinstance(factor, float):
        return True
    found = factor.node.meta.get("example_value")
    return isinstance(found, Tensor) and found.dim() == 0


def writes(node: fx.Node) -> bool:
    """Whether a node writes over what it is given."""
    name = named(node.target)
    in_place = argument(node, 1, "inplace") if node.target is F.relu else node.kwargs.get("inplace")
    return (
        bool(in_place)
        or "out" in node.kwargs
        or name in ("iadd", "isub", "imul", "itruediv", "ipow", "imatmul", "setitem")
        or (name.endswith("_") and not name.endswith("__"))
    )


def require_own(node: fx.Node) -> None:
    """Raise unless what a node writes over was computed by g, and is read by nobody else."""
    target = argument(node, 0, "input")
    made = isinstance(target, fx.Node) and target.op in ("call_function", "call_method")
    if not made or len(target.users) > 1 or "out" in node.kwargs or may_be_view(target):
        raise NotLowered(f"{named(node.target)} writes over what something else may read")


def may_be_view(node: fx.Node) -> bool:
    """Whether what a node gives may lie in the memory of what it was given."""
    known = (*LINEAR, *PRODUCTS, *ADDMM, *SUMS, *DIFFERENCES, *TIMES, *QUOTIENTS, *NEGATIVES)
    return node.target not in known and node.target not in ACTIVATIONS


def dropped(node: fx.Node) -> bool:
    """Whether a dropout drops anything."""
    p, training = argument(node, 1, "p"), argument(node, 2, "training")
    return not (training is False or (p == 0 and isinstance(p, (int, float))))


def with_diagonal(weight: Tensor, number: float) -> Tensor:
    """A square weight, with the number added to its diagonal."""
    return weight + number * torch.eye(len(weight), dtype=weight.dtype, device=weight.device)


def as_rows(x: Tensor, width: int, t: Any) -> Tensor:
    """A number, or a tensor that is broadcast to it, as (B, width) of its own, B that of x."""
    if not isinstance(t, Tensor):
        return x.new_full((len(x), width), t)
    return t.expand(len(x), width).contiguous()


def bias_and_shift(x: Tensor, width: int, *terms: Any) -> tuple[Tensor | None, Tensor | None]:
    """The terms that are the same in all rows, summed (width,), and the others (B, width)."""
    bias: Any = None
    shift: Any = None
    for t in terms:
        if isinstance(t, Tensor) and t.dim() == 2:
            shift = t if shift is None else shift + t
        else:
            bias = t if bias is None else bias + t
    if bias is not None and not isinstance(bias, Tensor):
        bias = x.new_full((width,), bias)
    if bias is not None and bias.shape != (width,):
        bias = bias.expand(width).contiguous()
    if shift is not None and shift.shape != (len(x), width):
        shift = shift.expand(len(x), width).contiguous()
    return bias, shift
