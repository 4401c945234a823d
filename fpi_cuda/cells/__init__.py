"""Maps with a known structure: FPI_NN (Dense, MLP) and FPI_GD (GradientDescent)."""

from fpi_cuda.activations import ACTIVATIONS, Activation
from fpi_cuda.cells.cell import Cell, add_activation
from fpi_cuda.cells.dense import Dense
from fpi_cuda.cells.energy import MLPEnergy
from fpi_cuda.cells.gradient_descent import GradientDescent
from fpi_cuda.cells.mlp import MLP

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Activation",
    "Cell",
    "Dense",
    "GradientDescent",
    "MLPEnergy",
    "add_activation",
]
