"""A user's g, traced by Dynamo and kept for as long as nothing that the trace rests on changes."""

from __future__ import annotations

import dis
import itertools
import operator
import os
import random
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext

from fpi_cuda import _extension
from fpi_cuda.evaluation.modules import modules_in, modules_of
from fpi_cuda.evaluation.shortcuts import HOOKS, hooks_on_all, why_modes_matter
from fpi_cuda.evaluation.state import why_not_dense
from fpi_cuda.loops.fused.recognise import Form, recognised
from fpi_cuda.lowered import Lowered, NotLowered

if _extension.module_error is None or TYPE_CHECKING:
    from fpi_cuda._C import newest_version
else:

    def newest_version(types: tuple[type, ...]) -> int:
        """That no number is known."""
        return 0


MOST_CAPTURES = 32
"""Of one kind of g: for so many shapes, modes and states of it. Others are not looked at."""

SWITCH = "FPI_CUDA_CAPTURE"
TOO_MANY = f"{MOST_CAPTURES} others like it were looked at"
NO_LOWER = "has no lower(prepared)"
WITH_EFFECTS = "an evaluation of it does more than compute its value"

KNOWN_MODULES = frozenset(
    (
        nn.Linear, nn.Identity, nn.Dropout, nn.Tanh, nn.ReLU, nn.Sigmoid, nn.GELU, nn.Softplus,
        nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
    )
)  # fmt: skip
"""Modules of torch that a map of the kernels' form is made of."""


class Capture:
    """One trace of g, in the kernels' form.

    Attributes:
        form: what it was recognised as.
        verified: it was compared with g itself.
        classes: what it rests on besides what Dynamo guards.
        plain: where the x of the trace requires grad, another trace with one that does not, which
            was recognised as the same: g may look at that.
    """

    def __init__(self, form: Form, trace: Trace, guards: Any, code: types.CodeType, g: Any) -> None:
        self.form = form
        self.plain: Capture | None = None
        self.verified = False
        self._guards = guards
        self._function = undisturbed(code, trace.evaluation.__globals__)
        self._evaluation = trace.evaluation  # Dynamo's entry goes with its code
        modules = modules_of(g)
        kinds = [*map(type, (g, *modules)), *trace.kinds]
        self.classes = Classes(kinds, trace.codes, trace.methods)
        self._holds_modules = bool(modules)

    def holds(self, g: Any, x: Tensor, z: tuple[Any, ...]) -> bool:
        """Whether a trace of g would be the same now. Under the grad mode of the trace."""
        return (
            self._guards_hold(g, x, z)
            and not hooks_on_all()
            and self.classes.unchanged()
            and (self.plain is None or self.plain.classes.unchanged())
            and not (self._holds_modules and called_otherwise(g))
        )

    def _guards_hold(self, g: Any, x: Tensor, z: tuple[Any, ...]) -> bool:
        guards = self._guards
        if self.plain is not None:
            if not self.plain._guards_hold(g, x, z):
                return False
            x = leaf_of(x)
        return guards.cache_entry is not None and guards.root.check({"g": g, "x": x, "z": z})

    def is_alive(self) -> bool:
        """Whether it may hold for some g: Dynamo lets go of what rests on a thing that is gone."""
        alive = self._guards.cache_entry is not None
        return alive and (self.plain is None or self.plain.is_alive())

    def reads(self, g: Any, x: Tensor, z: tuple[Any, ...]) -> tuple[Any, ...]:
        """What an evaluation of g reads, where the trace holds: as it is now, x among it."""
        if self.plain is None:
            given: tuple[Any, ...] = self._function(g, x, z)
            return given
        leaf = leaf_of(x)
        return tuple([x if t is leaf else t for t in self._function(g, leaf, z)])

    def lowered(self, given: tuple[Any, ...]) -> Lowered:
        """The map that g is where it reads these, with the graph that the grad mode allows."""
        return self.form.lowered(self.form.hoisted(*given))


