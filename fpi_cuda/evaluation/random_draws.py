"""The random numbers of one evaluation of g: recorded once, handed out again in every other.

A mode of the dispatcher sees each op that draws, below autograd and torch.func, and on its own
thread only. So later evaluations get the numbers of the first one without any generator being
wound back, and what other threads draw stays theirs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack

from fpi_cuda.evaluation.dispatch_modes import QuietMode
from fpi_cuda.evaluation.drawing_ops import (
    Generators,
    Kind,
    State,
    copied_where_written,
    default_generator,
    device_of,
    drawn_from,
    drawn_with,
    draws_none,
    dropped_out,
    form_of,
    generator_at,
    generator_in,
    kind_of,
    known_kinds,
    written_in,
)
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


# Looked up at every op.
NOTHING, NUMBERS = Kind.NOTHING, Kind.NUMBERS


class ThisThread(threading.local):
    """What holds on one thread.

    Attributes:
        depth: how many of the modes below it is in.
    """

    depth = 0


here = ThisThread()


class Draw(NamedTuple):
    """What one op drew.

    Attributes:
        op: the op. asked: its arguments but for numbers in tensors and the generator.
        numbers: copies of what it drew.
        state: of the generator that it draws from instead, where it reads tensors.
    """

    op: Any
    asked: Any
    numbers: tuple[Tensor, ...] = ()
    state: State | None = None


class DrawMode(QuietMode):
    """Sees every op that draws, on this thread."""

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
        kind = known_kinds.get(func) or kind_of(func)
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

    def draw(self, kind: Kind, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the op returns."""
        raise NotImplementedError

    def rest(self) -> Start:
        """What hands out from here on what this mode hands out."""
        raise NotImplementedError


class Recording(DrawMode):
    """An evaluation whose draws are written down.

    Args:
        source: what it draws from; None: as it would without this mode.
    Attributes:
        draws: what it drew, in order.
    """

    def __init__(self, source: Generators | None = None) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self._source = source

    def draw(self, kind: Kind, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked = form_of(func, args, kwargs)
        if kind is Kind.DEPENDENT:
            out, state = self._dependent(func, args, kwargs)
            self.draws.append(Draw(func, asked, state=state))
            return out
        if self._source is None:
            out = func(*args, **kwargs)
        else:
            out = drawn_from(self._source, kind, func, args, kwargs)
        drawn = out[1:] if kind is Kind.DROPOUT else (out,)
        self.draws.append(Draw(func, asked, tuple(t.detach().clone() for t in drawn)))
        return out

    def rest(self) -> Start:
        return functools.partial(Replaying, self.draws, len(self.draws))

    def _dependent(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, State]:
        """What an op returns that reads tensors, and where its generator was before."""
        given = generator_in(args, kwargs)
        device = device_of(args, kwargs)
        if self._source is not None:
            mine = self._source.like(given, device)
            state = (mine.device, mine.get_state())
            return drawn_with(mine, func, args, kwargs), state
        source = default_generator(device) if given is None else given
        before = copied_where_written(func, args)
        if here.depth == 1:
            state = (source.device, source.get_state())
            out = func(*args, **kwargs)
            mine = generator_at(*state)
            drawn_with(mine, func, copied_where_written(func, before), kwargs)
            if torch.equal(mine.get_state(), source.get_state()):
                return out, state
        # Another thread draws as well, or a mode further out says what is drawn here.
        mine = torch.Generator(source.device)
        seed = torch.randint(2**62, (), device=source.device, generator=given)
        mine.manual_seed(int(seed))
        state = (source.device, mine.get_state())
        for t, copy in zip(args, before, strict=True):
            if t is not copy:
                t.copy_(copy)
        return drawn_with(mine, func, args, kwargs), state


class Replaying(DrawMode):
    """An evaluation that is given what another one drew.

    Args:
        draws: of that one; more may be added to them while it goes on.
        position: where among them this one begins.
    """

    def __init__(self, draws: Sequence[Draw], position: int = 0) -> None:
        super().__init__()
        self._draws = draws
        self._position = position

    def draw(self, kind: Kind, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._position == len(self._draws):
            raise RuntimeError(OTHERWISE.format(f"{func.name()} comes after all there were"))
        known = self._draws[self._position]
        asked = form_of(func, args, kwargs)
        if known.op is not func or known.asked != asked:
            raise RuntimeError(
                OTHERWISE.format(
                    f"{func.name()} of {asked} comes in the place of {known.op.name()} of "
                    f"{known.asked}"
                )
            )
        self._position += 1
        if kind is Kind.DEPENDENT:
            assert known.state is not None
            return drawn_with(generator_at(*known.state), func, args, kwargs)
        if kind is Kind.DROPOUT:
            return dropped_out(args[0], args[1], known.numbers[0])
        (numbers,) = known.numbers
        written = written_in(func, args, kwargs)
        return numbers.clone() if written is None else written.copy_(numbers)

    def rest(self) -> Start:
        return functools.partial(Replaying, self._draws, self._position)

    def require_all(self) -> None:
        """Raise unless everything was asked for."""
        left = len(self._draws) - self._position
        if left:
            op = self._draws[self._position].op.name()
            raise RuntimeError(OTHERWISE.format(f"{op} and what follows, {left} in all, is left"))
