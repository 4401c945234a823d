"""Names of what was measured, where and how. Imports no torch: .ci/gpu_check.py takes it too."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path


def commit() -> str:
    """The commit of this checkout, with "+" where tracked files differ from it.

    FPI_COMMIT names it where the files were copied without git.
    """
    if named := os.environ.get("FPI_COMMIT"):
        return named
    here = Path(__file__).parent

    def git(*args: str) -> str:
        try:
            run = subprocess.run(
                ["git", "-C", str(here), *args], capture_output=True, text=True, check=False
            )
        except OSError:  # there is no git
            return ""
        return run.stdout.strip() if run.returncode == 0 else ""

    revision = git("rev-parse", "--short", "HEAD")
    if not revision:
        return "unknown"
    return revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def slug(device: str) -> str:
    """A device's name as it stands in file names."""
    return re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()


def without_folders(words: Iterable[str]) -> str:
    """A command line in which folders became DIR."""
    return " ".join(re.sub(r"^(\S*=)?.*/.*$", r"\1DIR", word) for word in words)
