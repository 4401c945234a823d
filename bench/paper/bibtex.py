"""Multi-label text (Bibtex): FPI_NN and FPI_GD against the feedforward twin of g.

    python -m bench.paper.bibtex --data DIR [--smoke] [--resume]

Epochs and thresholds are chosen by cross-validation on the training split; idf is counted there
too. Sizes, rates and the loss's weight were picked before, on a fifth of the training split held
out. The test split is used once: by the final models.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fpi_cuda as fpi
from bench.data import Split, load_bibtex
from bench.paper import bibtex_report
from bench.paper.account import Account, last_solution
from bench.paper.bibtex_models import Descent, Perceptron, Twin, loss_of
from bench.paper.bibtex_scores import RULES, TfIdf, best_threshold, decide, f1_rows
from bench.paper.experiment import Run, main
from bench.paper.fit import fit, once
from bench.paper.statistics import difference, interval

METHODS = ("FPI_NN", "FPI_GD", "feedforward")
ABLATIONS = ("FPI_NN", "FPI_NN, A free", "FPI_GD", "FPI_GD, no quadratic term")
CV_SEED = 100


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Attributes:
        folds: of the cross-validation.
        epochs: numbers of epochs to choose from, ascending.
        entropy_weights: weights of the cross-entropy to choose from.
        seeds: final trainings per method.
    """

    folds: int = 3
    epochs: tuple[int, ...] = (8, 12, 16)
    entropy_weights: tuple[float, ...] = (0.03,)
    seeds: int = 3
    hidden: int = 300
    label_hidden: int = 128
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    dropout: float = 0.5
    ablation_epochs: int = 5


SIZES = {
    "full": Config(),
    "smoke": Config(folds=2, epochs=(4, 6), hidden=128, ablation_epochs=1),
}


