"""The levels of torch.func that are active, and how to take tensors out of them and back.

Inside torch.func.grad, jvp and vmap a tensor is wrapped once for every level that concerns it:
level 1 is the outermost transform, and lies innermost in the tensor. A solver must work on plain
numbers, with all samples of all vmaps side by side; the map g must be called with every level in
place, since it may close over wrapped tensors. What follows moves between the two.

Only names that torch's own Python code for torch.func uses are used here.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch

Restore = Callable[[], contextlib.AbstractContextManager[None]]


class Level(NamedTuple):
    """One active transform.

    Attributes:
        number: 1 for the outermost; 0 stands for no transform, plain autograd.
        kind: "Vmap", "Grad", "Jvp" or "Functionalize".
        size: how many samples a vmap has; 0 for the others.
    """

    number: int
    kind: str
    size: int


active = torch._C._are_functorch_transforms_active
"""Whether any transform is active."""


def require_working() -> None:
    """Raise where torch itself loses the derivatives that active transforms ask for.

    Raises:
        RuntimeError: grad, vjp or jvp inside inference_mode, before torch 2.13.
    """
    if not (active() and torch.is_inference_mode_enabled()):
        return
    if any(level.kind in ("Grad", "Jvp") for level in live_levels()) and not works_in_inference():
        raise RuntimeError(
            "fixed_point: inside torch.inference_mode this torch computes no derivatives for "
            "torch.func.grad, vjp and jvp. Use torch.no_grad"
        )


@functools.cache
def works_in_inference() -> bool:
    """Whether torch.func.grad knows in inference mode that (t^2)' = 2t: not before torch 2.13."""
    with truncated(0), torch.inference_mode():
        return bool(torch.func.grad(torch.square)(torch.ones(())) == 2)


def live_levels() -> list[Level]:
    """The active transforms, outermost first."""
    levels = []
    for interpreter in functorch.get_interpreter_stack() or ():
        kind = interpreter.key().name
        size = functorch.CVmapInterpreterPtr(interpreter).batchSize() if kind == "Vmap" else 0
        levels.append(Level(interpreter.level(), kind, size))
    return levels


@contextlib.contextmanager
def truncated(number: int) -> Iterator[Restore]:
    """Leave the transforms above level `number`; the yielded context enters them again."""
    popped = []
    while (top := functorch.peek_interpreter_stack()) is not None and top.level() > number:
        popped.append(functorch.pop_dynamic_layer_stack())

    @contextlib.contextmanager
    def restored() -> Iterator[None]:
        for layer in reversed(popped):
            functorch.push_dynamic_layer_stack(layer)
        try:
            yield
        finally:
            for _ in popped:
                functorch.pop_dynamic_layer_stack()

    try:
        yield restored
    finally:
        for layer in reversed(popped):
            functorch.push_dynamic_layer_stack(layer)


def level_of(t: Tensor) -> int:
    """The highest level that t is wrapped for; 0 for a plain tensor."""
    t = functorch.unwrap_if_dead(t)
    return functorch.maybe_get_level(t) if functorch.is_functorch_wrapped_tensor(t) else 0


def batch_levels_of(t: Tensor) -> set[int]:
    """Levels of the vmaps that t has a dimension of."""
    return {number for number, _ in wrappers_of(t, 0)[1]}


