"""The CI gate on what the Triton kernels compile to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).parents[1] / ".ci" / "check_triton.py"
KERNEL = "anderson_step_kernel fp32/fp32 m=0 d=1024"


def run_gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The gate as CI calls it."""
    command = [sys.executable, str(GATE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("budget", "failure"),
    [
        ({}, None),
        ({"registers": 8}, "registers, budget 8"),
        ({"spill_bytes": -1}, "0 spill_bytes, budget -1"),
    ],
    ids=["default", "registers", "spills"],
)
def test_a_kernel_is_held_to_its_budget(
    tmp_path: Path, budget: dict[str, int], failure: str | None
) -> None:
    """Compiled for sm_90 without a GPU, though the tests around it run in the interpreter."""
    pytest.importorskip("triton")
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps({"anderson_step_kernel": budget}))
    done = run_gate(KERNEL, "--budgets", str(file))
    assert "triton gate: 1 kernels" in done.stdout, done.stderr
    assert (done.returncode == 0) == (failure is None)
    assert (failure or "") in done.stderr


def test_a_budget_may_be_that_of_one_triton(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    series = "Triton " + ".".join(triton.__version__.split(".")[:2])
    budgets = {f"{series} {KERNEL}": {}, f"Triton 0.1 {KERNEL}": {"registers": 8}}
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps({"anderson_step_kernel": {"registers": 8}, **budgets}))
    done = run_gate(KERNEL, "--budgets", str(file))
    assert done.returncode == 0, done.stderr


def test_a_name_that_fits_no_kernel_fails() -> None:
    done = run_gate("no_such_kernel")
    assert done.returncode == 1
    assert "no kernel is named like 'no_such_kernel'" in done.stderr
