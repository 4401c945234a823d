"""What may not be in the repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FOLDERS = "opt|work|tmp|root|home"  # Machine paths: they hold on nobody else's computer.
FORBIDDEN = re.compile(rf"(?<![\w.)}}*-])/({FOLDERS})/|extra-index|find-links|index-url")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_tracked_file_names_one_machine() -> None:
    listing = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    paths = [ROOT / name for name in listing.split("\0") if name]
    assert len(paths) > 10
    problems = []
    for path in paths:
        if path == Path(__file__) or not path.is_file():
            continue
        text = path.read_bytes().decode(errors="ignore")
        problems += [f"{path}: {match[0]}" for match in FORBIDDEN.finditer(text)]
    assert not problems
