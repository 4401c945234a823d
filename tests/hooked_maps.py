"""Maps to hang something on, and the loop that calls them by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda import cells
from fpi_cuda.lowered import Layer, Lowered

F64 = torch.float64
B, D = 8, 6
TIGHT = {"rtol": 1e-12, "max_steps": 400}
# The fixed point of what a call of g says, to many more digits than any way of passing it over.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def dense() -> cells.Cell:
    return cells.Dense(D, D)


def mlp() -> cells.Cell:
    return cells.MLP(D, D, 9, "tanh", "tanh")


def descent() -> cells.Cell:
    return cells.GradientDescent(cells.MLPEnergy(D, D, 9), 0.4)


class Own(cells.Cell):
    """tanh(M x + z), with lower()."""

    def __init__(self) -> None:
        super().__init__()
        self.x_features = D
        self.M = nn.Linear(D, D, bias=False)
        nn.init.orthogonal_(self.M.weight, 0.5)

    def prepare(self, z: Tensor) -> Tensor:
        return z

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return torch.tanh(self.M(x) + prepared)

    def lower(self, prepared: Tensor) -> Lowered:
        return Lowered((Layer(self.M.weight, "tanh", shift=prepared),))


class Pair(nn.Module):
    """A tuple state, with prepare and step."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Linear(D, D)
        nn.init.orthogonal_(self.A.weight, 0.5)

    def prepare(self, z: Tensor) -> Tensor:
        return 2 * z

    def step(self, x: Any, prepared: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.A(x[1]) + prepared), 0.4 * torch.sin(x[0])

    def forward(self, x: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(x, self.prepare(z))


CELLS: dict[str, Callable[[], nn.Module]] = {
    "dense": dense, "mlp": mlp, "descent": descent, "own": Own, "pair": Pair,
}  # fmt: skip


def halved(out: Any) -> Any:
    return tuple(0.5 * t for t in out) if isinstance(out, tuple) else 0.5 * out


def start(g: Any, dtype: torch.dtype = F64) -> Any:
    zero = torch.zeros(B, D, dtype=dtype)
    return (zero, zero) if isinstance(g, Pair) else zero


def by_hand(g: Any, z: Tensor, steps: int = 300) -> Any:
    x = start(g, z.dtype)
    for _ in range(steps):
        x = g(x, z)
    return x


def inputs() -> Tensor:
    return torch.randn(B, D, dtype=F64)


def parts(x: Any) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in (x if isinstance(x, tuple) else (x,)))


ADJOINTS = {
    "implicit": fpi.Implicit(),
    "gmres": fpi.Implicit(solver=fpi.GMRES()),
    "neumann": fpi.Neumann(k=80),
    "phantom": fpi.Phantom(k=80, tau=1.0),
    "unroll": fpi.Unroll(),
}


def derivatives(value: Any, inputs: list[Tensor], order: int) -> list[Tensor]:
    found: list[Tensor] = []
    scalar = sum(t.square().sum() for t in (value if isinstance(value, tuple) else (value,)))
    for level in range(order):
        last = level == order - 1
        found = list(torch.autograd.grad(scalar, inputs, create_graph=not last))
        scalar = sum((t.square().sum() for t in found), torch.zeros((), dtype=F64))
    return found


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Linear(D, D)
        nn.init.orthogonal_(self.A.weight, 0.5)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.A(x) + z)
