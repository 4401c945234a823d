"""What a GPU has to show, in minutes: does it load, work, pass its tests, how fast, how clean.

    make gpu-check [PYTHON=python3] [ARGS="--minutes 5 --out DIR"]

Stages in the order of their value: library, module, light, tests, figures, sanitize. Every command
is a process group of its own under a clock, and the whole is under one too, so that whatever hangs
or crashes costs itself alone. DIR gets gpu-check.json and gpu-check.txt, written anew whenever
something has ended, and gpu-check-logs.tar.gz at the end.

Runs from a bare checkout with the interpreter that it is called with: no virtual environment, no
downloads. `make gpu-lib` on a machine without a GPU builds what would take minutes here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import first_light

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
CI = ROOT / ".ci"
LIBRARY = ROOT / "fpi_cuda" / "libfpi_cuda.so"
DRIVER = ROOT / "build" / "sanitize" / "sanitize_kernels"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND_BY_SANITIZER = 9
# Of the kernels. No tool sees the WHILE graph: tests/sanitize/device_loops.cu says why.
FAMILIES = ("picard", "anderson", "broyden", "cell_loop")
FIGURES_SHARE = 0.6  # of the whole budget
FIGURES = ("step", "fused", "device_loop", "throughput")
WIDTH = 100
LOGS = "gpu-check-logs.tar.gz"
OUT_OF_TIME = "out of time"
LEAST_SECONDS = 2.0  # under which nothing is begun

sys.path.insert(0, str(ROOT))
from bench import checkout  # noqa: E402
from bench.json_files import write_json  # noqa: E402

Parse = Callable[["Task", str, Path], tuple[str, Any]]


@dataclass(frozen=True)
class Task:
    """One command.

    Attributes:
        seconds: after which it is ended.
        alone: nothing runs beside it: it measures time.
        missing: why it cannot run here; None where it can.
        parse: what its output says: a line, and what is kept of it.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    alone: bool = False
    missing: str | None = None
    parse: Parse | None = None

    def shown(self) -> str:
        """The command as a user would type it."""
        words = [*(f"{k}={v}" for k, v in self.environment.items()), *self.command]
        return " ".join(word.replace(f"{ROOT}/", "").replace(PYTHON, "python3") for word in words)


@dataclass(frozen=True)
class Outcome:
    """How a task ended: "pass", "fail", "crashed", "hung", "cut" by the budget, or "not run"."""

    name: str
    result: str
    seconds: float
    detail: str
    found: Any = None


@dataclass(frozen=True)
class Stage:
    """Tasks that run side by side, but for those alone.

    Attributes:
        share: of the whole budget, the most that it may take.
        needed: nothing after it can work where it fails.
    """

    name: str
    tasks: list[Task]
    share: float
    jobs: int
    needed: bool = False


def library_stage(_: argparse.Namespace) -> Stage:
    """The library that was carried here, else one built now."""
    code = (
        "from fpi_cuda._extension import build_info; info = build_info(); "
        "assert 'cuda' in info, info; print(info)"
    )
    tasks = [Task("load", (PYTHON, "-c", code), 60)]
    if not LIBRARY.exists():
        build = (PYTHON, "setup.py", "-q", "build_ext", "--inplace")
        tasks.insert(0, Task("build", build, 600, {"FPI_CUDA": "1"}))
    return Stage("library", tasks, 0.9, 1, needed=True)


def module_stage(_: argparse.Namespace) -> Stage:
    """fpi_cuda._C for this Python: a library that was carried here has that of another, or none."""
    build = (PYTHON, "-c", "import setup; setup.build_module()")
    return Stage("module", [Task("compile", build, 120)], 0.3, 1)


def light_stage(options: argparse.Namespace) -> Stage:
    """Every mechanism by itself."""
    more = ("--cpu",) if options.cpu else ()
    tasks = [
        Task(name, (PYTHON, str(CI / "first_light.py"), name, *more), 60,
             {"OMP_NUM_THREADS": "2"}, name in first_light.ALONE, None, parse_light)
        for name in first_light.CHECKS
        if not (options.cpu and name in first_light.NEEDS_DEVICE)
    ]  # fmt: skip
    return Stage("light", tasks, 0.4, options.jobs)


