"""Trains the small FPI_NN and FPI_GD layers whose solves the benchmark times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import fpi_cuda as fpi
from bench.data import Split
from bench.problems import Problem

HIDDEN = {"digits": 128, "bibtex": 300}
DIGITS_STATE = 64
BATCH = 128
LEARNING_RATE = 3e-3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A layer to train: its map, how its state becomes scores, and where it is trained."""

    name: str
    cell: Any
    head: nn.Module
    split: Split
    epochs: int


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained layer and how the training went.

    Attributes:
        history: per epoch the mean train loss, the share of solves that converged and the mean
            steps per sample.
        metric: "accuracy", or "F1" (example-averaged, at 0.5).
        score: of the test set.
    """

    name: str
    cell: Any
    history: list[dict[str, float]]
    metric: str
    score: float

    def problem(self, z: Tensor, rtol: float) -> Problem:
        """The fixed points of the trained map at inputs `z`."""
        cell = self.cell.eval().requires_grad_()
        x0 = z.new_zeros(z.shape[0], cell.x_features)
        return Problem(self.name, cell, z, x0, rtol)


def digits_recipes(split: Split, epochs: int) -> list[Recipe]:
    """FPI_NN and FPI_GD with 64 states and a linear head over the ten digits."""
    features, classes = split.x_train.shape[1], int(split.y_train.max()) + 1
    hidden = HIDDEN["digits"]
    network = fpi.cells.MLP(features, DIGITS_STATE, hidden)
    energy = fpi.cells.MLPEnergy(features, DIGITS_STATE, hidden)
    descent = fpi.cells.GradientDescent(energy, step_size=0.5)
    return [
        Recipe("digits FPI_NN", network, nn.Linear(DIGITS_STATE, classes), split, epochs),
        Recipe("digits FPI_GD", descent, nn.Linear(DIGITS_STATE, classes), split, epochs),
    ]


def bibtex_recipes(split: Split, epochs: int) -> list[Recipe]:
    """FPI_NN and FPI_GD whose state holds one score per label; no head of its own."""
    features, labels = split.x_train.shape[1], split.y_train.shape[1]
    hidden = HIDDEN["bibtex"]
    network = fpi.cells.MLP(features, labels, hidden)
    energy = fpi.cells.MLPEnergy(features, labels, hidden)
    descent = fpi.cells.GradientDescent(energy, step_size=0.5)
    return [
        Recipe("bibtex FPI_NN", network, _Logit(), split, epochs),
        Recipe("bibtex FPI_GD", descent, nn.Identity(), split, epochs),
    ]


class _Logit(nn.Module):
    """Probabilities to scores, so that both layers share one loss on scores."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.logit(x, eps=1e-6)


def train(recipe: Recipe, device: torch.device, seed: int = 0) -> Trained:
    """Fit the layer by Adam, the gradient by the implicit adjoint; report the test score."""
    split = Split(*(part.to(device) for part in recipe.split))
    multilabel = split.y_train.dim() == 2
    loss_of = multilabel_loss if multilabel else functional.cross_entropy
    cell, head = recipe.cell.to(device), recipe.head.to(device)
    layer = fpi.FPILayer(
        cell, solver=fpi.Anderson(m=5), rtol=1e-4, max_steps=200, state_shape=(cell.x_features,)
    )
    parameters = [*cell.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    history = []
    with tqdm(range(recipe.epochs), desc=f"train {recipe.name}", unit="epoch") as epochs:
        for _ in epochs:
            order = torch.randperm(len(split.x_train), generator=generator).to(device)
            entry = _epoch(layer, head, split, order, optimizer, loss_of)
            history.append(entry)
            epochs.set_postfix(loss=f"{entry['loss']:.3f}", solved=f"{entry['solved']:.1%}")
    with torch.no_grad():
        scores = head(layer(split.x_test))
    metric, score = (
        ("F1", example_f1(scores > 0, split.y_test))
        if multilabel
        else ("accuracy", float((scores.argmax(1) == split.y_test).float().mean()))
    )
    return Trained(recipe.name, cell, history, metric, score)


def _epoch(
    layer: Any,
    head: nn.Module,
    split: Split,
    order: Tensor,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, float]:
    loss_sum = solved = steps = 0.0
    for rows in order.split(BATCH):
        solution = layer.solve(split.x_train[rows])
        loss = loss_of(head(solution.value), split.y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(rows)
        solved += float(solution.converged.sum())
        steps += float(solution.num_steps.sum())
    count = len(order)
    return {"loss": loss_sum / count, "solved": solved / count, "steps": steps / count}


def multilabel_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over the labels, plus 1 minus the soft F1 of each row."""
    entropy = functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    probability = torch.sigmoid(scores)
    overlap = 2 * (probability * targets).sum(1)
    soft_f1 = overlap / (probability.sum(1) + targets.sum(1)).clamp_min(1e-6)
    return (entropy.sum(1) + 1 - soft_f1).mean()


def example_f1(predicted: Tensor, targets: Tensor) -> float:
    """F1 of each row, averaged; a row with neither a prediction nor a label counts as 1."""
    predicted = predicted.to(targets.dtype)
    total = predicted.sum(1) + targets.sum(1)
    overlap = 2 * (predicted * targets).sum(1)
    return float(torch.where(total > 0, overlap / total.clamp_min(1), 1.0).mean())