def undisturbed(code: types.CodeType, named: dict[str, Any]) -> types.FunctionType:
    """What Dynamo made of an evaluation, without what it does on the way to what is read.

    It notes the time for its profiler, and switches itself off and on again for each function that
    it calls.

    Args:
        named: the globals of the evaluation.
    """
    given = {name: named[name] for name in code.co_names if name in named}
    for name, value in given.items():
        if name.startswith("__compiled_fn"):
            given[name] = getattr(value, "_torchdynamo_orig_callable", value)
        elif isinstance(value, types.ModuleType) and not UNTIMED.keys() - vars(value).keys():
            used = {n: v for n, v in vars(value).items() if n in code.co_names}
            given[name] = types.SimpleNamespace(**used | UNTIMED)
    return types.FunctionType(code, {"__builtins__": named["__builtins__"]} | given)


UNTIMED = {
    "record_pregraph_bytecode_enter": lambda: None,
    "record_pregraph_bytecode_exit": lambda _: None,
}


def leaf_of(x: Tensor) -> Tensor:
    """x as something to differentiate by."""
    return x.detach().requires_grad_()


def called_otherwise(g: Any) -> bool:
    """Whether a call of a module in g was given another meaning on the instance."""
    modules = modules_in(g) if isinstance(g, nn.Module) else modules_of(g)
    return any("_call_impl" in part.__dict__ for part in modules)


class Classes:
    """What classes hold: Dynamo trusts that a class stays as it is.

    Args:
        kinds: they, and those that they inherit from, are looked at.
        codes: of functions that may not be given other code.
        methods: those of Tensor that are looked at.
    """

    def __init__(
        self,
        kinds: Iterable[type],
        codes: Container[types.CodeType] = (),
        methods: Iterable[str] = (),
    ) -> None:
        kinds = dict.fromkeys(kinds)
        self._kinds = tuple(k for k in (*kinds, Tensor) if k.__flags__ & MADE_IN_PYTHON)
        self._newest = 0
        self._methods = operator.attrgetter(*methods, "__add__", "__radd__")
        self._known_methods = self._methods(Tensor)
        self._held: list[tuple[Any, int, Callable[[Any], Any], tuple[Any, ...]]] = []
        self._functions: list[tuple[types.FunctionType, types.CodeType]] = []
        for kind in dict.fromkeys(base for each in kinds for base in each.__mro__):
            if kind in FIXED or not kind.__flags__ & MADE_IN_PYTHON:
                continue
            of = vars(kind)
            names = [n for n, v in of.items() if callable(v) or hasattr(type(v), "__get__")]
            if kind is nn.Module:
                names = ["__call__", "_call_impl", "_wrapped_call_impl", "__getattr__"]
            names += ["__module__", "__module__"]  # an itemgetter of two gives a tuple
            read = operator.itemgetter(*names)
            self._held.append((of, len(of), read, read(of)))
            functions = map(function_in, map(of.get, names))
            self._functions += [(f, f.__code__) for f in functions if f and f.__code__ in codes]

    def unchanged(self) -> bool:
        """Whether they hold what they held."""
        for function, code in self._functions:
            if function.__code__ is not code:
                return False
        version = newest_version(self._kinds)
        if version and version == self._newest:
            return True
        if not self._look_the_same():
            return False
        self._newest = version
        return True

    def _look_the_same(self) -> bool:
        try:
            for of, size, read, known in self._held:
                if len(of) != size or read(of) != known:  # as a rule the very same
                    return False
        except Exception:
            return False  # it holds that no longer, or what does not like to be compared
        return all(map(operator.is_, self._methods(Tensor), self._known_methods))


FIXED = frozenset((Tensor, nn.Parameter))
MADE_IN_PYTHON = 1 << 9
"""A flag of classes that anybody can change."""


def function_in(value: Any) -> types.FunctionType | None:
    """The function behind what a class holds under a name."""
    value = getattr(value, "fget", getattr(value, "__func__", value))
    return value if isinstance(value, types.FunctionType) else None


class Kind:
    """What is known of the g that share a class or a piece of code.

    Attributes:
        captures: newest first.
        refusals: why such a g, with such a state and inputs, has no capture.
    """

    def __init__(self) -> None:
        self.captures: list[Capture] = []
        self.refusals: dict[Hashable, str] = {}
        self.begin_anew()

    def renew(self) -> None:
        """Forget what Dynamo has let go of, and have all traced anew where classes have changed.

        With what it has let go of, g may be another one than was refused.
        """
        left = [capture for capture in self.captures if capture.is_alive()]
        if len(left) < len(self.captures):
            self.captures, self.refusals = left, {}
        if any(not capture.classes.unchanged() for capture in left):
            self.begin_anew()

    def begin_anew(self) -> None:
        """Have evaluations that Dynamo has not met."""
        self.evaluation, self.plain_evaluation = copy_of(call_g), copy_of(call_plain_g)


