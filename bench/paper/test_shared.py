"""What the paper's experiments share: checkpoints, the training loop, accounts, intervals."""
# ruff: noqa: E402

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for name in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(name, reason="the bench extra is not installed")

import fpi_cuda as fpi
from bench.paper.account import Account, last_solution
from bench.paper.checkpoints import Checkpoints
from bench.paper.experiment import Run, main
from bench.paper.fit import fit, once
from bench.paper.statistics import difference, interval


class Interrupted(Exception):
    """Stands for a process that is killed."""


def train(checkpoints: Checkpoints, *, stop_before: int | None = None) -> tuple[nn.Module, Any]:
    """Four epochs of noisy regression; the noise comes from torch's default generator."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def epoch(k: int) -> dict[str, float]:
        if k == stop_before:
            raise Interrupted
        total = 0.0
        for _ in range(3):
            loss = (model(torch.randn(8, 3)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        return {"loss": total}

    def evaluate(k: int) -> dict[str, Tensor]:
        return {"output": model(torch.ones(2, 3))}

    history, kept = fit(
        "a training", model, optimizer, epoch,
        epochs=4, seed=3, checkpoints=checkpoints, evaluate=evaluate,
    )  # fmt: skip
    return model, (history, kept)


def test_resumed_training_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path: Path) -> None:
    whole, (history, kept) = train(Checkpoints(tmp_path / "whole", {}, resume=False))
    with pytest.raises(Interrupted):
        train(Checkpoints(tmp_path / "broken", {}, resume=False), stop_before=2)
    resumed, (same_history, same_kept) = train(Checkpoints(tmp_path / "broken", {}, resume=True))
    assert history == same_history
    assert len(history) == 4
    for ours, theirs in zip(kept, same_kept, strict=True):
        assert torch.equal(ours["output"], theirs["output"])
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not resumed.training


def test_starting_without_resume_forgets(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path, {"size": "full"}, resume=False)
    first.save("a, b", {"k": 1})
    (tmp_path / "notes.txt").write_text("mine")
    assert Checkpoints(tmp_path, {"size": "full"}, resume=True).load("a, b") == {"k": 1}
    assert Checkpoints(tmp_path, {"size": "full"}, resume=False).load("a, b") is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_another_configuration_is_not_resumed(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {"size": "full"}, resume=False)
    with pytest.raises(ValueError, match="another configuration"):
        Checkpoints(tmp_path, {"size": "smoke"}, resume=True)


def test_finished_work_is_done_once(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {}, resume=False)
    calls = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        checkpoints.save("work", {"halfway": True})
        return {"value": torch.arange(3)}

    first, second = (once(checkpoints, "work", compute) for _ in range(2))
    assert torch.equal(first["value"], second["value"])
    assert len(calls) == 1
    assert checkpoints.load("work") is None


def test_account_counts_what_solutions_say() -> None:
    def g(x: Tensor, z: Tensor) -> Tensor:
        return z[:, None] * x + 1

    layer = fpi.FPILayer(g, state_shape=1, solver=fpi.Picard(), rtol=1e-3, max_steps=20)
    z = torch.tensor([0.0, 0.5, 0.99], requires_grad=True)
    layer(z).sum().backward()
    solution = last_solution(nn.Sequential(nn.ReLU(), layer))
    assert solution is not None
    account = Account()
    account.add(solution)
    account.add(None)
    summary = account.summary()
    assert summary["solved"] == pytest.approx(2 / 3)
    assert summary["at_cap"] == pytest.approx(1 / 3)
    assert summary["steps"] == pytest.approx(solution.num_steps.float().mean().item())
    assert summary["adjoint_solved"] == pytest.approx(2 / 3)
    assert summary["zeroed"] == 0
    assert last_solution(nn.Linear(1, 1)) is None
    assert Account().summary() == {}


def test_interval_of_known_spread() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1, 2500, generator=generator) + 3
    values = interval(scores)
    # The mean of 2,500 standard normals has standard deviation 0.02.
    assert values["mean"] == pytest.approx(float(scores.mean()), abs=1e-6)
    assert values["high"] - values["low"] == pytest.approx(2 * 1.96 * 0.02, rel=0.1)
    assert values["low"] < values["mean"] < values["high"]


def test_seeds_widen_the_interval() -> None:
    scores = torch.zeros(4, 100) + torch.tensor([[0.0], [0.1], [0.2], [0.3]])
    values = interval(scores)
    assert values["sd_seeds"] == pytest.approx(0.1291, abs=1e-3)
    assert 0.15 < values["high"] - values["low"] < 0.3


def test_difference_is_paired() -> None:
    theirs = torch.rand(3, 200, generator=torch.Generator().manual_seed(0))
    values = difference(theirs + 0.01, theirs)
    assert values["low"] == pytest.approx(0.01, abs=1e-5)
    assert values["high"] == pytest.approx(0.01, abs=1e-5)


def test_result_says_how_it_was_made(tmp_path: Path) -> None:
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Config:
        epochs: int = 2

    def experiment(run: Run, config: Config) -> dict[str, Any]:
        run.checkpoints.save("x", {"epochs": config.epochs})
        return {"figure": 4}

    def tell(result: dict[str, Any]) -> dict[str, str]:
        assert result["size"] == "smoke"
        return {"finding": "Nothing.", "readme": f"It is {result['figure']}."}

    data, out, checkpoints = (tmp_path / name for name in ("data", "out", "checkpoints"))
    arguments = ["--data", str(data), "--smoke", "--out", str(out)]
    arguments += ["--checkpoints", str(checkpoints)]
    main("made_up", experiment, tell, {"full": Config(), "smoke": Config(1)}, arguments)
    result = json.loads((out / "paper-made_up-smoke.json").read_text())
    assert result["config"] == {"epochs": 1}
    assert result["size"] == "smoke"
    assert result["machine"]["command"].startswith("python -m bench.paper.made_up --data DIR")
    assert str(tmp_path) not in json.dumps(result)
    assert result["readme"] == "It is 4."
    assert {"finding", "seconds"} <= set(result)
    assert not list(checkpoints.glob("*.pt"))
