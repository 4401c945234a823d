"""A cell as the fused loop runs it: one or two layers, in tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fpi_cuda.activations import FUNCTIONS, identity
from fpi_cuda.declined import Declined

ACTIVATIONS = tuple(FUNCTIONS)
"""What a Layer's activation may be: names that all kernels know."""


class NotLowered(Declined):
    """Raised by a cell's lower(): why the fused loop cannot run it as it is."""


@dataclass(frozen=True)
class Layer:
    """h -> factor * activation(weight h + bias + shift), row by row.

    Attributes:
        weight: (outputs, inputs), with any strides.
        activation: the name of an elementwise function, one of fpi_cuda.activations.FUNCTIONS.
        bias: (outputs,) or None.
        shift, factor: (B, outputs) or None.
    """

    weight: Tensor
    activation: str = "identity"
    bias: Tensor | None = None
    shift: Tensor | None = None
    factor: Tensor | None = None

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """weight, bias, shift, factor."""
        return self.weight, self.bias, self.shift, self.factor

    def sums(self, h: Tensor) -> Tensor:
        """weight h + bias + shift."""
        u = torch.nn.functional.linear(h, self.weight, self.bias)
        return u if self.shift is None else u + self.shift

    def finished(self, u: Tensor) -> Tensor:
        """factor * activation(u)."""
        y = FUNCTIONS[self.activation](u)
        return y if self.factor is None else y * self.factor

    def slope(self, u: Tensor) -> Tensor | None:
        """The derivative of `finished` at u; None where it is one everywhere."""
        function = FUNCTIONS[self.activation]
        if function is identity:
            return self.factor
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            value = function(leaf)
            slope = torch.zeros_like(u)
            if value.requires_grad:
                (slope,) = torch.autograd.grad(value.sum(), leaf)
        return slope if self.factor is None else slope * self.factor


@dataclass(frozen=True)
class Lowered:
    """x -> layers(x_factor * x) + carry * x, on states (B, D).

    Attributes:
        layers: one or two.
        x_factor: (B, D) or None.
        carry: one number.
    """

    layers: tuple[Layer, ...]
    x_factor: Tensor | None = None
    carry: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """One evaluation, in torch."""
        h = x if self.x_factor is None else x * self.x_factor
        for layer in self.layers:
            h = layer.finished(layer.sums(h))
        return h + self.carry * x if self.carry else h

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it is made of."""
        parts = [self.x_factor]
        for layer in self.layers:
            parts += layer.weight, layer.bias, layer.shift, layer.factor
        return tuple([t for t in parts if t is not None])

    def detached(self) -> Lowered:
        """The same without a graph; what has the batch is contiguous."""
        layers = []
        for layer in self.layers:
            weight, *others = layer.tensors()
            plain = [None if t is None else t.detach().contiguous() for t in others]
            layers.append(Layer(weight.detach(), layer.activation, *plain))
        factor = None if self.x_factor is None else self.x_factor.detach().contiguous()
        return Lowered(tuple(layers), factor, self.carry)

    def rows(self, count: int) -> Lowered:
        """The same for the first samples alone."""

        def first(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[:count]

        layers = tuple(
            dataclasses.replace(layer, shift=first(layer.shift), factor=first(layer.factor))
            for layer in self.layers
        )
        return Lowered(layers, first(self.x_factor), self.carry)

    def slopes(self, x: Tensor) -> list[Tensor | None]:
        """The derivative of each layer in its sums at x, (B, outputs); None for ones."""
        h, slopes = x, []
        for layer in self.layers:
            u = layer.sums(h)
            h = layer.finished(u)
            slopes.append(layer.slope(u))
        return slopes

    def adjoint(
        self,
        x: Tensor,
        v: Tensor,
        without: Tensor | None = None,
        known: Sequence[Tensor | None] | None = None,
    ) -> Lowered:
        """c -> J^T c + v, J the Jacobian at x (B, D), from weights that are not copied.

        Args:
            without: (B,) bool, samples whose J is replaced by carry times the identity.
            known: the slopes of the layers at x, if somebody has them.
        """
        if self.x_factor is not None:
            raise NotLowered("the adjoint of a map with an x_factor is none of these maps")
        slopes = self.slopes(x) if known is None else list(known)
        if without is not None:
            slopes = [
                torch.where(without[:, None], 0.0, x.new_ones(len(x), width) if s is None else s)
                for s, width in zip(
                    slopes, (len(layer.weight) for layer in self.layers), strict=True
                )
            ]
        backwards = [
            Layer(layer.weight.mT, factor=slope)
            for layer, slope in zip(self.layers, [None, *slopes], strict=False)
        ][::-1]
        backwards[-1] = dataclasses.replace(backwards[-1], shift=v)
        return Lowered(tuple(backwards), slopes[-1], self.carry).detached()
