"""tanh and linear layers of three small samples, and what their derivatives must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fpi_cuda as fpi

F64 = torch.float64
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 500}
B, D, K = 3, 4, 2


def tanh_layer(**options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """x* of tanh(A x + C z), A and C closed over."""

    def solve(z: Tensor, a: Tensor, c: Tensor) -> Tensor:
        def g(x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(x @ a.T + z @ c.T)

        return fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), z, **(TIGHT | options)).value

    return solve


def linear_layer(z: Tensor, a: Tensor, c: Tensor, **options: Any) -> Tensor:
    """x* of A x + C z."""

    def g(x: Tensor, z: Tensor) -> Tensor:
        return x @ a.T + z @ c.T

    return fpi.fixed_point(g, torch.zeros(len(z), D, dtype=F64), z, **(TIGHT | options)).value


def closed_form(z: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """(I - A)^-1 C z. An explicit inverse: torch.linalg.solve loses derivatives of tangents."""
    return z @ c.T @ torch.linalg.inv(torch.eye(D, dtype=F64) - a).T


def derivatives(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], order: int) -> list[Tensor]:
    """The gradients of orders 1 to `order`, each of a nonlinear scalar of the one before."""
    scalar = (f(*inputs) ** 3).sum()
    found: list[Tensor] = []
    for _ in range(order):
        grads = torch.autograd.grad(scalar, inputs, create_graph=True)
        found += [grad.detach() for grad in grads]
        scalar = sum((grad.sin().sum() for grad in grads), torch.zeros((), dtype=F64))
    return found


class Problem(NamedTuple):
    """tanh(A x + z): its inputs and what a loop of 100 steps makes of them."""

    z: Tensor
    a: Tensor

    def looped(self) -> Tensor:
        x = torch.zeros_like(self.z)
        for _ in range(100):
            x = torch.tanh(x @ self.a.T + self.z)
        return x


class Sine(torch.autograd.Function):
    """sin, with a backward that autograd may or may not follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return v * ctx.saved_tensors[0].cos()


class Detached(Sine):
    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return v.detach() * ctx.saved_tensors[0].detach().cos()
