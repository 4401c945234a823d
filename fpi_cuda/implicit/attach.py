"""Give a fixed point its derivatives, from one evaluation of g at it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda.implicit.cut_graph import notice_cut_of
from fpi_cuda.implicit.flat_map import FlatMap
from fpi_cuda.implicit.graft import has_tangent
from fpi_cuda.implicit.graph import leads_to, mark_as_anchor
from fpi_cuda.implicit.inputs import Inputs, buffers_of, moved_since
from fpi_cuda.implicit.linearization import Linearization
from fpi_cuda.implicit.mending import mended_if_batchwise
from fpi_cuda.implicit.problem import MapProblem, solved_state
from fpi_cuda.implicit.strategy import Strategy, without_autocast
from fpi_cuda.row_norm import row_norm

# A g that moves buffers of its own (spectral norm, in training) drifts while it is solved.
SAME_RESIDUAL = 1e-2


def attach(
    flat_map: FlatMap,
    x_star: Tensor,
    residual: Tensor | None,
    strategy: Strategy,
    born_after: int,
) -> Any:
    """x_star, as the user's state, as a function of all that g depends on.

    Args:
        flat_map: g with its inputs, already evaluated.
        x_star: (B, D) its fixed point, plain.
        residual: (B,) float64 ||g(x_star) - x_star|| as the solver found it; None: unknown.
        born_after: autograd's sequence number before flat_map was made.
    Raises:
        RuntimeError: g has another residual now.
    """
    layout = flat_map.layout
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return layout.taken_apart(x_star)
    x = x_star.detach()
    if strategy.truncation != 0:
        mark_as_anchor(x.requires_grad_())
        # The user's backward pass also ends here, and nobody reads what it leaves.
        x.register_post_accumulate_grad_hook(drop_gradient)
    account = strategy.account
    hopeless = None if account.late else account.settle()
    if hopeless is not None and not bool(hopeless.all()):
        flat_map = mended_if_batchwise(flat_map, x_star, hopeless)
    evaluated = flat_map
    if residual is not None:
        evaluated = flat_map.watched(SameResidual(residual, hopeless))
    if strategy.truncation == 0 and flat_map.damping[0] > 1:
        evaluated = evaluated.watched_twice(functools.partial(notice_cut_in_a_step, flat_map))
    buffers = buffers_of(flat_map)
    with torch.enable_grad(), tensors_saved_as_they_are():
        gx = evaluated(x)
    inputs = Inputs(flat_map, x, gx, born_after, moved_since(buffers))
    if inputs.unnamed and account.late and account.settle() is not None:
        # Samples that failed cannot be left out later where g cannot be evaluated again.
        return attach(flat_map, x_star, residual, strategy, born_after)
    if not inputs and not has_tangent(gx):
        return layout.taken_apart(x_star)
    if strategy.truncation != 0 and inputs.unreached:
        notice_cut_of(flat_map, x, inputs.unreached)
    problem = MapProblem(flat_map, x_star, gx, Linearization(x, gx), inputs, strategy)
    return solved_state(problem, layout, *inputs.originals)


def notice_cut_in_a_step(flat_map: FlatMap, x: Tensor, gx: Tensor) -> None:
    """Warn where a step of several has no graph from the one before it, which has one."""
    if x.requires_grad and not leads_to(gx, x):
        notice_cut_of(flat_map, x)


class SameResidual:
    """Raises where g, evaluated once more at the solution, is another function.

    That is how a g shows which is not row-wise but was declared so, for the solver saw it on
    parts of the batch, and one with random numbers that cannot be replayed.

    Args:
        residual: (B,) float64, as the solver found it.
        bad: (B,) bool, samples that need not agree; None: all must.
    """

    def __init__(self, residual: Tensor, bad: Tensor | None) -> None:
        self._residual = residual
        self._bad = bad

    def __call__(self, x: Tensor, gx: Tensor) -> None:
        x, gx = x.detach(), gx.detach()
        share = max(SAME_RESIDUAL, 8 * torch.finfo(x.dtype).eps)
        with without_autocast(x.device):
            change = (row_norm(gx - x) - self._residual).abs()
            # False where either is not finite: those are the solver's to report.
            off = change > share * torch.maximum(row_norm(gx), row_norm(x))
        if self._bad is not None:
            off = off & ~self._bad
        if bool(off.any()):
            raise RuntimeError(
                "fixed_point: g has another value at the solution than the solver was given, in "
                f"samples {torch.nonzero(off).flatten().tolist()[:8]}. Either it is not row-wise: "
                "set rowwise=False. Or it draws random numbers out of reach: draw them from "
                "torch's default generators, or before the call"
            )


def tensors_saved_as_they_are() -> contextlib.AbstractContextManager[Any]:
    """Keep hooks on saved tensors away from the one graph that every adjoint step runs through.

    Activation checkpointing would repeat the whole solve for each step, offloading the transfer.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def drop_gradient(x: Tensor) -> None:
    """Forget what was accumulated in x."""
    x.grad = None
