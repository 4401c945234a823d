"""A benchmark's results, on disk as soon as they are measured, and the time that it may take."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bench.json_files import write_json
from bench.measure import time_limit

OUT_OF_TIME = "out of time"
COMPILATION = 20.0
"""Seconds that a compiler may hold the process without a Python line in which it could end."""

T = TypeVar("T")


class OutOfTime(BaseException):
    """The run's seconds are spent. Not an Exception: no library is to catch it."""


class Record:
    """Results in a file that is written anew after every row: a killed run leaves what it had.

    Args:
        path: of the JSON file; None keeps none.
        head: what is known before the first row.
        seconds: after which no row is begun, and the one under way is given up.
    Attributes:
        results: with `complete`, false until `finish`, and `skipped`: why there is no such row.
    """

    def __init__(
        self,
        path: Path | None = None,
        head: dict[str, Any] | None = None,
        seconds: float = math.inf,
    ) -> None:
        self.path = path
        self.ends = time.perf_counter() + seconds
        self.skipped: dict[str, str] = {}
        self.results: dict[str, Any] = {"complete": False, **(head or {}), "skipped": self.skipped}
        self.save()

    def row(
        self,
        name: str,
        measure: Callable[[], T],
        keep: Callable[[T], object],
        *,
        compiles: bool = False,
    ) -> None:
        """keep(measure()) and write the file; `skipped` tells by name why there is no result."""
        left = self.ends - time.perf_counter()
        try:
            if left <= (COMPILATION if compiles else 0.0):
                raise OutOfTime
            with time_limit(left, OutOfTime):
                found = measure()
            keep(found)
        except OutOfTime:
            self.skipped[name] = OUT_OF_TIME
        except Exception as error:
            self.skipped[name] = reason(error)
        self.save()

    def finish(self) -> dict[str, Any]:
        """All results, marked as complete."""
        self.results["complete"] = True
        self.save()
        return self.results

    def save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.results)


def reason(error: Exception) -> str:
    """The kind of an error and the first line of its message; of a traceback in it, the last."""
    text = str(error).strip().splitlines()
    raised = [line for line in text if re.match(r"\w*(Error|Exception): ", line)]
    if raised and "Traceback" in text[0]:
        return raised[-1][:160]
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


def skipped_lines(skipped: dict[str, str], most: float = math.inf) -> list[str]:
    """A line for each reason, with the names that share it; over `most` of them are counted."""
    names: dict[str, list[str]] = {}
    for name, why in skipped.items():
        names.setdefault(why, []).append(name)

    def told(which: list[str]) -> str:
        return ", ".join(which) if len(which) <= most else f"{len(which)} rows, by name in the JSON"

    return [f"skipped, {why}: {told(which)}" for why, which in names.items()]
