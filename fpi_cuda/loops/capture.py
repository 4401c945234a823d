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
from fpi_cuda.lowered import NotLowered

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
WITH_EFFECTS = "an evaluation of it does more than compute its value"


class Capture:
    """One trace of g.

    Attributes:
        found: what was read in it.
        verified: it was compared with g itself.
        classes: what it rests on besides what Dynamo guards.
        plain: where the x of the trace requires grad, another trace with one that does not, in
            which the same was read: g may look at that.
    """

    def __init__(self, found: Any, trace: Trace, guards: Any, code: types.CodeType, g: Any) -> None:
        self.found = found
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
        self._orders = [(kind, kind.__mro__) for kind in kinds]
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
        if any(kind.__mro__ != order for kind, order in self._orders):
            return False
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
        seconds: that solves of such a g have taken, where somebody counts them.
        traces: of such a g, made so far, likewise.
    """

    def __init__(self) -> None:
        self.captures: list[Capture] = []
        self.refusals: dict[Hashable, str] = {}
        self.seconds: dict[Hashable, float] = {}
        self.traces: dict[Hashable, int] = {}
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


def make_lock_anew() -> None:
    """In a process that was forked while another thread traced."""
    global lock
    lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=make_lock_anew)


def key_of_kind(g: Any) -> Any:
    """The class of a module or object, the code of a function."""
    kind = type(g)
    if kind is types.FunctionType:
        return g.__code__
    if kind is types.MethodType:
        function = g.__func__  # may be any callable
        return getattr(function, "__code__", None) or type(function)
    return kind


def is_wanted() -> bool:
    """Whether g are to be captured at all."""
    return os.environ.get(SWITCH, "1") != "0"


def why_hooks_matter(g: Any) -> str | None:
    """Which hooks must see evaluations of g, or None."""
    if hooks_on_all():
        return "there are hooks on all modules"
    for part in modules_of(g):
        if any(part.__dict__.get(name) for name in HOOKS):
            return f"{type(part).__name__} has hooks, which must see its evaluations"
    return None


class Captures:
    """The traces of g that are kept for one purpose.

    Args:
        read: what is looked for in a graph of torch's functions and methods, each with what it
            gives as "example_value", given the state in it; `plain` says that it is that of a
            call_plain_g. Raises NotLowered where it is not there.
        grad: whether g is traced in grad mode.
        why_not: what shows in a g before it is traced; None: nothing does.
        refusal: with places for the class of g and a reason.
    """

    def __init__(
        self,
        read: Callable[[Any, Any, bool], Any],
        *,
        grad: bool,
        why_not: Callable[[Any], str | None],
        refusal: str,
    ) -> None:
        self.read = read
        self.kinds: weakref.WeakKeyDictionary[Any, Kind] = weakref.WeakKeyDictionary()
        self._grad = grad
        self._why_not = why_not
        self._refusal = refusal

    def kind_of(self, g: Any) -> Kind:
        """That which g is of."""
        key = key_of_kind(g)
        found = self.kinds.get(key)
        return self.kinds.setdefault(key, Kind()) if found is None else found

    def clear(self) -> None:
        """Forget every capture."""
        with lock:
            self.kinds.clear()

    def known(self, g: Any, x: Tensor, z: tuple[Any, ...]) -> Capture | None:
        """A capture that holds for g; None where there is none. Under the grad mode of traces."""
        kind = self.kind_of(g)
        captures = kind.captures
        for capture in captures:
            if capture.holds(g, x, z):
                if capture is not captures[0]:  # in one go, for other threads may be here
                    kind.captures = [capture, *(c for c in captures if c is not capture)]
                return capture
        return None

    def why_not(self, g: Any) -> str | None:
        """What speaks against a trace before anything is traced; None: nothing shows at once."""
        return why_hooks_matter(g) or self._why_not(g)

    def of(self, g: Any, x: Tensor, z: tuple[Any, ...]) -> Capture:
        """A trace of g that holds, made here if there is none.

        Args:
            x: plain, a state. z: inputs of g.
        Raises:
            NotLowered: g cannot be traced, or what is looked for is not in it.
        """
        for t in z:
            strange = why_not_dense(t) if isinstance(t, Tensor) else None
            if strange is not None:
                raise NotLowered(self._refusal.format(type(g).__name__, f"a z is {strange[0]}"))
        with torch.set_grad_enabled(self._grad), lock:
            found = self.known(g, x, z)
            if found is not None:
                return found
            kind, key = self.kind_of(g), key_of(g, x, z)
            kind.renew()
            reason = kind.refusals.get(key)
            if reason is None and len(kind.captures) + len(kind.refusals) >= MOST_CAPTURES:
                reason = TOO_MANY
            reason = reason or why_hooks_matter(g) or why_modes_matter()
            if reason is not None:
                raise NotLowered(self._refusal.format(type(g).__name__, reason))
            try:
                reason = self._why_not(g)
                if reason is not None:
                    raise NotLowered(reason)
                capture = self.made(kind, g, x, z)
            except Exception as error:  # Dynamo's insides may be others in another torch
                said = error if isinstance(error, NotLowered) else f"it was not traced ({error!r})"
                if not isinstance(error, NotTraced):
                    kind.refusals[key] = str(said)
                raise NotLowered(self._refusal.format(type(g).__name__, said)) from error
            kind.captures.insert(0, capture)
            return capture

    def made(self, kind: Kind, g: Any, x: Tensor, z: tuple[Any, ...]) -> Capture:
        """A trace of g, made now."""
        return traced(self.read, kind.evaluation, g, x, z)

    def refuse(self, capture: Capture, g: Any, x: Tensor, z: tuple[Any, ...], reason: str) -> None:
        """Let go of a capture that is not what g computes."""
        with lock:
            kind = self.kind_of(g)
            if capture in kind.captures:  # another thread may have been here
                kind.captures.remove(capture)
            kind.refusals[key_of(g, x, z)] = reason


class NotTraced(NotLowered):
    """Dynamo was not asked: it may be another time."""


def key_of(g: Any, x: Tensor, z: tuple[Any, ...]) -> Hashable:
    """Equal for the same g, as far as that shows, with a state and inputs of the same shapes."""
    shapes = tuple((t.shape, t.dtype, t.requires_grad) for t in (x, *z) if isinstance(t, Tensor))
    which = (weakref.ref(g), getattr(g, "training", None)) if isinstance(g, nn.Module) else None
    return which, shapes


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
        for code in self.codes:
            if code.co_filename == os.getenv.__code__.co_filename:
                raise NotLowered("it reads what the operating system has")
            seen = SEES_TRACES.intersection(code.co_names)
            if seen and not code.co_filename.startswith(EXEMPT):
                raise NotLowered(f"it calls {min(seen)}, which a trace has another answer to")
        self._guards = list(context.guards_context.dynamo_guards)
        if any(COMPILED in guard.name for guard in self._guards):
            raise NotLowered("it calls what is compiled")
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

    def forget(self) -> None:
        """Hold nothing that was traced: Dynamo holds who is asked here."""
        self.codes, self._guards = frozenset(), ()


SEES_TRACES = frozenset(
    ("is_compiling", "is_dynamo_compiling", "is_exporting", "is_torchdynamo_compiling",
     "record_function")
)  # fmt: skip
"""Functions of torch that answer otherwise, or do nothing, where they are traced."""

EXEMPT = (os.path.dirname(torch.__file__), os.path.dirname(_extension.__file__))
"""Where the answer decides how something is computed, not what."""

COMPILED = "_torchdynamo_"
"""In the names of what torch.compile puts around a function."""


class Traced(BaseException):
    """There is a trace, and nobody needs the value."""


class Refusal(str):
    """Why a trace is not what was looked for."""

    __slots__ = ()


def first_line(error: BaseException) -> str:
    """What an error says, without where."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def traced(
    look: Callable[[Any, Any, bool], Any],
    evaluation: types.FunctionType,
    g: Any,
    x: Tensor,
    z: tuple[Any, ...],
    plain: bool = False,
) -> Capture:
    """A trace of g, made now.

    Args:
        look: see read of Captures.
        plain: the evaluation is a call_plain_g.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list as entries_of

    found: list[Any] = []
    trace, running = Trace(evaluation), False

    def read(module: Any, _: object) -> Callable[..., Any]:
        """What Dynamo calls with the graph, and then with what the graph reads."""
        try:
            trace.look_at_graph(module.graph)
            found.append(look(module.graph, state_in(module.graph), plain))
        except Exception as error:
            # In words, for Dynamo keeps this function, and an exception the frames of its making.
            found.append(Refusal(first_line(error)))

        def given(*given: Any) -> Any:
            if not running:  # what else an evaluation does comes behind this
                raise Traced
            return (given,)

        return given

    code = evaluation.__code__
    before = {id(entry.code) for entry in entries_of(code)}
    try:
        with tracing_for_guards(), nothing_else_touched():
            torch.compile(evaluation, backend=read, fullgraph=True)(g, x, z)
    except Traced:
        pass
    except NotLowered:
        raise
    except Exception as error:
        said = first_line(getattr(error, "inner_exception", None) or error)
        kind = NotTraced if "stance" in said else NotLowered
        raise kind(f"it was not traced ({type(error).__name__}: {said})") from error
    finally:
        running = True
    try:
        if len(found) != 1:
            raise NotTraced("it was not traced: Dynamo is switched off, or does not look into it")
        (seen,) = found
        if isinstance(seen, Refusal):
            raise NotLowered(seen)
        new = [entry for entry in entries_of(code) if id(entry.code) not in before]
        if len(new) != 1 or has_effects(new[0].code):
            raise NotLowered(WITH_EFFECTS)
        trace.look_at_guards()
        return Capture(seen, trace, new[0].guard_manager, new[0].code, g)
    finally:
        trace.forget()
        found.clear()


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