def make(method: str, config: Config, features: int, labels: int) -> nn.Module:
    """A fresh model, from torch's default generator."""
    sizes = (features, labels, config.hidden)
    makers: dict[str, Callable[[], nn.Module]] = {
        "FPI_NN": lambda: Perceptron(*sizes),
        "FPI_NN, A free": lambda: Perceptron(*sizes, label_norm=None),
        "FPI_GD": lambda: Descent(*sizes, config.label_hidden),
        "FPI_GD, no quadratic term": lambda: Descent(*sizes, config.label_hidden, quadratic=0.0),
        "feedforward": lambda: Twin(*sizes),
    }
    return makers[method]()


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        name: unlike that of any other.
        x, y: (rows, words) and (rows, labels) zeros and ones to train on.
        held_out: (other rows, words).
        keep: after these numbers of epochs the held-out rows are looked at.
    """

    name: str
    method: str
    x: Tensor
    y: Tensor
    held_out: Tensor
    entropy_weight: float
    keep: tuple[int, ...]
    seed: int


def train(trial: Trial, config: Config, run: Run) -> dict[str, Any]:
    """Train a model.

    Returns:
        history, an entry per epoch; kept, for each number of epochs in trial.keep the
        "probability" (other rows, labels) of the held-out rows and the "account" of their solves.
    """
    weigh = TfIdf(trial.x)
    z, z_held_out = (weigh(x).to(run.device) for x in (trial.x, trial.held_out))
    y = trial.y.to(run.device)
    torch.manual_seed(trial.seed)
    model = make(trial.method, config, z.shape[1], y.shape[1]).to(run.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )

    def epoch(k: int) -> dict[str, float]:
        account, total = Account(), 0.0
        for rows in torch.randperm(len(z)).to(run.device).split(config.batch):
            scores = model(functional.dropout(z[rows], config.dropout))
            loss = loss_of(scores, y[rows], trial.entropy_weight)
            solution = last_solution(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            account.add(solution)
            total += float(loss.detach()) * len(rows)
        return {"loss": total / len(z), **account.summary()}

    def probabilities(k: int) -> dict[str, Any]:
        if k + 1 not in trial.keep:
            return {}
        parts = []
        account = Account()
        for part in z_held_out.split(512):
            parts.append(torch.sigmoid(model(part)).cpu())
            account.add(last_solution(model))
        return {"probability": torch.cat(parts), "account": account.summary()}

    def compute() -> dict[str, Any]:
        history, kept = fit(
            trial.name,
            model,
            optimizer,
            epoch,
            epochs=max(trial.keep),
            seed=trial.seed,
            checkpoints=run.checkpoints,
            evaluate=probabilities,
        )
        return {"history": history, "kept": {k: kept[k - 1] for k in trial.keep}}

    return once(run.checkpoints, trial.name, compute)


def cross_validate(method: str, config: Config, run: Run, split: Split) -> dict[str, Any]:
    """Choose epochs, the loss's weight and thresholds on the training split alone.

    The choice is that of the best F1 "at the threshold" on the held-out rows of all folds.
    """
    x, y = split.x_train, split.y_train
    fold_of = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % config.folds
    candidates = []
    for weight in config.entropy_weights:
        held = {k: torch.empty(y.shape) for k in config.epochs}
        for fold in range(config.folds):
            name = f"{method}, fold {fold}, weight {weight}"
            inside, outside = fold_of != fold, fold_of == fold
            trial = Trial(
                name, method, x[inside], y[inside], x[outside], weight, config.epochs, CV_SEED
            )
            kept = train(trial, config, run)["kept"]
            for k in config.epochs:
                held[k][outside] = kept[k]["probability"]
        for k in config.epochs:
            found = {rule: best_threshold(held[k], y, rule) for rule in RULES}
            candidates.append(
                {
                    "entropy_weight": weight,
                    "epochs": k,
                    "thresholds": {rule: threshold for rule, (threshold, _) in found.items()},
                    "f1": {rule: f1 for rule, (_, f1) in found.items()},
                }
            )
    return {
        "chosen": max(candidates, key=lambda item: item["f1"]["at the threshold"]),
        "candidates": candidates,
    }


def final(
    method: str, config: Config, run: Run, split: Split, chosen: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train on the whole training split, once per seed; score the test split.

    Returns:
        The result for the JSON, and (seeds, test rows) F1 by rule.
    """
    epochs, weight = chosen["epochs"], chosen["entropy_weight"]
    rows: dict[str, list[Tensor]] = {rule: [] for rule in RULES}
    trainings = []
    for seed in range(config.seeds):
        name = f"{method}, seed {seed}"
        trial = Trial(
            name, method, split.x_train, split.y_train, split.x_test, weight, (epochs,), seed
        )
        result = train(trial, config, run)
        test = result["kept"][epochs]
        for rule in RULES:
            decided = decide(test["probability"], rule, chosen["thresholds"][rule])
            rows[rule].append(f1_rows(decided, split.y_test))
        trainings.append({"history": result["history"], "test_solves": test["account"]})
    scores = {rule: torch.stack(parts) for rule, parts in rows.items()}
    return {"test_f1": {r: interval(s) for r, s in scores.items()}, "trainings": trainings}, scores


def ablation(method: str, config: Config, run: Run, split: Split) -> dict[str, Any]:
    """Train with or without what makes g contract; the held-out rows are of the training split."""
    x, y = split.x_train, split.y_train
    count = len(x) * 3 // 4
    epochs, weight = config.ablation_epochs, config.entropy_weights[0]
    name = f"{method}, ablation"
    trial = Trial(name, method, x[:count], y[:count], x[count:], weight, (epochs,), CV_SEED)
    with warnings.catch_warnings():
        # The samples without a gradient are counted, in the history.
        warnings.simplefilter("ignore", fpi.FixedPointWarning)
        result = train(trial, config, run)
    held = result["kept"][epochs]
    threshold, f1 = best_threshold(held["probability"], y[count:], "at the threshold")
    return {
        "history": result["history"],
        "held_out_solves": held["account"],
        "held_out_f1": f1,
        "threshold": threshold,
    }


def experiment(run: Run, config: Config) -> dict[str, Any]:
    """All of it."""
    split = load_bibtex(run.data)
    methods: dict[str, Any] = {}
    scores: dict[str, dict[str, Tensor]] = {}
    for method in METHODS:
        choice = cross_validate(method, config, run, split)
        result, scores[method] = final(method, config, run, split, choice["chosen"])
        methods[method] = choice | result
    twin = scores["feedforward"]
    result = {
        "methods": methods,
        "minus_feedforward": {
            method: {rule: difference(scores[method][rule], twin[rule]) for rule in RULES}
            for method in METHODS[:2]
        },
        "ablations": {method: ablation(method, config, run, split) for method in ABLATIONS},
    }
    bibtex_report.plot(result, run.picture())
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    main("bibtex", experiment, bibtex_report.tell, SIZES)
