"""Networks: tanh cells, perceptrons, convolutions, attention, and trained FPI_NN and FPI_GD.

The trained layers are those of bench/train_zoo_layers.py for Bibtex, rounded to float16 and used
so: 159 labels are the state, eight test rows the z. What does not depend on x is done already: z
is what reaches the loop of the features.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from fpi_cuda.testing.linear import affine
from fpi_cuda.testing.problem import NUM_SAMPLES, Draw, Map, Problem, evenly, register

D = 64
HIDDEN = 96

WEIGHTS = Path(__file__).with_name("trained_layers.npz")
"""Arrays called layer.weight and layer.z<k>."""

EDGE = 1.95
"""Step size of the "edge" problems, times the largest curvature at the eight minima."""


def tanh_cell(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """tanh(W x + b) with W (B, d, d)."""
    return torch.tanh(affine(x, W, b))


def relu_perceptron(x: Tensor, V: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """V relu(W x + b) with W (B, hidden, d), V (B, d, hidden), b (B, hidden)."""
    return (V * torch.relu(affine(x, W, b))[:, None, :]).sum(-1)


def sigmoid_perceptron(x: Tensor, V: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """sigmoid(V relu(W x + b)): the shape of FPI_NN."""
    return torch.sigmoid(relu_perceptron(x, V, W, b))


def with_norm(W: Tensor, norm: Tensor | float) -> Tensor:
    """The matrices (..., d, k) scaled to the given 2-norms (...)."""
    scale: Tensor = torch.as_tensor(norm) / torch.linalg.matrix_norm(W, 2)
    return W * scale[..., None, None]


def gaussian(draw: Draw, norm: Tensor | float) -> Tensor:
    """(B, D, D) Gaussian matrices of the given 2-norms."""
    return with_norm(draw.normal(NUM_SAMPLES, D, D), norm)


def symmetric(draw: Draw, norm: Tensor | float) -> Tensor:
    """The same, symmetric."""
    W = draw.normal(NUM_SAMPLES, D, D)
    return with_norm(W + W.mT, norm)


def negative_definite(draw: Draw, norm: Tensor | float) -> Tensor:
    """The same, negative definite."""
    W = draw.normal(NUM_SAMPLES, D, D)
    return -with_norm(W @ W.mT, norm)


@register(
    {
        "tanh/norm-0.9": (symmetric, 0.9, 0.1),
        # The bias is small: little saturation helps.
        "tanh/norm-0.99": (symmetric, 0.99, 0.02),
        "tanh/non-symmetric": (gaussian, evenly(0.5, 0.98), 0.3),
        # A norm of 1.5, and many fixed points: the part from the identity dominates, so the
        # iteration saturates into a stable one.
        "tanh/expansive-1.5": (symmetric, 0.5, 0.3, True, 1.0),
        # Stable because most units saturate.
        "tanh/expansive-3": (gaussian, 3.0, 4.0),
        # Picard wanders.
        "tanh/unstable": (gaussian, evenly(2.5, 6), 0.1, False),
        # Picard ends in a 2-cycle.
        "tanh/negative": (negative_definite, evenly(1.1, 3), 0.2, False),
    }
)
def tanh_problem(
    draw: Draw,
    weights: Map,
    norm: Tensor | float,
    bias_scale: float,
    contractive: bool = True,
    shift: float = 0.0,
) -> Problem:
    """The tanh cell of W + shift I from zero, W of the given norm, with a Gaussian bias."""
    W = weights(draw, norm) + shift * torch.eye(D, dtype=torch.float64)
    bias = bias_scale * draw.normal(NUM_SAMPLES, D)
    return draw.problem(tanh_cell, torch.zeros_like(bias), (W, bias), contractive=contractive)


@register(
    {
        # It has kinks.
        "perceptron/relu": (relu_perceptron, 0.95),
        # It contracts where it settles.
        "perceptron/relu-expansive": (relu_perceptron, 4.0),
        # The slope 1/4 of the sigmoid makes it contract.
        "perceptron/sigmoid": (sigmoid_perceptron, 12.0),
        # Picard wanders.
        "perceptron/sigmoid-unstable": (sigmoid_perceptron, 400.0, 0.5, False),
    }
)
def perceptron_problem(
    draw: Draw, g: Map, norm: float, start: float = 0.0, contractive: bool = True
) -> Problem:
    """A perceptron from x = start, with ||V|| ||W|| = norm for each sample."""
    V = with_norm(draw.normal(NUM_SAMPLES, D, HIDDEN), math.sqrt(norm))
    W = with_norm(draw.normal(NUM_SAMPLES, HIDDEN, D), math.sqrt(norm))
    z = V, W, draw.normal(NUM_SAMPLES, HIDDEN)
    return draw.problem(g, torch.full((NUM_SAMPLES, D), start), z, contractive=contractive)


def convolution_cell(x: Tensor, z: Tensor, weight: Tensor, groups: int) -> Tensor:
    """tanh(conv2d(x) + z), then a group norm if `groups` is not 0. x, z: (B, C, H, W)."""
    y = torch.tanh(functional.conv2d(x, weight, padding=1) + z)
    return functional.group_norm(y, groups) if groups else y


@register(
    {
        "convolution/tanh": (0.97, 0),
        # The group norm undoes the contraction on some samples.
        "convolution/group-norm": (0.8, 2),
    }
)
def convolution_problem(draw: Draw, norm: float, groups: int) -> Problem:
    """4 channels of 10 x 10; the samples differ in the size of their input."""
    channels, side = 4, 10
    weight = draw.normal(channels, channels, 3, 3)
    # The operator norm of a convolution is at most that of its symbol; sample it on a grid.
    symbol = torch.fft.fft2(weight, s=(32, 32)).permute(2, 3, 0, 1)
    (weight,) = draw.cast(norm * weight / torch.linalg.matrix_norm(symbol, 2).amax())
    z = evenly(0.1, 2)[:, None, None, None] * draw.normal(NUM_SAMPLES, channels, side, side)
    g = functools.partial(convolution_cell, weight=weight, groups=groups)
    return draw.problem(g, torch.zeros_like(z), (z,), contractive=groups == 0, bitwise=False)


def attention_cell(x: Tensor, z: Tensor, Q: Tensor, W: Tensor) -> Tensor:
    """z + W softmax(x Q x^T / sqrt(d)) x over tokens. x, z: (B, tokens, d)."""
    scores = torch.einsum("btd,de,bse->bts", x, Q, x) / math.sqrt(x.shape[-1])
    return z + torch.einsum("bts,bsd,de->bte", scores.softmax(-1), x, W)


@register("attention/softmax")
def attention(draw: Draw) -> Problem:
    """Self-attention over 6 tokens; z grows over the samples."""
    Q, W = draw.cast(with_norm(draw.normal(16, 16), 1.0), with_norm(draw.normal(16, 16), 0.9))
    z = evenly(0.2, 1.5)[:, None, None] * draw.normal(NUM_SAMPLES, 6, 16)
    g = functools.partial(attention_cell, Q=Q, W=W)
    return draw.problem(g, torch.zeros_like(z), (z,), contractive=True, bitwise=False)


def fpi_nn(x: Tensor, z: Tensor, A: Tensor, V: Tensor, c: Tensor) -> Tensor:
    """sigmoid(V relu(A x + z) + c), x and c of d labels, z of h hidden units."""
    return torch.sigmoid(torch.relu(x @ A.mT + z) @ V.mT + c)


def fpi_gd(
    x: Tensor, z: Tensor, local: Tensor, A: Tensor, w: Tensor, decay: Tensor, step_size: Tensor
) -> Tensor:
    """A step down w . softplus(A x + z) + decay |x|^2 / 2 - local . x."""
    slope = (torch.sigmoid(x @ A.mT + z) * w) @ A
    return x - step_size * (slope + decay * x - local)


def energy_curvature(
    x: Tensor, z: Tensor, local: Tensor, A: Tensor, w: Tensor, decay: Tensor
) -> Tensor:
    """(B, d) eigenvalues of the Hessian in x of the energy of `fpi_gd`, ascending."""
    p = torch.sigmoid(x @ A.mT + z)
    H = (A.mT * (p * (1 - p) * w)[:, None, :]) @ A
    return torch.linalg.eigvalsh(H) + decay


@functools.cache
def stored() -> dict[str, Tensor]:
    """Every array of the file, as float64."""
    # Here, so that the rest of the zoo does without numpy, on which the package does not depend.
    import numpy as np

    with np.load(WEIGHTS) as file:
        return {name: torch.from_numpy(file[name].astype(np.float64)) for name in file.files}


def layer(draw: Draw, name: str) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Weights and z of a stored layer, in the draw's dtype."""
    arrays = {
        key.removeprefix(name + "."): draw.cast(value)[0]
        for key, value in stored().items()
        if key.startswith(name + ".")
    }
    z = tuple(arrays.pop(key) for key in sorted(arrays) if key.startswith("z"))
    return arrays, z


