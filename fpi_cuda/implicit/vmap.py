"""The innermost torch.func.vmap of a solve, made part of its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.faithful import rehearsal
from fpi_cuda.state import Layout
from fpi_cuda.transforms import Level


class Merged(NamedTuple):
    """The same solve with the V samples of a vmap and the B of the batch side by side.

    Attributes:
        g: the map of V B samples.
        x0: state of V B samples.
        z: inputs of that g.
        level: the vmap.
        batch: B; None where the whole state is one sample, as it stays, V of them by now.
    """

    g: Callable[..., Any]
    x0: Any
    z: tuple[Tensor, ...]
    level: Level
    batch: int | None

    def split(self, t: Tensor) -> Tensor:
        """(V B, ...) -> (B, ...) as the vmap sees it."""
        if self.batch is not None:
            t = t.reshape(self.level.size, self.batch, *t.shape[1:])
        return transforms.lift(t, [self.level])


def merge_innermost(
    g: Callable[..., Any], x0: Any, z: tuple[Tensor, ...], layout: Layout
) -> Merged | None:
    """The merged solve; None without a vmap, or where g closes over a tensor that it batches.

    After the vmap has ended a backward pass can evaluate this g, which the user's own g inside
    of the vmap would not allow.
    """
    parts = x0 if layout.is_tuple else (x0,)
    level = transforms.innermost_vmap([*parts, *z])
    if level is None:
        return None
    size, batch = level.size, layout.batch
    starts = [with_batch_first(part, level) for part in parts]
    if layout.batch_dims:
        starts = [start.flatten(0, 1) for start in starts]
    taken = [transforms.take_batch(t, level) for t in z]
    in_dims = (0, *(dim for _, dim in taken))
    batched = torch.func.vmap(g, in_dims=in_dims, randomness=transforms.randomness_of(level))

    def on_parts(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
        return tuple(map(change, x)) if layout.is_tuple else change(x)

    def merged(x: Any, *z: Tensor) -> Any:
        if not layout.batch_dims:
            return batched(x, *z)
        split = on_parts(x, lambda t: t.reshape(size, batch, *t.shape[1:]))
        gx = batched(split, *z)
        # Whatever has another shape is left for the check of g to complain about.
        return on_parts(gx, lambda t: t.flatten(0, 1)) if like(gx, split) else gx

    merged.__wrapped__ = g  # type: ignore[attr-defined]
    whole = tuple(starts) if layout.is_tuple else starts[0]
    inputs = tuple(t for t, _ in taken)
    if closes_over(level, merged, whole, inputs, layout):
        return None
    return Merged(merged, whole, inputs, level, batch if layout.batch_dims else None)


def with_batch_first(t: Tensor, level: Level) -> Tensor:
    """(V, ...) from a tensor that the vmap batches, or that it does not."""
    t, dim = transforms.take_batch(t, level)
    return t.expand(level.size, *t.shape) if dim is None else t.movedim(dim, 0)


def like(gx: Any, x: Any) -> bool:
    """Whether gx is made of tensors of the shapes in x."""
    if isinstance(x, tuple):
        return isinstance(gx, (tuple, list)) and len(gx) == len(x) and all(map(like, gx, x))
    return isinstance(gx, Tensor) and gx.shape == x.shape


def closes_over(
    level: Level, g: Callable[..., Any], x0: Any, z: tuple[Tensor, ...], layout: Layout
) -> bool:
    """Whether g itself holds tensors that the vmap, or one inside it, batches."""
    with torch.no_grad(), rehearsal(layout.device):
        gx = g(x0, *z)
    parts = gx if isinstance(gx, (tuple, list)) else (gx,)
    return any(
        isinstance(part, Tensor)
        and any(number >= level.number for number in transforms.batch_levels_of(part))
        for part in parts
    )