def wrappers_of(t: Tensor, down_to: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """t without its wrappers above a level, and (level, dimension) of the vmaps among them."""
    batched = []
    t = functorch.unwrap_if_dead(t)
    while functorch.is_functorch_wrapped_tensor(t) and functorch.maybe_get_level(t) > down_to:
        if functorch.is_batchedtensor(t):
            batched.append((functorch.maybe_get_level(t), functorch.maybe_get_bdim(t)))
        t = functorch.unwrap_if_dead(functorch.get_unwrapped(t))
    return t, batched


def numbers(t: Tensor) -> Tensor:
    """What lies in t, without any wrapper; dimensions are in the order of storage."""
    return wrappers_of(t, 0)[0]


def strip(t: Tensor, number: int, batch: Sequence[Level]) -> Tensor:
    """t as a tensor of level `number` at most, with the vmaps above it as leading dimensions.

    Args:
        batch: these vmaps, ascending. Where t has no dimension of one, it is expanded.
    """
    t, batched = wrappers_of(t, number)
    with truncated(number):
        present = set()
        # Innermost first: the position that a wrapper knows does not count those inside it.
        for moved, (found, dim) in enumerate(reversed(batched)):
            t = t.movedim(dim + moved, moved)
            present.add(found)
        unknown = present.difference(level.number for level in batch)
        if unknown:
            raise RuntimeError(
                "fixed_point: torch.func.vmap at level "
                f"{min(unknown)} batches a derivative but not what is differentiated. Loop in "
                "place of that vmap"
            )
        for place, level in enumerate(batch):
            if level.number not in present:
                t = t.unsqueeze(place)
                t = t.expand(*t.shape[:place], level.size, *t.shape[place + 1 :])
    return t


def lift(t: Tensor, batch: Sequence[Level]) -> Tensor:
    """The opposite of strip: hand the leading dimensions back to their vmaps."""
    for level in batch:
        t = functorch._add_batch_dim(t, 0, level.number)
    return t


def wrap(t: Tensor, number: int) -> Tensor:
    """t, a tensor of a lower level, as a constant of the grad or jvp at level `number`."""
    return functorch._wrap_for_grad(t, number)


def leaf(t: Tensor, number: int) -> Tensor:
    """t, a tensor of a lower level, as a leaf of the grad at level `number` (0: a plain leaf)."""
    with truncated(number):
        wrapped = wrap(t, number) if number else t.detach()
        allowed = functorch.get_inplace_requires_grad_allowed()
        functorch.set_inplace_requires_grad_allowed(True)
        try:
            return wrapped.requires_grad_()
        finally:
            functorch.set_inplace_requires_grad_allowed(allowed)


def is_dead(token: Tensor) -> bool:
    """Whether the transform that `token` was wrapped for has ended."""
    return functorch.unwrap_if_dead(token) is not token


def is_legacy_batched(t: Tensor) -> bool:
    """Whether t is seen by the older vmap behind torch.autograd.grad(is_grads_batched=True)."""
    return functorch.is_legacy_batchedtensor(t)


def from_legacy_vmap(apply: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """apply(t), with torch.func.vmap in the place of the older vmap that batches t.

    Raises:
        RuntimeError: several of them are nested.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    whole = torch._remove_batch_dim(t, level, 1, 0)
    if is_legacy_batched(whole) or whole.dim() != t.dim() + 1:
        raise RuntimeError(
            "fixed_point: nested batches of gradients are not supported. Use torch.func.vmap"
        )
    return torch._add_batch_dim(torch.func.vmap(apply)(whole), 0, level)


class Frame:
    """How the samples of nested vmaps lie side by side in one plain batch.

    Args:
        batch: the vmaps whose samples differ, ascending.
        samples: the leading dimensions of a tensor as the current levels see it; (B,) for what
            one function call computes.
    """

    def __init__(self, batch: Sequence[Level], samples: Sequence[int]) -> None:
        self.batch = list(batch)
        self.samples = tuple(samples)

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the vmaps, then the samples."""
        return (*(level.size for level in self.batch), *self.samples)

    @property
    def count(self) -> int:
        """N, the number of all samples."""
        return math.prod(self.leading)

    def above(self, number: int) -> list[Level]:
        """The vmaps of the frame above a level."""
        return [level for level in self.batch if level.number > number]

    def lower(self, t: Tensor) -> Tensor:
        """(samples..., ...) at the current levels -> plain (N, ...), detached."""
        t = strip(t, 0, self.batch)
        with truncated(0):
            t = t.detach()
            return t.reshape(self.count, *t.shape[len(self.leading) :])

    def spread(self, flat: Tensor) -> Tensor:
        """Plain (N, ...) -> plain (sizes of the vmaps..., samples..., ...)."""
        with truncated(0):
            return flat.reshape(*self.leading, *flat.shape[1:])

    def raised(self, flat: Tensor) -> Tensor:
        """Plain (N, ...) -> (samples..., ...) at the current levels."""
        return lift(self.spread(flat), self.batch)


def frame_of(samples: Sequence[int], *tensors: Tensor) -> Frame:
    """The frame of all vmaps that any of the tensors has a dimension of."""
    found = set().union(*(batch_levels_of(t) for t in tensors))
    return Frame([level for level in live_levels() if level.number in found], samples)


def innermost_vmap(tensors: Sequence[Tensor]) -> Level | None:
    """The vmap that sees some of the tensors as batched before any other transform does."""
    for level in reversed(live_levels()):
        if level.kind != "Vmap":
            return None
        if any(functorch.is_batchedtensor(t) and level_of(t) == level.number for t in tensors):
            return level
    return None


def take_batch(t: Tensor, level: Level) -> tuple[Tensor, int | None]:
    """t without the wrapper of a vmap, and the dimension it had there, if any."""
    if functorch.is_batchedtensor(t) and level_of(t) == level.number:
        return functorch.get_unwrapped(t), functorch.maybe_get_bdim(t)
    return t, None


def randomness_of(level: Level) -> str:
    """What a vmap does with random numbers: "error", "same" or "different"."""
    for interpreter in functorch.get_interpreter_stack() or ():
        if interpreter.level() == level.number:
            return functorch.CVmapInterpreterPtr(interpreter).randomness().name.lower()
    raise RuntimeError(f"vmap at level {level.number} has ended")