def call_g(g: Any, x: Any, z: Any) -> Any:
    """What is traced. Each kind has a copy, for Dynamo keeps its traces by code."""
    return g(x, *z)


def call_plain_g(g: Any, x: Any, z: Any) -> Any:
    """The same in a way that lets g make a leaf of x, which Dynamo else refuses."""
    return g(x.clone(), *z).detach()


def copy_of(evaluation: Any) -> types.FunctionType:
    """The same function with code of its own, of a name of its own.

    By that name Dynamo remembers which sizes it has seen to differ.
    """
    code = evaluation.__code__
    return types.FunctionType(code.replace(co_name=f"{code.co_name}_{next(numbers)}"), globals())


numbers = itertools.count()


lock = threading.RLock()
kinds: weakref.WeakKeyDictionary[Any, Kind] = weakref.WeakKeyDictionary()


def key_of_kind(g: Any) -> Any:
    """The class of a module or object, the code of a function."""
    kind = type(g)
    if kind is types.FunctionType:
        return g.__code__
    if kind is types.MethodType:
        function = g.__func__  # may be any callable
        return getattr(function, "__code__", None) or type(function)
    return kind


def kind_of(g: Any) -> Kind:
    """That which g is of."""
    key = key_of_kind(g)
    found = kinds.get(key)
    return kinds.setdefault(key, Kind()) if found is None else found


def clear() -> None:
    """Forget every capture."""
    with lock:
        kinds.clear()


def is_wanted() -> bool:
    """Whether g are to be captured at all."""
    return os.environ.get(SWITCH, "1") != "0"


def why_not_capturable(g: Any) -> str | None:
    """What speaks against a trace before anything is traced; None: nothing that shows at once."""
    return why_hooks_matter(g) or why_of_no_form(g)


def why_hooks_matter(g: Any) -> str | None:
    """Which hooks must see evaluations of g, or None."""
    if hooks_on_all():
        return "there are hooks on all modules"
    for part in modules_of(g):
        if any(part.__dict__.get(name) for name in HOOKS):
            return f"{type(part).__name__} has hooks, which must see its evaluations"
    return None


def why_of_no_form(g: Any) -> str | None:
    """Which module of torch in g shows that it has none of the kernels' forms; None: none does."""
    for part in modules_of(g):
        kind = type(part)
        if isinstance(part, torch.jit.ScriptModule):
            return "it is in TorchScript"
        if kind.__module__.startswith("torch.nn.modules.") and kind not in KNOWN_MODULES:
            return f"the kernels have no {kind.__name__}"
    return None


def known_capture(g: Any, x: Tensor, z: tuple[Any, ...]) -> Capture | None:
    """A capture that holds for g; None where there is none."""
    kind = kind_of(g)
    for place, capture in enumerate(kind.captures):
        if capture.holds(g, x, z):
            if place:
                kind.captures.remove(capture)
                kind.captures.insert(0, capture)
            return capture
    return None


class NotTraced(NotLowered):
    """Dynamo was not asked: it may be another time."""


def capture_of(g: Any, x: Tensor, z: tuple[Any, ...]) -> Capture:
    """A trace of g that holds, made here if there is none.

    Args:
        x: plain, (B, D). z: inputs of g.
    Raises:
        NotLowered: g cannot be traced, or has not the kernels' form.
    """
    for t in z:
        strange = why_not_dense(t) if isinstance(t, Tensor) else None
        if strange is not None:
            raise NotLowered(f"{type(g).__name__} {NO_LOWER}, and a z is {strange[0]}")
    with torch.enable_grad(), lock:
        found = known_capture(g, x, z)
        if found is not None:
            return found
        kind, key = kind_of(g), key_of(g, x, z)
        kind.renew()
        reason = kind.refusals.get(key)
        if reason is None and len(kind.captures) + len(kind.refusals) >= MOST_CAPTURES:
            reason = TOO_MANY
        reason = reason or why_hooks_matter(g) or why_modes_matter()
        if reason is not None:
            raise NotLowered(f"{type(g).__name__} {NO_LOWER}, and {reason}")
        try:
            reason = why_of_no_form(g)
            if reason is not None:
                raise NotLowered(reason)
            capture = traced_in_turn(kind, g, x, z)
        except Exception as error:  # Dynamo's insides may be others in another torch
            said = error if isinstance(error, NotLowered) else f"it was not traced ({error!r})"
            if not isinstance(error, NotTraced):
                kind.refusals[key] = str(said)
            raise NotLowered(f"{type(g).__name__} {NO_LOWER}, and {said}") from error
        kind.captures.insert(0, capture)
        return capture


