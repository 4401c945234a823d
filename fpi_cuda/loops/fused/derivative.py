"""Derivatives that a traced g takes of itself, written out as further operations of the trace."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fpi_cuda.activations import DERIVATIVES, FUNCTIONS
from fpi_cuda.loops.fused.operations import (
    ACTIVATIONS,
    COPIES,
    MEANS,
    NEGATIVES,
    POWERS,
    QUOTIENTS,
    RESHAPES,
    SQUARES,
    TIMES,
    TOTALS,
    activation_of,
    called,
    columns,
    example,
    joined_of,
    product_of,
    scaled_of,
    sizes_of,
)
from fpi_cuda.loops.nodes import argument, named
from fpi_cuda.lowered import NotLowered

WRAPPED = ("_wrap_for_grad", "_unwrap_for_grad")
FUNC_GRAD = "_autograd_grad"
VMAPPED = "_vmap_increment_nesting"
ALLOWED = "set_inplace_requires_grad_allowed"
AROUND = (
    "_saved_tensors_hooks_disable",
    "_saved_tensors_hooks_enable",
    "_grad_increment_nesting",
    "_grad_decrement_nesting",
    ALLOWED,
    "_set_tensor_requires_grad",
)
"""What torch.func.grad calls for what it does."""

Gradient = float | fx.Node
"""Of the shape of what it belongs to, or broadcast to it."""


def write_out(graph: fx.Graph) -> bool:
    """Replace each derivative in a trace by the operations that it is made of; whether one was.

    Args:
        graph: see fpi_cuda.loops.fused.recognise.recognised. Written to.
    Raises:
        NotLowered: a derivative is of something that the kernels have not, or has no graph.
    """
    of_func = any(named(node.target) == FUNC_GRAD for node in graph.nodes)
    found = False
    for node in list(graph.nodes):
        name = named(node.target)
        if name == VMAPPED:
            raise NotLowered("it uses torch.func.vmap")
        if node.target is torch.autograd.grad or name == FUNC_GRAD:
            replace(graph, node)
            found = True
        elif of_func and name in WRAPPED:
            # Still a node of its own: only what is reached by way of it is differentiated.
            node.target, node.args = operator.pos, node.args[:1]
        elif of_func and name in AROUND:
            if node.users:
                node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return found


def leave_out_leaf(graph: fx.Graph, x: fx.Node) -> None:
    """Take out of a trace that its value is detached, and how a leaf is made of x."""
    output = graph.output_node()
    output.args = ((output.args[0][0].args[0],),)  # type: ignore[index,union-attr]
    copies = {x}
    for node in list(graph.nodes):
        if node.target in ("detach", "clone") and node.args[0] in copies:
            node.target = "clone"
            copies.add(node)
        elif node.target == "requires_grad_" and node.args[0] in copies:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif named(node.target) == ALLOWED and not node.users:
            graph.erase_node(node)


def replace(graph: fx.Graph, node: fx.Node) -> None:
    """Replace one torch.autograd.grad."""
    outputs, inputs = single(argument(node, 0, "outputs")), single(argument(node, 1, "inputs"))
    if outputs is None or inputs is None:
        raise NotLowered("a derivative of several values or in several tensors is in it")
    if argument(node, 4, "create_graph") is not True:
        raise NotLowered("it takes a derivative of itself without create_graph=True")
    if argument(node, 6, "is_grads_batched"):
        raise NotLowered("it takes a derivative of itself with is_grads_batched")
    given = argument(node, 2, "grad_outputs")
    given = single(given) if isinstance(given, (tuple, list)) else given
    start: Gradient = 1.0
    if isinstance(given, fx.Node) and given.target not in (torch.ones_like, torch.ones):
        start = given
    with graph.inserting_before(node):
        found = Backward(graph, inputs).of(outputs, start)
    for user in list(node.users):
        if user.target is not operator.getitem or user.args[1] != 0:
            raise NotLowered("it takes a derivative of itself, and not its values alone")
        user.replace_all_uses_with(found)
        graph.erase_node(user)
    graph.erase_node(node)


def single(given: Any) -> fx.Node | None:
    """The node that is given, alone or alone in a sequence; None for others."""
    if isinstance(given, (tuple, list)) and len(given) == 1:
        given = given[0]
    return given if isinstance(given, fx.Node) else None


class Backward:
    """Reverse mode over a trace: new nodes are inserted where the graph says.

    Args:
        x: in what is differentiated.
    """

    def __init__(self, graph: fx.Graph, x: fx.Node) -> None:
        self.graph = graph
        self.x = x
        # What depends on x, in the order of the trace.
        self.active: dict[fx.Node, None] = {x: None}
        for node in graph.nodes:
            if any(n in self.active for n in node.all_input_nodes):
                self.active[node] = None
        self.known: dict[fx.Node, Gradient] = {}

    def of(self, output: fx.Node, start: Gradient) -> fx.Node:
        """The derivative of sum(start * output), shaped like x."""
        if output not in self.active:
            raise NotLowered("what it differentiates does not depend on x")
        self.known[output] = start
        for node in reversed(self.active):
            if node in self.known and node is not self.x:
                self.step(node, self.known.pop(node))
        found = self.known[self.x]
        return found if isinstance(found, fx.Node) else self.new(torch.full_like, self.x, found)

    def step(self, node: fx.Node, c: Gradient) -> None:
        """Hand the gradient c of a node on to what it was computed from."""
        target: Any = node.target
        args: Any = node.args
        product, scaled = product_of(node), scaled_of(node)
        joined = joined_of(node)
        if target in ACTIVATIONS:
            self.activated(node, c)
        elif product is not None:
            self.product(node, c, *product)
        elif scaled is not None:
            a, b, number = scaled
            self.add(node, a, c)
            self.add(node, b, self.times(c, number))
        elif joined is not None:
            start = 0
            for part in joined:
                stop = start + int(example(part).shape[1])
                if part in self.active:
                    share = c
                    if isinstance(c, fx.Node):
                        share = self.new(columns, self.wide(c, node), start, stop)
                    self.add(part, part, share)
                start = stop
        elif target in TOTALS or target in MEANS:
            self.total(node, c)
        elif target in RESHAPES:
            if isinstance(c, fx.Node) and sizes_of(c):
                if sizes_of(c)[1:] != sizes_of(node)[1:] or example(args[0]).dim() == 0:
                    raise NotLowered(f"its derivative is of {named(target)} in another form")
                c = self.new(torch.reshape, c, (-1, *sizes_of(args[0])[1:]))
            self.add(args[0], args[0], c)
        elif node.kwargs:
            raise NotLowered(f"its derivative is of {named(target)} in another form")
        elif target in TIMES:
            self.add(node, args[0], lambda: self.times(c, args[1]))
            self.add(node, args[1], lambda: self.times(c, args[0]))
        elif target in QUOTIENTS and args[1] not in self.active:
            by = args[1]
            by = self.new(torch.reciprocal, by) if isinstance(by, fx.Node) else 1.0 / by
            self.add(node, args[0], self.times(c, by))
        elif target in NEGATIVES:
            self.add(node, args[0], self.times(c, -1.0))
        elif target in SQUARES or (target in POWERS and args[1] == 2):
            self.add(node, args[0], self.times(self.times(c, 2.0), args[0]))
        elif target in COPIES and len(args) == 1:
            self.add(node, args[0], c)
        else:
            raise NotLowered(f"its derivative is of {named(target)}, which the kernels have not")

    def activated(self, node: fx.Node, c: Gradient) -> None:
        """The gradient goes on through activation(u)."""
        name, u = activation_of(node)
        if name not in DERIVATIVES:
            raise NotLowered(f"the kernels have no derivative of {name}")
        if name == "softplus" and example(u).dtype == torch.float64:
            # Where torch's softplus goes over to u, its slope jumps by 2e-9.
            raise NotLowered("in float64 the kernels' derivative of softplus is not torch's")
        self.add(node, u, self.times(c, self.new(FUNCTIONS[DERIVATIVES[name]], u)))

    def product(
        self, node: fx.Node, c: Gradient, h: Any, weight: Any, bias: Any, transposed: bool
    ) -> None:
        """The gradient goes on through h times a weight."""
        if weight in self.active or bias in self.active:
            raise NotLowered("its derivative is of a product of two values of x")
        sizes = example(weight).dim(), example(h).dim()
        if sizes == (1, 2):  # (B, H) with (H,)
            if isinstance(c, fx.Node) and example(c).dim() > 0:
                c = self.new(torch.unsqueeze, c, 1)
            self.add(h, h, self.times(c, weight))
        elif sizes != (2, 2):
            raise NotLowered("a product is none of (B, inputs) with a matrix")
        elif isinstance(c, float):
            self.add(h, h, self.times(c, self.new(torch.sum, weight, 1 if transposed else 0)))
        else:
            back = self.new(torch.t, weight) if transposed else weight
            self.add(h, h, self.new(torch.matmul, self.wide(c, node), back))

    def total(self, node: fx.Node, c: Gradient) -> None:
        """The gradient goes on through a sum or a mean."""
        of = argument(node, 0, "input")
        shape = example(of).shape
        dims, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim")
        if set(node.kwargs) - {"input", "dim", "keepdim"}:
            raise NotLowered(f"its derivative is of {named(node.target)} in another form")
        if dims is None or dims in ((), []):
            dims = tuple(range(len(shape)))
        dims = sorted(d % len(shape) for d in ((dims,) if isinstance(dims, int) else dims))
        if isinstance(c, fx.Node) and not keep and example(c).dim() > 0:
            if example(c).dim() != example(node).dim():
                raise NotLowered(f"its derivative is of {named(node.target)} in another form")
            for d in dims:
                c = self.new(torch.unsqueeze, c, d)
        if node.target in MEANS:
            count = 1
            for d in dims:
                count *= int(shape[d])
            c = self.times(c, 1.0 / count)
        self.add(of, of, c)

    def add(self, node: fx.Node, to: Any, c: Gradient | Callable[[], Gradient]) -> None:
        """Add c to the gradient of `to`, if x has a part in it.

        Args:
            node: what was computed from it, elementwise.
        """
        if not isinstance(to, fx.Node) or to not in self.active:
            return
        if sizes_of(to) != sizes_of(node):
            raise NotLowered("its derivative is of a value of x that is broadcast")
        c = c() if callable(c) else c
        if to in self.known:
            before = self.known[to]
            both = isinstance(before, float) and isinstance(c, float)
            c = before + c if both else self.new(torch.add, before, c)  # type: ignore[operator]
        self.known[to] = c

    def times(self, a: Any, b: Any) -> Gradient:
        """a * b, of numbers and nodes."""
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return self.new(torch.mul, a, b)
        if not isinstance(a, fx.Node):
            a, b = b, a
        if not isinstance(a, fx.Node):
            return float(a) * float(b)
        return a if b == 1 else self.new(torch.mul, a, float(b))

    def wide(self, c: fx.Node, like: fx.Node) -> fx.Node:
        """A gradient with as many features as what it belongs to, (B, features)."""
        width = sizes_of(like)[1]
        shape = sizes_of(c)
        if shape[-1:] == (width,):
            return c
        return self.new(torch.Tensor.expand, c, (*(-1 for _ in shape[:-1]), width))

    def new(self, function: Callable[..., Tensor], *args: Any) -> fx.Node:
        """A node that calls function(*args)."""
        return called(self.graph, function, *args)
