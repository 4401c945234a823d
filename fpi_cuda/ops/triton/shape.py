"""How a step is cut into programs and blocks: by the sample's size, depth and dtype alone.

So the order of every sum, and with it each bit of a sample's result, is the same in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

# Elements of one program: few enough that float32 partial sums of a lane stay short, many enough
# that a program's fixed cost is small.
SPAN = 8192
BLOCK_BYTES = 4096
TILE_BYTES = 32768  # of one of the two running sums by column, which live in registers
TILE_BYTES_PER_WARP = 4096
BLOCK_PER_WARP = 256


@dataclass(frozen=True)
class Shape:
    """Elements in a block, rows in a tile of columns, warps of a program, programs of a sample."""

    block: int
    tile_rows: int
    num_warps: int
    spans: int


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`, itself at least 1."""
    return 1 << max(least - 1, 0).bit_length()


def shape_of(dim: int, depth: int, compute_bytes: int) -> Shape:
    """The shape of a step on samples of `dim` elements with `depth` columns of history."""
    rows = power_of_two(depth)
    most = min(BLOCK_BYTES, TILE_BYTES // rows) // compute_bytes
    block = min(max(power_of_two(dim), 32), most)
    warps = max(block * rows * compute_bytes // TILE_BYTES_PER_WARP, block // BLOCK_PER_WARP)
    return Shape(block, rows, min(max(warps, 1), 8), max(1, -(-dim // SPAN)))
