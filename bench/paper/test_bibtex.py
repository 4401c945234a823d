"""The multi-label experiment: decisions, models, protocol, and its smoke form on made-up text."""
# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

for name in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(name, reason="the bench extra is not installed")

from bench.data import BIBTEX_FEATURES, BIBTEX_LABELS
from bench.paper import bibtex, bibtex_report
from bench.paper.bibtex_models import Descent, Perceptron, TextEnergy, Twin, loss_of
from bench.paper.bibtex_scores import TfIdf, best_threshold, decide, f1_rows
from bench.paper.experiment import main

TOPICS = 5
WORDS_PER_TOPIC = 6


def write_arff(path: Path, rows: int, seed: int) -> None:
    """Text whose labels follow from its words: each of five labels has six words of its own."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"@attribute a{k} {{0,1}}" for k in range(BIBTEX_FEATURES + BIBTEX_LABELS)]
    lines = ["@relation made_up", *names, "@data"]
    for _ in range(rows):
        labels = torch.randperm(TOPICS, generator=generator)[:2].sort().values.tolist()
        words = {
            WORDS_PER_TOPIC * label + int(word)
            for label in labels
            for word in torch.randperm(WORDS_PER_TOPIC, generator=generator)[:4]
        }
        noise = torch.randint(100, BIBTEX_FEATURES, (5,), generator=generator).tolist()
        columns = sorted(words | set(noise)) + [BIBTEX_FEATURES + label for label in labels]
        lines.append("{" + ",".join(f"{column} 1" for column in columns) + "}")
    path.write_text("\n".join([*lines, ""]))


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "bibtex"
    folder.mkdir()
    write_arff(folder / "bibtex-train.arff", 256, 0)
    write_arff(folder / "bibtex-test.arff", 64, 1)
    return folder.parent


def test_smoke_form_learns_made_up_text(made_up: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        bibtex.SIZES["smoke"],
        epochs=(8, 12),
        batch=32,
        hidden=48,
        label_hidden=16,
        learning_rate=1e-2,
    )
    arguments = ["--data", str(made_up), "--smoke", "--out", str(tmp_path)]
    arguments += ["--checkpoints", str(tmp_path / "checkpoints")]
    result = main(
        "bibtex",
        bibtex.experiment,
        bibtex_report.tell,
        {"full": config, "smoke": config},
        arguments,
    )
    assert result == json.loads((tmp_path / "paper-bibtex-smoke.json").read_text())
    assert (tmp_path / "paper-bibtex-smoke.png").stat().st_size > 10_000
    for method in bibtex.METHODS:
        entry = result["methods"][method]
        assert entry["test_f1"]["at the threshold"]["mean"] > 0.9
        assert len(entry["trainings"]) == 3
        assert len(entry["trainings"][0]["history"]) == entry["chosen"]["epochs"]
        assert f"| {method} |" in result["readme"]
    for method in ("FPI_NN", "FPI_GD"):
        trainings = result["methods"][method]["trainings"]
        assert all(item["history"][-1]["solved"] == 1 for item in trainings)
        assert all(item["test_solves"]["solved"] == 1 for item in trainings)
        assert all(item["history"][-1]["adjoint_solved"] == 1 for item in trainings)
    unbounded = result["ablations"]["FPI_GD, no quadratic term"]["history"][-1]
    assert unbounded["solved"] < 0.5
    assert "settles nothing" in result["finding"]


def test_idf_counts_the_training_part_only() -> None:
    train = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    z = TfIdf(train)(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    idf = torch.log(torch.tensor([3 / 3, 3 / 2, 3 / 1])) + 1
    torch.testing.assert_close(z[0], idf / idf.norm())
    assert z[1].tolist() == [0, 0, 0]


def test_f1_of_rows() -> None:
    predicted = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0]])
    targets = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 0]])
    torch.testing.assert_close(f1_rows(predicted, targets), torch.tensor([2 / 3, 1.0, 0.0, 1.0]))


def test_rules_decide_differently() -> None:
    probability = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.15, 0.1]])
    assert decide(probability, "at 0.5", 0.25).tolist() == [[True, False, False], [False] * 3]
    assert decide(probability, "at the threshold", 0.25).tolist() == [
        [True, True, False],
        [False] * 3,
    ]
    assert decide(probability, "at least one label", 0.25).tolist() == [
        [True, True, False],
        [True, False, False],
    ]


def test_best_threshold_separates() -> None:
    probability = torch.tensor([[0.30, 0.20], [0.10, 0.28]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    threshold, f1 = best_threshold(probability, targets, "at the threshold")
    assert 0.20 <= threshold < 0.28
    assert f1 == 1.0
    assert best_threshold(probability, targets, "at 0.5") == (0.5, 0.0)


def shaken(energy: TextEnergy) -> TextEnergy:
    """With parameters far from where they started."""
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.add_(3 * torch.randn_like(parameter))
    return energy


def test_text_energy_is_strongly_convex_whatever_its_parameters() -> None:
    energy = shaken(TextEnergy(7, 5, 6, 9, quadratic=0.8).double())
    prepared = energy.prepare(torch.randn(1, 7, dtype=torch.float64))
    for _ in range(5):
        x = 3 * torch.randn(5, dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(lambda x: energy.value(x[None], prepared), x)
        curvatures = torch.linalg.eigvalsh(hessian)
        assert 0.4 <= float(curvatures.min()) <= float(curvatures.max()) <= 1.2


def test_closed_form_gradient_is_that_of_the_value() -> None:
    energy = shaken(TextEnergy(7, 5, 6, 9, quadratic=0.8).double())
    prepared = energy.prepare(torch.randn(3, 7, dtype=torch.float64))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(energy.value(x, prepared).sum(), x)
    torch.testing.assert_close(energy.gradient(x, prepared), gradient)


def test_descent_finds_the_minimiser() -> None:
    model = Descent(7, 5, 6, 9)
    z = torch.randn(4, 7)
    x = model(z).detach()
    energy = model.layer.g.energy
    gradient = energy.gradient(x, energy.prepare(z)).detach()
    assert float(gradient.norm(dim=1).max()) < 1e-3 * float(x.norm(dim=1).min())


def test_scores_are_those_of_the_fixed_point() -> None:
    model = Perceptron(7, 5, 6)
    z = torch.randn(4, 7)
    torch.testing.assert_close(torch.sigmoid(model(z)), model.layer(z), rtol=1e-3, atol=1e-4)


def test_twin_is_g_without_the_labels() -> None:
    perceptron, twin = Perceptron(7, 5, 6), Twin(7, 5, 6)
    cell = perceptron.layer.g
    twin.B.load_state_dict(cell.B.state_dict())
    twin.W.load_state_dict(cell.W.state_dict())
    z, x = torch.randn(4, 7), torch.zeros(4, 5)
    torch.testing.assert_close(torch.sigmoid(twin(z)), cell(x, z))


def soft_loss(scores: list[list[float]], targets: Tensor, weight: float) -> float:
    return float(loss_of(torch.tensor(scores), targets, weight))


def test_loss_is_entropy_and_soft_f1() -> None:
    targets = torch.tensor([[1.0, 0.0]])
    assert soft_loss([[20.0, -20.0]], targets, 1.0) == pytest.approx(0, abs=1e-6)
    # p = (1/2, 1/2): soft F1 is 2 * 0.5 / (1 + 1), the cross-entropy 2 log 2.
    assert soft_loss([[0.0, 0.0]], targets, 0.0) == pytest.approx(0.5)
    assert soft_loss([[0.0, 0.0]], targets, 0.1) == pytest.approx(0.5 + 0.2 * 0.693147, abs=1e-5)
