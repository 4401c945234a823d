"""Give a fixed point its derivatives in plain autograd, from one evaluation of g at it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.autograd.cut_graph import notice_cut, notice_cut_in_step
from fpi_cuda.autograd.equation import Evaluate
from fpi_cuda.autograd.graph import TRACKING, frontier_of
from fpi_cuda.autograd.reattach import MaybeTensor, follows, has_tangent
from fpi_cuda.autograd.solved import SolvedEquation
from fpi_cuda.autograd.strategy import Strategy
from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.bound_map import BoundMap
from fpi_cuda.evaluation.recomputed import tensors_saved_as_they_are
from fpi_cuda.evaluation.state import Layout

STRIDED_NESTED = (
    "fixed_point: autograd cannot hand a gradient to a nested tensor of layout torch.strided that "
    "g reads. Make it with layout=torch.jagged, or use adjoint=Unroll()"
)
LEGACY = (
    "fixed_point: is_grads_batched together with create_graph is not supported. Use "
    "torch.func.vmap over torch.func.vjp"
)
LEGACY_TANGENT = (
    "fixed_point: torch.autograd.functional with vectorize=True in forward mode is not supported. "
    "Use torch.func.jacfwd, or torch.func.hessian"
)


Check = Callable[[Tensor, Tensor, MaybeTensor], None]
"""check(x, gx, ignored): raises where g(x) is not what the solver was shown, ignored samples (B,)
apart."""


class Attached(torch.autograd.Function):
    """The state that the user sees, as a function of g at it and of all that g depends on.

    A first derivative goes through the graph of g(x), where the user's closures are. That graph
    holds x constant, so a second derivative has to go to the inputs directly.
    """

    @staticmethod
    def forward(
        ctx: Any, get: Callable[[], SolvedEquation], layout: Layout, gx: Tensor, *inputs: Tensor
    ) -> Any:
        ctx.get, ctx.layout = get, layout
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        # A copy, so that an in-place op on the value does not reach the x that is linearized at;
        # and copied last, for views refuse in-place operations.
        if layout.is_tuple:
            return tuple(map(contiguous_copy, layout.unflatten(get().x)))
        x = get().x
        return contiguous_copy(x.reshape(x.shape[: layout.batch_dims] + layout.shapes[0]))

    @staticmethod
    def backward(ctx: Any, *parts: Tensor) -> tuple[MaybeTensor, ...]:
        equation, v = ctx.get(), ctx.layout.flatten(parts if ctx.layout.is_tuple else parts[0])
        legacy = transforms.is_legacy_batched(v)
        if torch.is_grad_enabled() or transforms.in_dual_level():
            if legacy:
                raise RuntimeError(LEGACY)
            # Not read before: it raises where one of them was written to.
            inputs = ctx.saved_tensors
            equation.require_all_tangents()
            if follows(v, *inputs):
                return (None, None, None, *equation.pulled(v, inputs))
        if legacy or transforms.active():
            c: MaybeTensor = transforms.one_by_one(lambda v: equation.solve(v, transpose=True), v)
            return (None, None, c, *equation.nothing())
        c, more = equation.pulled_through_g(v)
        return (None, None, c, *more)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, t: Tensor, *___: Tensor) -> Any:
        equation = ctx.get()
        if transforms.is_legacy_batched(t):
            raise RuntimeError(LEGACY_TANGENT)
        elif torch.is_grad_enabled():
            tangent = equation.pushed(ctx.saved_tensors)
        else:
            tangent = equation.solve(t, transpose=False)
        return ctx.layout.unflatten(tangent)


class _Part(torch.autograd.Function):
    """One tensor of a tuple state, itself. It holds what its tuple only knows of.

    So the cycle through a g that holds its own fixed point is one that Python's collector can
    see: through the node that belongs to this tensor alone.
    """

    @staticmethod
    def forward(ctx: Any, equation: SolvedEquation, part: Tensor) -> Tensor:
        ctx.equation = equation
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(part)
        return part

    @staticmethod
    def backward(ctx: Any, v: MaybeTensor) -> tuple[None, MaybeTensor]:
        return None, v


def attach(
    bound_map: BoundMap,
    x_star: Tensor,
    check: Check | None,
    strategy: Strategy,
    born_after: int,
    evaluate: Evaluate | None = None,
) -> Any:
    """x_star, as the user's state, as a function of all that g depends on.

    Grad mode is on, or a level of forward mode.

    Args:
        bound_map: g with its inputs, already evaluated.
        x_star: (B, D) its fixed point, plain.
        check: looks at x_star and g there, and at the samples that failed; None: nobody does.
        born_after: autograd's sequence number before bound_map was made.
        evaluate: another way to the value of bound_map and its graph, where no sample failed.
    """
    layout = bound_map.layout
    x = x_star.detach()
    if strategy.truncation != 0:
        setattr(x.requires_grad_(), TRACKING, True)
        # The user's backward pass also ends here, and nobody reads what it leaves.
        x.register_post_accumulate_grad_hook(drop_gradient)
    account = strategy.account
    failed_forward = None if account.late else account.failed_forward
    if failed_forward is not None:
        evaluate = None
        if not bool(failed_forward.all()):
            bound_map = bound_map.replace_failed_if_batchwise(x_star, failed_forward)
    evaluated, once = bound_map, bound_map.damping == (1, 1.0)
    if not once:

        def watch(step: int, x: Tensor, gx: Tensor) -> None:
            if step == 0 and check is not None:
                check(x, gx, failed_forward)
            elif step == 1 and strategy.truncation == 0:
                notice_cut_in_step(bound_map, x, gx)

        evaluated = bound_map.damped(*bound_map.damping, watch)
    with torch.enable_grad(), tensors_saved_as_they_are():
        gx = (evaluate or evaluated)(x)
    if check is not None and once:
        check(x, gx, failed_forward)
    equation = SolvedEquation(
        bound_map, x_star, x, gx, strategy, frontier_of(gx, bound_map.z, born_after)
    )
    for t in equation.originals:
        if t.is_nested and t.layout == torch.strided:
            raise TypeError(STRIDED_NESTED)
    if equation.unnamed and account.late and account.failed_forward is not None:
        # Samples that failed cannot be left out later where g cannot be evaluated again.
        account.late = False
        return attach(bound_map, x_star, check, strategy, born_after)
    if not (equation.originals or equation.unnamed or has_tangent(gx)):
        return layout.taken_apart(x_star)
    if strategy.truncation != 0 and equation.unreached:
        notice_cut(bound_map, x, equation.unreached)
    return state_of(equation, layout)


def state_of(equation: SolvedEquation, layout: Layout) -> Any:
    """The solution as the user's state, as a function of all that g depends on.

    A g that holds its own fixed point, as self.x = fixed_point(self.step, ...).value does, is a
    cycle that Python's collector sees only through nodes with one owner: the tensor's own.
    """
    # What changes a tensor in place must change its tangent in place: no parts there.
    if not layout.is_tuple or transforms.in_dual_level():
        return Attached.apply(lambda: equation, layout, equation.gx, *equation.originals)
    parts = Attached.apply(weakref.ref(equation), layout, equation.gx, *equation.originals)
    return tuple(_Part.apply(equation, part) for part in parts)


def drop_gradient(x: Tensor) -> None:
    """Forget what was accumulated in x."""
    x.grad = None


def contiguous_copy(t: Tensor) -> Tensor:
    """t, row-major, in memory of its own."""
    return t.clone(memory_format=torch.contiguous_format)
