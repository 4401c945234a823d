"""Solves that autograd follows step by step, for all samples of a torch.func.vmap at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.autograd.closed_over import Substitution, Watch
from fpi_cuda.autograd.lifted import matters
from fpi_cuda.autograd.linear import side_by_side
from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.context import rehearsal
from fpi_cuda.evaluation.state import Layout, layout_of

BATCHED = (
    "fixed_point: adjoint=Unroll() inside torch.func.vmap needs the vmap inside of all "
    "torch.func.grad, vjp and jvp. Use adjoint=Implicit()"
)

Solve = Callable[[Callable[..., Any], Any, tuple[Tensor, ...], Layout], Sequence[Tensor]]
"""solve(g, x0, z, layout): tensors with dim 0 for the samples."""


class SideBySide(torch.autograd.Function):
    """What a solve returns, where a vmap batches some of the tensors that it is given."""

    @staticmethod
    def forward(solve: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(BATCHED)

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], outputs: Any) -> None:
        # Here a level of derivatives is inside of the vmap.
        raise RuntimeError(BATCHED)

    @staticmethod
    def vmap(info: Any, dims: Any, solve: Callable[..., Any], *tensors: Tensor) -> Any:
        return solve(info, dims[1:], tensors)


def by_samples_of_vmap(
    g: Callable[..., Any], x0: Any, z: tuple[Tensor, ...], layout: Layout, solve: Solve
) -> Sequence[Tensor] | None:
    """What `solve` returns for a g that a vmap batches; None where the innermost level is none."""
    parts = x0 if layout.is_tuple else (x0,)
    watch = Watch([*parts, *z])
    with torch.no_grad(), rehearsal(layout.device), watch:
        g(x0, *z)
    pairs = [pair for pair in watch.captured() if matters(pair[1])]
    captured = [t for _, t in pairs]
    if not any(map(transforms.is_batched, (*parts, *z, *captured))):
        return None
    if not layout.batch_dims:
        parts = tuple(t[None] for t in parts)

    def lifted(x: Any, *inputs: Tensor) -> Any:
        originals = [*z, *(t for t, _ in pairs)]
        with Substitution(zip(originals, inputs, strict=True)):
            return g(x, *inputs[: len(z)])

    def solve_merged(info: Any, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> Any:
        rows, inputs = tensors[: len(parts)], tuple(tensors[len(parts) :])
        batched = torch.func.vmap(
            lifted, in_dims=(0, *dims[len(parts) :]), randomness=info.randomness
        )

        def merged(x: Any, *inputs: Tensor) -> Any:
            if not layout.batch_dims:
                return batched(x, *inputs)
            gx = batched(on_parts(x, apart), *inputs)
            # Whatever has another shape is left for the check of g to complain about.
            return on_parts(gx, lambda t: t.flatten(0, 1)) if like(gx, on_parts(x, apart)) else gx

        merged.__wrapped__ = g  # type: ignore[attr-defined]

        def apart(t: Tensor) -> Tensor:
            return t.reshape(info.batch_size, layout.batch, *t.shape[1:])

        def solved(*rows: Tensor) -> Sequence[Tensor]:
            start = rows if layout.is_tuple else rows[0]
            inner = dataclasses.replace(layout_of(start), together=layout.rows_together)
            return solve(merged, start, inputs, inner)

        return side_by_side(solved, info.batch_size, rows, dims[: len(parts)])

    found = SideBySide.apply(solve_merged, *parts, *z, *captured)
    return found if layout.batch_dims else [t[0] for t in found]


def on_parts(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A state with each of its tensors changed."""
    return tuple(map(change, x)) if isinstance(x, (tuple, list)) else change(x)


def like(gx: Any, x: Any) -> bool:
    """Whether gx is made of tensors of the shapes in x."""
    if isinstance(x, tuple):
        return isinstance(gx, (tuple, list)) and len(gx) == len(x) and all(map(like, gx, x))
    return isinstance(gx, Tensor) and gx.shape == x.shape
