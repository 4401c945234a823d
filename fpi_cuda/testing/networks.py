"""Untrained network maps: tanh cells, perceptrons, convolutions, attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fpi_cuda.testing.linear import affine
from fpi_cuda.testing.problem import NUM_SAMPLES, Draw, Problem, register, rowwise

D = 64
HIDDEN = 96


@rowwise
def tanh_cell(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """tanh(W x + b) with W (B, d, d)."""
    return torch.tanh(affine(x, W, b))


@rowwise
def relu_perceptron(x: Tensor, V: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """V relu(W x + b) with W (B, hidden, d), V (B, d, hidden), b (B, hidden)."""
    return (V * torch.relu(affine(x, W, b))[:, None, :]).sum(-1)


@rowwise
def sigmoid_perceptron(x: Tensor, V: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """sigmoid(V relu(W x + b)): the shape of FPI_NN."""
    return torch.sigmoid(relu_perceptron(x, V, W, b))


def with_norm(W: Tensor, norm: Tensor | float) -> Tensor:
    """The matrices (..., d, k) scaled to the given 2-norms (...)."""
    scale: Tensor = torch.as_tensor(norm) / torch.linalg.matrix_norm(W, 2)
    return W * scale[..., None, None]


def symmetric_normal(draw: Draw, norm: Tensor | float) -> Tensor:
    """(B, D, D) symmetric Gaussian matrices of the given 2-norms."""
    W = draw.normal(NUM_SAMPLES, D, D)
    return with_norm(W + W.mT, norm)


def tanh_problem(draw: Draw, W: Tensor, bias_scale: float, contractive: bool) -> Problem:
    """The tanh cell from zero with a Gaussian bias."""
    bias = bias_scale * draw.normal(NUM_SAMPLES, D)
    x0 = torch.zeros(NUM_SAMPLES, D)
    return draw.problem(tanh_cell, x0, (W, bias), contractive=contractive, bitwise=True)


@register("tanh/norm-0.9")
def tanh_contractive(draw: Draw) -> Problem:
    """Symmetric weights of norm 0.9."""
    return tanh_problem(draw, symmetric_normal(draw, 0.9), 0.1, True)


@register("tanh/norm-0.99")
def tanh_barely_contractive(draw: Draw) -> Problem:
    """Symmetric weights of norm 0.99 and a small bias: little saturation helps."""
    return tanh_problem(draw, symmetric_normal(draw, 0.99), 0.02, True)


@register("tanh/non-symmetric")
def tanh_non_symmetric(draw: Draw) -> Problem:
    """Gaussian weights of norm 0.5 to 0.98."""
    norms = torch.linspace(0.5, 0.98, NUM_SAMPLES, dtype=torch.float64)
    return tanh_problem(draw, with_norm(draw.normal(NUM_SAMPLES, D, D), norms), 0.3, True)


@register("tanh/expansive-1.5")
def tanh_expansive(draw: Draw) -> Problem:
    """Symmetric weights of norm 1.5 with many stable fixed points."""
    # A positive part dominates, so the iteration saturates into a stable fixed point.
    W = symmetric_normal(draw, 0.5) + torch.eye(D, dtype=torch.float64)
    return tanh_problem(draw, W, 0.3, True)


@register("tanh/expansive-3")
def tanh_saturated(draw: Draw) -> Problem:
    """Gaussian weights of norm 3, large bias: stable because most units saturate."""
    return tanh_problem(draw, with_norm(draw.normal(NUM_SAMPLES, D, D), 3.0), 4.0, True)


@register("tanh/unstable")
def tanh_unstable(draw: Draw) -> Problem:
    """Gaussian weights of norm 2.5 to 6: Picard wanders."""
    norms = torch.linspace(2.5, 6, NUM_SAMPLES, dtype=torch.float64)
    return tanh_problem(draw, with_norm(draw.normal(NUM_SAMPLES, D, D), norms), 0.1, False)


@register("tanh/negative")
def tanh_negative(draw: Draw) -> Problem:
    """Negative definite weights of norm 1.1 to 3: Picard ends in a 2-cycle."""
    norms = torch.linspace(1.1, 3, NUM_SAMPLES, dtype=torch.float64)
    G = draw.normal(NUM_SAMPLES, D, D)
    return tanh_problem(draw, -with_norm(G @ G.mT, norms), 0.2, False)


def perceptron_inputs(draw: Draw, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """V, W, b with ||V|| ||W|| = norm for each sample."""
    V = with_norm(draw.normal(NUM_SAMPLES, D, HIDDEN), math.sqrt(norm))
    W = with_norm(draw.normal(NUM_SAMPLES, HIDDEN, D), math.sqrt(norm))
    return V, W, draw.normal(NUM_SAMPLES, HIDDEN)


@register("perceptron/relu")
def relu_contractive(draw: Draw) -> Problem:
    """Contractive, with kinks."""
    x0 = torch.zeros(NUM_SAMPLES, D)
    z = perceptron_inputs(draw, 0.95)
    return draw.problem(relu_perceptron, x0, z, contractive=True, bitwise=True)


@register("perceptron/relu-expansive")
def relu_expansive(draw: Draw) -> Problem:
    """The product of norms is 4, yet the map contracts where it settles."""
    x0 = torch.zeros(NUM_SAMPLES, D)
    z = perceptron_inputs(draw, 4.0)
    return draw.problem(relu_perceptron, x0, z, contractive=True, bitwise=True)


@register("perceptron/sigmoid")
def sigmoid_contractive(draw: Draw) -> Problem:
    """The shape of FPI_NN; the slope 1/4 of the sigmoid makes it contract."""
    x0 = torch.zeros(NUM_SAMPLES, D)
    z = perceptron_inputs(draw, 12.0)
    return draw.problem(sigmoid_perceptron, x0, z, contractive=True, bitwise=True)


@register("perceptron/sigmoid-unstable")
def sigmoid_unstable(draw: Draw) -> Problem:
    """The shape of FPI_NN with weights so large that Picard wanders."""
    x0, z = torch.full((NUM_SAMPLES, D), 0.5), perceptron_inputs(draw, 400.0)
    return draw.problem(sigmoid_perceptron, x0, z, bitwise=True)


@dataclass(frozen=True)
class ConvolutionCell:
    """tanh(conv2d(x) + z), then a group norm if `groups` is not 0. x, z: (B, C, H, W)."""

    weight: Tensor
    groups: int = 0
    rowwise: ClassVar[bool] = True

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        y = torch.tanh(functional.conv2d(x, self.weight, padding=1) + z)
        return functional.group_norm(y, self.groups) if self.groups else y


def convolution_problem(draw: Draw, norm: float, groups: int) -> Problem:
    """4 channels of 10 x 10; the samples differ in the size of their input."""
    channels, side = 4, 10
    weight = draw.normal(channels, channels, 3, 3)
    # The operator norm of a convolution is at most that of its symbol; sample it on a grid.
    symbol = torch.fft.fft2(weight, s=(32, 32)).permute(2, 3, 0, 1)
    (weight,) = draw.cast(norm * weight / torch.linalg.matrix_norm(symbol, 2).amax())
    strength = torch.linspace(0.1, 2, NUM_SAMPLES, dtype=torch.float64)[:, None, None, None]
    z = strength * draw.normal(NUM_SAMPLES, channels, side, side)
    cell = ConvolutionCell(weight, groups)
    return draw.problem(cell, torch.zeros_like(z), (z,), contractive=groups == 0)


@register("convolution/tanh")
def convolution_tanh(draw: Draw) -> Problem:
    """Contractive: the convolution has norm at most 0.97."""
    return convolution_problem(draw, 0.97, 0)


@register("convolution/group-norm")
def convolution_group_norm(draw: Draw) -> Problem:
    """The group norm undoes the contraction on some samples."""
    return convolution_problem(draw, 0.8, 2)


@dataclass(frozen=True)
class AttentionCell:
    """z + W softmax(x Q x^T / sqrt(d)) x over tokens. x, z: (B, tokens, d)."""

    Q: Tensor
    W: Tensor
    rowwise: ClassVar[bool] = True

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        scores = torch.einsum("btd,de,bse->bts", x, self.Q, x) / math.sqrt(x.shape[-1])
        return z + torch.einsum("bts,bsd,de->bte", scores.softmax(-1), x, self.W)


@register("attention/softmax")
def attention(draw: Draw) -> Problem:
    """Self-attention over 6 tokens; z grows over the samples."""
    tokens, d = 6, 16
    Q, W = draw.cast(with_norm(draw.normal(d, d), 1.0), with_norm(draw.normal(d, d), 0.9))
    strength = torch.linspace(0.2, 1.5, NUM_SAMPLES, dtype=torch.float64)[:, None, None]
    z = strength * draw.normal(NUM_SAMPLES, tokens, d)
    return draw.problem(AttentionCell(Q, W), torch.zeros_like(z), (z,), contractive=True)
