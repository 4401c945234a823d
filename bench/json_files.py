"""How results are written: small, and in one move. Imports no torch: .ci/gpu_check.py takes it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

DIGITS = 7
"""Significant digits that are kept of a float: rounded again, tables show the same."""


def write_json(path: Path, value: Any) -> Any:
    """Replace the file, which holds the old or the new value at any moment; return what it holds.

    Of every float DIGITS significant digits are kept, and None for an infinity or a NaN.
    """
    kept = finite(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(kept, separators=(",", ":"), allow_nan=False) + "\n")
    os.replace(partial, path)
    return json.loads(path.read_text())


def finite(value: Any) -> Any:
    """`value` as it is written, at any depth: JSON has neither infinity nor NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