def refuse(capture: Capture, g: Any, x: Tensor, z: tuple[Any, ...], reason: str) -> None:
    """Let go of a capture that is not what g computes."""
    with lock:
        kind = kind_of(g)
        if capture in kind.captures:  # another thread may have been here
            kind.captures.remove(capture)
        kind.refusals[key_of(g, x, z)] = reason


def key_of(g: Any, x: Tensor, z: tuple[Any, ...]) -> Hashable:
    """Equal for the same g, as far as that shows, with a state and inputs of the same shapes."""
    shapes = tuple((t.shape, t.dtype, t.requires_grad) for t in (x, *z) if isinstance(t, Tensor))
    which = (weakref.ref(g), getattr(g, "training", None)) if isinstance(g, nn.Module) else None
    return which, shapes


def traced_in_turn(
    kind: Kind, g: Any, x: Tensor, z: tuple[Any, ...], *, fresh: bool = False
) -> Capture:
    """A trace of g, with an x that requires grad where g makes a leaf of one that does not.

    Args:
        fresh: Dynamo has not met the evaluations of this kind.
    """
    try:
        return traced(kind.evaluation, g, x, z)
    except NotLowered as refusal:
        if "requires_grad_()" not in str(refusal):
            raise
    try:
        found = traced(kind.evaluation, g, leaf_of(x), z)
    except NotLowered as refusal:
        if "requires_grad_()" not in str(refusal):
            raise
        raise NotLowered("it takes a derivative by what it detached from x") from refusal
    found.plain = traced(kind.plain_evaluation, g, x, z, plain=True)
    if not found.form.differentiates or found.form.code != found.plain.form.code:
        if fresh:
            raise NotLowered("it computes another value where x requires grad")
        # Dynamo may have learnt of one evaluation alone that batches differ.
        kind.begin_anew()
        return traced_in_turn(kind, g, x, z, fresh=True)
    return found


class Trace:
    """What was met while a g was traced.

    Attributes:
        evaluation: the function that was traced.
        codes: of functions that g has called.
        kinds: the classes of what Dynamo guards, and those that it guards themselves.
        methods: those of Tensor that may be called.
    """

    def __init__(self, evaluation: types.FunctionType) -> None:
        self.evaluation = evaluation
        self.codes: frozenset[types.CodeType] = frozenset()
        self.kinds: set[type] = set()
        self.methods: set[str] = set()
        self._guards: Iterable[Any] = ()

    def look_at_graph(self, graph: Any) -> None:
        """See what it calls."""
        context = TracingContext.get()
        self.codes = frozenset(context.traced_code)
        if any(code.co_filename == os.getenv.__code__.co_filename for code in self.codes):
            raise NotLowered("it reads what the operating system has")
        self._guards = list(context.guards_context.dynamo_guards)
        for node in graph.nodes:
            name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
            names = (name, f"__{name}__", f"__r{name}__")
            self.methods |= {n for n in names if hasattr(Tensor, n)}

    def look_at_guards(self) -> None:
        """See what they are of, now that they are made."""
        for guard in self._guards:
            for found in (guard.guarded_class_weakref, guard.obj_weakref):
                value = found() if isinstance(found, weakref.ref) else None
                if isinstance(value, type):
                    self.kinds.add(value)
        self._guards = ()  # they hold what was traced, and Dynamo holds who is asked here


