"""Maps on a CUDA device, and what the device loop makes of them beside the host loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fpi_cuda as fpi

BATCH = 6


class ConvCell(nn.Module):
    """x -> norm(relu(norm(conv(x)) + z)), a DEQ cell."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(3))
        with torch.no_grad():
            for conv in (self.first, self.second):
                conv.weight.mul_(0.3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        inner = self.norms[0](torch.relu(self.first(x)))
        return self.norms[2](torch.relu(x + self.norms[1](z + self.second(inner))))


class Attention(nn.Module):
    """x -> tanh(a attention(x) + z)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.project(x).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return torch.tanh(0.3 * self.out(mixed.transpose(1, 2).flatten(2)) + z)


MAPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "dense": (lambda: fpi.cells.Dense(16, 256), (256,), (16,)),
    "mlp": (lambda: fpi.cells.MLP(16, 40, 64), (40,), (16,)),
    "conv": (ConvCell, (8, 12, 12), (8, 12, 12)),
    "attention": (Attention, (10, 32), (10, 32)),
    "large": (lambda: fpi.cells.Dense(16, 4096), (4096,), (16,)),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """The map, and zeros of its state."""
    torch.manual_seed(0)
    make, state, _ = MAPS[name]
    return make().to("cuda", dtype), torch.zeros(BATCH, *state, device="cuda", dtype=dtype)


def input_of(name: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(BATCH, *MAPS[name][2], device="cuda", dtype=dtype, generator=generator)


def run(g: Any, x0: Tensor, z: Tensor, route: str | None, **options: Any) -> list[Tensor]:
    """Value, account, adjoint's account, gradients in z and the parameters."""
    z = z.clone().requires_grad_()
    solution = fpi.fixed_point(g, x0, z, **{"rtol": 1e-5, "rowwise": False, **options}, route=route)
    weights = torch.linspace(-1.0, 2.0, x0.numel(), device="cuda", dtype=x0.dtype)
    loss = (solution.value.flatten() * weights).sum()
    found = torch.autograd.grad(loss, [z, *g.parameters()])
    stats = solution.adjoint_stats
    assert stats is not None
    account = [solution.status, solution.num_steps, stats.status, stats.num_steps]
    return [*account, solution.value.detach(), *found]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-3) -> None:
    """Accounts equal; numbers up to what kernels with atomics may differ by after a solve."""
    for mine, other in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(found[4:], expected[4:], strict=True):
        assert torch.linalg.vector_norm(mine - other) <= tolerance * torch.linalg.vector_norm(other)
