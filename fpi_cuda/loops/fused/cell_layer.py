"""One evaluation of a fused cell with a graph, by the kernels of the fused loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.activations import CODES, DERIVATIVES
from fpi_cuda.evaluation import transforms
from fpi_cuda.lowered import Layer, Lowered


@dataclass(eq=False)
class FusedEvaluation:
    """Evaluates g at the fixed point, and keeps the slopes that the adjoint needs there.

    Attributes:
        described: g, with its graph.
        derivatives: names of those of its activations.
        engine: that has cell_layer_, in the schema of csrc/layer_ops.cpp.
        slopes: derivative of each layer in its sums (B, outputs) at the point that was evaluated
            last, None for ones; None as a whole before that.
    """

    described: Lowered
    derivatives: Sequence[str]
    engine: Any
    slopes: tuple[Tensor | None, ...] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """g(x), x (B, D) and that with its graph."""
        h, slopes = x, []
        for layer, derivative in zip(self.described.layers, self.derivatives, strict=True):
            h, slope = CellLayer.apply(
                self.engine, layer.activation, derivative, h, layer.weight, layer.bias, layer.shift
            )
            slopes.append(slope)
        self.slopes = tuple(slopes)
        return h + self.described.carry * x if self.described.carry else h


def fused_evaluation(described: Lowered, engine: Any) -> FusedEvaluation | None:
    """That of a cell of this package; None where kernels do not have it.

    That lower() of another cell has step()'s derivatives too is not known.
    """
    layers = described.layers
    known = all(layer.factor is None and layer.activation in DERIVATIVES for layer in layers)
    if described.x_factor is not None or not known:
        return None
    return FusedEvaluation(described, [DERIVATIVES[layer.activation] for layer in layers], engine)


class CellLayer(torch.autograd.Function):
    """activation(weight h + bias + shift), and the derivative of the activation there."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: Any,
        activation: str,
        derivative: str,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shift: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        slope = None if activation == "identity" else h.new_empty(len(h), len(weight))
        out = product(engine, h, weight, bias, shift, activation, derivative, slope)
        ctx.engine, ctx.activation = engine, activation
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, bias, shift, slope)
        if slope is not None:
            ctx.mark_non_differentiable(slope)
        return out, slope

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        nothing = (None, None, None)
        if v is None:
            return (*nothing, None, None, None, None)
        h, weight, bias, shift, slope = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            return (*nothing, *differentiated(ctx.activation, (h, weight, bias, shift), needed, v))
        delta = v if slope is None else v * slope
        if transforms.is_legacy_batched(v) or transforms.active() or len(h) == 0:
            by_h, by_weight = delta @ weight, delta.mT @ h
        else:
            delta = delta.contiguous()
            by_h = product(ctx.engine, delta, weight.mT) if needed[0] else None
            by_weight = None
            if needed[1]:
                by_weight = h.new_empty(delta.shape[1], h.shape[1])
                ctx.engine.weight_gradient_(by_weight, delta, h.contiguous())
        by_bias = delta.sum(0) if needed[2] else None
        return (*nothing, by_h, by_weight, by_bias, delta if needed[3] else None)


def product(
    engine: Any,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "identity",
    derivative: str = "one",
    slope: Tensor | None = None,
) -> Tensor:
    """activation(weight h + bias + shift) (B, outputs); slope (B, outputs) is written."""
    out = h.new_empty(h.shape[0], weight.shape[0])
    engine.cell_layer_(
        out,
        slope,
        h.contiguous(),
        weight,
        None if bias is None else bias.contiguous(),
        None if shift is None else shift.contiguous(),
        None,
        activation=CODES[activation],
        derivative=CODES[derivative],
    )
    return out


def differentiated(
    activation: str,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    needed: tuple[bool, ...],
    v: Tensor,
) -> list[Tensor | None]:
    """The derivative of <v, layer> in the inputs that need it, with a graph in them and v."""
    # Aliases: an input may itself be computed from another.
    h, weight = (t.view_as(t) for t in inputs[:2])
    bias, shift = (None if t is None else t.view_as(t) for t in inputs[2:])
    layer = Layer(weight, activation, bias, shift)
    value = layer.finished(layer.sums(h))
    pairs = zip((h, weight, bias, shift), needed, strict=True)
    wanted = [t for t, asked in pairs if asked and t is not None]
    found = iter(torch.autograd.grad(value, wanted, v, create_graph=True))
    return [next(found) if asked else None for asked in needed]
