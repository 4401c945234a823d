"""How a step and a fused loop are cut into programs: by size, depth and dtype alone.

So the order of every sum, and with it each bit of a sample's result, is the same in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

# Elements of one program: few enough that float32 partial sums of a lane stay short, many enough
# that a program's fixed cost is small.
SPLIT = 8192
BLOCK_BYTES = 4096
TILE_BYTES = 32768  # of one of the two running sums by column, which live in registers
TILE_BYTES_PER_WARP = 4096
BLOCK_PER_WARP = 256

MAX_DEPTH = 8  # of a history: with more, the sums over a tile's columns leave the registers
SLOTS = 16  # the rows of one tensor-core instruction
PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True)
class Shape:
    """Elements in a block, rows in a tile of columns, warps of a program, programs of a sample."""

    block: int
    tile_rows: int
    num_warps: int
    splits: int


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`, itself at least 1."""
    return 1 << max(least - 1, 0).bit_length()


def shape_of(dim: int, depth: int, compute_bytes: int) -> Shape:
    """The shape of a step on samples of `dim` elements with `depth` columns of history."""
    rows = power_of_two(depth)
    most = min(BLOCK_BYTES, TILE_BYTES // rows) // compute_bytes
    block = min(max(power_of_two(dim), 32), most)
    warps = max(block * rows * compute_bytes // TILE_BYTES_PER_WARP, block // BLOCK_PER_WARP)
    return Shape(block, rows, min(max(warps, 1), 8), max(1, -(-dim // SPLIT)))


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
