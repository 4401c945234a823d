"""One sample of a step: its norms, and where x goes. Shared by the Triton kernels."""

import triton
import triton.language as tl

from fpi_cuda.ops.triton.rules import ANCHOR, REJECT, RETURN, STOP


@triton.jit
def narrowed(value, DTYPE: tl.constexpr):
    """`value` rounded to nearest, ties to even.

    bfloat16 by its bits: Triton's interpreter would truncate, and what is tested is what runs.
    """
    if tl.bfloat16 == DTYPE:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value == value, bits >> 16, 0x7FC0)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def trustworthy(square, dim, COMPUTE: tl.constexpr):
    """Whether a plain sum of squares of `dim` numbers stayed where nothing is lost; or is NaN."""
    if tl.float64 == COMPUTE:
        inside = (square / dim >= 1e-280) & (square <= 1e300)
    else:
        inside = (square / dim >= 1e-30) & (square <= 1e34)
    return inside | (square != square)


@triton.jit
def scaled_norm(x, gx, dim, alive, OF: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr):
    """sqrt(sum of squares) in float64 without overflow or underflow; OF is "x", "gx" or "f"."""
    largest = tl.zeros([S, BLOCK], tl.float64)
    for at in range(0, dim, BLOCK):
        value = tl.abs(elements(x, gx, at, dim, alive, OF, BLOCK))
        largest = tl.where(value > largest, value, largest)
    scale = tl.max(largest, axis=1)
    usable = (scale > 0) & (scale < float("inf"))
    total = tl.zeros([S, BLOCK], tl.float64)
    for at in range(0, dim, BLOCK):
        value = elements(x, gx, at, dim, alive, OF, BLOCK)
        ratio = value / tl.where(usable, scale, 1.0)[:, None]
        total += ratio * ratio
    return tl.where(usable, scale * tl.sqrt(tl.sum(total, axis=1)), scale)


@triton.jit
def elements(x, gx, at, dim, alive, OF: tl.constexpr, BLOCK: tl.constexpr):
    """(S, BLOCK) float64 elements of x, g(x) or f from `at` on, 0 past the end."""
    d = (at + tl.arange(0, BLOCK))[None, :]
    inside = alive[:, None] & (d < dim)
    if OF == "x":
        return tl.load(x[:, None] + d, mask=inside, other=0.0).to(tl.float64)
    g = tl.load(gx[:, None] + d, mask=inside, other=0.0).to(tl.float64)
    if OF == "f":
        g -= tl.load(x[:, None] + d, mask=inside, other=0.0).to(tl.float64)
    return g


@triton.jit
def safe_norm(
    x, gx, square, dim, alive, OF: tl.constexpr, S: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(S,) the norm that `square` is the square of; only a sum of float64 can be beyond range."""
    norm = tl.sqrt(square)
    if tl.float64 == COMPUTE:
        sound = trustworthy(square, dim, COMPUTE) | (alive == 0)
        if tl.sum((sound == 0).to(tl.int32), axis=0) > 0:
            norm = tl.where(sound, norm, scaled_norm(x, gx, dim, alive, OF, S, BLOCK))
    return norm


@triton.jit
def next_slot(columns, head, DEPTH: tl.constexpr):
    """The slot that the next difference takes: the oldest one's, once the history is full."""
    return tl.where(columns == 0, 0, (head + 1) % DEPTH).to(tl.int64)


@triton.jit
def go(
    x,
    best,
    anchor,
    inside,
    stepped,
    move,
    improved,
    anchors,
    COMPUTE: tl.constexpr,
    ANCHORED: tl.constexpr,
):
    """Move x where the decision says; keep the best point and the anchor.

    x, best and anchor are blocks of pointers to elements; inside and stepped are of their shape,
    and move, improved and anchors scalars or of shape (S, 1).

    The point to return is left in x and in best alike, so that g goes on being evaluated at a
    harmless point where stopped samples stay in the batch.
    """
    STATE: tl.constexpr = x.dtype.element_ty
    here = tl.load(x, mask=inside, other=0.0)
    returns = ((move == STOP) | (move == RETURN)) & (improved == 0)
    kept = tl.load(best, mask=tl.where(returns | (move == REJECT), inside, False), other=0.0)
    near, far = kept.to(COMPUTE), here.to(COMPUTE)
    middle = near + (far - near) * 0.5
    back = tl.where(tl.abs(middle) < float("inf"), middle, near)
    to = narrowed(tl.where(move == REJECT, back, stepped), STATE)
    to = tl.where(returns, kept, to)
    to = tl.where(((move == STOP) | (move == RETURN)) & improved, here, to)
    if ANCHORED:
        at_anchor = tl.where(move == ANCHOR, inside, False)
        to = tl.where(at_anchor, tl.load(anchor, mask=at_anchor, other=0.0), to)
    # Other threads may have read these places, and the slots that the caller writes next.
    tl.debug_barrier()
    if ANCHORED:
        tl.store(anchor, here, mask=tl.where(anchors, inside, False))
    tl.store(best, here, mask=tl.where(improved, inside, False))
    tl.store(x, to, mask=inside)


@triton.jit
def totals(partial, splits, M: tl.constexpr, BLOCK: tl.constexpr):
    """(M,) sums over a sample, of M quantities whose partial sums by split follow each other."""
    rows = tl.arange(0, M)[:, None] * splits
    summed = tl.zeros([M, BLOCK], tl.float64)
    for at in range(0, splits, BLOCK):
        s = at + tl.arange(0, BLOCK)[None, :]
        summed += tl.load(partial + rows + s, mask=(rows >= 0) & (s < splits), other=0.0)
    return tl.sum(summed, axis=1)
