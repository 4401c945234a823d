"""Give a fixed point its derivatives, from one evaluation of g at it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda.implicit.cut_graph import notice_cut, notice_cut_in_step
from fpi_cuda.implicit.flat_map import FlatMap
from fpi_cuda.implicit.graft import has_tangent
from fpi_cuda.implicit.graph import mark_as_anchor
from fpi_cuda.implicit.inputs import Inputs
from fpi_cuda.implicit.linearization import Linearization
from fpi_cuda.implicit.mending import mended_if_batchwise
from fpi_cuda.implicit.problem import MapProblem, solved_state
from fpi_cuda.implicit.strategy import Strategy

STRIDED_NESTED = (
    "fixed_point: autograd cannot hand a gradient to a nested tensor of layout torch.strided that "
    "g reads. Make it with layout=torch.jagged, or use adjoint=Unroll()"
)


class Check(Protocol):
    """Raises where g(x) is not what the solver was shown, but for ignored samples (B,)."""

    def __call__(self, x: Tensor, gx: Tensor, ignored: Tensor | None = None) -> None: ...


def attach(
    flat_map: FlatMap,
    x_star: Tensor,
    check: Check | None,
    strategy: Strategy,
    born_after: int,
) -> Any:
    """x_star, as the user's state, as a function of all that g depends on.

    Args:
        flat_map: g with its inputs, already evaluated.
        x_star: (B, D) its fixed point, plain.
        check: looks at x_star and g there, and at the samples that failed; None: nobody does.
        born_after: autograd's sequence number before flat_map was made.
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
    if check is not None:
        evaluated = flat_map.watched(functools.partial(check, ignored=hopeless))
    if strategy.truncation == 0 and flat_map.damping[0] > 1:
        evaluated = evaluated.watched_twice(functools.partial(notice_cut_in_step, flat_map))
    with torch.enable_grad(), tensors_saved_as_they_are():
        gx = evaluated(x)
    inputs = Inputs(flat_map, x, gx, born_after)
    if any(t.is_nested and t.layout == torch.strided for t in inputs.originals):
        raise TypeError(STRIDED_NESTED)
    if inputs.unnamed and account.late and account.settle() is not None:
        # Samples that failed cannot be left out later where g cannot be evaluated again.
        return attach(flat_map, x_star, check, strategy, born_after)
    if not inputs and not has_tangent(gx):
        return layout.taken_apart(x_star)
    if strategy.truncation != 0 and inputs.unreached:
        notice_cut(flat_map, x, inputs.unreached)
    problem = MapProblem(flat_map, x_star, gx, Linearization(x, gx), inputs, strategy)
    return solved_state(problem, layout, *inputs.originals)


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