def parse_light(task: Task, output: str, _: Path) -> tuple[str, Any]:
    """The line that a check of first light ends with."""
    lines = [line for line in output.splitlines() if line.startswith(first_light.RESULT)]
    if not lines:
        return "no result", None
    found = json.loads(lines[-1].removeprefix(first_light.RESULT))
    said = found["said"]
    return said if isinstance(said, str) else json.dumps(said), found


def tests_stage(options: argparse.Namespace) -> Stage:
    """The tests with the mark gpu, a process for each file."""
    pytest = [PYTHON, "-m", "pytest", "-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["-p", "report_tests"]
    missing = None if has("pytest") else "pytest is not installed"
    if has("pytest_timeout"):  # by a thread: a signal cannot leave a wait for the device
        pytest += ["--timeout=120", "--timeout-method=thread"]
    if has("pytest_benchmark"):
        pytest += ["-p", "no:benchmark"]
    if has("xdist"):
        pytest += ["-n", "3"]
    tasks = []
    for file in sorted(ROOT.glob("tests/**/test_*.py")):
        if not re.search(r"\bpytest\.mark\.gpu\b", file.read_text()):
            continue
        report = options.work / f"{file.stem}.jsonl"
        environment = {"OMP_NUM_THREADS": "1", "GPU_CHECK_REPORT": str(report)}
        environment["PYTHONPATH"] = str(CI)
        tasks.append(Task(file.stem, (*pytest, str(file)), 180, environment, False, missing,
                          parse_tests))  # fmt: skip
    return Stage("tests", tasks, 0.5, 6)


def parse_tests(task: Task, output: str, _: Path) -> tuple[str, Any]:
    """Counts, and each test that did not pass, from the lines that were written as they ended."""
    report = Path(task.environment["GPU_CHECK_REPORT"])
    lines = report.read_text().splitlines() if report.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    passed = sum(row["outcome"] == "passed" for row in rows)
    failed = [row for row in rows if row["outcome"] == "failed"]
    skipped = [row for row in rows if row["outcome"] == "skipped"]
    text = f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped"
    if failed:
        text += f": {failed[0]['test'].split('::')[-1]}"
    return text, {"passed": passed, "failed": failed, "skipped": skipped}


def figures_stage(options: argparse.Namespace) -> Stage:
    """The short form of each benchmark."""
    tasks = []
    names = [name for name in FIGURES if wanted(name, options)]
    # Imports, warming up and what is under way when its seconds end take some more.
    seconds = max(20.0, min(90.0, FIGURES_SHARE * 60 * options.minutes / max(len(names), 1) - 15))
    for name in names:
        command = (PYTHON, "-m", f"bench.{name}", "--short", "--device", "cuda")
        command += ("--seconds", f"{seconds:.0f}", "--out", str(options.work))
        environment = {"OMP_NUM_THREADS": "4", "TQDM_DISABLE": "1", "FPI_COMMIT": options.commit}
        if options.wheels:
            command += ("--wheels", str(options.wheels))
        tasks.append(Task(name, command, seconds + 30, environment, True, None, parse_figures))
    return Stage("figures", tasks, FIGURES_SHARE, 1)


def parse_figures(task: Task, output: str, work: Path) -> tuple[str, Any]:
    """The benchmark's JSON, whether it came to its end or not."""
    files = [f for f in sorted(work.glob(f"{task.name}-*.json")) if not f.stem.endswith("-parts")]
    if not files:
        return last_line(output), None
    found = json.loads(files[0].read_text())
    return "complete" if found["complete"] else "as far as it came", found


def sanitize_stage(options: argparse.Namespace) -> Stage:
    """Every kernel on awkward sizes, by a program without torch, under compute-sanitizer."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join([f"{home}/bin", f"{home}/compute-sanitizer"])
    )
    where = DRIVER.relative_to(ROOT)
    unbuilt = None if DRIVER.exists() else f"there is no {where}: `make gpu-lib` builds it"
    missing = unbuilt or (None if tool else "compute-sanitizer is not on this machine")
    tasks = [Task("plain", (str(DRIVER),), 60, {}, False, unbuilt)]
    for name in SANITIZERS:
        command = (tool or "compute-sanitizer", f"--tool={name}")
        command += (f"--error-exitcode={FOUND_BY_SANITIZER}", str(DRIVER))
        for part in FAMILIES:
            tasks.append(Task(f"{name}_{part}", (*command, "--only", part), 120, {}, False,
                              missing, parse_sanitizer))  # fmt: skip
    return Stage("sanitize", tasks, 1.0, len(tasks))


def parse_sanitizer(task: Task, output: str, _: Path) -> tuple[str, Any]:
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    kinds = sorted({line.strip("= ")[:90] for line in output.splitlines() if "at fpi::" in line})
    text = summary[-1].split("SUMMARY:")[-1].strip() if summary else last_line(output)
    return text, {"summary": text, "where": kinds[:20]}


STAGES: dict[str, Callable[[argparse.Namespace], Stage]] = {
    "library": library_stage,
    "module": module_stage,
    "light": light_stage,
    "tests": tests_stage,
    "figures": figures_stage,
    "sanitize": sanitize_stage,
}


def wanted(name: str, options: argparse.Namespace) -> bool:
    """Whether --only asks for a task of this name."""
    return any(part in name for part in options.only.split(","))


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


class Runner:
    """Runs commands, each in a process group of its own, until a deadline.

    Args:
        work: folder of logs.
        deadline: on time.monotonic's clock.
    """

    def __init__(self, work: Path, deadline: float) -> None:
        self._work = work
        self._deadline = deadline
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def left(self) -> float:
        """Seconds of the whole budget."""
        return 0.0 if self._stopped else self._deadline - time.monotonic()

    def stop(self) -> None:
        """End what runs now, and begin nothing more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                kill_group(process, wait=False)

    def run(self, task: Task, stage_end: float) -> Outcome:
        """Run one task to its end, to its own clock's, or to its stage's."""
        if task.missing is not None:
            return Outcome(task.name, "not run", 0.0, task.missing)
        left = min(stage_end - time.monotonic(), self.left())
        if left < LEAST_SECONDS:
            return Outcome(task.name, "not run", 0.0, OUT_OF_TIME)
        log = self._work / f"{task.name}.log"
        path = os.pathsep.join(
            filter(None, [str(ROOT), task.environment.get("PYTHONPATH"), os.getenv("PYTHONPATH")])
        )
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **task.environment}
        environment["PYTHONPATH"] = path
        started = time.monotonic()
        with log.open("wb") as file:
            try:
                process = self._start(task, environment, file)
            except OSError as error:
                return Outcome(task.name, "fail", 0.0, str(error))
            if process is None:
                return Outcome(task.name, "not run", 0.0, OUT_OF_TIME)
            try:
                code: int | None = process.wait(min(task.seconds, left))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                kill_group(process)
                with self._lock:
                    self._running.discard(process)
        seconds = time.monotonic() - started
        output = log.read_text(errors="replace")
        detail, found = self._parsed(task, output)
        if code is None:
            cut = left < task.seconds
            return Outcome(task.name, "cut" if cut else "hung", seconds, detail, found)
        if code < 0:
            return Outcome(task.name, "cut" if self._stopped else "crashed", seconds,
                           f"signal {-code}; {detail}", found)  # fmt: skip
        return Outcome(task.name, "fail" if code else "pass", seconds, detail, found)

    def _start(
        self, task: Task, environment: dict[str, str], file: Any
    ) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(
                task.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            return process

    def _parsed(self, task: Task, output: str) -> tuple[str, Any]:
        if task.parse is None:
            return last_line(output), None
        try:
            return task.parse(task, output, self._work)
        except Exception as error:  # whatever a command that was cut has left
            return f"its output does not parse ({error!r})", None


def kill_group(process: subprocess.Popen[bytes], wait: bool = True) -> None:
    """End a command and all that it started; one that hangs in the driver is left to itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if wait:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


class Report:
    """The three files, the first two as they stand now."""

    def __init__(self, out: Path, work: Path, about: dict[str, Any]) -> None:
        self._out = out
        self._work = work
        self._lock = threading.Lock()
        self.results: dict[str, Any] = {**about, "complete": False, "stages": {}}
        out.mkdir(parents=True, exist_ok=True)
        (out / LOGS).unlink(missing_ok=True)  # of an earlier run
        self._write()

    def add(self, stage: str, outcome: Outcome) -> None:
        """Keep an outcome, on disk."""
        with self._lock:
            self.results["stages"].setdefault(stage, []).append(vars(outcome))
            self._write()

    def covers(self, stages: list[Stage]) -> bool:
        """Whether every task has ended by itself, or could not run here at all."""
        ended = {
            (stage, outcome["name"])
            for stage, outcomes in self.results["stages"].items()
            for outcome in outcomes
            if outcome["result"] != "cut" and outcome["detail"] != OUT_OF_TIME
        }
        return ended >= {(stage.name, task.name) for stage in stages for task in stage.tasks}

    def finish(self, complete: bool) -> None:
        """Close the account, and pack the logs."""
        with self._lock:
            self.results["complete"] = complete
            self.results["readme"] = readme(self.results)
            self._write()
        with tarfile.open(self._out / LOGS, "w:gz") as archive:
            for log in sorted(self._work.iterdir()):
                archive.add(log, log.name)

    def _write(self) -> None:
        for name, text in (
            ("gpu-check.json", json.dumps(self.results, indent=1) + "\n"),
            ("gpu-check.txt", summary(self.results) + "\n"),
        ):
            new = self._out / f".{name}"
            new.write_text(text)
            new.replace(self._out / name)


def summary(results: dict[str, Any]) -> str:
    """What a person reads: what passed by name, what did not by line, 100 columns wide."""
    lines = [f"{results['device']}, commit {results['commit']}, {results['date']}"]
    for stage, outcomes in results["stages"].items():
        good = [o["name"] for o in outcomes if o["result"] == "pass"]
        seconds = sum(o["seconds"] for o in outcomes)
        lines.append(
            f"{stage}: {len(good)} of {len(outcomes)} passed, {seconds:.0f} s of processes"
        )
        if good:
            lines += textwrap.wrap(
                ", ".join(good), WIDTH, initial_indent="  ", subsequent_indent="  "
            )
        lines += [row(o) for o in outcomes if o["result"] != "pass"]
    if not results["complete"]:
        lines.append("not complete")
    return "\n".join(lines)


def readme(results: dict[str, Any]) -> str:
    """A section of bench/results/README.md: how much passed, and first light's timings."""
    stages = results["stages"]
    table = [("stage", "passed", "")]
    for stage, outcomes in stages.items():
        good = sum(o["result"] == "pass" for o in outcomes)
        table.append((stage, f"{good} of {len(outcomes)}", told(stage, outcomes)))
    timings = [o["found"] for o in stages.get("light", []) if o["name"] == "timings"]
    figures = timings[0]["said"] if timings and timings[0] else {}
    parts = [
        f"### On a GPU: {results['device']}",
        "\n".join(
            "| " + " | ".join(line) + " |" for line in [*table[:1], ("---",) * 3, *table[1:]]
        ),
    ]
    if isinstance(figures, dict):
        parts += ["\n".join(f"- {name}: {value}" for name, value in figures.items())]
    parts += [f"Commit {results['commit']}, {results['date']}: `{results['command']}`."]
    return "\n\n".join(filter(None, parts))


def told(stage: str, outcomes: list[dict[str, Any]]) -> str:
    """What a stage comes to."""
    if stage == "tests":
        found = [o["found"] for o in outcomes if o["found"]]
        passed, failed, skipped = (
            sum(f["passed"] for f in found),
            sum(len(f["failed"]) for f in found),
            sum(len(f["skipped"]) for f in found),
        )
        return f"{passed} tests passed, {failed} failed, {skipped} skipped"
    return ", ".join(f"{o['name']} {o['result']}" for o in outcomes if o["result"] != "pass")


def row(outcome: dict[str, Any]) -> str:
    """One line, at most 100 columns wide."""
    begin = f"  {outcome['result']:<8} {outcome['name']:<32.32} {outcome['seconds']:4.0f} s  "
    return (begin + " ".join(outcome["detail"].split()))[:WIDTH]


def run_stage(stage: Stage, runner: Runner, report: Report, budget: float) -> bool:
    """Run its tasks, those alone after the others; whether all have passed."""
    end = time.monotonic() + min(stage.share * budget, runner.left())

    def passes(task: Task) -> bool:
        outcome = runner.run(task, end)
        report.add(stage.name, outcome)
        print(f"[{stage.name}]{row(vars(outcome))[1:]}", flush=True)
        return outcome.result == "pass"

    with ThreadPoolExecutor(stage.jobs) as pool:
        good = list(pool.map(passes, [task for task in stage.tasks if not task.alone]))
    good += [passes(task) for task in stage.tasks if task.alone]
    return all(good)


def visible_gpu() -> str | None:
    """The first GPU and its driver, without torch: that takes ten seconds to import there."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def keep(file: Path, folder: Path) -> list[Path]:
    """Put a run's results where the report takes them from: the figures into files of their own."""
    results = json.loads(file.read_text())
    slug = checkout.slug(results["device"].split(",")[0])
    kept = {f"gpu-check-{slug}.json": results}
    for outcome in results["stages"].get("figures", []):
        found = outcome.pop("found")
        if found and not found["complete"]:
            print(f"not filed, for it did not come to its end: {outcome['name']}")
        elif found:
            kept[f"{outcome['name']}-{slug}.json"] = found
    for name, value in kept.items():
        write_json(folder / name, value)
    return [folder / name for name in kept]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=15.0, help="for everything, 15 if not said"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "gpu-check")
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas")
    parser.add_argument("--only", default="", help="tasks whose name contains one of these")
    parser.add_argument("--dry-run", action="store_true", help="list stages and commands")
    parser.add_argument("--cpu", action="store_true", help="first light without a GPU")
    parser.add_argument("--jobs", type=int, default=max(1, min(10, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--keep", type=Path, metavar="JSON", help="file a run's results, and end")
    parser.add_argument("--wheels", type=Path, help="folder of benchmark peers' wheels")
    parser.add_argument("--commit", default="", help="for a checkout without git")
    options = parser.parse_args(arguments)
    options.stages = options.stages.split(",")
    options.commit = options.commit or checkout.commit()
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    if options.jobs < 1 or options.minutes <= 0:
        parser.error("--jobs and --minutes must be positive")
    return options


def planned(options: argparse.Namespace) -> list[Stage]:
    """The stages asked for, with the tasks asked for."""
    stages = []
    for name in options.stages:
        stage = STAGES[name](options)
        tasks = [t for t in stage.tasks if stage.needed or wanted(t.name, options)]
        stages.append(replace(stage, tasks=tasks))
    return stages


def dry_run(stages: list[Stage]) -> None:
    for stage in stages:
        print(f"{stage.name}: {len(stage.tasks)} task(s)")
        for task in stage.tasks:
            note = f"    NOT RUN, {task.missing}" if task.missing else ""
            print(f"  {task.name} (at most {task.seconds:.0f} s): {task.shown()}{note}")


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 where every task of every stage asked for has passed."""
    options = parse(arguments)
    if options.keep:
        print(*keep(options.keep, ROOT / "bench" / "results"), sep="\n")
        return 0
    asked = sys.argv[1:] if arguments is None else arguments
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options.work = Path(folder)
        stages = planned(options)
        device = "no GPU, by the CPU" if options.cpu else visible_gpu()
        if not any(wanted(task.name, options) for stage in stages for task in stage.tasks):
            sys.exit(f"gpu-check: no task's name contains {options.only!r}: --dry-run lists them")
        if options.dry_run:
            dry_run(stages)
            print(f"device: {device or 'none visible'}")
            return 0
        if device is None:
            print("gpu-check: no GPU is visible: nothing was run. --dry-run lists it all.")
            return 1
        runner = Runner(options.work, started + 60 * options.minutes)
        about = {
            "kind": "gpu-check",
            "device": device,
            "commit": options.commit,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "minutes": options.minutes,
            "command": "make gpu-check ARGS=" + json.dumps(checkout.without_folders(asked)),
        }
        report = Report(options.out, options.work, about)
        complete = good = False
        try:
            with ended_by_signals(runner):
                good = run_stages(stages, runner, report, 60 * options.minutes)
            complete = report.covers(stages)
        finally:
            report.finish(complete)
    print("\n" + summary(report.results))
    print(f"gpu-check: {time.monotonic() - started:.0f} s, written to {options.out}")
    return 0 if good and complete else 1


def run_stages(stages: list[Stage], runner: Runner, report: Report, budget: float) -> bool:
    """All of them, unless one that is needed fails; whether everything has passed."""
    good = True
    for stage in stages:
        passed = run_stage(stage, runner, report, budget)
        good &= passed
        if stage.needed and not passed:
            print(f"gpu-check: nothing works without the stage {stage.name} under {PYTHON}; "
                  "PYTHON=... names another")  # fmt: skip
            break
    return good


@contextlib.contextmanager
def ended_by_signals(runner: Runner) -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C end what runs, and the account is closed all the same."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before[number] = signal.signal(
                number, lambda *_: threading.Thread(target=runner.stop).start()
            )
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
