"""Checkpoints of an experiment: one file per training, replaced after every epoch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

CONFIG = "config.json"


class Unfinished(Exception):
    """A training that is not finished, where none may be trained."""


class Checkpoints:
    """A folder of checkpoints that belong to one configuration.

    Args:
        folder: made where it is missing.
        fingerprint: what the checkpoints depend on.
        resume: keep what is there; False starts afresh.
        finished_only: report what is there and train nothing; keeps it, too.
    Raises:
        ValueError: the folder is to be resumed but belongs to another configuration.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: dict[str, Any],
        *,
        resume: bool,
        finished_only: bool = False,
    ) -> None:
        self.folder = folder
        self.finished_only = finished_only
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(fingerprint, sort_keys=True, default=str)
        path = folder / CONFIG
        if not (resume or finished_only):
            self.clear()
        elif path.exists() and path.read_text() != text:
            raise ValueError(
                f"checkpoints: {folder} is of another configuration. Start without --resume, or "
                "name another folder with --checkpoints"
            )
        path.write_text(text)

    def load(self, name: str) -> dict[str, Any] | None:
        """What was saved under this name; None where nothing was."""
        path = self._path(name)
        return torch.load(path, weights_only=True) if path.exists() else None

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Replace what is there; a process that dies midway leaves the old file."""
        path = self._path(name)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def delete(self, name: str) -> None:
        """Forget what was saved under this name."""
        self._path(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the checkpoints, and nothing else."""
        for path in [*self.folder.glob("*.pt"), *self.folder.glob("*.partial")]:
            path.unlink()
        (self.folder / CONFIG).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / (re.sub(r"[^A-Za-z0-9.]+", "_", name) + ".pt")
