"""A fixed-point problem as every peer gets it, its true residual and its true gradient."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fpi_cuda as fpi


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Find x with x = cell.step(x, cell.prepare(z)), sample by sample.

    `prepare` holds the loop-invariant work; every peer calls it once per solve, so that no peer
    wins by hoisting what another could have hoisted too.

    Attributes:
        name: as the tables show it.
        cell: the map; cell(x, z) == cell.step(x, cell.prepare(z)).
        z: (B, z_features) inputs.
        x0: (B, x_features) start.
        rtol: a sample is solved when ||g(x) - x|| <= rtol ||g(x)|| in float64.
        max_steps: the cap that every peer gets.
    """

    name: str
    cell: Any
    z: Tensor
    x0: Tensor
    rtol: float
    max_steps: int = 1000

    @property
    def batch(self) -> int:
        return self.x0.shape[0]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.cell.parameters())

    def with_inputs(self, z: Tensor) -> Problem:
        """The same map on other inputs, started at zero."""
        x0 = self.x0.new_zeros(z.shape[0], *self.x0.shape[1:])
        return dataclasses.replace(self, z=z, x0=x0)

    def with_batch(self, size: int) -> Problem:
        """The first `size` inputs, over again from the first when there are fewer."""
        index = torch.arange(size, device=self.z.device) % self.z.shape[0]
        return self.with_inputs(self.z[index])

    def to(self, device: torch.device) -> Problem:
        """The same problem on `device`."""
        return dataclasses.replace(
            self, cell=self.cell.to(device), z=self.z.to(device), x0=self.x0.to(device)
        )

    def double(self) -> Problem:
        """The same problem in float64."""
        cell = copy.deepcopy(self.cell).double()
        return dataclasses.replace(self, cell=cell, z=self.z.double(), x0=self.x0.double())

    def true_residual(self, x: Tensor) -> Tensor:
        """(B,) float64 ||g(x) - x|| / ||g(x)||, whatever the solver says; NaN counts as inf."""
        exact = self.double()
        with torch.no_grad():
            state = x.double()
            image = exact.cell.step(state, exact.cell.prepare(exact.z))
            residual = (image - state).norm(dim=1) / image.norm(dim=1)
        return torch.nan_to_num(residual, nan=torch.inf)


class CountingCell:
    """A cell that counts the rows it evaluates: the work that a solve really did."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell
        self.rows = 0

    def prepare(self, z: Tensor) -> Any:
        return self.cell.prepare(z)

    def step(self, x: Tensor, prepared: Any) -> Tensor:
        self.rows += x.shape[0]
        return self.cell.step(x, prepared)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The solution and the gradient of sum(v * x) in float64, by Newton and a direct solve.

    Attributes:
        x: (B, d) fixed point.
        valid: (B,) bool, Newton reached 1e-10.
        z_grad: (B, z_features).
        parameter_grads: like the cell's parameters.
        condition: largest ||(I - J)^-1||_2 of the valid samples.
    """

    x: Tensor
    valid: Tensor
    z_grad: Tensor
    parameter_grads: list[Tensor]
    condition: float


def reference_solution(problem: Problem, x: Tensor, v: Tensor, newton_steps: int = 8) -> Reference:
    """Polish `x` by Newton's method and solve the adjoint system directly.

    Args:
        x: (B, d) a point near the fixed points, from any solver.
        v: (B, d) gradient of the loss in x.
    """
    exact = problem.double()
    z = exact.z.detach().requires_grad_()
    prepared = exact.cell.prepare(z)
    state = x.double()
    identity = torch.eye(state.shape[1], dtype=torch.float64, device=state.device)
    for _ in range(newton_steps):
        image, jacobian = _image_and_jacobian(exact.cell, state, prepared)
        state = state + torch.linalg.solve(identity - jacobian, image - state)
    valid = problem.true_residual(state) <= 1e-10
    state_in = state.requires_grad_()
    image = exact.cell.step(state_in, prepared)
    _, jacobian = _image_and_jacobian(exact.cell, state.detach(), prepared)
    adjoint = torch.linalg.solve((identity - jacobian).transpose(1, 2), v.double())
    z_grad, *parameter_grads = torch.autograd.grad(image, [z, *exact.parameters], adjoint)
    # On the CPU: a device takes the singular values of one matrix after the other.
    inverse = torch.linalg.inv(identity - jacobian[valid]).cpu()
    condition = float(torch.linalg.matrix_norm(inverse, 2).max()) if bool(valid.any()) else np.inf
    return Reference(state.detach(), valid, z_grad, parameter_grads, condition)


def _image_and_jacobian(cell: Any, x: Tensor, prepared: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    image = cell.step(x, prepared)
    rows = [
        torch.autograd.grad(image[:, i].sum(), x, retain_graph=True)[0]
        for i in range(image.shape[1])
    ]
    return image.detach(), torch.stack(rows, dim=1).detach()


def tanh_cell(
    batch: int, features: int = 128, norm: float = 0.9, rtol: float = 1e-6, seed: int = 0
) -> Problem:
    """x = tanh(W x + z) with W symmetric, of spectral norm `norm`, and z = 0.1 randn."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(features, features, generator=generator)
    symmetric = square + square.T
    cell = fpi.cells.Dense(features, features, activation="tanh")
    with torch.no_grad():
        cell.A.weight.copy_(norm * symmetric / torch.linalg.matrix_norm(symmetric, 2))
        cell.B.weight.copy_(torch.eye(features))
        cell.B.bias.zero_()
    z = 0.1 * torch.randn(batch, features, generator=generator)
    return Problem("tanh", cell, z, torch.zeros_like(z), rtol)
