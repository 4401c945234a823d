"""Maps whose rows depend on one another, and what their solutions must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fpi_cuda as fpi

F64 = torch.float64
SOLVERS = [fpi.Picard(), fpi.Anderson(m=5), fpi.Broyden(m=10)]
LINEAR_SOLVERS = [*SOLVERS, fpi.GMRES(), fpi.ConjugateGradient()]
Map = Callable[..., Any]


def orthogonal(n: int, gain: float) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=F64))[0] * gain


def graph(nodes: int = 40, features: int = 4, sources: int = 2) -> tuple[Map, Tensor]:
    """Messages between nodes; most have no input of their own, so that they rest at first."""
    edges = (torch.rand(nodes, nodes, dtype=F64) < 0.1).double()
    edges = edges / edges.sum(1, keepdim=True).clamp(min=1)
    weight = orthogonal(features, 0.9)
    u = torch.zeros(nodes, features, dtype=F64)
    u[:sources] = torch.randn(sources, features, dtype=F64)
    return lambda x, z=0: torch.tanh(edges @ x @ weight + u + z), torch.zeros_like(u)


def chain(n: int = 30) -> tuple[Map, Tensor]:
    """An unbatched vector in which each number waits for the one before it."""
    p = torch.eye(n, dtype=F64).roll(1, 0) * 0.8
    p[0] = 0
    b = torch.zeros(n, dtype=F64)
    b[0] = 1
    return lambda x, z=0: p @ x + b + z, torch.zeros_like(b)


def dense_vector(n: int = 20) -> tuple[Map, Tensor]:
    p, b = orthogonal(n, 0.7), torch.randn(n, dtype=F64)
    return lambda x, z=0: p @ x + b + z, torch.zeros_like(b)


def attention(n: int = 16, d: int = 6) -> tuple[Map, Tensor]:
    q, k, v = (orthogonal(d, gain) for gain in (1.5, 1.5, 0.9))
    u = torch.randn(n, d, dtype=F64)

    def g(x: Tensor, z: Any = 0) -> Tensor:
        mixed = torch.softmax((x @ q) @ (x @ k).T / 4, -1) @ x @ v
        return 0.5 * mixed + 0.3 * torch.tanh(x @ k) + u + z

    return g, torch.zeros_like(u)


def batch_norm(n: int = 12, d: int = 5) -> tuple[Map, Tensor]:
    weight, u = orthogonal(d, 1.0), torch.randn(n, d, dtype=F64)

    def g(x: Tensor, z: Any = 0) -> Tensor:
        y = nn.functional.batch_norm(x @ weight, None, None, training=True, eps=0.1)
        return torch.tanh(0.5 * y + u + z)

    return g, torch.zeros_like(u)


COUPLED = [graph, chain, dense_vector, attention, batch_norm]


def iterated(g: Map, x: Tensor, *z: Tensor) -> Tensor:
    for _ in range(2000):
        x = g(x, *z)
    return x


def true_residual(g: Map, x: Tensor, *z: Tensor) -> Tensor:
    with torch.no_grad():
        return (g(x, *z) - x).reshape(len(x), -1).norm(dim=1)


def same_as_told(sol: fpi.Solution, residual: Tensor) -> bool:
    return bool(((sol.residual - residual).abs() <= 1e-12 + 1e-6 * residual).all())


def dense_gradient(g: Map, x0: Tensor, z: Tensor, v: Tensor) -> Tensor:
    """The gradient of <v, x*> in z by a dense solve; g(x, z) = g(x) + z inside of its last map."""
    x = iterated(g, x0, z)
    n = x.numel()
    by_x = torch.autograd.functional.jacobian(lambda x: g(x, z), x).reshape(n, n)
    by_z = torch.autograd.functional.jacobian(lambda z: g(x, z), z).reshape(n, n)
    c = torch.linalg.solve((torch.eye(n, dtype=F64) - by_x).T, v.reshape(n))
    return (by_z.T @ c).reshape(x.shape)


def masked(v: Tensor) -> Tensor:
    """A loss that reads a few of the nodes."""
    kept = torch.zeros_like(v)
    kept[::5] = v[::5]
    return kept
