"""What a benchmark has measured is on disk, whatever ends it; its options and its libraries."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("tqdm", reason="the bench extra is not installed")

from bench import options
from bench.measure import time_limit
from bench.peers import Entry, Peer, by_worth, load_entries
from bench.record import Record, skipped_lines

ROOT = Path(__file__).parents[2]
ENDLESS = """
import itertools, sys, torch
from pathlib import Path
from bench import step
from bench.record import Record
from bench.step_rows import Case
cases = [Case(2, 20 + n, 2, torch.float32) for n in range(10_000)]
step.run(Record(Path(sys.argv[1])), cases, torch.device("cpu"), 1, 0, ("hand",))
"""


def test_a_killed_run_leaves_what_it_had_measured(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    with subprocess.Popen([sys.executable, "-c", ENDLESS, str(path)], cwd=ROOT) as run:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (path.exists() and '"ratio"' in path.read_text()):
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
    results = json.loads(path.read_text())
    assert results["complete"] is False
    assert results["cases"][0]["rows"][0]["name"].startswith("fpi_cuda")
    assert results["cases"][0]["rows"][0]["seconds"]["median"] > 0


def test_a_row_that_fails_is_named_and_ends_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path / "deep" / "a.json", {"machine": {}})
    assert json.loads(record.path.read_text())["complete"] is False
    rows: list[float] = []
    record.results["rows"] = rows
    record.row("one", lambda: 1 / 0, rows.append)
    record.row("two", lambda: float("inf"), rows.append)
    held = json.loads(record.path.read_text())
    assert held["skipped"] == {"one": "ZeroDivisionError: division by zero"}
    assert held["rows"] == [None]
    record.finish()
    assert json.loads(record.path.read_text())["complete"] is True
    assert [file.name for file in record.path.parent.iterdir()] == ["a.json"]


def test_the_rest_is_named_when_time_is_out() -> None:
    record = Record(seconds=0.2)
    rows: list[int] = []

    def stubborn() -> int:
        for _ in range(100):
            try:
                time.sleep(0.05)
            except Exception:
                continue
        return 1

    record.row("quick", lambda: 0, rows.append)
    began = time.perf_counter()
    record.row("slow", stubborn, rows.append)
    record.row("late", lambda: 2, rows.append)
    short = Record(seconds=5.0)
    short.row("long compiled", lambda: 3, rows.append, compiles=True)
    assert short.skipped == {"long compiled": "out of time"}
    assert time.perf_counter() - began < 2
    assert rows == [0]
    assert record.skipped == {"slow": "out of time", "late": "out of time"}
    assert skipped_lines(record.skipped) == ["skipped, out of time: slow, late"]


def test_a_limit_holds_inside_of_another() -> None:
    def many_limits() -> None:
        for _ in range(100):
            with time_limit(5.0):
                time.sleep(0.05)
            with time_limit(0.2):
                time.sleep(0.01)

    began = time.perf_counter()
    with pytest.raises(KeyError), time_limit(0.3, KeyError):
        many_limits()
    assert 0.25 < time.perf_counter() - began < 2
    time.sleep(0.05)  # and none is left over


def parse(*arguments: str) -> argparse.Namespace:
    return options.parse(argparse.ArgumentParser("bench.step"), arguments, ("hand", "torchdeq"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that leave this process as it is."""
    monkeypatch.setattr(options, "use_threads", lambda count: None)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("alone")
def test_peers_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse().peers == ("hand", "torchdeq")
    assert parse("--peers", "torchdeq").peers == ("torchdeq",)
    assert parse("--skip", "torchdeq").not_asked == {"torchdeq": "not asked for"}
    assert parse("--peers", "").peers == ()
    with pytest.raises(SystemExit):
        parse("--skip", "torchdq")
    assert "unknown 'torchdq'; there are hand, torchdeq" in capsys.readouterr().err


@pytest.mark.usefixtures("alone")
def test_results_of_a_device_have_a_file_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("--out", "a").path == Path("a/step.json")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    path = parse("--out", "a", "--device", "cuda").path
    assert path == Path("a/step-nvidia-h100-80gb-hbm3.json")
    assert parse("--short").seconds == float("inf")
    assert parse("--short", "--device", "cuda").seconds < 90


@pytest.mark.usefixtures("alone")
def test_wheels_of_a_folder_are_imported_where_nothing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("surely_not_installed", "torch"):
        wheel = tmp_path / f"{name}-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(f"{name}/__init__.py", "here = 1\n")
    monkeypatch.setenv(options.WHEELS, str(tmp_path))
    parse()
    import surely_not_installed  # type: ignore[import-not-found]

    assert surely_not_installed.here == 1
    monkeypatch.delitem(sys.modules, "surely_not_installed")
    code = "import bench, sys; from bench import options; from pathlib import Path;"
    code += f"options.offer_wheels(Path({str(tmp_path)!r})); import torch; torch.zeros(1)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert parse("--wheels", str(tmp_path / "absent")).wheels is not None


def test_a_library_that_breaks_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Entry]:
        raise AttributeError("jax.core has no Primitive")

    monkeypatch.setattr("bench.peers.loop.entries", broken)
    entries, skipped = load_entries(("loop", "ours"))
    assert skipped == {"loop": "AttributeError: jax.core has no Primitive"}
    assert entries


def test_ours_come_first_and_defaults_last() -> None:
    class Other(Peer):
        library = "torchdeq"

    others = [Entry(f"torchdeq ({kind})", (Other(kind),)) for kind in ("default", "best")]
    entries, _ = load_entries(("loop", "ours"))
    labels = [entry.label for entry in by_worth([*others, *entries])]
    assert labels[0] == "fpi_cuda Anderson"
    assert labels[-3:] == ["torch loop, per-sample stop", "torchdeq (best)", "torchdeq (default)"]


def test_jax_leaves_the_card_to_others() -> None:
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