def traced(
    evaluation: types.FunctionType, g: Any, x: Tensor, z: tuple[Any, ...], plain: bool = False
) -> Capture:
    """A trace of g, made now.

    Args:
        plain: the evaluation is a call_plain_g.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list as entries_of

    found: list[Form | str] = []
    trace = Trace(evaluation)

    def read(module: Any, _: object) -> Callable[..., Any]:
        """What Dynamo calls with the graph, and then with what the graph reads."""
        try:
            trace.look_at_graph(module.graph)
            form = recognised(module.graph, state_in(module.graph), plain=plain)
        except NotLowered as reason:
            # In words, for Dynamo keeps this function, and an exception the frames of its making.
            found.append(str(reason))
            return lambda *_: (None,)
        found.append(form)
        return lambda *given: (given,)

    code = evaluation.__code__
    before = {id(entry.code) for entry in entries_of(code)}
    try:
        with tracing_for_guards(), nothing_else_touched():
            torch.compile(evaluation, backend=read, fullgraph=True)(g, x, z)
    except NotLowered:
        raise
    except Exception as error:
        if len(found) != 1:
            cause = getattr(error, "inner_exception", None) or error
            said = (str(cause).splitlines() or [""])[0]
            raise NotLowered(f"it was not traced ({type(error).__name__}: {said})") from error
    if len(found) != 1:
        raise NotTraced("it was not traced: Dynamo is switched off, or does not look into it")
    (form,) = found
    if isinstance(form, str):
        raise NotLowered(form)
    new = [entry for entry in entries_of(code) if id(entry.code) not in before]
    if len(new) != 1 or has_effects(new[0].code):
        raise NotLowered(WITH_EFFECTS)
    trace.look_at_guards()
    return Capture(form, trace, new[0].guard_manager, new[0].code, g)


@contextmanager
def tracing_for_guards() -> Iterator[None]:
    """Dynamo with guards on hooks, and with derivatives that g takes of itself in the trace.

    Numbers stay numbers: Dynamo would make an input of one that is not what it was before.
    """
    from torch._dynamo import config

    wanted = {
        "skip_nnmodule_hook_guards": False,
        "trace_autograd_ops": True,
        "specialize_float": True,
        "specialize_int": True,
        "recompile_limit": 4 * MOST_CAPTURES,
        "accumulated_recompile_limit": 4 * MOST_CAPTURES,
    }
    with config.patch({name: v for name, v in wanted.items() if hasattr(config, name)}):
        yield


@contextmanager
def nothing_else_touched() -> Iterator[None]:
    """Dynamo does not wind back the generators of the process, from which other threads draw.

    Nor does it warn: nobody has asked for a trace.
    """
    here, tracing = threading.get_ident(), True

    def unless_here(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # Somebody may have taken hold of it, and call it later.
            if tracing and threading.get_ident() == here:
                return None
            return function(*args, **kwargs)

        return call

    places: list[tuple[Any, str]] = [(random, "setstate"), (torch.random, "set_rng_state")]
    places += [(torch.cuda, "set_rng_state"), (warnings, "warn")]
    before = [getattr(*place) for place in places]
    ours = [*map(unless_here, before)]
    try:
        for place, function in zip(places, ours, strict=True):
            setattr(*place, function)
        yield
    finally:
        tracing = False
        for place, function, known in zip(places, ours, before, strict=True):
            if getattr(*place) is function:  # nor is what another thread has put there
                setattr(*place, known)


def state_in(graph: Any) -> Any:
    """The node of a trace that is the state."""
    for node in graph.nodes:
        if node.op == "placeholder":
            source = getattr(node.meta.get("grapharg"), "source", None)
            name = getattr(source, "name", None)
            if (name() if callable(name) else name) == "L['x']":
                return node
    raise NotLowered("its value does not depend on x")


def has_effects(code: types.CodeType) -> bool:
    """Whether what Dynamo made of an evaluation does more than hand its inputs to the graph."""
    handed_over = False
    for step in dis.get_instructions(code):
        name = step.opname
        if name == "LOAD_GLOBAL" and str(step.argval).startswith("__compiled_fn"):
            handed_over = False
        if name.startswith(("STORE", "DELETE")) and "FAST" not in name:
            return True
        if name == "STORE_FAST" and "graph_out" in str(step.argval):
            handed_over = True
        elif handed_over and name.startswith("CALL"):
            return True
    return not handed_over
