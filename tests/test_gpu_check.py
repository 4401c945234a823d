"""The script for GPU machines, as far as it goes without one: on small tasks of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "gpu_check.py"
FILES = {"gpu-check.json", "gpu-check.txt", "gpu-check-logs.tar.gz"}

HANGS = "sleep 600"
CRASHES = "kill -SEGV $$"

# Runs the script in a process of its own, with stages of stand-ins: {stage: {task: command}}.
STAND_INS = """
import json, sys
sys.path.insert(0, {folder!r})
import gpu_check as check
stages = json.loads(sys.argv[1])
def stage(name, commands):
    tasks = [check.Task(task, ("sh", "-c", line), 30) for task, line in commands.items()]
    return check.Stage(name, tasks, 1.0, 1)
check.visible_gpu = lambda: "Some GPU (80 GB), 580.1"
check.STAGES = {{name: lambda o, name=name: stage(name, stages[name]) for name in stages}}
sys.exit(check.main(["--commit", "abc1234", "--out", sys.argv[2], *sys.argv[3:]]))
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    yield gpu_check
    for name in ("gpu_check", "first_light"):
        sys.modules.pop(name, None)


def start(stages: dict[str, dict[str, str]], out: Path, *arguments: str) -> Any:
    """The script under way."""
    code = STAND_INS.format(folder=str(SCRIPT.parent))
    command = [sys.executable, "-c", code, json.dumps(stages), str(out), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(
    stages: dict[str, dict[str, str]], out: Path, *arguments: str
) -> tuple[int, dict[str, Any], str]:
    """Exit status, results, and what was printed."""
    process = start(stages, out, *arguments)
    printed, _ = process.communicate(timeout=100)
    assert {file.name for file in out.iterdir()} == FILES, printed
    return process.returncode, results_in(out), printed


def results_in(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "gpu-check.json").read_text())
    return results


def ended(results: dict[str, Any]) -> dict[str, str]:
    """How each task ended."""
    return {o["name"]: o["result"] for stage in results["stages"].values() for o in stage}


