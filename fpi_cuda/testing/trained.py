"""FPI_NN and FPI_GD layers trained on Bibtex: 159 labels are the state, eight test rows the z.

The weights are those of bench/train_zoo_layers.py, rounded to float16 and used so. What does not
depend on x is done already: z is what reaches the loop of the features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fpi_cuda.testing.problem import Draw, Problem, register

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


@dataclass(frozen=True)
class TrainedMap:
    """One of the functions above with its weights."""

    function: Callable[..., Tensor]
    weights: dict[str, Tensor]
    rowwise: ClassVar[bool] = True

    def __call__(self, x: Tensor, *z: Tensor) -> Tensor:
        return self.function(x, *z, **self.weights)


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


def trained_problem(
    draw: Draw, name: str, function: Callable[..., Tensor], contractive: bool, **replaced: Tensor
) -> Problem:
    """A stored layer from x = 0, some weights replaced."""
    weights, z = layer(draw, name)
    labels = weights["A"].shape[-1]
    x0 = torch.zeros(z[0].shape[0], labels)
    g = TrainedMap(function, weights | replaced)
    return draw.problem(g, x0, z, contractive=contractive)


@register("trained/perceptron")
def perceptron(draw: Draw) -> Problem:
    """FPI_NN trained with ||V|| ||A|| / 4 below 1."""
    return trained_problem(draw, "perceptron", sigmoid_perceptron, True)


@register("trained/perceptron-free")
def perceptron_free(draw: Draw) -> Problem:
    """FPI_NN trained without a bound: it has left the region where it contracts."""
    return trained_problem(draw, "perceptron_free", sigmoid_perceptron, False)


@register("trained/energy")
def energy(draw: Draw) -> Problem:
    """FPI_GD, not convex, with the step size it was trained with."""
    return trained_problem(draw, "energy", energy_descent, True)


@register("trained/energy-edge")
def energy_edge(draw: Draw) -> Problem:
    """FPI_GD, not convex, with a step size near the edge of stability."""
    return edge_problem(draw, "energy")


@register("trained/energy-convex-edge")
def energy_convex_edge(draw: Draw) -> Problem:
    """FPI_GD with a strongly convex energy, with a step size near the edge of stability."""
    return edge_problem(draw, "energy_convex")


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
