"""Bibtex: FPI_NN, FPI_GD and the feedforward twin of FPI_NN's g; all return a score per label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import fpi_cuda as fpi

RARE = -3.0
"""Scores start here: most labels are rare."""

LABEL_NORM = 0.5
"""Bound on ||A|| of FPI_NN, the weight on the labels: training would break the contraction."""


def layer_of(cell: nn.Module) -> fpi.FPILayer:
    """The one layer of the experiment; only g differs."""
    return fpi.FPILayer(cell, solver=fpi.Anderson(m=5), rtol=1e-4, max_steps=100)


class Perceptron(nn.Module):
    """FPI_NN: x = sigmoid(W relu(A x + B z + b) + c), the probabilities of the labels.

    Args:
        label_norm: bound on ||A||; None leaves it free.
    """

    def __init__(
        self, features: int, labels: int, hidden: int, label_norm: float | None = LABEL_NORM
    ) -> None:
        super().__init__()
        cell = fpi.cells.MLP(features, labels, hidden)
        nn.init.constant_(cell.W.bias, RARE)
        if label_norm is not None:
            fpi.contract_(cell.A, label_norm)
        self.layer = layer_of(cell)

    def forward(self, z: Tensor) -> Tensor:
        """Scores: what the sigmoid is taken of, at the fixed point, for it may saturate."""
        cell: Any = self.layer.g
        x = self.layer(z)
        return cell.W(torch.relu(cell.A(x) + cell.B(z)))


class Twin(nn.Module):
    """g of FPI_NN without x: W relu(B z + b) + c."""

    def __init__(self, features: int, labels: int, hidden: int) -> None:
        super().__init__()
        self.B = nn.Linear(features, hidden)
        self.W = nn.Linear(hidden, labels)
        nn.init.constant_(self.W.bias, RARE)

    def forward(self, z: Tensor) -> Tensor:
        return self.W(torch.relu(self.B(z)))


class TextEnergy(nn.Module):
    """f(x, z) = -x . (V h + d) + w . softplus(A x + U h + b) + quadratic / 2 ||x||^2.

    h = relu(B z + e). The first term knows each label by itself, the second (an MLPEnergy) how
    labels go together. With ||A|| <= 1 and |w| <= 2 quadratic the Hessian lies between half and
    three halves of `quadratic`, so f is strongly convex however it is trained.

    Args:
        quadratic: 0 leaves f without a minimum, and A and w free.
    Source:
        Belanger, McCallum, Structured Prediction Energy Networks, ICML 2016, section 3 (local
        and label energy).
    """

    rowwise = True

    def __init__(
        self, features: int, labels: int, hidden: int, label_hidden: int, quadratic: float
    ) -> None:
        super().__init__()
        self.x_features = labels
        self.features = nn.Linear(features, hidden)
        self.local = nn.Linear(hidden, labels)
        self.together = fpi.cells.MLPEnergy(hidden, labels, label_hidden, quadratic=quadratic)
        nn.init.constant_(self.local.bias, RARE * (quadratic or 1.0))
        if quadratic > 0:
            fpi.contract_(self.together.A, 1.0)
            parametrize.register_parametrization(self.together, "w", Within(2 * quadratic))

    def prepare(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, labels) and (B, label_hidden): all that x has no part in."""
        h = torch.relu(self.features(z))
        return self.local(h), self.together.prepare(h)

    def value(self, x: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """f: (B,)."""
        local, together = prepared
        return self.together.value(x, together) - (local * x).sum(-1)

    def gradient(self, x: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """Its derivative in x: (B, labels)."""
        local, together = prepared
        return self.together.gradient(x, together) - local


class Within(nn.Module):
    """w -> bound tanh(w): each entry stays within the bound."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, w: Tensor) -> Tensor:
        return self.bound * torch.tanh(w)


class Descent(nn.Module):
    """FPI_GD: the minimiser of TextEnergy, whose entries are the scores."""

    def __init__(
        self,
        features: int,
        labels: int,
        hidden: int,
        label_hidden: int,
        quadratic: float = 1.0,
    ) -> None:
        super().__init__()
        energy = TextEnergy(features, labels, hidden, label_hidden, quadratic)
        self.layer = layer_of(fpi.cells.GradientDescent(energy, 1 / (quadratic or 1.0)))

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(z)


def loss_of(scores: Tensor, targets: Tensor, entropy_weight: float) -> Tensor:
    """entropy_weight times the cross-entropy, summed over labels, plus 1 - soft F1 of each row."""
    entropy = functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    probability = torch.sigmoid(scores)
    overlap = 2 * (probability * targets).sum(1)
    soft_f1 = overlap / (probability.sum(1) + targets.sum(1)).clamp_min(1e-6)
    return (entropy_weight * entropy.sum(1) + 1 - soft_f1).mean()
