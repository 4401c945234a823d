"""Bibtex: tf-idf inputs, the three ways to decide on labels, and example-averaged F1."""

from __future__ import annotations

import torch
from torch import Tensor

RULES = ("at 0.5", "at the threshold", "at least one label")
THRESHOLDS = tuple(k / 40 for k in range(1, 37))


class TfIdf:
    """Binary word counts to rows of length 1, rare words weighing more.

    Args:
        x: (rows, words) of the training part: the only one whose frequencies are known.
    """

    def __init__(self, x: Tensor) -> None:
        frequency = (x > 0).sum(0)
        self.idf = torch.log((1 + x.shape[0]) / (1 + frequency)) + 1

    def __call__(self, x: Tensor) -> Tensor:
        weighted = x * self.idf
        return weighted / weighted.norm(dim=1, keepdim=True).clamp_min(1e-9)


def decide(probability: Tensor, rule: str, threshold: float) -> Tensor:
    """(B, labels) bool.

    Args:
        rule: one of RULES. "at 0.5" has no use for the threshold; "at least one label" adds the
            likeliest label.
    """
    if rule == "at 0.5":
        return probability > 0.5
    chosen = probability > threshold
    if rule == "at least one label":
        chosen = chosen.scatter(1, probability.argmax(1, keepdim=True), True)
    return chosen


def f1_rows(predicted: Tensor, targets: Tensor) -> Tensor:
    """(B,) F1 of each row; a row with neither a prediction nor a label counts as 1."""
    predicted = predicted.to(targets.dtype)
    total = predicted.sum(1) + targets.sum(1)
    overlap = 2 * (predicted * targets).sum(1)
    return torch.where(total > 0, overlap / total.clamp_min(1), 1.0)


def best_threshold(probability: Tensor, targets: Tensor, rule: str) -> tuple[float, float]:
    """The threshold with the best F1 on these rows, and that F1."""
    if rule == "at 0.5":
        return 0.5, float(f1_rows(decide(probability, rule, 0.5), targets).mean())
    scored = [(float(f1_rows(decide(probability, rule, t), targets).mean()), t) for t in THRESHOLDS]
    score, threshold = max(scored)
    return threshold, score
