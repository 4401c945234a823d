"""The CI gate on what the Triton kernels compile to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).parents[2] / ".ci" / "check_triton.py"
KERNEL = "anderson_step_kernel fp32/fp32 m=0 d=1024"


def run_gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The gate as CI calls it."""
    command = [sys.executable, str(GATE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("budget", "failure"),
    [
        ({"registers": 8}, "registers, budget 8"),
        ({"spill_bytes": -1}, "0 spill_bytes, budget -1"),
    ],
    ids=["registers", "spills"],
)
def test_a_kernel_is_held_to_its_budget(
    tmp_path: Path, budget: dict[str, int], failure: str
) -> None:
    """Compiled for sm_90 without a GPU, though the tests around it run in the interpreter."""
    pytest.importorskip("triton")
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps({"anderson_step_kernel": budget}))
    done = run_gate(KERNEL, "--budgets", str(file))
    assert "triton gate: 1 kernels" in done.stdout, done.stderr
    assert done.returncode != 0
    assert failure in done.stderr


SELF_DIFFERENCE = """
import sys
sys.path.insert(0, {gate!r})
import check_triton, triton
import triton.language as tl

@triton.jit
def finite_kernel(x, best):
    v = tl.load(x) * tl.load(best)
    tl.store(best, tl.where({test}, v, 0.0))

check_triton.built(finite_kernel, {{}}, "fp64", "fp64", (), {{}}, check_triton.CAPABILITY)
"""


@pytest.mark.parametrize(
    ("test", "passes"), [("v - v == 0", False), ("tl.abs(v) < float('inf')", True)]
)
def test_no_kernel_takes_a_product_from_itself(tmp_path: Path, test: str, passes: bool) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "kernel.py"
    file.write_text(SELF_DIFFERENCE.format(gate=str(GATE.parent), test=test))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(file)], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == passes, done.stderr
    assert passes or "finite_kernel takes a number from itself" in done.stderr


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