@register(
    {
        # Trained with ||V|| ||A|| / 4 below 1.
        "trained/perceptron": ("perceptron", fpi_nn, True),
        # Trained without a bound: it has left the region where it contracts.
        "trained/perceptron-free": ("perceptron_free", fpi_nn, False),
        # Not convex, with the step size it was trained with.
        "trained/energy": ("energy", fpi_gd, True),
    }
)
def trained_problem(
    draw: Draw, name: str, function: Map, contractive: bool, **replaced: Tensor
) -> Problem:
    """A stored layer from x = 0, some weights replaced."""
    weights, z = layer(draw, name)
    x0 = torch.zeros(z[0].shape[0], weights["A"].shape[-1])
    g = functools.partial(function, **weights | replaced)
    return draw.problem(g, x0, z, contractive=contractive, bitwise=False)


@register(
    {
        # Not convex.
        "trained/energy-edge": ("energy",),
        # Strongly convex.
        "trained/energy-convex-edge": ("energy_convex",),
    }
)
def edge_problem(draw: Draw, name: str) -> Problem:
    """A stored energy with EDGE / L as its step size, L the largest curvature at the minima."""
    weights, z = layer(Draw(draw.name, torch.float64), name)
    x = torch.zeros(z[0].shape[0], weights["A"].shape[-1], dtype=torch.float64)
    for _ in range(2000):
        x = fpi_gd(x, *z, **weights)
    del weights["step_size"]
    largest = energy_curvature(x, *z, **weights).amax()
    (step_size,) = draw.cast(EDGE / largest)
    return trained_problem(draw, name, fpi_gd, True, step_size=step_size)
