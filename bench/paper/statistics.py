"""Confidence intervals by the bootstrap, over seeds and test examples at once."""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95


def interval(scores: Tensor) -> dict[str, float]:
    """Mean of (seeds, examples) scores with its 95% bootstrap interval.

    Seeds and examples are both drawn anew, so the interval covers another training as well as
    another test set. With `sd_seeds`, the standard deviation of the mean over seeds.
    """
    scores = scores.double()
    generator = torch.Generator().manual_seed(0)
    seeds, examples = scores.shape
    means = torch.empty(RESAMPLES, dtype=torch.float64)
    for k in range(RESAMPLES):
        rows = torch.randint(seeds, (seeds,), generator=generator)
        columns = torch.randint(examples, (examples,), generator=generator)
        means[k] = scores[rows].mean(0)[columns].mean()
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    per_seed = scores.mean(1)
    return {
        "mean": float(scores.mean()),
        "low": low,
        "high": high,
        "sd_seeds": float(per_seed.std()) if seeds > 1 else 0.0,
    }


def difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """The same for `ours - theirs`, paired by seed and example."""
    return interval(ours.double() - theirs.double())
