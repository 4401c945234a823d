"""Draws inside torch.utils.checkpoint, which evaluates a part of g again in each backward pass.

It winds the process's generators back for that, and finds them elsewhere than g did, for g's
numbers came from a record. So that part is given the record as well.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils import checkpoint

REENTRANT = (
    "fixed_point: g draws random numbers inside torch.utils.checkpoint(use_reentrant=True), which "
    "would draw others in backward. Use use_reentrant=False"
)
UNKNOWN_FORM = (
    "fixed_point: g draws random numbers inside a torch.utils.checkpoint of a form that is not "
    "known, and might draw others in backward. Draw them before the call and pass them as z"
)
GIVEN = "_fpi_cuda_given"

Start = Callable[[], AbstractContextManager[Any]]
"""Surroundings that hand out the record from some place on."""


def recomputations_use(start: Callable[[], Start]) -> None:
    """Let what is recomputed later of the segments around a draw begin the record here.

    Each is met at its own first draw.

    Args:
        start: gives the place.
    """
    hooks = hooks_on_saved_tensors()
    if hooks is None:
        return
    for around in (segment_of(hooks[0]), *segments_around()):
        if around is not None and not hasattr(around, GIVEN):
            give(around, start())


def hooks_on_saved_tensors() -> tuple[Any, Any] | None:
    """What packs and unpacks the tensors that autograd saves now, if anything does."""
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks


def tensors_saved_as_they_are() -> AbstractContextManager[Any]:
    """Keep hooks on saved tensors away from the one graph that every adjoint step runs through.

    Activation checkpointing would repeat the whole solve for each step, offloading the transfer.
    """
    if hooks_on_saved_tensors() is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def give(segment: Any, start: Start) -> None:
    """Lay `start` around what a segment recomputes."""
    recompute = segment.recompute_fn

    def with_the_same_numbers(*args: Any) -> None:
        with start():
            recompute(*args)

    segment.recompute_fn = with_the_same_numbers
    setattr(segment, GIVEN, True)


def segment_of(pack: Any) -> Any:
    """The segment that a hook on saved tensors belongs to; None if that is none of checkpoint's."""
    if not getattr(pack, "__qualname__", "").startswith("_checkpoint_hook."):
        return None
    closure = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    if "frame" not in closure:
        raise RuntimeError(UNKNOWN_FORM)
    return closure["frame"].cell_contents


def segments_around() -> Iterator[Any]:
    """The segments that the running code is in, innermost first."""
    for frame in frames_of(inspect.unwrap(checkpoint.checkpoint)):
        running = frame.f_locals.get("gen")
        inside = getattr(running, "gi_frame", None)
        if inside is None or "new_frame" not in inside.f_locals:
            raise RuntimeError(UNKNOWN_FORM)
        yield inside.f_locals["new_frame"]


def require_not_reentrant() -> None:
    """Raise inside of a segment that keeps no record of what it calls."""
    if any(frames_of(checkpoint.CheckpointFunction.forward)):
        raise RuntimeError(REENTRANT)


def frames_of(function: Any) -> Iterator[Any]:
    """The running calls of a function on this thread, innermost first."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is function.__code__:
            yield frame
        frame = frame.f_back
