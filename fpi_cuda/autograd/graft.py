"""Differentiable results of a computation that was done on stand-ins."""

from __future__ import annotations

from collections.abc import Sequence
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


def graft(
    outputs: Sequence[MaybeTensor], stand_ins: Sequence[Tensor], originals: Sequence[Tensor]
) -> list[MaybeTensor]:
    """`outputs`, computed from `stand_ins`, as functions of `originals`; to any order.

    A partial derivative with respect to x and z must not follow the graph that makes x depend
    on z: autograd would enter the very node that asks. So it is taken with respect to leaves
    that stand in for them, and then put back into the graph here.

    Args:
        outputs: tensors whose graph leads to the stand-ins and nowhere else; None stays None.
        stand_ins: leaves that require grad, with the values of the originals. A leaf of the
            user's own (a parameter) stands in for itself.
        originals: like stand_ins; may carry a graph or a forward-mode tangent.
    """
    grown = list(outputs)
    places = [i for i, out in enumerate(grown) if out is not None and out.requires_grad]
    if places:
        tape = Tape([grown[i] for i in places], list(stand_ins))  # type: ignore[misc]
        for place, out in zip(places, _Graft.apply(tape, *originals), strict=True):
            grown[place] = out
    return grown


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
    """A computation on stand-ins: its outputs, and the leaves they were computed from."""

    def __init__(self, outputs: list[Tensor], leaves: list[Tensor]) -> None:
        self.outputs = outputs
        self.leaves = leaves

    def pull(self, weights: list[MaybeTensor], *, create_graph: bool) -> list[MaybeTensor]:
        """The derivative of <weights, outputs> in every leaf; the graph is kept.

        Raises:
            RuntimeError: it shall have a graph itself, which some operation in g does not give.
        """
        pairs = [(o, w) for o, w in zip(self.outputs, weights, strict=True) if w is not None]
        if not pairs:
            return [None] * len(self.leaves)
        outputs, given = zip(*pairs, strict=True)
        pulled: list[MaybeTensor] = list(
            torch.autograd.grad(
                outputs,
                self.leaves,
                given,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        )
        if create_graph and any(t is not None and is_differentiable_once(t) for t in pulled):
            raise RuntimeError(ONCE)
        return pulled

    def push(self, tangents: list[MaybeTensor]) -> list[MaybeTensor]:
        """The derivative of every output along the tangents of the leaves, with its graph.

        Source:
            The derivative of a vector-Jacobian product in its vector is the Jacobian-vector
            product.
        """
        weights = [torch.zeros_like(out).requires_grad_() for out in self.outputs]
        pulled = self.pull(list(weights), create_graph=True)
        pairs = [
            (p, t)
            for p, t in zip(pulled, tangents, strict=True)
            if p is not None and p.requires_grad and t is not None
        ]
        if not pairs:
            return [None] * len(weights)
        outputs, given = zip(*pairs, strict=True)
        return list(
            torch.autograd.grad(outputs, weights, given, create_graph=True, allow_unused=True)
        )


class _Graft(torch.autograd.Function):
    """Identity on the outputs of a tape; differentiates through the tape."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, *originals: Tensor) -> tuple[Tensor, ...]:
        ctx.tape = tape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*originals)
        ctx.save_for_forward(*originals)
        return tuple(out.detach() for out in tape.outputs)

    @staticmethod
    def backward(ctx: Any, *weights: MaybeTensor) -> tuple[MaybeTensor, ...]:
        tape = ctx.tape
        originals = ctx.saved_tensors
        if not follows(*weights, *originals):
            return (None, *tape.pull(list(weights), create_graph=False))
        given = [None if w is None else stand_in(w) for w in weights]
        with torch.enable_grad():
            pulled = tape.pull(given, create_graph=True)
        leaves = tape.leaves + [w for w in given if w is not None]
        return (None, *graft(pulled, leaves, [*originals, *(w for w in weights if w is not None)]))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: MaybeTensor) -> tuple[Tensor, ...]:
        tape = ctx.tape
        originals = ctx.saved_tensors
        given = [None if t is None else stand_in(t) for t in tangents]
        with torch.enable_grad():
            pushed = tape.push(given)
        leaves = tape.leaves + [t for t in given if t is not None]
        grown = graft(pushed, leaves, [*originals, *(t for t in tangents if t is not None)])
        return tuple(
            torch.zeros_like(out) if tangent is None else tangent
            for out, tangent in zip(tape.outputs, grown, strict=True)
        )
