"""The CI gate on registers and spills, on kernels made for it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import types
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "check_cuda.py"
PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z11step_kernelIfEvPT_' for 'sm_90'
ptxas info    : Function properties for _Z11step_kernelIfEvPT_
    96 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 96 bytes cumulative stack size
"""


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """.ci/check_cuda.py as a module that looks into an empty project."""
    spec = importlib.util.spec_from_file_location("check_cuda", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "CUDA", folder)
    return module


@pytest.mark.parametrize(
    ("budgets", "failed"),
    [
        ({}, ["24 spill_bytes, budget 0"]),
        ({"step_kernel": {"spill_bytes": 24}}, []),
        ({"step_kernel": {"spill_bytes": 23}}, ["24 spill_bytes, budget 23"]),
        ({"another_kernel": {"spill_bytes": 24}}, ["24 spill_bytes, budget 0"]),
        ({"step_kernel": {"registers": 32}}, ["64 registers, budget 32", "24 spill_bytes"]),
        ({"step": {}, "step_kernel": {"spill_bytes": 24}}, []),
    ],
)
def test_a_kernel_is_held_to_its_budget(
    gate: types.ModuleType, budgets: dict[str, dict[str, int]], failed: list[str]
) -> None:
    failures = gate.check([PTXAS], budgets)
    assert len(failures) == len(failed)
    for failure, text in zip(failures, failed, strict=True):
        assert text in failure
        assert "(sm_90)" in failure


def test_no_kernels_is_no_failure(
    gate: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "find_nvcc", lambda: "nvcc")
    gate.main()
    assert capsys.readouterr().out == "cuda gate: 0 kernels, 0 over budget\n"


def test_without_nvcc_the_gate_says_what_was_not_run(
    gate: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (gate.CUDA / "step.cu").touch()
    monkeypatch.setattr(gate, "find_nvcc", lambda: None)
    gate.main()
    assert "NOT RUN, no nvcc on this machine (step.cu)" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_real_kernels_are_compiled_and_spills_found(
    gate: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    # 400 live values cannot fit into 255 registers.
    (gate.CUDA / "spill.cu").write_text(
        """
        __global__ void spill_kernel(const float* x, float* y, int n) {
          float v[400];
          #pragma unroll
          for (int i = 0; i < 400; ++i) v[i] = x[i * n + threadIdx.x];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 400; ++i) y[i * n + threadIdx.x] = v[399 - i];
        }
        __global__ void plain_kernel(float* x) { x[threadIdx.x] = 1.0f; }
        """
    )
    with pytest.raises(SystemExit, match=r"spill_kernel.* spill_bytes, budget 0"):
        gate.main()
    assert "cuda gate: 4 kernels, 2 over budget" in capsys.readouterr().out

    budget = {"spill_kernel": {"spill_bytes": 100000}}
    (gate.CUDA / "budgets.json").write_text(json.dumps(budget))
    gate.main()
    assert "cuda gate: 4 kernels, 0 over budget" in capsys.readouterr().out

    (gate.CUDA / "broken.cu").write_text("__global__ void f( {")
    with pytest.raises(SystemExit, match=r"broken\.cu does not compile for sm_"):
        gate.main()
