"""Everything that must be seen on a machine with a GPU: build, tests, sanitizers, benchmarks.

    make gpu-check [PYTHON=python3] [ARGS="--stages build,tests --only triton"]

Runs from a bare checkout with the interpreter that it is called with: no virtual environment, no
downloads. Each stage can run alone; what it found is kept in the logs folder, and the results
file is written anew from all stages kept there for this commit:

    bench/results/<device>-<commit>.json

What is missing on the machine (compute-sanitizer, a pytest plugin) is named, never passed over.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
STAGES = ("build", "tests", "sanitize", "bench")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
BENCHMARKS = ("step", "device_loop", "fused", "throughput")
FOUND_BY_SANITIZER = 9
DETAIL_WIDTH = 46


@dataclass(frozen=True)
class Task:
    """One command of a stage.

    Attributes:
        seconds: after which it is ended, and has failed.
        missing: why it cannot run here; None where it can.
    """

    stage: str
    name: str
    command: tuple[str, ...]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None

    def shown(self) -> str:
        """The command as a user would type it."""
        words = [*(f"{k}={v}" for k, v in self.environment.items()), *self.command]
        return " ".join(word.replace(f"{ROOT}/", "") for word in words)


@dataclass(frozen=True)
class Outcome:
    """How a task ended: "pass", "fail" or "not run"."""

    stage: str
    name: str
    result: str
    seconds: float
    detail: str


def build_tasks(_: argparse.Namespace) -> Iterator[Task]:
    """The extension with its CUDA kernels, in place."""
    build = (PYTHON, "setup.py", "-q", "build_ext", "--inplace")
    yield Task("build", "build_ext", build, 580, {"FPI_CUDA": "1"})
    code = "from fpi_cuda._extension import build_info; print(build_info()['cuda'])"
    yield Task("build", "load", (PYTHON, "-c", code), 60)


def tests_tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Every test: by pytest-xdist where it is, else one process for each file."""
    pytest = (PYTHON, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider")
    if not has("pytest"):
        yield Task("tests", "pytest", pytest, 1, missing="pytest is not installed")
        return
    if has("pytest_timeout"):
        pytest = (*pytest, "--timeout=300")
    one_thread = {"OMP_NUM_THREADS": "1"}

    def task(name: str, *what: str) -> Task:
        report = f"--junitxml={options.logs / f'tests-{name}.xml'}"
        return Task("tests", name, (*pytest, report, *what), 580, one_thread)

    if has("xdist"):
        yield task("all", "-n", str(options.jobs), "tests")
        return
    for file in sorted(ROOT.glob("tests/test_*.py")):
        yield task(file.stem, str(file))


def sanitize_tasks(options: argparse.Namespace) -> Iterator[Task]:
    """A few steps of every kernel under each tool of compute-sanitizer."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join([f"{home}/bin", f"{home}/compute-sanitizer"])
    )
    for name in SANITIZERS:
        command = (tool or "compute-sanitizer", f"--tool={name}")
        command += (f"--error-exitcode={FOUND_BY_SANITIZER}", PYTHON, ".ci/sanitize_steps.py")
        # Each allocation its own, so that a read past its end is seen.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        kernels = {"TRITON_CACHE_DIR": str(options.logs / "triton")}
        missing = None if tool else "compute-sanitizer is not on this machine"
        yield Task("sanitize", name, command, 280, {**alone, **kernels}, missing)


def bench_tasks(options: argparse.Namespace) -> Iterator[Task]:
    """The benchmarks that this checkout has."""
    for name in BENCHMARKS:
        if not (ROOT / "bench" / f"{name}.py").exists():
            continue
        more = ("--short",) if name == "throughput" else ()
        command = (PYTHON, "-m", f"bench.{name}", *more, "--device=cuda", f"--out={options.logs}")
        yield Task("bench", name, command, 540)


TASKS = {
    "build": build_tasks,
    "tests": tests_tasks,
    "sanitize": sanitize_tasks,
    "bench": bench_tasks,
}


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run(task: Task, logs: Path) -> Outcome:
    """Run one task, its output to a log of its own."""
    if task.missing is not None:
        return Outcome(task.stage, task.name, "not run", 0.0, task.missing)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **task.environment}
    log = logs / f"{task.stage}-{task.name}.log"
    started = time.perf_counter()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                task.command, cwd=ROOT, env=environment, stdout=file, stderr=file,
                timeout=task.seconds, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
        except OSError as error:
            file.write(str(error))
            code = 127
    seconds = time.perf_counter() - started
    if code is None:
        return Outcome(task.stage, task.name, "fail", seconds, f"ended after {task.seconds} s")
    detail = explain(task, log, logs, code)
    return Outcome(task.stage, task.name, "fail" if code else "pass", seconds, detail)


def explain(task: Task, log: Path, logs: Path, code: int) -> str:
    """What the table says of a task."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else f"exit status {code}"
    if task.stage == "tests":
        counts = tests_of(logs / f"tests-{task.name}.xml")
        return f"{counts['text']}" if counts else last
    if task.stage == "sanitize":
        summary = [line for line in lines if "SUMMARY" in line]
        return summary[-1].split("SUMMARY:")[-1].strip() if summary else last
    return last


def tests_of(report: Path) -> dict[str, Any] | None:
    """Counts, and the names of what failed or was skipped, from a JUnit report."""
    if not report.exists():
        return None
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except ElementTree.ParseError:
        return None
    names: dict[str, list[str]] = {"failed": [], "skipped": []}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            names["failed"].append(name)
        elif skipped is not None:
            names["skipped"].append(f"{name}: {skipped.get('message', '')}")
    failed, skipped_count = len(names["failed"]), len(names["skipped"])
    passed = len(cases) - failed - skipped_count
    text = f"{passed} passed, {failed} failed, {skipped_count} skipped"
    return {"passed": passed, **names, "text": text}


def run_stage(stage: str, tasks: list[Task], options: argparse.Namespace) -> list[Outcome]:
    """Run a stage, tests in parallel, and keep what it found."""
    workers = options.jobs if stage == "tests" else 1
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(workers) as pool:
        for number, outcome in enumerate(
            pool.map(lambda task: run(task, options.logs), tasks), start=1
        ):
            outcomes.append(outcome)
            print(f"[{stage} {number}/{len(tasks)}] {row(outcome)}", flush=True)
            if stage == "build" and outcome.result != "pass":
                print(tail(options.logs / f"{stage}-{outcome.name}.log"))
    found: dict[str, Any] = {
        "commit": options.commit,
        "outcomes": [vars(outcome) for outcome in outcomes],
    }
    if stage == "tests":
        reports = {task.name: tests_of(options.logs / f"tests-{task.name}.xml") for task in tasks}
        found["tests"] = {name: report for name, report in reports.items() if report}
    if stage == "bench":
        found["benchmarks"] = {
            task.name: json.loads(file.read_text())
            for task, outcome in zip(tasks, outcomes, strict=True)
            if outcome.result == "pass" and (file := options.logs / f"{task.name}.json").exists()
        }
    (options.logs / f"{stage}.json").write_text(json.dumps(found, indent=1))
    return outcomes


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def row(outcome: Outcome) -> str:
    """One line of the table, at most 100 columns wide."""
    detail = outcome.detail
    detail = detail if len(detail) <= DETAIL_WIDTH else detail[: DETAIL_WIDTH - 3] + "..."
    where = f"{outcome.stage}: {outcome.name}"
    return f"{where:<32.32} {outcome.result:<8} {outcome.seconds:6.0f} s  {detail}"


def results_of(options: argparse.Namespace, where: dict[str, Any]) -> dict[str, Any]:
    """Everything that the stages of this commit have found so far."""
    kept = {}
    for stage in STAGES:
        file = options.logs / f"{stage}.json"
        if file.exists():
            found = json.loads(file.read_text())
            if found.pop("commit") == options.commit:
                kept[stage] = found
    results = {"kind": "gpu-check", "machine": where, "stages": kept}
    sections = readme_sections(kept.get("bench", {}).get("benchmarks", {}))
    return {**results, "readme": sections} if sections else results


def readme_sections(benchmarks: dict[str, Any]) -> str:
    """The benchmarks' tables for README."""
    from bench import report

    sections = [benchmark["readme"] for benchmark in benchmarks.values() if "readme" in benchmark]
    if "throughput" in benchmarks:
        sections.append(report.markdown(benchmarks["throughput"]))
    return "\n\n".join(sections)


def visible_gpu() -> tuple[str | None, str]:
    """The name of the first GPU, or None and why there is none; and torch in words."""
    try:
        import torch
    except ImportError as error:
        return None, f"torch does not import under {PYTHON} ({error})"
    words = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    return (torch.cuda.get_device_name() if torch.cuda.is_available() else None), words


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas")
    parser.add_argument("--only", default="", help="tasks whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="list stages and commands")
    parser.add_argument("--jobs", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--logs", type=Path, default=ROOT / "bench" / "out" / "gpu-check")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--commit", default="", help="for a checkout without git")
    options = parser.parse_args(arguments)
    options.stages = options.stages.split(",")
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    options.logs = options.logs.resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 where every task of every stage asked for has passed."""
    options = parse(arguments)
    sys.path.insert(0, str(ROOT))
    plan = {
        stage: [task for task in TASKS[stage](options) if options.only in task.name]
        for stage in options.stages
    }
    device, words = visible_gpu()
    if options.dry_run:
        for stage, tasks in plan.items():
            print(f"{stage}: {len(tasks)} task(s)")
            for task in tasks:
                note = f"    NOT RUN, {task.missing}" if task.missing else ""
                print(f"  {task.name} (at most {task.seconds} s): {task.shown()}{note}")
        print(f"device: {device or 'none visible'}; {words}")
        return 0
    if device is None:
        print(f"gpu-check: no GPU is visible to {words}: nothing was run. --dry-run lists it all.")
        return 1
    from bench import machine

    options.commit = options.commit or machine.commit()
    print(f"gpu-check: {device}, {words}, commit {options.commit}", flush=True)
    options.logs.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for stage, tasks in plan.items():
        outcomes += run_stage(stage, tasks, options)
        if stage == "build" and any(o.result != "pass" for o in outcomes):
            break
    import torch

    where = machine.describe(torch.device("cpu"), 1, ["make", "gpu-check"])
    where |= {"device": device, "commit": options.commit}
    options.results.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    file = options.results / f"{slug}-{options.commit.rstrip('+')}.json"
    file.write_text(json.dumps(results_of(options, where), indent=1) + "\n")
    print("\n" + "\n".join(row(outcome) for outcome in outcomes))
    bad = [outcome for outcome in outcomes if outcome.result != "pass"]
    print(f"gpu-check: {len(outcomes) - len(bad)} of {len(outcomes)} tasks passed; "
          f"logs in {options.logs}, results in {file}")  # fmt: skip
    return 1 if bad or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
