"""Ops that draw random numbers, and how each is made to draw from a given generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fpi_cuda.evaluation.stream_capture import never_drops

State = tuple[torch.device, Tensor]
"""Where a generator of a device stands."""


class Kind(Enum):
    """How what an op draws can be had again."""

    NOTHING = auto()  # it draws nothing
    NUMBERS = auto()  # a copy is enough: no tensor is read
    DEPENDENT = auto()  # it reads tensors, so that the state of a generator is kept
    DROPOUT = auto()  # the mask is kept
    COMPOSITE = auto()  # it is made of others
    UNKNOWN = auto()  # not at all


# Without an argument for the generator; each has a form in place that takes one.
FILLED: dict[str, Callable[..., Tensor]] = {
    "aten::rand": lambda t, generator: t.uniform_(generator=generator),
    "aten::rand_like": lambda t, generator: t.uniform_(generator=generator),
    "aten::randn": lambda t, generator: t.normal_(generator=generator),
    "aten::randn_like": lambda t, generator: t.normal_(generator=generator),
}
INTEGERS = ("aten::randint", "aten::randint_like", "aten::randperm")
# They read the shape of a tensor, not its numbers.
SHAPE_ONLY = ("bernoulli.p", "rand_like", "randn_like", "randint_like")
# They overwrite a tensor without reading it.
FILLING = (
    *("bernoulli_.float", "uniform_", "normal_", "exponential_", "geometric_", "log_normal_"),
    *("cauchy_", "random_"),
)

known_kinds: dict[Any, Kind] = {}


class Generators:
    """Generators of one's own that begin where others stand.

    Args:
        states: of the CPU's default generator and, if there are two, of the device's.
        device: the one whose second state that is.
    """

    def __init__(self, states: Sequence[Tensor], device: torch.device) -> None:
        self._mine: dict[Any, torch.Generator] = {}
        for place, state in zip((torch.device("cpu"), device), states, strict=False):
            self._mine[place] = generator_at(place, state)

    def like(self, given: torch.Generator | None, device: torch.device) -> torch.Generator:
        """The one in the place of `given`, or of the default one of a device."""
        key: Any = device if given is None else given
        if key not in self._mine:
            source = default_generator(device) if given is None else given
            self._mine[key] = generator_at(source.device, source.get_state())
        return self._mine[key]


def kind_of(func: Any) -> Kind:
    """The kind of an op, which is then known."""
    kind = known_kinds[func] = classified(func)
    return kind


def classified(func: Any) -> Kind:
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
    short = schema.name.removeprefix("aten::")
    names = (short, f"{short}.{schema.overload_name}")
    reads = [a for a in schema.arguments if is_tensor(a) and a.name != "out"]
    if any(name in SHAPE_ONLY or name in FILLING for name in names):
        reads = reads[1:]
    if schema.name in FILLED or schema.name in INTEGERS:
        return Kind.UNKNOWN if reads else Kind.NUMBERS
    if all(a.name != "generator" for a in schema.arguments):
        return Kind.UNKNOWN
    return Kind.DEPENDENT if reads else Kind.NUMBERS


def is_tensor(argument: Any) -> bool:
    """Whether an argument of a schema is a tensor, or may be one."""
    return "Tensor" in str(argument.type)


def is_written(argument: Any) -> bool:
    """Whether the op writes to it."""
    return argument.alias_info is not None and argument.alias_info.is_write


def draws_none(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the op is told to leave nothing out, so that it draws nothing."""
    if never_drops(func, args, kwargs):
        return True
    given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    train = next((given[name] for name in ("train", "training") if name in given), None)
    share = next((given[name] for name in ("p", "dropout") if name in given), None)
    return train is False or (isinstance(share, float) and share == 0.0)


def form_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments, but for the numbers in tensors and for generators."""
    given = (*args, *kwargs.items()) if kwargs else args
    return tuple(map(form_of_one, given))


def form_of_one(value: Any) -> Any:
    """A tensor's shape, dtype and device; nothing of a generator; anything else itself."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple(map(form_of_one, value))
    return None if isinstance(value, torch.Generator) else value


def drawn_from(
    source: Generators, kind: Kind, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What an op returns that draws from a generator of `source`."""
    generator = source.like(generator_in(args, kwargs), device_of(args, kwargs))
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return drawn_with(generator, func, args, kwargs)
    with torch._C._DisableTorchDispatch():
        if kind is Kind.DROPOUT:
            x, p = args[:2]
            mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
            return dropped_out(x, p, mask)
        name = func._schema.name
        written = written_in(func, args, kwargs)
        if name in INTEGERS:
            return integers(name, args, kwargs, generator, written)
        target = empty_for(func, args, kwargs) if written is None else written
        return FILLED[name](target, generator)


def empty_for(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Uninitialised memory for what a factory function returns."""
    make = torch.empty_like if func._schema.name.endswith("_like") else torch.empty
    kwargs = {k: v for k, v in kwargs.items() if k != "out" and v is not None}
    return make(args[0], **kwargs)


def integers(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    generator: torch.Generator,
    out: Tensor | None,
) -> Tensor:
    """randint, randint_like or randperm, drawing from a generator."""
    kwargs = {k: v for k, v in kwargs.items() if k != "out" and v is not None}
    if name == "aten::randperm":
        drawn = torch.randperm(*args, generator=generator, **kwargs)
        return drawn if out is None else out.copy_(drawn)
    like = name.endswith("_like")
    bounds = args[1:] if like else args[:-1]
    low, high = (0, *bounds) if len(bounds) == 1 else bounds
    if out is None:
        kwargs.setdefault("dtype", args[0].dtype if like else torch.int64)
        out = torch.empty_like(args[0], **kwargs) if like else torch.empty(args[-1], **kwargs)
    return out.random_(low, high, generator=generator)


def dropped_out(x: Tensor, p: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What native_dropout returns with this mask."""
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return torch.ops.aten.native_dropout_backward(x, mask, scale), mask.clone()


def written_in(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that an op writes to, if there is one."""
    for index, argument in enumerate(func._schema.arguments):
        if is_written(argument):
            return args[index] if index < len(args) else kwargs.get(argument.name)
    return None


def copied_where_written(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with copies of the tensors that an op writes to."""
    arguments = func._schema.arguments
    return tuple(
        t.clone() if is_written(argument) and isinstance(t, Tensor) else t
        for t, argument in zip(args, arguments, strict=False)
    )


def generator_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator | None:
    """The generator that an op was given."""
    values = (*args, *kwargs.values())
    return next((v for v in values if isinstance(v, torch.Generator)), None)


def drawn_with(
    generator: torch.Generator, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What an op returns that is given this generator, in the place of its own."""
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("generator")
    # What modes further out record or replay is not touched by it.
    with torch._C._DisableTorchDispatch():
        if place < len(args):
            return func(*args[:place], generator, *args[place + 1 :], **kwargs)
        return func(*args, **kwargs | {"generator": generator})


def device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where an op draws."""
    place = kwargs.get("device")
    if place is None:
        tensors = (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        place = next((t.device for t in tensors), torch.device("cpu"))
    place = torch.device(place)
    if place.index is None and place.type != "cpu":
        return torch.device(place.type, torch.get_device_module(place).current_device())
    return place


def default_generator(device: torch.device) -> torch.Generator:
    """The process's generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    return module.default_generators[device.index]


def generator_at(device: torch.device, state: Tensor) -> torch.Generator:
    """A new generator in a state."""
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator
