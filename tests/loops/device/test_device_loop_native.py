"""fpi_cuda._C: the loop's rules, its builder up to where a device is needed, and its objects."""

from __future__ import annotations

import ast
import ctypes
import gc
import importlib.util
import shutil
import subprocess
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fpi_cuda import _C, _extension
from fpi_cuda.loops.device.cuda_graphs import CudaGraphs

ROOT = Path(__file__).parents[3]
KERNEL, MEMCPY, MEMSET, HOST, GRAPH, EMPTY, WAIT, RECORD = range(8)
MEM_ALLOC, MEM_FREE, CONDITIONAL = 10, 11, 13


@pytest.mark.parametrize("node", [KERNEL, MEMCPY, MEMSET, GRAPH, EMPTY])
def test_what_a_loop_may_repeat(node: int) -> None:
    assert _C.node_refusal(node) is None


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (HOST, "runs a function on the host"),
        (WAIT, "event of another stream"),
        (RECORD, "event of another stream"),
        (8, "external semaphore"),
        (9, "external semaphore"),
        (MEM_ALLOC, "allocates or frees memory"),
        (MEM_FREE, "allocates or frees memory"),
        (CONDITIONAL, "conditional node of its own"),
        (12, "does not know"),
        (99, "does not know"),
        (-1, "does not know"),
    ],
)
def test_what_a_loop_may_not_repeat(node: int, reason: str) -> None:
    refusal = _C.node_refusal(node)
    assert refusal is not None
    assert reason in refusal


def test_the_stub_names_what_there_is() -> None:
    assert _extension.module_error is None
    tree = ast.parse((Path(_extension.__file__).parent / "_C.pyi").read_text())
    stub = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert stub | {"interface"} == {name for name in dir(_C) if not name.startswith("__")}


def test_no_loop_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "module_error", "switched off")
    assert CudaGraphs().why_not() == "switched off"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_no_loop_without_a_device_says_why() -> None:
    reason = CudaGraphs().why_not()
    built_without = _extension.build_info().get("no_cuda")
    if built_without is None:
        assert reason is not None
        assert "driver" in reason
    else:
        assert reason == f"built without CUDA ({built_without})"


# Libraries of other makes, each with a copy of the module: it calls the one that it opened last.


