"""A pytest plugin that writes each test's outcome as it ends, a JSON line each: see gpu_check.py.

The file is named by GPU_CHECK_REPORT. A run that hangs or crashes leaves what came before.
"""

from __future__ import annotations

import json
import os

import pytest


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure in any phase, a skip, or the pass of the call itself."""
    path = os.environ.get("GPU_CHECK_REPORT")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ:  # the controller hears of every report
        return
    if report.passed and report.when != "call":
        return
    said = "" if report.passed else reason(report)
    row = {"test": report.nodeid, "outcome": report.outcome, "said": said}
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def reason(report: pytest.TestReport) -> str:
    """Why it was skipped or failed, in one line."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])[:300]
    lines = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return (lines[0] if lines else report.longreprtext.strip().rsplit("\n", 1)[-1])[:300]
