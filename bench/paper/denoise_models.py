"""Denoising: FPI_NN on feature maps, and the feedforward network of the structure of its g."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fpi_cuda as fpi


class ConvolutionalMap(fpi.cells.Cell):
    """g(x, z) = relu(M_k ... relu(M_1 relu(A x + B z + b) + b_1) ... + b_k), all convolutions.

    x: (B, channels, H, W) feature maps; z: (B, 1, H, W) the noisy image.

    Args:
        depth: number of M, at least 1.
        norm: bound on the norms of A and of every M, hence norm^(depth + 1) on the Lipschitz
            constant of g in x; None leaves them free.
    """

    def __init__(self, channels: int, depth: int, norm: float | None) -> None:
        super().__init__()
        self.channels = channels
        self.A = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.B = nn.Conv2d(1, channels, 3, padding=1)
        self.M = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth))
        for layer in self.M:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        if norm is not None:
            for layer in (self.A, *self.M):
                fpi.contract_(layer, norm)

    def prepare(self, z: Tensor) -> Tensor:
        """B z + b: (B, channels, H, W)."""
        return self.B(z)

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        """The next x."""
        return self.deepen(torch.relu(self.A(x) + prepared))

    def deepen(self, h: Tensor) -> Tensor:
        """What follows the first layer."""
        for layer in self.M:
            h = torch.relu(layer(h))
        return h


class FixedPointDenoiser(nn.Module):
    """z + D x with x = g(x, z)."""

    def __init__(
        self, channels: int, depth: int, norm: float | None, rtol: float, max_steps: int
    ) -> None:
        super().__init__()
        self.layer = fpi.FPILayer(
            ConvolutionalMap(channels, depth, norm),
            init=self.start,
            solver=fpi.Anderson(m=5),
            rtol=rtol,
            max_steps=max_steps,
        )
        self.D = last_layer(channels)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.D(self.layer(z))

    def start(self, z: Tensor) -> Tensor:
        """Feature maps of zeros."""
        cell: Any = self.layer.g
        return z.new_zeros(z.shape[0], cell.channels, *z.shape[2:])


class FeedforwardDenoiser(nn.Module):
    """z + D g(0, z), with nothing bounded: the same convolutions, used once, and no A."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        cell = ConvolutionalMap(channels, depth, None)
        del cell.A
        self.cell = cell
        self.D = last_layer(channels)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.D(self.cell.deepen(torch.relu(self.cell.prepare(z))))


def last_layer(channels: int) -> nn.Conv2d:
    """Features to image; small, so that a fresh network returns about the noisy image."""
    layer = nn.Conv2d(channels, 1, 3, padding=1)
    with torch.no_grad():
        layer.weight.mul_(0.1)
    return layer


class PersistentPenalty(nn.Module):
    """Holds the Jacobian of g at the fixed point below a target, in its strongest direction.

    One vector per place in the batch persists over the training and takes one power step with
    J^T a call, so it follows the dominant direction as J changes slowly.

    Args:
        shape: (B, ...) of the state in training.
        target: norms of J^T v below it cost nothing.
    """

    vector: Tensor

    def __init__(self, shape: tuple[int, ...], target: float) -> None:
        super().__init__()
        self.target = target
        vector = torch.randn(shape)
        self.register_buffer("vector", vector / norms(vector))

    def forward(self, cell: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        """Scalar: the mean over samples of max(0, ||J^T v|| - target)^2.

        Args:
            x: the fixed point of cell(x, z) = x; taken without its graph.
        """
        x = x.detach().requires_grad_()
        (product,) = torch.autograd.grad(cell(x, z), x, self.vector, create_graph=True)
        norm = norms(product)
        # Not in place: the backward of this call still needs the old vector.
        self.vector = (product / norm.clamp_min(1e-12)).detach()
        return torch.relu(norm - self.target).square().mean()


def norms(x: Tensor) -> Tensor:
    """2-norm of each sample, broadcastable to x."""
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))
