"""A fixed-point problem as every peer gets it, its true residual and its true gradient."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fpi_cuda as fpi
from fpi_cuda.activations import ACTIVATIONS

GRADIENT_OVER_RESIDUAL = 10.0
"""The relative error that a gradient may have, over the residual that the solution may have."""

Written = tuple[Callable[[Tensor], tuple[Tensor, ...]], Callable[..., Tensor]]
"""prepare(z), once per solve, and step(x, *prepared)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Find x with x = cell(x, z), sample by sample.

    Attributes:
        name: as the tables show it.
        cell: the map g: a built-in cell, or a module as any user writes it.
        z: (B, ...) inputs.
        x0: (B, ...) start: zeros.
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
    def features(self) -> int:
        """Numbers in the state of one sample."""
        return self.x0[0].numel()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.cell.parameters())

    @property
    def gradient_rtol(self) -> float:
        """The relative error that a sample's gradient in z may have."""
        return GRADIENT_OVER_RESIDUAL * self.rtol

    @property
    def g(self) -> str:
        """What the map is called: a cell by its name, anything else is the user's."""
        name = type(self.cell).__name__
        return f"cells.{name}" if type(self.cell) in BY_HAND else "your module"

    @property
    def written(self) -> Written:
        """The map as whoever writes a loop in torch has it.

        A cell is written out in addmm and activations; a user's module is called as it is.
        """
        by_hand = BY_HAND.get(type(self.cell))
        return by_hand(self.cell) if by_hand else (lambda z: (z,), self.cell)

    def bound(self, z: Tensor) -> Callable[[Tensor], Tensor]:
        """The same as a function of x alone."""
        prepare, step = self.written
        prepared = prepare(z)
        return lambda x: step(x, *prepared)

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
            image = exact.cell(state, exact.z)
            residual = norms(image - state) / norms(image)
        return torch.nan_to_num(residual, nan=torch.inf)


def norms(t: Tensor) -> Tensor:
    """(B,) of each sample."""
    return torch.linalg.vector_norm(t.flatten(1), dim=1)


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """(B,) as it multiplies `like`."""
    return t.view(-1, *[1] * (like.dim() - 1))


# The built-in cells as somebody writes them who has torch only.


def dense(cell: Any) -> Written:
    activation = ACTIVATIONS[cell.activation].value

    def prepare(z: Tensor) -> tuple[Tensor, ...]:
        return functional.linear(z, cell.B.weight, cell.B.bias), cell.A.weight.t()

    def step(x: Tensor, zb: Tensor, a: Tensor) -> Tensor:
        return activation(torch.addmm(zb, x, a))

    return prepare, step


def mlp(cell: Any) -> Written:
    activation, out = (ACTIVATIONS[name].value for name in (cell.activation, cell.out_activation))

    def prepare(z: Tensor) -> tuple[Tensor, ...]:
        zb = functional.linear(z, cell.B.weight, cell.B.bias)
        return zb, cell.A.weight.t(), cell.W.weight.t(), cell.W.bias

    def step(x: Tensor, zb: Tensor, a: Tensor, w: Tensor, c: Tensor) -> Tensor:
        return out(torch.addmm(c, activation(torch.addmm(zb, x, a)), w))

    return prepare, step


def gradient_descent(cell: Any) -> Written:
    energy, size = cell.energy, cell.step_size
    slope = ACTIVATIONS[energy.activation].derivative
    kept = 1.0 - size * energy.quadratic

    def prepare(z: Tensor) -> tuple[Tensor, ...]:
        zb = functional.linear(z, energy.B.weight, energy.B.bias)
        return zb, energy.A.weight, energy.w

    def step(x: Tensor, zb: Tensor, a: Tensor, w: Tensor) -> Tensor:
        hidden = slope(torch.addmm(zb, x, a.t())) * w
        return torch.addmm(x, hidden, a, beta=kept, alpha=-size)

    return prepare, step


BY_HAND: dict[type, Callable[[Any], Written]] = {
    fpi.cells.Dense: dense,
    fpi.cells.MLP: mlp,
    fpi.cells.GradientDescent: gradient_descent,
}


class Counter(nn.Module):
    """A map that counts the rows it evaluates: the work that a solve really did."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.rows = 0

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        self.rows += x.shape[0]
        return self.problem.cell(x, z)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The solution and the gradient of sum(v * x), in float64.

    Attributes:
        x: (B, ...) fixed point.
        valid: (B,) bool, it is one to 1e-10, and not at a kink of g.
        z_grad: like z.
        parameter_grads: like the cell's parameters.
    """

    x: Tensor
    valid: Tensor
    z_grad: Tensor
    parameter_grads: list[Tensor]


EXACT = 1e-12
"""To what the reference is solved, relative to its own size."""
MOST_STEPS = 3000
DENSE_FEATURES = 512
"""Beyond so many, no Jacobian is made where iterating does not converge."""


