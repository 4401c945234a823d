"""The script for GPU machines, as far as it goes without one: on small tasks of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "gpu_check.py"
FILES = {"gpu-check.json", "gpu-check.txt", "gpu-check-logs.tar.gz"}

HANGS = "sleep 600"
BRIEFLY = "sleep 61"
CRASHES = "kill -SEGV $$"

# Runs the script in a process of its own, with stages of stand-ins: {stage: {task: command}}.
STAND_INS = """
import json, sys
sys.path.insert(0, {folder!r})
import gpu_check as check
stages = json.loads(sys.argv[1])
def stage(name, commands):
    tasks = [check.Task(task, ("sh", "-c", line), 30) for task, line in commands.items()]
    return check.Stage(name, tasks, 1.0, 1, needed=name == "library")
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
    assert [name for name, _ in stages] == [
        "library", "module", "light", "tests", "figures", "sanitize",
    ]  # fmt: skip
    for part in (
        "build_info",
        "setup.build_module()",
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
    mark = "pytest." + "mark.gpu"
    assert planned == {f.stem for f in ROOT.glob("tests/**/test_*.py") if mark in f.read_text()}
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


def test_a_budget_that_runs_out_leaves_what_came_before(tmp_path: Path) -> None:
    stage = "tests"  # with others before it and after it
    names = ["library", "light", "tests", "figures", "sanitize"]
    stages = {name: {f"{name} 1": "true", f"{name} 3": "true"} for name in names}
    stages[stage] = {f"{stage} 1": "true", f"{stage} 2": HANGS, f"{stage} 3": "true"}
    code, results, printed = run(stages, tmp_path, "--minutes", "0.12")
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


def test_nothing_is_tried_without_the_library(tmp_path: Path) -> None:
    stages = {"library": {"build": "true", "load": "exit 1"}, "light": {"never": "true"}}
    code, results, printed = run(stages, tmp_path)
    assert code == 1
    assert ended(results) == {"build": "pass", "load": "fail"}
    assert not results["complete"]
    assert "nothing works without the stage library" in printed


def test_the_library_is_built_before_it_is_loaded(
    check: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "LIBRARY", tmp_path / "absent.so")
    stage = check.library_stage(check.parse([]))
    assert [task.name for task in stage.tasks] == ["build", "load"]
    assert stage.jobs == 1
    assert not any(task.alone for task in stage.tasks)


@pytest.mark.parametrize(
    ("environment", "ends", "detail"),
    [
        ({}, "pass", "no output"),
        ({"CXX": "no-such-compiler"}, "fail", "there is no no-such-compiler"),
    ],
    ids=["compiler", "no compiler"],
)
def test_the_module_is_compiled_for_the_python_that_runs(
    check: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
    ends: str,
    detail: str,
) -> None:
    for name in ("csrc", "setup.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "fpi_cuda").mkdir()
    monkeypatch.setattr(check, "ROOT", tmp_path)
    stage = check.module_stage(check.parse([]))
    assert not stage.needed  # all else works without it
    (task,) = stage.tasks
    task = check.replace(task, environment=environment)
    outcome = check.Runner(tmp_path, time.monotonic() + 60).run(task, time.monotonic() + 60)
    assert outcome.result == ends
    assert detail in outcome.detail
    made = {file.name for file in (tmp_path / "fpi_cuda").iterdir()}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert made == ({f"_C{suffix}"} if ends == "pass" else set())


def test_a_task_alone_waits_for_the_others(check: types.ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "order"
    tasks = [
        check.Task(name, ("sh", "-c", f"sleep {pause}; echo {name} >> {log}"), 30, alone=alone)
        for name, pause, alone in (("clock", 0, True), ("slow", 1, False), ("quick", 0, False))
    ]
    about = {"device": "Some GPU", "commit": "abc", "date": "today"}
    report = check.Report(tmp_path / "out", tmp_path, about)
    runner = check.Runner(tmp_path, time.monotonic() + 60)
    assert check.run_stage(check.Stage("figures", tasks, 1.0, 2), runner, report, 60)
    assert log.read_text().split() == ["quick", "slow", "clock"]


def test_a_stage_ends_with_its_share(check: types.ModuleType, tmp_path: Path) -> None:
    about = {"device": "Some GPU", "commit": "abc", "date": "today"}
    report = check.Report(tmp_path / "out", tmp_path, about)
    runner = check.Runner(tmp_path, time.monotonic() + 60)
    stage = check.Stage("light", [check.Task("hangs", ("sh", "-c", HANGS), 30)], 0.05, 1)
    assert not check.run_stage(stage, runner, report, 60)
    assert ended(report.results) == {"hangs": "cut"}
    assert not report.covers([stage])
    assert runner.left() > 30


@pytest.mark.parametrize("output", ["", "RESULT {", "RESULT null", "no result"])
def test_what_was_cut_off_is_no_result(
    check: types.ModuleType, tmp_path: Path, output: str
) -> None:
    """Of each parser, whatever a command that was killed has left."""
    report = tmp_path / "report.jsonl"
    report.write_text('{"test": "a", "outcome": "passed", "said": ""}\n{"test": "b", "outc')
    for parser in (
        check.parse_light,
        check.parse_tests,
        check.parse_figures,
        check.parse_sanitizer,
    ):
        task = check.Task("it", ("echo", output), 30, {"GPU_CHECK_REPORT": str(report)},
                          parse=parser)  # fmt: skip
        outcome = check.Runner(tmp_path, time.monotonic() + 60).run(task, time.monotonic() + 60)
        assert outcome.result == "pass"
        assert outcome.detail
    assert check.parse_tests(task, "", tmp_path)[0] == "1 passed, 0 failed, 0 skipped"


def test_a_name_that_no_task_has_is_refused(check: types.ModuleType) -> None:
    for stages in ("figures", "library,light"):
        with pytest.raises(SystemExit, match="no task's name contains 'setp'"):
            check.main(["--dry-run", "--stages", stages, "--only", "setp"])


def test_a_run_that_goes_well(tmp_path: Path) -> None:
    code, results, _ = run({"library": {"a": "echo good"}, "light": {"b": ""}}, tmp_path)
    assert code == 0
    assert results["complete"]
    assert results["commit"] == "abc1234"
    assert results["device"] == "Some GPU (80 GB), 580.1"
    with tarfile.open(tmp_path / "gpu-check-logs.tar.gz") as archive:
        assert set(archive.getnames()) == {"a.log", "b.log"}


def test_a_run_is_filed_with_its_figures_apart(check: types.ModuleType, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "results"
    folder.mkdir()
    report = check.Report(out, tmp_path, {"device": "Some GPU (80 GB), 580.1", "commit": "abc",
                                          "date": "today", "command": "make"})  # fmt: skip
    for name, complete in (("step", True), ("fused", False)):
        found = {"kind": name, "readme": "| a |", "complete": complete}
        report.add("figures", check.Outcome(name, "pass", 1.0, "", found))
    report.add("tests", check.Outcome("t", "pass", 1.0, "", {"passed": 2, "failed": [],
                                                             "skipped": []}))  # fmt: skip
    report.results["readme"] = check.readme(report.results)
    assert "2 tests passed, 0 failed, 0 skipped" in report.results["readme"]
    (out / "gpu-check.json").write_text(json.dumps(report.results))
    names = [file.name for file in check.keep(out / "gpu-check.json", folder)]
    assert names == ["gpu-check-some-gpu-80-gb.json", "step-some-gpu-80-gb.json"]
    assert json.loads((folder / names[1]).read_text())["readme"] == "| a |"
    assert "| a |" not in (folder / names[0]).read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_what_it_found(number: signal.Signals, tmp_path: Path) -> None:
    process = start({"light": {"first": "", "second": f"exec {BRIEFLY}", "third": ""}}, tmp_path)
    deadline = time.monotonic() + 60
    file = tmp_path / "gpu-check.json"
    while not (file.exists() and "first" in ended(results_in(tmp_path))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=60)
    subprocess.run(["pkill", "-f", f"^{BRIEFLY}$"], check=False)  # which SIGKILL leaves behind
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


def test_reports_are_written_as_tests_end(
    check: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # that of this very run
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
    """Its Python, on the native backend, but for what needs a device."""
    only = "extension_loads,step_other_dtypes,loop_tf32,while_graph_counts"
    command = [sys.executable, str(SCRIPT), "--cpu", "--stages", "light", "--only", only]
    subprocess.run([*command, "--out", str(tmp_path), "--jobs", "1"], check=True, timeout=300)
    names = ["extension_loads", "step_other_dtypes", "loop_tf32", "loop_tf32x3"]
    assert ended(results_in(tmp_path)) == dict.fromkeys(names, "pass")
