"""The tensors that g closes over, found and exchanged while it is evaluated."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fpi_cuda.evaluation.context import laid_aside


class Here(threading.local):
    """What is exchanged on this thread.

    Attributes:
        substitution: the innermost one.
    """

    substitution: Substitution | None = None


here = Here()


class Watch(TorchFunctionMode):
    """Finds the tensors that g uses and that it was neither given nor has made itself.

    Attributes:
        functions: it calls an autograd.Function.
        blind: it has made tensors out of sight; known after `captured` too.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        # Kept, for numbers of what is gone are given anew.
        self._known = {id(t): t for t in given}
        self._used: list[tuple[weakref.ref[Tensor], Tensor | None]] = []
        self.functions = False
        self.blind = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Look at what comes out, and if that has tensors at what has gone in."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = list(tensors_in(result))
        for t in tensors_in((args, kwargs)) if made else ():
            if id(t) not in self._known:
                self._known[id(t)] = t
                stand_in = t if here.substitution is None else here.substitution.exchanged(t)
                self._used.append((weakref.ref(t), None if stand_in is t else stand_in))
        self.functions |= getattr(func, "__name__", "") == "custom_function_call"
        self._known.update((id(t), t) for t in made)
        return result

    def captured(self) -> list[tuple[Tensor, Tensor]]:
        """Those that are still there, and what is given in their place by a solve around.

        What transforms inside of g have wrapped is not there any more.
        """
        self._known.clear()
        there = [(used(), stand_in) for used, stand_in in self._used]
        self.blind |= any(t is None for t, _ in there)
        return [(t, t if stand_in is None else stand_in) for t, stand_in in there if t is not None]

    def call(self, function: Callable[..., Any], *args: Any, given: Sequence[Tensor]) -> Any:
        """function(*args), watched, which is given other tensors besides."""
        self._known.update((id(t), t) for t in tensors_in([*args, *given]))
        with self:
            result = function(*args)
        self.blind |= any(id(t) not in self._known for t in tensors_in(result))
        return result


class Substitution(TorchFunctionMode):
    """Puts stand-ins in the place of tensors that g closes over, after those of a solve around.

    Attributes:
        hooks_set: g has set hooks on tensors meanwhile.
    """

    def __init__(self, stand_ins: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._pairs = {id(original): (original, other) for original, other in stand_ins}
        self.hooks_set = False

    def __enter__(self) -> Substitution:
        self._around = here.substitution
        here.substitution = self
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        here.substitution = self._around

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Exchange the arguments, then call."""
        if func is Tensor.register_hook:
            self.hooks_set = True
        args, kwargs = mapped(self.exchanged, (args, kwargs or {}))
        return func(*args, **kwargs)

    def exchanged(self, t: Tensor) -> Tensor:
        """What stands in for t, or t itself."""
        pair = self._pairs.get(id(t))
        if pair is None and self._around is not None:
            t = self._around.exchanged(t)
            pair = self._pairs.get(id(t))
        return t if pair is None else pair[1]


@contextlib.contextmanager
def exchanging(
    pairs: Iterable[tuple[Tensor, Tensor]], around: Substitution | None
) -> Iterator[Substitution]:
    """Around an evaluation of g on stand-ins.

    Args:
        around: what was exchanged around the solve that g belongs to.
    """
    if around is not None and around is not here.substitution:
        # The solve around has ended meanwhile.
        with exchanging(around._pairs.values(), around._around), Substitution(pairs) as exchange:
            yield exchange
    else:
        with laid_aside(covers=True), Substitution(pairs) as exchange:
            yield exchange


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a call, or in what it returns."""
    return (part for part in parts_in(value) if isinstance(part, Tensor))


def parts_in(value: Any) -> Iterator[Any]:
    """All that lies in tuples, lists and dicts."""
    if isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from parts_in(part)
    else:
        yield value


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same arguments, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(change, part) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(mapped(change, part) for part in value)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(mapped(change, part) for part in value)
    return value
