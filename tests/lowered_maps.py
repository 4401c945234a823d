"""Contractions as cells and their adjoints lower to them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fpi_cuda.lowered import Layer, Lowered


def contraction(rows: int, columns: int, dtype: torch.dtype, norm: float = 0.5) -> Tensor:
    """Of about this norm, which a Gaussian matrix has by its size."""
    return torch.randn(rows, columns, dtype=dtype) * (norm / (rows**0.5 + columns**0.5))


def one_layer(batch: int, dim: int, dtype: torch.dtype, activation: str = "tanh") -> Lowered:
    """act(A x + p), as Dense lowers to."""
    shift = torch.randn(batch, dim, dtype=dtype)
    return Lowered((Layer(contraction(dim, dim, dtype), activation, shift=shift),))


def two_layers(batch: int, dim: int, dtype: torch.dtype, hidden: int = 37) -> Lowered:
    """sigmoid(W relu(A x + p) + c), as MLP lowers to."""
    first = Layer(
        contraction(hidden, dim, dtype, 1.0), "relu", shift=torch.randn(batch, hidden, dtype=dtype)
    )
    bias = torch.randn(dim, dtype=dtype)
    return Lowered((first, Layer(contraction(dim, hidden, dtype, 2.0), "sigmoid", bias=bias)))


def descent(batch: int, dim: int, dtype: torch.dtype, hidden: int = 37) -> Lowered:
    """(1 - step) x - step A^T (w act'(A x + p)), as GradientDescent lowers to."""
    weight = contraction(hidden, dim, dtype, 1.0)
    first = Layer(weight, "sigmoid", shift=torch.randn(batch, hidden, dtype=dtype))
    return Lowered((first, Layer(-0.5 * weight.mT)), carry=0.5)


def adjoint(batch: int, dim: int, dtype: torch.dtype, hidden: int = 37) -> Lowered:
    """x_factor, factors, a shift and transposed weights, as an adjoint lowers to."""
    first = Layer(
        contraction(dim, hidden, dtype, 0.8).mT, factor=torch.rand(batch, hidden, dtype=dtype)
    )
    second = Layer(
        contraction(hidden, dim, dtype, 0.8).mT, shift=torch.randn(batch, dim, dtype=dtype)
    )
    return Lowered((first, second), x_factor=torch.rand(batch, dim, dtype=dtype))


MAPS = {f.__name__: f for f in (one_layer, two_layers, descent, adjoint)}


def with_strides(lowered: Lowered) -> Lowered:
    """The same, its weights as every second row and third column of larger ones."""
    layers = []
    for layer in lowered.layers:
        rows, columns = layer.weight.shape
        view = torch.randn(2 * rows, 3 * columns).to(layer.weight)[::2, ::3]
        view.copy_(layer.weight)
        layers.append(replace(layer, weight=view))
    return replace(lowered, layers=tuple(layers))


def permuted(lowered: Lowered, order: Tensor) -> Lowered:
    """The same with its samples in another order, or some of them."""

    def pick(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[order].contiguous()

    layers = tuple(
        replace(layer, shift=pick(layer.shift), factor=pick(layer.factor))
        for layer in lowered.layers
    )
    return Lowered(layers, pick(lowered.x_factor), lowered.carry)


def on_device(lowered: Lowered, device: str) -> Lowered:
    """The same with its tensors there, and its weights transposed where they were."""

    def moved(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device)

    layers = tuple(
        Layer(layer.weight.to(device), layer.activation, *map(moved, layer.tensors()[1:]))
        for layer in lowered.layers
    )
    return Lowered(layers, moved(lowered.x_factor), lowered.carry)
