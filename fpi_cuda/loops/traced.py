"""g for the host's loop by its trace: what does not depend on x once a solve, and no module calls.

The numbers are those of g, bit by bit: the trace calls the same functions of torch. So it does not
matter from which solve on it is used.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from types import FunctionType, MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fpi_cuda.autograd import BoundMap
from fpi_cuda.evaluation.bound_map import bits_of
from fpi_cuda.evaluation.context import being_captured
from fpi_cuda.evaluation.modules import modules_of
from fpi_cuda.evaluation.shortcuts import why_modes_matter
from fpi_cuda.loops.capture import Capture, Captures, is_wanted, key_of
from fpi_cuda.loops.nodes import has_value, hint_of, named, read_for, writes
from fpi_cuda.loops.overwriting import overwriting
from fpi_cuda.lowered import NotLowered

WORTH_A_TRACE = 1.0
"""Seconds that solves of one g have taken by then; Dynamo's import and a trace take about that.

Those that must pass until the next trace, of a g that has changed, are four times as many."""

MOST_SHAPES = 64
"""Of one kind of g, whose seconds are counted."""

HOMES = ("torch", "torch.functional", "torch.nn.functional", "torch.special", "torch.linalg",
         "torch.fft", "torch._C", "torch._C._nn", "torch._C._special", "torch._C._linalg",
         "torch._C._fft", "_operator", "builtins", "math")  # fmt: skip
"""Modules whose functions do nothing but compute what they return, or write over an argument."""


class Split(NamedTuple):
    """A traced g in two.

    Attributes:
        before: called as the trace is, it returns what `step` is given besides x.
        step: g's value, given x and these.
        hoisted, total: operations in `before`, and in both.
        saves: it is faster than g even where that calls no modules.
    """

    before: Callable[..., tuple[Any, ...]]
    step: Callable[..., Tensor]
    hoisted: int
    total: int
    saves: bool


def split(graph: fx.Graph, x: fx.Node, plain: bool = False) -> Split:
    """What of a traced g does not depend on x, and the rest; see fpi_cuda.loops.capture.Captures.

    Raises:
        NotLowered: it does something that evaluations may do in g's own code only.
    """
    found = graph.output_node().args[0]
    values = found if isinstance(found, (tuple, list)) else (found,)
    answer = values[0] if len(values) == 1 else None
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    operations = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    for node in operations:
        require_function(node)
        let_call_its_core(node)
    of_x = {x}
    for node in operations:
        if any(n in of_x for n in node.all_input_nodes):
            of_x.add(node)
    if not isinstance(answer, fx.Node) or answer not in of_x or answer is x:
        raise NotLowered("its value is not one tensor that is computed from x")
    memory = memory_of(graph, inputs)
    alone = not memory.written and not any(isinstance(n.target, OF_LIBRARIES) for n in operations)
    if alone:
        needed = read_for(answer)
        operations = [n for n in operations if n in needed]
    else:
        of_x.update(operations)
    before, inner, given = parted(operations, of_x)
    if sum(map(bytes_of, given)) > MOST_HELD * bytes_of(x) + sum(map(bytes_of, inputs)):
        before, inner, given = parted(operations, {*of_x, *operations})
    over = overwriting(inner, answer, memory.places) if alone else {}
    return Split(
        part_of(inputs, before, tuple(given)),
        part_of([x, *given], inner, answer, over),
        len(before),
        len(operations),
        bool(before) or (bool(over) and bytes_of(x) >= LARGE),
    )


def parted(
    operations: list[fx.Node], of_x: set[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
    """Those before the steps, those in them, and what the steps are given besides x."""
    inner = [n for n in operations if n in of_x]
    inside = {*inner}
    given = dict.fromkeys(n for node in inner for n in node.all_input_nodes if n not in inside)
    (x,) = (n for n in of_x if n.op == "placeholder")
    given.pop(x, None)
    return [n for n in operations if n not in of_x], inner, list(given)


LARGE = 1 << 16
"""Bytes of a state from which on it shows where the values of a step lie."""

MOST_HELD = 8
"""So many times the state, and what g is given, may be kept of what does not depend on x."""


def bytes_of(node: fx.Node) -> int:
    """Memory of what a node gives, where that is a tensor."""
    t = node.meta["example_value"]
    return math.prod(map(hint_of, t.shape)) * t.element_size() if isinstance(t, Tensor) else 0


class Memory(fx.Interpreter):
    """Where the values of a graph lie, seen while it runs.

    Attributes:
        places: by node, of those that give a tensor.
        written: something that it has computed is written over.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.places: dict[fx.Node, int] = {}
        self.written = False
        self._values: list[Any] = []  # the memory of one that is gone may be another's

    def run_node(self, n: fx.Node) -> Any:
        """See fx.Interpreter."""
        value = super().run_node(n)
        self._values.append(value)
        if isinstance(value, Tensor):
            self.places[n] = place_of(value)
        return value


