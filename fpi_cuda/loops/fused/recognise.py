"""A traced g as one or two layers, with what depends on z alone taken out of the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from fpi_cuda.loops.fused.derivative import leave_out_leaf, write_out
from fpi_cuda.loops.fused.operations import (
    ACTIVATIONS,
    ADDMM,
    COPIES,
    DIFFERENCES,
    DROPOUT,
    LERPS,
    LINEAR,
    NEGATIVES,
    PRODUCTS,
    QUOTIENTS,
    SQUARES,
    SUMS,
    TIMES,
    activation_of,
    called,
    columns,
    example,
    joined_of,
    product_of,
    scaled_of,
    sizes_of,
)
from fpi_cuda.loops.nodes import argument, has_value, named, read_for, writes
from fpi_cuda.lowered import Layer, Lowered, NotLowered


@dataclass(frozen=True)
class X:
    """times * x + terms, (B, D).

    Attributes:
        times: a number, or what gives a tensor that is broadcast to (B, D).
        terms: what is broadcast to (B, D).
    """

    times: Any = 1.0
    terms: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Sum:
    """weight h + terms + carry * x, (B, outputs).

    Attributes:
        weight: gives (outputs, inputs).
        h: an X or a Value, without terms.
        terms: what is broadcast to (B, outputs).
    """

    weight: Any
    h: Any
    outputs: int
    terms: tuple[Any, ...] = ()
    carry: float = 0.0


@dataclass(frozen=True)
class Value:
    """factor * activation(sum) + carry * x + terms, with a sum that has no carry."""

    activation: str
    sum: Sum
    factor: Any = 1.0
    carry: float = 0.0
    terms: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Joined:
    """Several side by side, one of which is an X, a Sum or a Value.

    Attributes:
        parts: each with its number of features.
    """

    parts: tuple[tuple[Any, int], ...]


OF_X = (X, Sum, Value, Joined)


@dataclass(frozen=True)
class Form:
    """What a traced g was recognised as.

    Attributes:
        activations: of its layers.
        carry: see Lowered.
        hoisted: what does not depend on x: called as the trace is, it returns weight, bias, shift
            and factor of each layer in turn, and x_factor.
        words: the same for people.
        code: equal where all of it is.
        differentiates: g takes a derivative of itself.
    """

    activations: tuple[str, ...]
    carry: float
    hoisted: Callable[..., tuple[Any, ...]]
    words: str
    code: str
    differentiates: bool = False

    def lowered(self, tensors: tuple[Any, ...]) -> Lowered:
        """The map made of what hoisted() has returned."""
        layers = tuple(
            Layer(tensors[4 * i], activation, *tensors[4 * i + 1 : 4 * i + 4])
            for i, activation in enumerate(self.activations)
        )
        return Lowered(layers, tensors[-1], self.carry)


def recognised(graph: fx.Graph, x: fx.Node, plain: bool = False) -> Form:
    """The form of a traced g.

    Args:
        graph: of torch's functions and methods, each with what it gives as "example_value".
        x: the state (B, D) in it.
        plain: what is traced is the value alone, with what makes a leaf of x.
    Raises:
        NotLowered: it is none that the kernels run, and why.
    """
    settle_numbers(graph)
    if plain:
        leave_out_leaf(graph, x)
    differentiates = write_out(graph)
    return replace(Reader(graph, x).form(), differentiates=differentiates)


def settle_numbers(graph: fx.Graph) -> None:
    """Make a trace for the numbers that Dynamo left open in a sum or product: a batch size."""
    for node in graph.nodes:
        known = node.target in (*SUMS, *DIFFERENCES, *TIMES, *QUOTIENTS)
        if known and isinstance(node.meta.get("example_value"), Tensor):
            node.args = tuple(map(number_of, node.args))


def number_of(argument: Any) -> Any:
    """The number that an argument is; itself where it is none."""
    found = argument.meta.get("example_value") if isinstance(argument, fx.Node) else None
    if isinstance(found, torch.SymInt):
        return int(found)
    return float(found) if isinstance(found, torch.SymFloat) else argument


class Reader:
    """Reads a graph once, from x to its output; arguments as in `recognised`."""

    def __init__(self, graph: fx.Graph, x: fx.Node) -> None:
        self.graph = graph
        self.x = x
        self.rows, self.width = sizes_of(x)
        self.hoisted = fx.Graph()
        self.tracer = GraphAppendingTracer(self.hoisted)
        # By node: what it is of x, or what gives it without x.
        self.values: dict[fx.Node, Any] = {}

    def form(self) -> Form:
        """See `recognised`."""
        found = self.graph.output_node().args[0]
        answer = found[0] if isinstance(found, (tuple, list)) else found
        lasting = [n for n in self.graph.nodes if writes(n) or not has_value(n)]
        needed = read_for(answer, *(n for n in lasting if n.op != "output"))
        for node in self.graph.nodes:
            if node.op == "placeholder":
                copy = self.hoisted.node_copy(node)
                self.values[node] = fx.Proxy(copy, self.tracer)
                if node is self.x:
                    self.given, self.values[node] = self.values[node], X()
            elif node.op == "output":
                break
            elif node.op not in ("call_function", "call_method"):
                raise NotLowered(f"it holds {node.target}, which is no input of its trace")
            elif node in needed:
                self.values[node] = self.value_of(node)
        return self.finished(self.values.get(answer) if isinstance(answer, fx.Node) else None)

    def value_of(self, node: fx.Node) -> Any:
        """What a node is."""
        if writes(node):
            require_own(node)
        if any(self.is_of_x(n) for n in node.all_input_nodes):
            value = self.step(node)
            if sizes_of(node) != (self.rows, self.width_of(value)):
                raise NotLowered(f"{named(node.target)} of x is broadcast to another shape")
            return value
        if not has_value(node):
            raise NotLowered(f"{named(node.target)} is called for what it does")
        copy = self.hoisted.node_copy(node, lambda n: self.values[n].node)
        return fx.Proxy(copy, self.tracer)

    def is_of_x(self, argument: Any) -> bool:
        """Whether x has a part in an argument."""
        return isinstance(argument, fx.Node) and isinstance(self.values.get(argument), OF_X)

    def width_of(self, value: Any) -> int:
        """The number of features of what is of x."""
        if isinstance(value, Joined):
            return sum(width for _, width in value.parts)
        if isinstance(value, X):
            return self.width
        outputs: int = value.outputs if isinstance(value, Sum) else value.sum.outputs
        return outputs

    def read(self, argument: Any) -> Any:
        """The value of an argument: a number, what gives a tensor, or what it is of x."""
        if isinstance(argument, fx.Node):
            return self.values[argument]
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return float(argument)
        raise NotLowered(f"it computes with {argument!r}")

    def step(self, node: fx.Node) -> Any:
        """What a node that depends on x is."""
        target: Any = node.target
        args: Any = node.args
        if target in ACTIVATIONS:
            name, u = activation_of(node)
            otherwise = f"{name} of what is no product with a weight"
            return Value(name, self.summed(self.read(u), otherwise))
        if target in DROPOUT and not dropped(node):
            return self.read(args[0])
        product, scaled, joined = product_of(node), scaled_of(node), joined_of(node)
        if product is not None:
            return self.product(*product)
        if scaled is not None:
            a, b, number = scaled
            return self.plus(self.read(a), self.times(self.read(b), number))
        if joined is not None:
            return Joined(tuple((self.read(p), int(example(p).shape[1])) for p in joined))
        plain = not node.kwargs
        if target in TIMES and plain:
            return self.times(self.read(args[0]), self.read(args[1]))
        if target in QUOTIENTS and plain and not self.is_of_x(args[1]):
            divisor = self.read(args[1])
            by = 1.0 / divisor if isinstance(divisor, float) else self.call(one_over, divisor)
            return self.times(self.read(args[0]), by)
        if target in NEGATIVES and plain:
            return self.times(self.read(args[0]), -1.0)
        if target in COPIES and len(args) == 1 and plain:
            return self.read(args[0])
        if target in LERPS and plain and type(args[2]) is float:
            rest = self.times(self.read(args[0]), 1.0 - args[2])
            return self.plus(rest, self.times(self.read(args[1]), args[2]))
        if target is columns:
            return self.columns(self.read(args[0]), *args[1:])
        if target is torch.full_like:
            raise NotLowered("the derivative that it takes is a constant")
        if target == "detach" or target is torch.detach:
            raise NotLowered("it detaches x, so that its derivative is that of another map")
        if target in SQUARES:
            raise NotLowered("it multiplies two values of x")
        raise NotLowered(f"the kernels have no {named(target)} of x in this form")

    def summed(self, v: Any, otherwise: str) -> Sum:
        """v as a sum without a carry."""
        v = opened(v)
        if not isinstance(v, Sum):
            raise NotLowered(otherwise)
        if v.carry == 0.0:
            return v
        if not isinstance(v.h, X) or not is_one(v.h.times) or v.outputs != self.width:
            raise NotLowered("x is added to what is not A x with a square A")
        # carry * x as part of the weight.
        return replace(v, weight=self.call(with_diagonal, v.weight, v.carry), carry=0.0)

    def product(self, h: Any, weight: Any, bias: Any, transposed: bool) -> Sum:
        """h times a weight in which x has no part."""
        if not self.is_of_x(h) or self.is_of_x(weight) or self.is_of_x(bias):
            raise NotLowered("a weight depends on x")
        if example(weight).dim() != 2:
            raise NotLowered("a product is none of (B, inputs) with a matrix")
        given = self.read(weight)
        given = self.call(torch.t, given) if transposed else given
        outputs = int(example(weight).shape[1 if transposed else 0])
        terms: tuple[Any, ...] = () if bias is None else (self.read(bias),)
        v = self.values[h]
        if not isinstance(v, Joined):
            return self.weighted(v, given, outputs, terms)
        found: Any = None
        start = 0
        for part, width in v.parts:
            own = self.call(columns, given, start, start + width)
            start += width
            if not isinstance(part, OF_X):
                terms += (self.call(through, own, part),)
            elif found is not None or isinstance(part, Joined):
                raise NotLowered("two values of x are joined")
            else:
                found = part, own
        v, own = found
        return self.weighted(v, own, outputs, terms)

    def weighted(self, v: Any, weight: Any, outputs: int, terms: tuple[Any, ...]) -> Sum:
        """weight v + terms."""
        v = opened(v)
        if isinstance(v, Sum):
            v = Value("identity", self.summed(v, ""))
        if isinstance(v, Value) and v.carry:
            raise NotLowered("x is added to what a layer inside gives")
        if v.terms:
            terms = (*terms, self.call(through, weight, *v.terms))
            v = replace(v, terms=())
        if isinstance(v, Value) and is_row(v.factor):
            weight, v = self.scaled(weight, v.factor), replace(v, factor=1.0)
        if isinstance(v, X) and isinstance(v.times, float):
            weight, v = self.scaled(weight, v.times), X()
        return Sum(weight, v, outputs, terms)

    def columns(self, v: Any, start: int, stop: int) -> Sum:
        """Some of the features of a sum."""
        v = opened(v)
        if not isinstance(v, Sum) or v.carry:
            raise NotLowered("it takes some features of what is no product with a weight")
        terms = tuple(
            t if isinstance(t, float) else self.call(some_columns, t, v.outputs, start, stop)
            for t in v.terms
        )
        return Sum(self.call(some_rows, v.weight, start, stop), v.h, stop - start, terms)

    def plus(self, a: Any, b: Any) -> Any:
        """a + b."""
        a, b = opened(a), opened(b)
        if not isinstance(a, OF_X) or isinstance(a, X):
            a, b = b, a
        if not isinstance(a, OF_X):
            a, b = b, a
        if isinstance(a, Joined) or isinstance(b, Joined):
            raise NotLowered("it computes with what is joined, before a product")
        if not isinstance(b, (X, Sum, Value)):
            return replace(a, terms=(*a.terms, b))
        terms: tuple[Any, ...] = (*a.terms, *b.terms)
        if isinstance(b, X):
            if isinstance(a, X):
                return X(self.total(a.times, b.times), terms)
            assert isinstance(a, (Sum, Value))
            if not isinstance(b.times, float):
                raise NotLowered("it adds x times a tensor to another value of x")
            if self.width_of(a) != self.width:
                raise NotLowered("x is added to another number of features")
            return replace(a, carry=a.carry + b.times, terms=terms)
        if isinstance(a, Sum) and isinstance(b, Sum) and a.outputs == b.outputs:
            both_x = isinstance(a.h, X) and isinstance(b.h, X)
            if a.h is b.h or (both_x and is_one(a.h.times) and is_one(b.h.times)):
                weight = self.total(a.weight, b.weight)
                return Sum(weight, a.h, a.outputs, terms, a.carry + b.carry)
        raise NotLowered("it adds two values of x")

    def times(self, a: Any, b: Any) -> Any:
        """a * b."""
        if not isinstance(a, OF_X):
            a, b = b, a
        if isinstance(b, OF_X):
            raise NotLowered("it multiplies two values of x")
        if not isinstance(a, OF_X):
            return self.scaled(a, b)
        if isinstance(a, Joined):
            raise NotLowered("it computes with what is joined, before a product")
        terms = tuple(self.scaled(t, b) for t in a.terms)
        if isinstance(a, X):
            return X(self.scaled(a.times, b), terms)
        if a.carry and not isinstance(b, float):
            raise NotLowered("a sum with x is multiplied by a tensor")
        carry = a.carry * b if a.carry else 0.0
        if isinstance(a, Value):
            return replace(a, factor=self.scaled(a.factor, b), carry=carry, terms=terms)
        if is_scalar(b):
            return Sum(self.scaled(a.weight, b), a.h, a.outputs, terms, carry)
        return Value("identity", a, factor=b)

    def scaled(self, a: Any, b: Any) -> Any:
        """a * b, of numbers and what gives tensors."""
        if isinstance(a, float):
            a, b = b, a
        if isinstance(a, float) or is_one(b):
            return a if is_one(b) else a * b
        if isinstance(b, float) and a.node.target is torch.mul and type(a.node.args[1]) is float:
            # One product with two numbers, not two.
            a, b = fx.Proxy(a.node.args[0], self.tracer), a.node.args[1] * b
        return self.call(torch.mul, a, b)

    def total(self, a: Any, b: Any) -> Any:
        """a + b, of numbers and what gives tensors."""
        if isinstance(a, float):
            a, b = b, a
        return a + b if isinstance(a, float) else self.call(torch.add, a, b)

    def finished(self, answer: Any) -> Form:
        """The form of what g returns."""
        answer = opened(answer)
        if isinstance(answer, Sum):
            answer = Value("identity", replace(answer, carry=0.0), carry=answer.carry)
        if not isinstance(answer, Value):
            raise NotLowered("its value has no product of a weight with x")
        if answer.terms:
            raise NotLowered("something is added behind its last activation")
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
                both: Any = self.call(bias_and_shift, self.given, width, *layer.sum.terms)
                bias, shift = both[0], both[1]
            outputs += layer.sum.weight, bias, shift, self.as_rows(layer.factor, width)
        outputs.append(self.as_rows(h.times, self.width))
        self.hoisted.output(tuple(o.node if isinstance(o, fx.Proxy) else o for o in outputs))
        self.hoisted.eliminate_dead_code()
        module = fx.GraphModule(torch.nn.Module(), self.hoisted)
        # Its function alone: a call of the module would look for hooks.
        names = tuple(layer.activation for layer in layers)
        code = f"{names} {carry} {module.code}"
        return Form(names, carry, module.forward, in_words(layers, outputs, carry), code)

    def as_rows(self, factor: Any, width: int) -> Any:
        """A factor as (B, width); None for one."""
        return None if is_one(factor) else self.call(as_rows, self.given, width, factor)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Proxy:
        """What function(*args) gives, as a part of what is hoisted."""
        nodes = [a.node if isinstance(a, fx.Proxy) else a for a in args]
        return fx.Proxy(called(self.hoisted, function, *nodes), self.tracer)


def opened(v: Any) -> Any:
    """v, as a sum where it is one with an activation that does nothing."""
    if isinstance(v, Value) and v.activation == "identity" and is_one(v.factor):
        return replace(v.sum, carry=v.carry, terms=(*v.sum.terms, *v.terms))
    return v


def in_words(layers: list[Value], outputs: list[Any], carry: float) -> str:
    """A form as a formula."""
    h = "x" if outputs[-1] is None else "(c x)"
    for place, layer in enumerate(layers):
        number = str(place + 1) if len(layers) > 1 else ""
        u = f"W{number} {h}{f' + b{number}' if layer.sum.terms else ''}"
        inner = u if layer is layers[-1] else f"({u})"
        h = inner if layer.activation == "identity" else f"{layer.activation}({u})"
        if outputs[4 * place + 3] is not None:
            h = f"a{number} ({u})" if layer.activation == "identity" else f"a{number} {h}"
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


def is_row(factor: Any) -> bool:
    """Whether a factor is the same for all samples."""
    if isinstance(factor, float):
        return True
    found = factor.node.meta.get("example_value")
    return isinstance(found, Tensor) and (found.dim() < 2 or found.shape[0] == 1)


def one_over(t: Tensor) -> Tensor:
    """1 / t."""
    return 1.0 / t


def some_rows(weight: Tensor, start: int, stop: int) -> Tensor:
    """Some rows of a weight."""
    return weight[start:stop]


def some_columns(t: Tensor, width: int, start: int, stop: int) -> Tensor:
    """Some columns of what is broadcast to so many."""
    return t if t.dim() == 0 or t.shape[-1] != width else t[..., start:stop]


def through(weight: Tensor, *terms: Any) -> Tensor:
    """The sum of the terms, each a number or broadcast to (B, inputs), times a weight."""
    t: Any = terms[0]
    for other in terms[1:]:
        t = t + other
    if not isinstance(t, Tensor):
        return weight.sum(1) * t
    inputs = weight.shape[1]
    return F.linear(t if t.shape[-1:] == (inputs,) else t.expand(*t.shape[:-1], inputs), weight)


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
    rows = (x.shape[0], width)  # in less time than by len()
    if shift is not None and shift.shape != rows:
        shift = shift.expand(rows).contiguous()
    return bias, shift
