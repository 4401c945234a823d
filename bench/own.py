"""Maps as users write them, with nothing of this library in them, and problems made of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.problems import Problem

RTOL = 1e-4
ACTIVATIONS = {"tanh": torch.tanh, "relu": functional.relu, "sigmoid": torch.sigmoid}


class Plain(nn.Module):
    """act(A x + B z + b)."""

    def __init__(self, features: int = 128, activation: str = "tanh") -> None:
        super().__init__()
        self.A = nn.Linear(features, features, bias=False)
        self.B = nn.Linear(features, features)
        self.activation = activation
        nn.init.orthogonal_(self.A.weight, 0.8)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.A(x) + self.B(z))


class MLPNorm(nn.Module):
    """Half the layer norm of a two-layer perceptron."""

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        hidden = 2 * features
        self.A = nn.Linear(features, hidden, bias=False)
        self.B = nn.Linear(features, hidden)
        self.W = nn.Linear(hidden, features)
        self.norm = nn.LayerNorm(features)
        nn.init.orthogonal_(self.A.weight, 0.6)
        nn.init.orthogonal_(self.W.weight, 0.6)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * self.norm(self.W(functional.relu(self.A(x) + self.B(z))))


class ConvNorm(nn.Module):
    """The multiscale DEQ's residual block at one scale, halved (Bai et al. 2020)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, channels)
        self.norm2 = nn.GroupNorm(4, channels)
        self.norm3 = nn.GroupNorm(4, channels)
        nn.init.normal_(self.conv1.weight, 0, 0.01)
        nn.init.normal_(self.conv2.weight, 0, 0.01)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        inner = self.conv2(self.norm1(functional.relu(self.conv1(x))))
        return 0.5 * self.norm3(functional.relu(x + self.norm2(z + inner)))


class Attention(nn.Module):
    """tanh of softmax attention of one head over the tokens, plus z."""

    def __init__(self, features: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Linear(features, features, bias=False) for _ in range(4)
        )
        for layer in (self.q, self.k, self.v, self.out):
            nn.init.orthogonal_(layer.weight, 0.7)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) * x.shape[-1] ** -0.5
        return torch.tanh(self.out(torch.softmax(scores, -1) @ self.v(x)) + z)


class Own(NamedTuple):
    """A problem yet to be made.

    Attributes:
        shape: of the state and the input of one sample.
        distinct: different samples in a batch.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    distinct: int = 256

    def problem(self, variants: int) -> Problem:
        """With inputs for so many variants."""
        torch.manual_seed(0)
        module = self.make()
        z = torch.randn(variants * self.distinct, *self.shape)
        return Problem(self.name, module, z, torch.zeros_like(z[:1]), RTOL, max_steps=300)


MAPS = (
    Own("your tanh, d=128", Plain, (128,)),
    Own("your MLP + layer norm, d=128", MLPNorm, (128,)),
    Own("your conv + group norm, 8x16x16", ConvNorm, (8, 16, 16), 64),
    Own("your attention, 16x32", Attention, (16, 32), 64),
)
"""The four that every form measures."""

WIDER = (
    *(Own(f"your tanh, d={d}", lambda d=d: Plain(d), (d,)) for d in (16, 512)),  # type: ignore[misc]
    *(
        Own(f"your {name}, d=128", lambda name=name: Plain(128, name), (128,))  # type: ignore[misc]
        for name in ("relu", "sigmoid")
    ),
    Own("your MLP + layer norm, d=512", lambda: MLPNorm(512), (512,)),
)
"""More widths and activations, for the full form."""