def memory_of(graph: fx.Graph, inputs: list[fx.Node]) -> Memory:
    """Where values lie, and whether any is written over, by a run without numbers.

    Raises:
        NotLowered: it writes over what it is given, or draws random numbers.
    """
    module = fx.GraphModule(nn.Module(), graph)  # with a copy of it
    memory = Memory(module)
    with FakeTensorMode():
        examples = [without_numbers(node.meta["example_value"]) for node in inputs]
        with Watch(examples) as watch:
            memory.run(*examples)
    memory.written = watch.writes
    pairs = zip(graph.nodes, module.graph.nodes, strict=True)
    memory.places = {n: memory.places[copy] for n, copy in pairs if copy in memory.places}
    return memory


def without_numbers(example: Any) -> Any:
    """The like of what an input was in a trace; of sizes that it leaves open, what they were."""
    if not isinstance(example, Tensor):
        return hint_of(example)
    shape, strides = map(hint_of, example.shape), map(hint_of, example.stride())
    return torch.empty_strided(
        tuple(shape), tuple(strides), dtype=example.dtype, device=example.device
    )


class Watch(TorchDispatchMode):
    """Sees which operations write.

    Args:
        given: what nothing may be written over.
    """

    def __init__(self, given: list[Any]) -> None:
        super().__init__()
        self.writes = False
        self._given = {place_of(t) for t in given if isinstance(t, Tensor)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See TorchDispatchMode."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotLowered("it draws random numbers")
        written = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if "batch_norm" in func.name() and len(args) > 5 and args[5]:
            written += args[3:5]  # running statistics, of which the schema has nothing to say
        for t in written:
            if isinstance(t, Tensor):
                self.writes = True
                if place_of(t) in self._given:
                    raise NotLowered(f"{func.name()} writes over what g is given")
        return func(*args, **kwargs)


def place_of(t: Tensor) -> int:
    """Which memory a tensor lies in."""
    return int(t.untyped_storage()._cdata)


OF_LIBRARIES = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
"""Operations that a library has registered."""


def require_function(node: fx.Node) -> None:
    """Raise unless a node calls a function or method of torch for what it returns."""
    target = node.target
    if node.op not in ("call_function", "call_method"):
        raise NotLowered(f"it holds {target}, which is no input of its trace")
    if not has_value(node):
        raise NotLowered(f"{named(target)} is called for what it does")
    home = getattr(target, "__module__", None) or "torch"
    if node.op == "call_function" and not isinstance(target, OF_LIBRARIES) and home not in HOMES:
        raise NotLowered(f"it calls {home}.{named(target)}")


CORES: dict[Any, Callable[..., Tensor]] = {
    F.relu: torch.relu,
    F.silu: torch._C._nn.silu,
    F.layer_norm: torch.layer_norm,
    F.group_norm: torch.group_norm,
}
"""Functions written in Python, and what they call in the end with the same arguments."""


def let_call_its_core(node: fx.Node) -> None:
    """Let a node that calls a function written in Python call what that calls, where it may."""
    function: Any = node.target
    if isinstance(function, FunctionType) and function in CORES and not writes(node):
        given = inspect.signature(function).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        node.args = tuple(v for name, v in given.arguments.items() if name != "inplace")
        node.kwargs, node.target = {}, CORES[function]


def part_of(
    inputs: list[fx.Node],
    nodes: list[fx.Node],
    outputs: Any,
    over: Mapping[fx.Node, tuple[str, tuple[Any, ...]]] = MappingProxyType({}),
) -> Callable[..., Any]:
    """The function of `inputs` that computes these nodes, in turn, and returns `outputs`.

    Args:
        over: which of them are computed by a method, and its arguments.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in nodes:
        if node in over:
            method, given = over[node]
            args = fx.node.map_arg(given, copies.__getitem__)
            copies[node] = graph.call_method(method, args)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {}  # which holds what the trace was made with
    graph.output(fx.node.map_arg(outputs, copies.__getitem__))
    # Its function alone: a call of the module would look for hooks.
    forward: Callable[..., Any] = fx.GraphModule(nn.Module(), graph).forward
    return forward


def why_not_traced(g: Any) -> str | None:
    """What shows in a g before a trace."""
    for part in modules_of(g):
        if isinstance(part, torch.jit.ScriptModule):
            return "it is in TorchScript"
        called = getattr(type(part), "forward", None)
        if (
            part.__dict__.get("_compiled_call_impl") is not None
            or "_orig_mod" in part._modules
            or hasattr(called, "_torchdynamo_orig_callable")
        ):
            return f"{type(part).__name__} is compiled"
    return None


steps = Captures(split, grad=False, why_not=why_not_traced, refusal="{}: {}")


class StandIn:
    """What may stand for calls of g in one solve.

    Args:
        bound_map: of g, as it is, with inputs.
    """

    def __init__(self, bound_map: BoundMap) -> None:
        self._g, self._z = bound_map.g, bound_map.z
        self._began = time.perf_counter()
        self._key: Any = None

    def __call__(self, state: Tensor) -> Callable[[Tensor], Any] | None:
        """A function of the state that gives what g gives; None: g itself has to."""
        g, z = self._g, self._z
        kind, key = steps.kind_of(g), key_of(g, state, z)
        if key in kind.refusals or why_modes_matter() is not None:
            return None
        capture = steps.known(g, state, z)
        if capture is None:
            # Each time that g has changed it has to pay for longer.
            traces = kind.traces.get(key, 0)
            if kind.seconds.get(key, 0.0) < WORTH_A_TRACE * 4**traces:
                self._key = key
                return None
            kind.traces[key] = traces + 1
            try:
                capture = steps.of(g, state, z)
            except NotLowered:
                return None
            if not saves_time(capture.found, g):
                steps.refuse(capture, g, state, z, "its trace would save nothing")
                return None
        step = bound(capture, capture.reads(g, state, z))
        return step if step is None or capture.verified else self._compared(capture, step)

    def _compared(
        self, capture: Capture, step: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Any]:
        """g itself, at which the trace is compared with it."""
        g, z, left = self._g, self._z, COMPARISONS

        def evaluate(state: Tensor) -> Any:
            nonlocal left
            if capture.verified:
                return step(state)
            value = g(state.detach(), *z)
            if left:
                try:
                    alike = same_bits(step(state), value)
                except Exception:
                    alike = False  # g has a value there
                left -= 1
                if not alike:
                    left = 0
                    steps.refuse(capture, g, state, z, "its trace has other numbers than it has")
                capture.verified = alike and not left
            return value

        return evaluate

    def over(self) -> None:
        """The solve is over: count what it took, where a trace might have saved of it."""
        if self._key is not None:
            kind = steps.kind_of(self._g)
            if len(kind.seconds) >= MOST_SHAPES and self._key not in kind.seconds:
                kind.seconds.clear()
                kind.traces.clear()
            took = time.perf_counter() - self._began
            kind.seconds[self._key] = kind.seconds.get(self._key, 0.0) + took


COMPARISONS = 2
"""Evaluations of g that a trace must have the numbers of."""


def saves_time(found: Split, g: Any) -> bool:
    """Whether a trace of g is faster than g: it is where g calls modules."""
    return found.saves or bool(modules_of(g))


def bound(capture: Capture, given: tuple[Any, ...]) -> Callable[[Tensor], Tensor] | None:
    """A traced g as a function of the state alone; None where it reads what is no plain tensor."""
    for t in given:
        if isinstance(t, Tensor) and (
            type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided
        ):
            return None
    found: Split = capture.found
    rest, step = found.before(*given), found.step

    def evaluate(state: Tensor) -> Tensor:
        return step(state, *rest)

    return evaluate


def same_bits(a: Any, b: Any) -> bool:
    """Whether two values of g are the same tensor to the bit."""
    return (
        type(a) is type(b) is Tensor
        and a.shape == b.shape
        and a.dtype is b.dtype
        and torch.equal(bits_of(a), bits_of(b))
    )


def stand_in(bound_map: BoundMap) -> StandIn | None:
    """What may stand for g in a solve; None where nothing may."""
    layout = bound_map.layout
    if bound_map.hoisted or layout.is_tuple or not is_wanted():
        return None
    return None if being_captured(layout.device) else StandIn(bound_map)


def words_of(g: Any) -> str | None:
    """What is known of traces of such a g, for people; None: nothing."""
    kind = steps.kind_of(g)
    if kind.captures:
        found: Split = kind.captures[0].found
        once = f", {found.hoisted} of its {found.total} operations once a solve"
        return f"g was traced{once if found.hoisted else ''}"
    return next((f"g was not traced: {reason}" for reason in kind.refusals.values()), None)