def module_with(library: Path, folder: Path) -> ModuleType:
    """Another fpi_cuda._C, which calls this library."""
    copy = shutil.copy(_C.__file__, folder)
    # pybind11 would give a name that it knows the module that it has made before.
    spec = importlib.util.spec_from_file_location(f"{folder.name}._C", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(RuntimeError, match="no library was opened"):
        module.why_not()
    with pytest.raises(RuntimeError, match=f"{library} is not loaded"):
        module.open_library(str(library))
    ctypes.CDLL(str(library))
    module.open_library(str(library))
    return module


# The module asks a library for all functions; these are of no use here.
NO_PLANS = """
#include "cell_plan/api.h"
FpiCellPlan* fpi_cell_plan_create(const FpiCellPlanOptions*) { return nullptr; }
int fpi_cell_plan_solve(FpiCellPlan*, const FpiCellSolve*) { return 0; }
int fpi_cell_plan_adjoint(FpiCellPlan*, const FpiCellAdjoint*) { return 0; }
int fpi_cell_plan_gradients(FpiCellPlan*, const FpiCellGradients*) { return 0; }
int64_t fpi_cell_plan_bytes(FpiCellPlan*) { return 0; }
void fpi_cell_plan_clear(FpiCellPlan*) {}
void fpi_cell_plan_destroy(FpiCellPlan*) {}
"""


def compiled(compiler: str, *arguments: str, folder: Path) -> Path:
    library = folder / "libdevice_loop.so"
    (folder / "no_plans.cpp").write_text(NO_PLANS)
    arguments = (*arguments, str(folder / "no_plans.cpp"))
    command = [compiler, "-std=c++17", "-shared", "-Icsrc", *arguments, "-o", str(library)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return library


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_builder_loads_and_refuses_without_a_driver(tmp_path: Path) -> None:
    sources = [str(path) for path in (ROOT / "csrc" / "device_loop").glob("*.c*")]
    library = compiled("nvcc", "-arch=sm_90", "-Xcompiler=-fPIC", *sources, folder=tmp_path)
    module = module_with(library, tmp_path)
    assert module.node_refusal(KERNEL) is None
    assert "driver" in module.why_not()
    with pytest.raises(RuntimeError, match=r"device loop: .*driver"):
        module.DeviceLoop(0, 0, 1, 0, 10)
    with pytest.raises(RuntimeError, match=r"device loop: cudaStreamGetCaptureInfo: .*driver"):
        module.captured_nodes(0)


def test_a_library_without_cuda_answers_with_the_reason(tmp_path: Path) -> None:
    sources = [str(path) for path in (ROOT / "csrc" / "device_loop").glob("*.cpp")]
    flags = ['-DFPI_NO_CUDA="no nvcc"', "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    module = module_with(compiled("c++", *flags, *sources, folder=tmp_path), tmp_path)
    assert module.why_not() == "built without CUDA (no nvcc)"
    assert "on the host" in module.node_refusal(HOST)
    for call in (
        lambda: module.DeviceLoop(0, 0, 1, 0, 10),
        lambda: module.captured_nodes(0),
        lambda: module.restart_capture(0),
    ):
        with pytest.raises(RuntimeError, match=r"device loop: built without CUDA \(no nvcc\)"):
            call()


# A stream is what happens to its launch: 0 is well, 1 fails, 2 waits for another thread.
STAND_IN = """
#include <atomic>
#include "device_loop/api.h"
std::atomic<int> alive{0}, gate{0};
struct FpiDeviceLoop { FpiDeviceLoop() { ++alive; } ~FpiDeviceLoop() { --alive; } };
const char* fpi_node_refusal(int) { return nullptr; }
const char* fpi_device_loop_unsupported() { return nullptr; }
const char* fpi_captured_nodes(void* stream, int64_t* count) {
  *count = reinterpret_cast<int64_t>(stream) + 1;
  return nullptr;
}
const char* fpi_restart_capture(void*) { gate = 1; return nullptr; }
const char* fpi_device_loop_create(void* body, const int8_t* status, int64_t batch,
                                   int32_t* rounds, int64_t max_steps, FpiDeviceLoop** loop) {
  if (body != (void*)1 || status != (void*)2 || batch != 3 || rounds != (void*)4 || max_steps != 5)
    return "no";
  *loop = new FpiDeviceLoop;
  return nullptr;
}
const char* fpi_device_loop_launch(FpiDeviceLoop*, void* stream) {
  while (stream == (void*)2 && !gate) {}
  return stream == (void*)1 ? "cudaGraphLaunch: out of memory" : nullptr;
}
void fpi_device_loop_destroy(FpiDeviceLoop* loop) { delete loop; }
FPI_API int loops_alive() { return alive; }
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> tuple[ModuleType, ctypes.CDLL]:
    """The module, and its library."""
    (tmp_path / "stand_in.cpp").write_text(STAND_IN)
    library = compiled("c++", "-fPIC", str(tmp_path / "stand_in.cpp"), folder=tmp_path)
    return module_with(library, tmp_path), ctypes.CDLL(str(library))


def test_a_loop_is_freed_once(stand_in: tuple[ModuleType, ctypes.CDLL]) -> None:
    module, library = stand_in
    loop = module.DeviceLoop(1, 2, batch=3, rounds=4, max_steps=5)
    other = module.DeviceLoop(1, 2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="device loop: cudaGraphLaunch: out of memory"):
        loop.launch(1)
    loop.launch(0)
    assert library.loops_alive() == 2
    loop.close()
    loop.close()
    assert library.loops_alive() == 1
    with pytest.raises(RuntimeError, match="device loop: it was closed"):
        loop.launch(0)
    del loop, other
    gc.collect()
    assert library.loops_alive() == 0


def test_a_loop_that_was_never_built_frees_nothing(
    stand_in: tuple[ModuleType, ctypes.CDLL],
) -> None:
    module, library = stand_in
    with pytest.raises(RuntimeError, match="device loop: no"):
        module.DeviceLoop(0, 2, 3, 4, 5)
    with pytest.raises(TypeError):
        module.DeviceLoop(1.0, 2, 3, 4, 5)
    assert library.loops_alive() == 0


def test_other_threads_run_while_a_loop_is_launched_or_closed(
    stand_in: tuple[ModuleType, ctypes.CDLL],
) -> None:
    module, library = stand_in
    loop = module.DeviceLoop(1, 2, 3, 4, 5)
    launching = threading.Thread(target=loop.launch, args=(2,))
    launching.start()
    closing = threading.Thread(target=loop.close)  # which waits for the launch
    closing.start()
    closing.join(0.2)
    assert library.loops_alive() == 1
    assert module.captured_nodes(6) == 7
    module.restart_capture(0)  # opens the gate
    launching.join(60)
    closing.join(60)
    assert library.loops_alive() == 0