def test_without_a_gpu_nothing_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env={"PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no GPU is visible: nothing was run" in done.stdout


def test_a_dry_run_lists_every_stage_and_command() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu-check", f"PYTHON={sys.executable}",
         "ARGS=--dry-run --minutes 5"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    stages = re.findall(r"^(\w+): (\d+) task", done.stdout, re.MULTILINE)
    assert [name for name, _ in stages] == ["library", "light", "tests", "figures", "sanitize"]
    for part in (
        "build_info",
        "first_light.py loop_ieee_streamed",
        "-m pytest -q -m gpu",
        "-m bench.step",
        "--tool=racecheck",
    ):
        assert part in done.stdout


def test_every_file_with_gpu_tests_has_a_process(check: types.ModuleType, tmp_path: Path) -> None:
    options = check.parse([])
    options.work = tmp_path
    planned = {task.name for task in check.tests_stage(options).tasks}
    marked = {f.stem for f in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in f.read_text()}
    assert marked - {"test_gpu_check"} <= planned
    assert "test_cuda_gpu" in planned


def test_what_does_not_exist_is_refused(check: types.ModuleType) -> None:
    for arguments in (["--stages", "library,test"], ["--minutes", "0"], ["--jobs", "0"]):
        with pytest.raises(SystemExit):
            check.parse(arguments)


def test_a_check_that_hangs_or_crashes_costs_itself_alone(
    check: types.ModuleType, tmp_path: Path
) -> None:
    late = tmp_path / "late"
    runner = check.Runner(tmp_path, time.monotonic() + 60)
    commands = {
        "before": "echo well",
        "hangs": f"(sleep 3; touch {late}) & sleep 600",
        "crashes": CRASHES,
        "fails": "echo no; exit 3",
        "after": "echo well",
    }
    outcomes = {}
    for name, line in commands.items():
        task = check.Task(name, ("sh", "-c", line), 1.0 if name == "hangs" else 30)
        outcomes[name] = runner.run(task, time.monotonic() + 50)
    assert {name: outcome.result for name, outcome in outcomes.items()} == {
        "before": "pass", "hangs": "hung", "crashes": "crashed", "fails": "fail", "after": "pass",
    }  # fmt: skip
    assert outcomes["before"].detail == "well"
    time.sleep(3)
    assert not late.exists(), "what the hung command had started went on"


@pytest.mark.parametrize("stage", ["library", "light", "tests", "figures", "sanitize"])
def test_a_budget_that_runs_out_leaves_what_came_before(stage: str, tmp_path: Path) -> None:
    names = ["library", "light", "tests", "figures", "sanitize"]
    stages = {name: {f"{name} 1": "true", f"{name} 3": "true"} for name in names}
    stages[stage] = {f"{stage} 1": "true", f"{stage} 2": HANGS, f"{stage} 3": "true"}
    code, results, printed = run(stages, tmp_path, "--minutes", "0.06")
    found = ended(results)
    passed = [task for name in names[: names.index(stage)] for task in stages[name]]
    assert code == 1
    assert not results["complete"]
    assert found == {
        **dict.fromkeys([*passed, f"{stage} 1"], "pass"),
        f"{stage} 2": "cut",
        f"{stage} 3": "not run",
        **{t: "not run" for name in names[names.index(stage) + 1 :] for t in stages[name]},
    }
    assert "not complete" in printed
    assert max(map(len, (tmp_path / "gpu-check.txt").read_text().splitlines())) <= 100


def test_a_run_that_goes_well(tmp_path: Path) -> None:
    code, results, _ = run({"library": {"a": "echo good"}, "light": {"b": ""}}, tmp_path)
    assert code == 0
    assert results["complete"]
    assert results["commit"] == "abc1234"
    assert results["device"] == "Some GPU (80 GB), 580.1"
    with tarfile.open(tmp_path / "gpu-check-logs.tar.gz") as archive:
        assert set(archive.getnames()) == {"a.log", "b.log"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_what_it_found(number: signal.Signals, tmp_path: Path) -> None:
    process = start({"light": {"first": "", "second": HANGS, "third": ""}}, tmp_path)
    deadline = time.monotonic() + 60
    file = tmp_path / "gpu-check.json"
    while not (file.exists() and "first" in ended(results_in(tmp_path))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=60)
    found = ended(results_in(tmp_path))
    assert found["first"] == "pass"
    assert not results_in(tmp_path)["complete"]
    if number != signal.SIGKILL:
        assert found == {"first": "pass", "second": "cut", "third": "not run"}
        assert (tmp_path / "gpu-check-logs.tar.gz").exists()


TESTS = """
import os
import pytest

def test_passes(): pass
@pytest.mark.skip(reason="no such device")
def test_skipped(): pass
def test_fails(): assert 1 == 2, "one is not two"
def test_crashes(): os.abort()
def test_after(): pass
"""


def test_reports_are_written_as_tests_end(check: types.ModuleType, tmp_path: Path) -> None:
    file, report = tmp_path / "test_it.py", tmp_path / "report.jsonl"
    file.write_text(TESTS)
    command = (sys.executable, "-m", "pytest", "-p", "report_tests", "-p", "no:cacheprovider",
               "-p", "no:xdist", "-c", os.devnull, f"--rootdir={tmp_path}", str(file))  # fmt: skip
    environment = {"GPU_CHECK_REPORT": str(report), "PYTHONPATH": str(SCRIPT.parent)}
    task = check.Task("it", command, 60, environment, parse=check.parse_tests)
    outcome = check.Runner(tmp_path, time.monotonic() + 60).run(task, time.monotonic() + 60)
    assert outcome.result == "crashed"
    assert "1 passed, 1 failed, 1 skipped" in outcome.detail
    assert "one is not two" in outcome.found["failed"][0]["said"]
    assert "no such device" in outcome.found["skipped"][0]["said"]


def test_first_light_runs_on_the_cpu(tmp_path: Path) -> None:
    """Its Python, on the native backend: what needs a device is named."""
    names = "extension_loads,step_other_dtypes,loop_tf32,while_graph_counts"
    command = [sys.executable, str(SCRIPT), "--cpu", "--stages", "light", "--only", names]
    subprocess.run([*command, "--out", str(tmp_path), "--jobs", "1"], check=False, timeout=300)
    results = results_in(tmp_path)
    found = ended(results)
    assert found.pop("while_graph_counts") == "not run"
    assert found == {
        "extension_loads": "pass", "step_other_dtypes": "pass", "loop_tf32": "pass",
        "loop_tf32x3": "pass", "triton_loop_tf32x3": "not run",
    }  # fmt: skip
    (stage,) = results["stages"].values()
    assert "native" in json.dumps(stage) or "gcc" in json.dumps(stage)
