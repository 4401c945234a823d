"""Differentiable results of a computation that was done on stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda.autograd.graph import is_differentiable_once

MaybeTensor = Tensor | None

ONCE = (
    "fixed_point: g holds an autograd.Function marked once_differentiable, or like one. Second "
    "derivatives, forward mode and adjoint=Implicit(ConjugateGradient()) differentiate its "
    "backward. Write that backward with differentiable operations"
)


def reattached(
    make: Callable[..., Sequence[MaybeTensor]],
    given: Sequence[MaybeTensor],
    leaves: Sequence[Tensor],
    originals: Sequence[Tensor],
) -> list[MaybeTensor]:
    """make(*given), computed from stand-ins, as functions of given and originals; to any order.

    A partial derivative with respect to x and z must not follow the graph that makes x depend
    on z: autograd would enter the very node that asks. So it is taken with respect to leaves
    that stand in for them, and then put back into the graph here.

    Args:
        make: returns tensors whose graph leads to what it is given and to the leaves, and nowhere
            else.
        given: tensors that may carry a graph or a forward-mode tangent; None stays None.
        leaves: that require grad, with the values of the originals. A leaf of the user's own (a
            parameter) stands in for itself.
        originals: like leaves; may carry a graph or a forward-mode tangent.
    """
    aside = [None if t is None else stand_in(t) for t in given]
    with torch.enable_grad():
        outputs = make(*aside)
    moving = {i: out for i, out in enumerate(outputs) if out is not None and out.requires_grad}
    if not moving:
        return list(outputs)
    tape = Tape([*moving.values()], [*leaves, *(t for t in aside if t is not None)])
    grown = _Reattached.apply(tape, *originals, *(t for t in given if t is not None))
    moving.update(zip(moving, grown, strict=True))
    return [moving.get(i, out) for i, out in enumerate(outputs)]


def stand_in(t: Tensor) -> Tensor:
    """A leaf with the value of t, without its graph and tangent."""
    return t.detach().requires_grad_()


def has_tangent(*tensors: MaybeTensor) -> bool:
    """Whether forward-mode differentiation follows any of them."""
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def follows(*tensors: MaybeTensor) -> bool:
    """Whether what is computed from these tensors now must be differentiable."""
    return torch.is_grad_enabled() or has_tangent(*tensors)


class Tape:
    """A computation on stand-ins: its outputs, and the leaves they were computed from.

    An output may be None, or have no graph: it is constant.
    """

    def __init__(self, outputs: Sequence[MaybeTensor], leaves: list[Tensor]) -> None:
        self.outputs = outputs
        self.leaves = leaves

    def pull(self, weights: Sequence[MaybeTensor], *, create_graph: bool) -> list[MaybeTensor]:
        """The derivative of <weights, outputs> in every leaf; the graph is kept.

        Raises:
            RuntimeError: it shall have a graph itself, which some operation in g does not give.
        """
        pulled = gradients(self.outputs, self.leaves, weights, create_graph=create_graph)
        if create_graph and any(t is not None and is_differentiable_once(t) for t in pulled):
            raise RuntimeError(ONCE)
        return pulled

    def push(self, tangents: Sequence[MaybeTensor]) -> list[MaybeTensor]:
        """The derivative of every output along the tangents of the leaves, with its graph.

        Source:
            The derivative of a vector-Jacobian product in its vector is the Jacobian-vector
            product.
        """
        zeros = (torch.zeros(()) if out is None else torch.zeros_like(out) for out in self.outputs)
        weights = [zero.requires_grad_() for zero in zeros]
        pulled = self.pull(weights, create_graph=True)
        return gradients(pulled, weights, tangents, create_graph=True)


def gradients(
    outputs: Sequence[MaybeTensor],
    inputs: Sequence[Tensor],
    weights: Sequence[MaybeTensor],
    *,
    create_graph: bool,
) -> list[MaybeTensor]:
    """torch.autograd.grad where outputs may be constant, and weights missing; the graph is kept."""
    pairs = [
        (out, weight)
        for out, weight in zip(outputs, weights, strict=True)
        if out is not None and out.requires_grad and weight is not None
    ]
    if not pairs:
        return [None] * len(inputs)
    moving, given = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(
            moving, inputs, given, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    )


class _Reattached(torch.autograd.Function):
    """Identity on the outputs of a tape; differentiates through the tape."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, *originals: Tensor) -> tuple[Tensor, ...]:
        ctx.tape = tape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*originals)
        ctx.save_for_forward(*originals)
        return tuple(out.detach() for out in tape.outputs if out is not None)

    @staticmethod
    def backward(ctx: Any, *weights: MaybeTensor) -> tuple[MaybeTensor, ...]:
        tape, originals = ctx.tape, ctx.saved_tensors
        if not follows(*weights, *originals):
            return (None, *tape.pull(weights, create_graph=False))
        pulled = reattached(
            lambda *w: tape.pull(w, create_graph=True), weights, tape.leaves, originals
        )
        return (None, *pulled)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: MaybeTensor) -> tuple[Tensor, ...]:
        tape = ctx.tape
        grown = reattached(lambda *t: tape.push(t), tangents, tape.leaves, ctx.saved_tensors)
        return tuple(
            torch.zeros_like(out) if tangent is None else tangent
            for out, tangent in zip(tape.outputs, grown, strict=True)
        )
