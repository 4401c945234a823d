"""The random numbers of one evaluation of g: recorded once, handed out again in every other.

A mode of the dispatcher sees each op that draws, below autograd and torch.func, and on its own
thread only. So later evaluations get the numbers of the first one without any generator being
wound back, and what other threads draw stays theirs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack
from torch.utils import _pytree as pytree

from fpi_cuda.evaluation.dispatch_modes import QuietMode
from fpi_cuda.evaluation.recomputed import Start, recomputations_use, require_not_reentrant

if TYPE_CHECKING:
    from typing_extensions import Self

OTHERWISE = (
    "fixed_point: g draws random numbers differently from evaluation to evaluation: {}. Every "
    "evaluation of one solve gets the same ones; draw them before the call and pass them as z"
)
OUT_OF_REACH = (
    "fixed_point: g draws random numbers in {}, which takes no generator, so that other "
    "evaluations of the solve could not be given the same ones. Draw them before the call and "
    "pass them as z, or, in attention, use torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
)


# Of the first tensor these ops read the shape alone, or they overwrite it.
NUMBERS_UNREAD = (
    *("bernoulli.p", "rand_like", "randn_like", "randint_like", "bernoulli_.float", "uniform_"),
    *("normal_", "exponential_", "geometric_", "log_normal_", "cauchy_", "random_"),
)


class ThisThread(threading.local):
    """What holds on one thread.

    Attributes:
        depth: how many of the modes below it is in.
    """

    depth = 0


here = ThisThread()


class Kind(Enum):
    """How what an op draws can be had again."""

    NOTHING = auto()  # it draws nothing
    NUMBERS = auto()  # a copy is enough: no tensor is read
    DEPENDENT = auto()  # it reads tensors, so that the state of a generator is kept
    DROPOUT = auto()  # the mask is kept
    COMPOSITE = auto()  # it is made of others
    UNKNOWN = auto()  # not at all


# Looked up at every op.
NOTHING, NUMBERS = Kind.NOTHING, Kind.NUMBERS


class Draw(NamedTuple):
    """What one op drew.

    Attributes:
        op: the op. asked: its arguments but for numbers in tensors and the generator.
        numbers: a copy of what it drew.
        start: stands where it began to draw, where it reads tensors, and nobody draws from it.
    """

    op: Any
    asked: Any
    numbers: Tensor | None
    start: torch.Generator | None


class Generators:
    """Generators of one's own that begin where others stand.

    Args:
        states: of the CPU's default generator and, if there are two, of the device's.
        device: the one whose second state that is.
    """

    def __init__(self, states: Sequence[Tensor], device: torch.device) -> None:
        self._mine: dict[torch.Generator, torch.Generator] = {}
        for place, state in zip((torch.device("cpu"), device), states, strict=False):
            self._mine[default_generator(place)] = torch.Generator(place).set_state(state)

    def like(self, source: torch.Generator) -> torch.Generator:
        """The one in the place of `source`."""
        if source not in self._mine:
            self._mine[source] = copy_of(source)
        return self._mine[source]


class DrawMode(QuietMode):
    """Sees every op that draws, on this thread.

    Args:
        draws: of an evaluation; more may be added to them while this goes on.
        position: where among them this one is.
    Attributes:
        draw: what an op of some kind returns.
    """

    draw: Callable[[Kind, Any, tuple[Any, ...], dict[str, Any]], Any]

    def __init__(self, draws: Sequence[Draw], position: int = 0) -> None:
        super().__init__()
        self.draws = draws
        self.position = position

    def __enter__(self) -> Self:
        self._differentiable = torch.is_grad_enabled()
        here.depth += 1
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        here.depth -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the op, or see to what it draws."""
        kind = kind_of(func)
        kwargs = kwargs or {}
        if kind is NOTHING or (kind is not NUMBERS and draws_none(func, args, kwargs)):
            # What this mode asks for, no function mode has to see: g did not.
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs) if kwargs else func(*args)
        if kind is Kind.COMPOSITE:
            _push_on_torch_dispatch_stack(self)
            try:
                return func.decompose(*args, **kwargs)
            finally:
                _pop_torch_dispatch_stack(None)
        if kind is Kind.UNKNOWN:
            raise RuntimeError(OUT_OF_REACH.format(func.name()))
        if self._differentiable:
            require_not_reentrant()
        recomputations_use(self.rest)
        return self.draw(kind, func, args, kwargs)

    def rest(self) -> Start:
        """What hands out from here on what this mode hands out."""
        return functools.partial(Replaying, self.draws, self.position)


