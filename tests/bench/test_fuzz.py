"""The short form of `python -m bench.fuzz`, and proof that it sees what it looks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi
from bench import fuzz, fuzz_layers
from fpi_cuda.solution import SolveResult, Status
from fpi_cuda.testing import backends_available

BATCH = 512


@pytest.mark.parametrize(("backend", "cases"), [("native", 36), ("reference", 6)])
def test_no_promise_is_broken(backend: str, cases: int) -> None:
    if backend not in backends_available():
        pytest.skip("built without the extension")
    report = fuzz.fuzz(0, range(cases), BATCH, backend, resolve_every=2)
    assert report.solves == cases * BATCH
    assert report.violations == []


def test_no_layer_breaks_its_word() -> None:
    assert [line for index in range(150) for line in fuzz_layers.fuzz_layer(0, index)] == []


@pytest.mark.parametrize("index", [214, 14771, 40192, 41548])
def test_layers_that_broke_their_word_once(index: int) -> None:
    assert fuzz_layers.fuzz_layer(14, index) == []


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        (lambda sol: {"residual": 2 * sol.residual}, "residual is not that of all rows"),
        (lambda sol: {"status": torch.ones_like(sol.status)}, "CONVERGED above the tolerance"),
        (lambda sol: {"value": sol.value + 1e-3 * sol.value.detach()}, "CONVERGED above"),
        (
            lambda sol: {"value": sol.value.detach() + 2 * (sol.value - sol.value.detach())},
            "the gr",
        ),
    ],
)
def test_a_lie_of_a_layer_is_found(
    lie: Callable[[fpi.Solution], dict[str, Tensor]], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fpi.fixed_point

    def lying(*args: object, **options: object) -> fpi.Solution:
        sol = honest(*args, **options)  # type: ignore[arg-type]
        return dataclasses.replace(sol, **lie(sol))

    monkeypatch.setattr(fuzz_layers.fpi, "fixed_point", lying)
    lines = [line for index in range(60) for line in fuzz_layers.fuzz_layer(0, index)]
    assert any(line.startswith(found) for line in lines)


def false_label(result: SolveResult) -> SolveResult:
    status = torch.full_like(result.status, int(Status.CONVERGED))
    return result._replace(status=status)


def false_floor(result: SolveResult) -> SolveResult:
    status = torch.where(result.status == Status.MAX_STEPS, int(Status.STALLED), result.status)
    return result._replace(status=status.to(torch.int8))


def false_residual(result: SolveResult) -> SolveResult:
    return result._replace(residual=1.001 * result.residual)


def another_point(result: SolveResult) -> SolveResult:
    return result._replace(x=result.x * 1.5)


def false_steps(result: SolveResult) -> SolveResult:
    return result._replace(num_steps=result.num_steps + 1000)


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        (false_label, "CONVERGED above the tolerance"),
        (false_label, "CONVERGED without a fixed point"),
        (false_floor, "STALLED above the floor"),
        (false_residual, "residual is not that of x"),
        (false_residual, "failed, and x is not the best seen"),
        (another_point, "residual is not that of x"),
        (false_steps, "num_steps out of range"),
    ],
)
def test_a_lie_is_found(
    lie: Callable[[SolveResult], SolveResult], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fuzz.iterate
    monkeypatch.setattr(fuzz, "iterate", lambda *a, **k: lie(honest(*a, **k)))
    report = fuzz.fuzz(0, range(12), 64, None, resolve_every=10**9)
    assert any(line.startswith(found) for line in report.violations)


def test_a_map_that_looks_at_its_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if "native" not in backends_available():
        pytest.skip("built without the extension")
    honest = fuzz.iterate

    def leaking(evaluate: Callable[..., Tensor], *a: object, **k: object) -> SolveResult:
        return honest(lambda x, rows: evaluate(x, rows) * (1 + 1e-6 * x.shape[0]), *a, **k)

    monkeypatch.setattr(fuzz, "iterate", leaking)
    report = fuzz.fuzz(0, range(4), 64, "native", resolve_every=1)
    assert any(line.startswith("moves when solved") for line in report.violations)


def test_the_command_prints_a_reproducer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = fuzz.iterate
    monkeypatch.setattr(fuzz, "iterate", lambda *a, **k: false_label(honest(*a, **k)))
    assert fuzz.main(["--solves", "64", "--batch", "64", "--seed", "3"]) == 1
    assert "python -m bench.fuzz --seed 3 --batch 64 --only 0" in capsys.readouterr().out
