"""The script for GPU machines, as far as it goes without one, on small tasks of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "gpu_check.py"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The script as a module, on a machine that claims a GPU."""
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # where dataclass looks itself up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "visible_gpu", lambda: ("Some GPU (80 GB)", "torch 2.11"))
    return module


def tasks(module: types.ModuleType, stage: str, **commands: str) -> Iterator[object]:
    """Tasks that run Python code."""
    for name, code in commands.items():
        yield module.Task(stage, name, (sys.executable, "-c", code), 20)


def run(module: types.ModuleType, folder: Path, *arguments: str) -> tuple[int, dict]:
    """The exit status, and the results file."""
    places = ["--logs", str(folder / "logs"), "--results", str(folder), "--commit", "abc123"]
    code = module.main([*places, *arguments])
    return code, json.loads((folder / "some-gpu-80-gb-abc123.json").read_text())


def test_without_a_gpu_nothing_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "gpu-check: no GPU is visible to torch" in done.stdout


def test_a_dry_run_lists_every_stage_and_command() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run"], capture_output=True, text=True, check=True
    )
    for stage in ("build", "tests", "sanitize", "bench"):
        assert f"\n{stage}: " in f"\n{done.stdout}"
    for part in ("build_ext --inplace", "-m pytest", "--tool=racecheck", "-m bench.step"):
        assert part in done.stdout


def test_an_unknown_stage_is_refused(check: types.ModuleType) -> None:
    with pytest.raises(SystemExit):
        check.main(["--stages", "build,test"])


def test_stages_add_up_to_one_results_file(
    check: types.ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = tmp_path / "logs" / "step.json"
    benchmark = f"open({str(written)!r}, 'w').write('{{\"readme\": \"A table.\"}}')"
    stages = {
        "build": lambda _: tasks(check, "build", build_ext="print('built')"),
        "bench": lambda _: tasks(check, "bench", step=benchmark),
    }
    monkeypatch.setattr(check, "TASKS", stages)
    code, results = run(check, tmp_path, "--stages", "build")
    assert code == 0
    assert results["machine"]["device"] == "Some GPU (80 GB)"
    code, results = run(check, tmp_path, "--stages", "bench")
    assert code == 0
    assert set(results["stages"]) == {"build", "bench"}
    assert results["readme"] == "A table."
    assert results["stages"]["build"]["outcomes"][0]["detail"] == "built"
    shown = capsys.readouterr().out
    assert "build: build_ext" in shown
    assert max(map(len, shown.split("\n\n")[-1].splitlines()[:1])) <= 100


def test_what_fails_hangs_or_is_missing_is_told(
    check: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sanitize(_: object) -> Iterator[object]:
        yield check.Task("sanitize", "memcheck", (sys.executable, "-c", "exit(9)"), 20)
        yield check.Task("sanitize", "slow", (sys.executable, "-c", SLEEP), 1)
        yield check.Task("sanitize", "absent", ("no-such-program",), 5)
        yield check.Task("sanitize", "initcheck", ("x",), 5, missing="no tool")

    monkeypatch.setattr(check, "TASKS", {"sanitize": sanitize})
    code, results = run(check, tmp_path, "--stages", "sanitize")
    assert code == 1
    outcomes = results["stages"]["sanitize"]["outcomes"]
    assert [o["result"] for o in outcomes] == ["fail", "fail", "fail", "not run"]
    assert outcomes[1]["detail"] == "ended after 1 s"
    assert outcomes[3]["detail"] == "no tool"


SLEEP = "import time; time.sleep(60)"


def test_a_failed_build_ends_the_run(
    check: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {
        "build": lambda _: tasks(check, "build", build_ext="exit('no nvcc')"),
        "tests": lambda _: tasks(check, "tests", never="print(1)"),
    }
    monkeypatch.setattr(check, "TASKS", stages)
    code, results = run(check, tmp_path, "--stages", "build,tests")
    assert code == 1
    assert set(results["stages"]) == {"build"}


def test_tests_run_with_and_without_their_plugins(
    check: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the reports: what failed and what was skipped, by name."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert False\n"
        "def test_c(): pytest.importorskip('no_such_module')\n"
    )
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "has", lambda name: name == "pytest")
    (task,) = check.tests_tasks(check.parse(["--logs", str(tmp_path)]))
    outcome = check.run(task, tmp_path)
    assert outcome.result == "fail"
    assert outcome.detail == "1 passed, 1 failed, 1 skipped"
    found = check.tests_of(tmp_path / "tests-test_one.xml")
    assert found["failed"] == ["tests.test_one::test_b"]
    assert "no_such_module" in found["skipped"][0]

    monkeypatch.setattr(check, "has", lambda name: name in ("pytest", "xdist"))
    (task,) = check.tests_tasks(check.parse(["--logs", str(tmp_path), "--jobs", "3"]))
    assert task.command[-3:] == ("-n", "3", "tests")
    monkeypatch.setattr(check, "has", lambda name: False)
    (task,) = check.tests_tasks(check.parse(["--logs", str(tmp_path)]))
    assert task.missing == "pytest is not installed"