class Recording(DrawMode):
    """An evaluation whose draws are written down.

    Args:
        source: what it draws from; None: as it would without this mode.
    Attributes:
        draws: what it drew, in order.
    """

    def __init__(self, source: Generators | None = None) -> None:
        self.draws: list[Draw]
        super().__init__([])
        self._source = source

    def draw(self, kind: Kind, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked = form_of((*args, *kwargs.items()))
        numbers = start = None
        if self._source is not None:
            mine = self._source.like(source_of(args, kwargs))
            start = copy_of(mine) if kind is Kind.DEPENDENT else None
            out = drawn_with(mine, func, args, kwargs)
        elif kind is Kind.DEPENDENT:
            out, start = dependent(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if start is None:
            numbers = (out[1] if kind is Kind.DROPOUT else out).detach().clone()
        self.draws.append(Draw(func, asked, numbers, start))
        self.position += 1
        return out


class Replaying(DrawMode):
    """An evaluation that is given what another one drew."""

    def draw(self, kind: Kind, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.position == len(self.draws):
            raise RuntimeError(OTHERWISE.format(f"{func.name()} comes after all there were"))
        op, known, numbers, start = self.draws[self.position]
        asked = form_of((*args, *kwargs.items()))
        if op is not func or known != asked:
            raise RuntimeError(
                OTHERWISE.format(
                    f"{func.name()} of {asked} comes in the place of {op.name()} of {known}"
                )
            )
        self.position += 1
        if start is not None:
            return drawn_with(copy_of(start), func, args, kwargs)
        assert numbers is not None
        if kind is Kind.DROPOUT:
            return dropped_out(args[0], args[1], numbers)
        for place, argument in enumerate(func._schema.arguments):
            if is_written(argument):
                written = args[place] if place < len(args) else kwargs[argument.name]
                return written.copy_(numbers)
        return numbers.clone()

    def require_all(self) -> None:
        """Raise unless everything was asked for."""
        left = len(self.draws) - self.position
        if left:
            op = self.draws[self.position].op.name()
            raise RuntimeError(OTHERWISE.format(f"{op} and what follows, {left} in all, is left"))


@functools.cache
def kind_of(func: Any) -> Kind:
    """The kind of an op, by its schema."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return Kind.NOTHING
    schema = func._schema
    if schema.name == "aten::_fused_sdp_choice":
        return Kind.NOTHING
    if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return Kind.COMPOSITE
    if schema.name == "aten::native_dropout" and not schema.overload_name:
        return Kind.DROPOUT
    if seeded(func) is None:
        return Kind.UNKNOWN
    short = schema.name.removeprefix("aten::")
    reads = [a for a in schema.arguments if "Tensor" in str(a.type) and a.name != "out"]
    if short in NUMBERS_UNREAD or f"{short}.{schema.overload_name}" in NUMBERS_UNREAD:
        reads = reads[1:]
    return Kind.DEPENDENT if reads else Kind.NUMBERS


@functools.cache
def seeded(func: Any) -> tuple[Any, int] | None:
    """The overload of an op that takes a generator besides, and its place; None: there is none."""
    asked = {argument.name for argument in func._schema.arguments} | {"generator"}
    packet = func.overloadpacket
    for overload in (func, *(getattr(packet, name) for name in packet.overloads())):
        names = [argument.name for argument in overload._schema.arguments]
        if set(names) == asked:
            return overload, names.index("generator")
    return None


def draws_none(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the op is told to leave nothing out, so that it draws nothing."""
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= {a.name: v for a, v in zip(arguments, args, strict=False)} | kwargs
    train = next((given[name] for name in ("train", "training") if name in given), None)
    share = next((given[name] for name in ("p", "dropout", "dropout_p") if name in given), None)
    return train is False or (isinstance(share, float) and share == 0.0)


def form_of(value: Any) -> Any:
    """A tensor's shape, dtype and device; nothing of a generator; anything else itself."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple(map(form_of, value))
    return None if isinstance(value, torch.Generator) else value


def dependent(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, torch.Generator]:
    """What an op returns that reads tensors, and a generator as its own stood before."""
    source = source_of(args, kwargs)
    before = copied_where_written(func, args)
    if here.depth == 1:
        start = copy_of(source)
        out = func(*args, **kwargs)
        mine = copy_of(start)
        drawn_with(mine, func, copied_where_written(func, before), kwargs)
        if torch.equal(mine.get_state(), source.get_state()):
            return out, start
    # Another thread draws as well, or a mode further out says what is drawn here.
    seed = torch.randint(2**62, (), device=source.device, generator=source)
    start = torch.Generator(source.device).manual_seed(int(seed))
    for t, copy in zip(args, before, strict=True):
        if t is not copy:
            t.copy_(copy)
    return drawn_with(copy_of(start), func, args, kwargs), start


def drawn_with(
    generator: torch.Generator, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What an op returns that is given this generator, in the place of its own."""
    # What modes further out record or replay is not touched by it.
    with torch._C._DisableTorchDispatch():
        if kind_of(func) is Kind.DROPOUT:
            x, p = args[:2]
            mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
            return dropped_out(x, p, mask)
        found = seeded(func)
        assert found is not None
        op, place = found
        if place < len(args):
            return op(*args[:place], generator, *args[place + 1 :], **kwargs)
        return op(*args, **kwargs | {"generator": generator})


def dropped_out(x: Tensor, p: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What native_dropout returns with this mask."""
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return torch.ops.aten.native_dropout_backward(x, mask, scale), mask.clone()


def copied_where_written(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with copies of the tensors that an op writes to."""
    return tuple(
        t.clone() if is_written(argument) and isinstance(t, Tensor) else t
        for t, argument in zip(args, func._schema.arguments, strict=False)
    )


def is_written(argument: Any) -> bool:
    """Whether the op writes to this argument of its schema."""
    return argument.alias_info is not None and argument.alias_info.is_write


def source_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator:
    """The generator that an op draws from: the one it was given, or its device's."""
    given = pytree.tree_leaves((args, kwargs))
    place = kwargs.get("device")
    for value in given:
        if isinstance(value, torch.Generator):
            return value
        if isinstance(value, Tensor) and place is None:
            place = value.device
    return default_generator(torch.device("cpu" if place is None else place))


def default_generator(device: torch.device) -> torch.Generator:
    """The process's generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    return module.default_generators[index]


def copy_of(generator: torch.Generator) -> torch.Generator:
    """A new generator where another one stands."""
    return torch.Generator(generator.device).set_state(generator.get_state())
