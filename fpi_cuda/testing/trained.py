"""FPI_NN and FPI_GD layers trained on Bibtex: 159 labels are the state, eight test rows the z.

The weights are those of bench/train_zoo_layers.py, rounded to float16 and used so. What does not
depend on x is done already: z is what reaches the loop of the features.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from fpi_cuda.testing.problem import Draw, Map, Problem, register

WEIGHTS = Path(__file__).with_name("trained_layers.npz")
"""Arrays called layer.weight and layer.z<k>."""

EDGE = 1.95
"""Step size of the "edge" problems, times the largest curvature at the eight minima."""


def sigmoid_perceptron(x: Tensor, z: Tensor, A: Tensor, V: Tensor, c: Tensor) -> Tensor:
    """FPI_NN: sigmoid(V relu(A x + z) + c), x and c of d labels, z of h hidden units."""
    return torch.sigmoid(torch.relu(x @ A.mT + z) @ V.mT + c)


def energy_descent(
    x: Tensor, z: Tensor, local: Tensor, A: Tensor, w: Tensor, decay: Tensor, step_size: Tensor
) -> Tensor:
    """FPI_GD: a step down w . softplus(A x + z) + decay |x|^2 / 2 - local . x."""
    slope = (torch.sigmoid(x @ A.mT + z) * w) @ A
    return x - step_size * (slope + decay * x - local)


def energy_curvature(
    x: Tensor, z: Tensor, local: Tensor, A: Tensor, w: Tensor, decay: Tensor
) -> Tensor:
    """(B, d) eigenvalues of the Hessian in x of the energy of `energy_descent`, ascending."""
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
        "trained/perceptron": ("perceptron", sigmoid_perceptron, True),
        # Trained without a bound: it has left the region where it contracts.
        "trained/perceptron-free": ("perceptron_free", sigmoid_perceptron, False),
        # Not convex, with the step size it was trained with.
        "trained/energy": ("energy", energy_descent, True),
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
        x = energy_descent(x, *z, **weights)
    del weights["step_size"]
    largest = energy_curvature(x, *z, **weights).amax()
    (step_size,) = draw.cast(EDGE / largest)
    return trained_problem(draw, name, energy_descent, True, step_size=step_size)
