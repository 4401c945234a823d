"""The CUDA step kernels as a backend without a GPU: compiled as C++, run under sanitizers."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fpi_cuda.norms import num_moved

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "emulation"
SOURCES = [
    *sorted((ROOT / "csrc" / "cuda").glob("*_step.cu")),
    EMULATION / "emulation.cpp",
    EMULATION / "driver.cpp",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    # The kernels read four numbers at a time, as nvcc lets them.
    "-fno-strict-aliasing",
    *("-I", str(EMULATION), "-I", str(ROOT / "csrc")),
]
STATES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ANDERSON, BROYDEN, SCRATCH_BYTES = range(3)
ARRAYS = 16


def compile_driver(folder: Path) -> Path:
    """Build the program that runs the step kernels; needs g++ with its sanitizers."""
    return build(SOURCES, folder / "driver")


def build(sources: list[Path], program: Path, objects: Sequence[Path] = ()) -> Path:
    """Compile and link a program under ASan and UBSan; `objects` are linked as they are."""
    compiled = compile_all(sources, program, SANITIZE)
    return link([*compiled, *objects], program, SANITIZE)


def compile_all(sources: list[Path], program: Path, flags: list[str]) -> list[Path]:
    """The objects of a program's sources, beside where it will be."""

    def compile_one(source: Path) -> Path:
        output = program.with_name(f"{program.name}-{source.stem}.o")
        run([compiler(), *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(output)])
        return output

    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_one, sources))


def link(objects: list[Path], program: Path, flags: list[str]) -> Path:
    run([compiler(), *flags, *map(str, objects), "-o", str(program)])
    return program


def compiler() -> str:
    found = shutil.which("g++")
    assert found is not None
    return found


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compiled_once(
    factory: pytest.TempPathFactory, name: str, compile_into: Callable[[Path], Path]
) -> Path:
    """What compile_into makes in a folder of this name; the first of several workers does."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / name
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 300
        while not done.exists():
            assert time.monotonic() < deadline, "the other worker did not compile the kernels"
            time.sleep(0.1)
    else:
        begun = folder / "begun"
        begun.write_text(str(compile_into(folder)))
        begun.rename(done)
    return Path(done.read_text())


class Pipe:
    """A program that answers requests on its stdout, under sanitizers."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen(
            [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def close(self) -> None:
        """End the program, which then looks for leaks."""
        _, errors = self.process.communicate()
        assert self.process.returncode == 0, errors.decode()

    def write(self, message: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(message)
            self.process.stdin.flush()
        except BrokenPipeError:
            self.fail()

    def receive(self, size: int) -> bytearray:
        assert self.process.stdout is not None
        data = self.process.stdout.read(size)
        if len(data) < size:
            self.fail()
        return bytearray(data)

    def fail(self) -> None:
        """The program has stopped: a sanitizer found something."""
        _, errors = self.process.communicate()
        raise AssertionError(f"the emulated kernels failed:\n{errors.decode()}")


def started(start: Callable[..., Pipe]) -> Iterator[Callable[..., Any]]:
    """`start`, for a fixture that sees that each program started ends well."""
    running: list[Pipe] = []

    def one(**options: int) -> Pipe:
        running.append(start(**options))
        return running[-1]

    yield one
    for backend in running:
        backend.close()


class Emulated(Pipe):
    """A backend for fpi_cuda.loops.host.iterate.

    Args:
        driver: from compile_driver.
        seed: order in which blocks and threads run; 0 is the plain one.
        offset: bytes by which x misses the alignment of vector accesses.
    """

    name = "emulated"
    num_moved = staticmethod(num_moved)

    def __init__(self, driver: Path, seed: int = 0, offset: int = 0) -> None:
        super().__init__(driver)
        self.seed = seed
        self.offset = offset

    def scratch(self, x: Tensor) -> Tensor | None:
        self.send(SCRATCH_BYTES, x, x, 0, 0, (0.0, 0.0, 0.0), [None] * ARRAYS)
        (size,) = struct.unpack("q", self.receive(8))
        return torch.zeros(size, dtype=torch.uint8) if size else None

    def anderson_step_(
        self, x: Tensor, gx: Tensor, sample_of: Tensor | None, best: Tensor, anchor: Tensor,
        f_previous: Tensor, g_previous: Tensor, columns_f: Tensor, columns_g: Tensor,
        gram: Tensor, control: Tensor, atol: Tensor, status: Tensor, num_steps: Tensor,
        residual: Tensor, *, rtol: float, max_steps: int, beta: float, ridge: float,
        scratch: Tensor | None = None,
    ) -> None:  # fmt: skip
        arrays = [x, gx, sample_of, best, anchor, f_previous, g_previous, columns_f, columns_g]
        arrays += [gram, control, atol, status, num_steps, residual, scratch]
        self.step(ANDERSON, arrays, max_steps, (rtol, beta, ridge))

    def broyden_step_(
        self, x: Tensor, gx: Tensor, sample_of: Tensor | None, best: Tensor, anchor: Tensor,
        f_previous: Tensor, x_previous: Tensor, columns_u: Tensor, columns_v: Tensor,
        control: Tensor, atol: Tensor, status: Tensor, num_steps: Tensor, residual: Tensor, *,
        rtol: float, max_steps: int, beta: float, scratch: Tensor | None = None,
    ) -> None:  # fmt: skip
        arrays = [x, gx, sample_of, best, anchor, f_previous, x_previous, columns_u, columns_v]
        arrays += [None, control, atol, status, num_steps, residual, scratch]
        self.step(BROYDEN, arrays, max_steps, (rtol, beta, 0.0))

    def step(
        self,
        op: int,
        arrays: list[Tensor | None],
        max_steps: int,
        reals: tuple[float, float, float],
    ) -> None:
        x, columns = arrays[0], arrays[7]
        assert x is not None
        assert columns is not None
        self.send(op, x, columns, columns.shape[1], max_steps, reals, arrays)
        (length,) = struct.unpack("q", self.receive(8))
        error = self.receive(length).decode()
        for array in arrays:
            (size,) = struct.unpack("q", self.receive(8))
            data = self.receive(size)
            if array is not None and size:
                array.copy_(torch.frombuffer(data, dtype=array.dtype).view(array.shape))
        if error:
            raise RuntimeError(error)

    def send(
        self,
        op: int,
        x: Tensor,
        history: Tensor,
        depth: int,
        max_steps: int,
        reals: tuple[float, float, float],
        arrays: list[Tensor | None],
    ) -> None:
        rows, dim = x.shape
        words = (op, self.seed, STATES.index(x.dtype), STATES.index(history.dtype))
        message = [struct.pack("9q", *words, rows, dim, depth, max_steps, self.offset)]
        message.append(struct.pack("3d", *reals))
        for array in arrays:
            data = b"" if array is None else bytes_of(array)
            message += [struct.pack("q", len(data)), data]
        self.write(b"".join(message))


def bytes_of(array: Tensor) -> bytes:
    """The bytes of `array`, contiguous."""
    flat = array.reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
