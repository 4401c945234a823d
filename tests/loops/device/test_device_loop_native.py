"""The C interface of the device loop: its rules, and its builder up to where a device is needed."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fpi_cuda import _extension
from fpi_cuda.loops.device import native

ROOT = Path(__file__).parents[3]
KERNEL, MEMCPY, MEMSET, HOST, GRAPH, EMPTY, WAIT, RECORD = range(8)
MEM_ALLOC, MEM_FREE, CONDITIONAL = 10, 11, 13


@pytest.mark.parametrize("node", [KERNEL, MEMCPY, MEMSET, GRAPH, EMPTY])
def test_what_a_loop_may_repeat(node: int) -> None:
    assert native.node_refusal(node) is None


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
    refusal = native.node_refusal(node)
    assert refusal is not None
    assert reason in refusal


def test_no_loop_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "load_error", "switched off")
    assert native.why_not() == "switched off"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_no_loop_without_a_device_says_why() -> None:
    reason = native.why_not()
    built_without = _extension.build_info().get("no_cuda")
    if built_without is None:
        assert reason is not None
        assert "driver" in reason
    else:
        assert reason == f"built without CUDA ({built_without})"


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """csrc/device_loop alone, compiled by nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    library = tmp_path_factory.mktemp("native") / "libdevice_loop.so"
    sources = [str(path) for path in (ROOT / "csrc" / "device_loop").glob("*.c*")]
    command = [nvcc, "-std=c++17", "-shared", "-Icsrc", "-arch=sm_90", "-Xcompiler=-fPIC"]
    done = subprocess.run(
        [*command, *sources, "-o", str(library)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_extension, "LIBRARY", library)
        native.library.cache_clear()
        yield native.library()
    native.library.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_builder_loads_and_refuses_without_a_driver(builder: ctypes.CDLL) -> None:
    missing = [name for name in native.SIGNATURES if not hasattr(builder, name)]
    assert not missing
    assert native.node_refusal(KERNEL) is None
    reason = native.why_not()
    assert reason is not None
    assert "driver" in reason
    with pytest.raises(RuntimeError, match=r"device loop: .*driver"):
        native.DeviceLoop(0, 0, 1, 0, 10)
    with pytest.raises(RuntimeError, match=r"device loop: cudaStreamGetCaptureInfo: .*driver"):
        native.captured_nodes(0)


def test_a_loop_is_freed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []

    class Library:
        fpi_device_loop_destroy = staticmethod(freed.append)

        @staticmethod
        def fpi_device_loop_create(*arguments: object) -> None:
            ctypes.cast(arguments[-1], ctypes.POINTER(native.Pointer))[0] = 1234  # type: ignore

        @staticmethod
        def fpi_device_loop_launch(handle: int, stream: int) -> bytes:
            return b"cudaGraphLaunch: out of memory"

    monkeypatch.setattr(native, "library", Library)
    loop = native.DeviceLoop(1, 2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="device loop: cudaGraphLaunch: out of memory"):
        loop.launch(7)
    loop.close()
    loop.close()
    with pytest.raises(RuntimeError, match="it was closed"):
        loop.launch(7)
    del loop
    assert freed == [1234]


def test_a_loop_that_was_never_built_frees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def fpi_device_loop_create(*arguments: object) -> bytes:
            return b"no"

        @staticmethod
        def fpi_device_loop_destroy(handle: int) -> None:
            raise AssertionError("freed")

    monkeypatch.setattr(native, "library", Library)
    with pytest.raises(RuntimeError, match="device loop: no"):
        native.DeviceLoop(1, 2, 3, 4, 5)
