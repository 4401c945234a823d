"""The CUDA loop of lowered cells as a backend without a GPU: see emulated."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from emulation.emulated import EMULATION, ROOT, Pipe, build, bytes_of
from torch import Tensor

from fpi_cuda.norms import num_moved

CUDA = ROOT / "csrc" / "cuda"
SOURCES = [
    CUDA / "cell_loop.cu",
    CUDA / "cell_loop_plan.cpp",
    EMULATION / "emulation.cpp",
    EMULATION / "mma.cpp",
    EMULATION / "loop_driver.cpp",
]
OUTPUTS = (0, 11, 12, 13)
"""Places of x, status, num_steps and residual among the arguments."""
H100_SHARED = 227 * 1024


def compile_loop(folder: Path) -> Path:
    """Build the program that runs the loop; needs g++ with its sanitizers."""
    return build(SOURCES, folder / "loop")


@dataclass(frozen=True)
class Laid:
    """How a loop was laid out."""

    slots: int
    blocks: int
    resident: bool
    operand_shared: bool
    history_shared: bool


class EmulatedLoop(Pipe):
    """A backend for fpi_cuda.loops.fused.cell_loop.solve_fused.

    Args:
        driver: from compile_loop.
        seed: order in which blocks and threads run; 0 is the plain one.
        cores, shared_bytes: of the device.
        slots, warps: of a block; 0 lets the plan choose.
    Attributes:
        laid: of the latest loop.
    """

    name = "emulated"
    num_moved = staticmethod(num_moved)
    CELL_LOOP_DTYPES = (torch.float32, torch.float64)
    CELL_LOOP_MAX_DEPTH = 16

    def __init__(
        self,
        driver: Path,
        seed: int = 0,
        *,
        cores: int = 2,
        shared_bytes: int = H100_SHARED,
        slots: int = 8,
        warps: int = 2,
    ) -> None:
        super().__init__(driver)
        self.seed = seed
        self.layout = (cores, shared_bytes, slots, warps)
        self.laid: Laid | None = None

    def cell_loop_(self, *args: Any, **kwargs: Any) -> None:
        x, weight1, weight2 = args[0], args[2], args[6]
        batch, dim = x.shape
        hidden = 0 if weight2 is None else weight1.shape[0]
        strides = (*weight1.stride(), *((0, 0) if weight2 is None else weight2.stride()))
        words = [self.seed, int(x.dtype == torch.float64), kwargs["precision"], batch, dim, hidden]
        words += [kwargs["activation1"], kwargs["activation2"], kwargs["depth"]]
        words += [kwargs["max_steps"], *strides, *self.layout]
        reals = [kwargs[name] for name in ("carry", "rtol", "beta", "ridge")]
        arrays = [span(a) if i in (2, 6) else a for i, a in enumerate(args)]
        message = [struct.pack(f"{len(words)}q", *words), struct.pack("4d", *reals)]
        for array in arrays:
            data = b"" if array is None else bytes_of(array)
            message += [struct.pack("q", len(data)), data]
        self.write(b"".join(message))
        (length,) = struct.unpack("q", self.receive(8))
        error = self.receive(length).decode()
        for place, array in enumerate(args):
            (size,) = struct.unpack("q", self.receive(8))
            data = self.receive(size)
            if size and place in OUTPUTS:
                array.copy_(torch.frombuffer(data, dtype=array.dtype).view(array.shape))
        slots, blocks, *places = struct.unpack("5q", self.receive(40))
        self.laid = Laid(slots, blocks, *map(bool, places))
        if error:
            raise RuntimeError(error)


def span(weight: Tensor | None) -> Tensor | None:
    """All memory that a weight of any strides reaches, from its first element on."""
    if weight is None:
        return None
    steps = zip(weight.shape, weight.stride(), strict=True)
    size = 1 + sum((count - 1) * step for count, step in steps)
    return weight.as_strided((size,), (1,))
