"""How the fused loop is cut into tiles: by depth and dtype alone.

So the order of every sum, and with it each bit of a sample's result, is the same in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from fpi_cuda.ops.triton.shape import power_of_two

MAX_DEPTH = 8  # of a history: with more, the sums over a tile's columns leave the registers
SLOTS = 16  # the rows of one tensor-core instruction
PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True)
class CellShape:
    """A program's slots; outputs and inputs of a layer, and elements of a sample, at a time."""

    slots: int
    panel: int
    inner: int
    block: int
    tile_rows: int
    num_warps: int
    registers: int


def cell_shape(depth: int, compute_bytes: int) -> CellShape:
    """The shape of a loop with `depth` columns of history."""
    rows = power_of_two(depth)
    return CellShape(
        slots=SLOTS,
        # Larger ones spill: plain products hold both operands in registers.
        panel=64,
        inner=16,
        block=128 // compute_bytes,
        tile_rows=rows,
        num_warps=8,
        # All that there are: left to choose, the assembler takes half of them and spills kilobytes.
        registers=255,
    )


def programs_for(batch: int, slots: int, processors: int) -> int:
    """Programs to launch: enough to fill the device, no more than have a sample each."""
    return min(-(-batch // slots), PROGRAMS_PER_PROCESSOR * processors)
