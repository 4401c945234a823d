"""What bench/results holds: small, all of it shown, and the pages that the report makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("tqdm", reason="the bench extra is not installed")

from bench import report
from bench.json_files import finite

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE = (RESULTS / "README.md").read_text()
MOST_BYTES = 1_000_000


def test_the_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in RESULTS.iterdir()) < MOST_BYTES


def test_every_file_is_shown() -> None:
    pictures = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE))
    for file in RESULTS.iterdir():
        if file.suffix == ".json":
            results = json.loads(file.read_text())
            assert results.get("kind") == "throughput" or results["readme"].strip() in PAGE, file
        elif file.name != "README.md":
            assert file.name in pictures
            pictures.remove(file.name)
    assert pictures == set()


def test_the_pages_are_those_of_the_report() -> None:
    assert report.page(RESULTS) == PAGE, "python -m bench.report --write"
    shown = (ROOT / "README.md").read_text().split(report.BEGIN)[1].split(report.END)[0].strip()
    assert shown == report.summary(RESULTS), "python -m bench.report --write"
    assert len(shown.splitlines()) <= 12


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_figures_are_written_short(file: Path) -> None:
    text = file.read_text()
    kept = json.loads(text)
    assert text == json.dumps(kept, separators=(",", ":")) + "\n"
    assert finite(kept) == kept