def reference_solution(problem: Problem, x: Tensor, v: Tensor, newton_steps: int = 8) -> Reference:
    """Polish `x` in float64 and solve the adjoint system, by plain iteration or by a direct solve.

    Args:
        x: (B, ...) a point near the fixed points, from any solver.
        v: (B, ...) gradient of the loss in x.
    """
    exact = problem.double()
    dense = problem.features <= DENSE_FEATURES and x.dim() == 2
    with torch.no_grad():
        state, settled = iterated(lambda at: exact.cell(at, exact.z), x.double())
    if dense and not settled:
        state = x.double()
        identity = torch.eye(problem.features, dtype=torch.float64, device=x.device)
        for _ in range(newton_steps):
            image, jacobian = image_and_jacobian(exact, state)
            state = state + torch.linalg.solve(identity - jacobian, image - state)
    valid = exact.true_residual(state) <= 1e-10
    grads = gradients(exact, state, v.double(), dense)
    generator = torch.Generator().manual_seed(2)
    for _ in range(PROBES):
        moved = torch.randn(state.shape, generator=generator).to(state)
        moved *= per_sample(PROBED * problem.rtol * norms(state) / norms(moved), moved)
        for there in (state + moved, state - moved):
            z_grad = gradients(exact, there, v.double(), dense)[0]
            valid &= norms(z_grad - grads[0]) <= problem.gradient_rtol * norms(grads[0])
    return Reference(state, valid, grads[0], grads[1:])


PROBES, PROBED = 2, 0.1
"""A sample is not judged where moves so small, over rtol, change its exact gradient by more than is
allowed: it lies at a kink of g, and has no gradient to be compared with."""


def gradients(exact: Problem, x: Tensor, v: Tensor, dense: bool) -> list[Tensor]:
    """Of sum(v * x) in z and in each parameter, at a fixed point x."""
    z = exact.z.detach().requires_grad_()
    state = x.detach().requires_grad_()
    image = exact.cell(state, z)
    adjoint, settled = iterated(
        lambda c: torch.autograd.grad(image, state, c, retain_graph=True)[0] + v, v
    )
    if dense and not settled:
        _, jacobian = image_and_jacobian(exact, x)
        identity = torch.eye(exact.features, dtype=torch.float64, device=x.device)
        adjoint = torch.linalg.solve((identity - jacobian).transpose(1, 2), v)
    return list(torch.autograd.grad(image, [z, *exact.parameters], adjoint))


def iterated(step: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, bool]:
    """x <- step(x) until no sample moves by more than EXACT, and whether that came to be."""
    for _ in range(MOST_STEPS):
        image = step(x)
        moved = float((norms(image - x) / norms(image).clamp_min(1e-30)).max())
        x = image
        if moved <= EXACT:
            return x, True
        if not moved < float("inf"):
            break
    return x, False


def image_and_jacobian(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """g(x) and its derivative in x: (B, d) and (B, d, d)."""
    x = x.detach().requires_grad_()
    image = problem.cell(x, problem.z)
    rows = [
        torch.autograd.grad(image[:, i].sum(), x, retain_graph=True)[0]
        for i in range(image.shape[1])
    ]
    return image.detach(), torch.stack(rows, dim=1).detach()


class Variants:
    """A problem at several inputs and slightly different weights, as steps of training see it.

    The weights are those of the problem's cell, changed in place: what `use` returned is out of
    date with the next `use`.

    Args:
        problem: its z is the pool that inputs are drawn from.
        count: of variants; the first has the weights as they are.
        distinct: different samples in a batch; a larger batch has them over again.
    """

    def __init__(self, problem: Problem, count: int, distinct: int) -> None:
        self.problem = problem
        self.count = count
        self.distinct = min(distinct, problem.z.shape[0])
        generator = torch.Generator().manual_seed(1)
        shape = (self.distinct, *problem.x0.shape[1:])
        self.v = torch.randn(shape, generator=generator).to(problem.x0)
        kept = [p.detach().clone() for p in problem.parameters]
        self._weights = [kept]
        for _ in range(1, count):
            noise = (torch.randn(w.shape, generator=generator).to(w) for w in kept)
            self._weights.append(
                [w * (1 + PERTURBATION * n) for w, n in zip(kept, noise, strict=True)]
            )
        self._references: dict[int, Reference] = {}

    def use(self, variant: int, batch: int) -> Problem:
        """One of them: weights written anew, inputs in memory of their own."""
        with torch.no_grad():
            for p, w in zip(self.problem.parameters, self._weights[variant], strict=True):
                p.copy_(w)
        rows = (variant * self.distinct + self.rows(batch)) % self.problem.z.shape[0]
        return self.problem.with_inputs(self.problem.z[rows])

    def rows(self, batch: int) -> Tensor:
        """(batch,) which of the distinct samples each row is."""
        return torch.arange(batch, device=self.problem.z.device) % self.distinct

    def reference(self, variant: int, start: Callable[[Problem], Tensor]) -> Reference:
        """Of the distinct samples, found once, from the solution that `start` finds."""
        if variant not in self._references:
            problem = self.use(variant, self.distinct)
            self._references[variant] = reference_solution(problem, start(problem), self.v)
        return self._references[variant]

    def judged(self) -> float:
        """The share of the samples, of all references found, whose gradient is held against it."""
        valid = [reference.valid.double().mean() for reference in self._references.values()]
        return float(torch.stack(valid).mean()) if valid else 1.0


PERTURBATION = 1e-3
"""Of the weights from one variant to the next, relative."""


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
