"""Good Broyden with an inverse Jacobian H = -beta I + sum u_i v_i^T of limited memory, in Triton.

Source: Broyden, Math. Comp. 19, 1965; Bai, Kolter, Koltun, NeurIPS 2019, section 3.1.3.
"""

import triton
import triton.language as tl

from fpi_cuda.ops import reference
from fpi_cuda.ops.triton.decide import (
    COLUMNS,
    FLOATS,
    HAS_PREVIOUS,
    HEAD,
    MIX,
    PICARD,
    STOP,
    decide,
)
from fpi_cuda.ops.triton.row import go, measured_alone, narrowed, trustworthy

SMALLEST_COSINE = tl.constexpr(reference.SMALLEST_COSINE)


@triton.jit
def kept_columns(columns, DEPTH: tl.constexpr):
    """A full memory starts afresh: the method has no rule for dropping one update."""
    return tl.where(columns >= DEPTH, 0, columns).to(tl.int32)


@triton.jit
def take_sums(
    x,
    gx,
    f_previous,
    x_previous,
    columns_u,
    columns_v,
    begin,
    end,
    dim,
    differs,
    kept,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    SUM: tl.constexpr,
):
    """Norms of f, g(x), x, the step s and its y = f - f_previous, and u.s, v.y, v.f by column."""
    slots = tl.arange(0, M)
    rows = slots.to(tl.int64) * dim
    ff = tl.zeros([BLOCK], SUM)
    gg = tl.zeros([BLOCK], SUM)
    xx = tl.zeros([BLOCK], SUM)
    ss = tl.zeros([BLOCK], SUM)
    yy = tl.zeros([BLOCK], SUM)
    us = tl.zeros([M, BLOCK], SUM)
    vy = tl.zeros([M, BLOCK], SUM)
    vf = tl.zeros([M, BLOCK], SUM)
    for at in range(begin, end, BLOCK):
        d = at + tl.arange(0, BLOCK)
        inside = d < end
        here = tl.load(x + d, mask=inside, other=0.0).to(COMPUTE)
        g = tl.load(gx + d, mask=inside, other=0.0).to(COMPUTE)
        # In the wider type first: the difference of two large floats may overflow.
        f_sum = g.to(SUM) - here.to(SUM)
        ff += f_sum * f_sum
        gg += g.to(SUM) * g.to(SUM)
        xx += here.to(SUM) * here.to(SUM)
        f = g - here
        taken = tl.where(differs, inside, False)
        s = here - tl.load(x_previous + d, mask=taken, other=0.0)
        y = f - tl.load(f_previous + d, mask=taken, other=0.0)
        s = tl.where(differs, s, 0.0).to(SUM)
        y = tl.where(differs, y, 0.0).to(SUM)
        ss += s * s
        yy += y * y
        place = rows[:, None] + d[None, :]
        valid = (slots < kept)[:, None] & inside[None, :]
        u = tl.load(columns_u + place, mask=valid, other=0.0).to(SUM)
        us += u * s[None, :]
        v = tl.load(columns_v + place, mask=valid, other=0.0).to(SUM)
        vy += v * y[None, :]
        vf += v * f.to(SUM)[None, :]
    return (
        tl.sum(ff.to(tl.float64), axis=0),
        tl.sum(gg.to(tl.float64), axis=0),
        tl.sum(xx.to(tl.float64), axis=0),
        tl.sum(ss.to(tl.float64), axis=0),
        tl.sum(yy.to(tl.float64), axis=0),
        tl.sum(us.to(tl.float64), axis=1),
        tl.sum(vy.to(tl.float64), axis=1),
        tl.sum(vf.to(tl.float64), axis=1),
    )


@triton.jit
def measure(
    x,
    gx,
    f_previous,
    x_previous,
    columns_u,
    columns_v,
    control,
    begin,
    end,
    dim,
    first_step,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sums of a span, taken again in float64 where a float32 sum left its range."""
    counters = control.to(FLOATS, bitcast=True)
    kept = kept_columns(tl.load(counters + COLUMNS), DEPTH)
    differs = tl.load(counters + HAS_PREVIOUS) != 0
    ff, gg, xx, ss, yy, us, vy, vf = take_sums(
        x, gx, f_previous, x_previous, columns_u, columns_v, begin, end, dim, differs, kept,
        M, BLOCK, COMPUTE, COMPUTE,
    )  # fmt: skip
    if tl.float32 == COMPUTE:
        count = end - begin
        sound = trustworthy(ff, count, COMPUTE) & trustworthy(gg, count, COMPUTE)
        sound &= trustworthy(xx, count, COMPUTE) | (first_step == 0)
        with_previous = trustworthy(ss, count, COMPUTE) & trustworthy(yy, count, COMPUTE)
        if (sound & (with_previous | (differs == 0))) == 0:
            ff, gg, xx, ss, yy, us, vy, vf = take_sums(
                x, gx, f_previous, x_previous, columns_u, columns_v, begin, end, dim, differs,
                kept, M, BLOCK // 2, COMPUTE, tl.float64,
            )  # fmt: skip
    return ff, gg, xx, ss, yy, us, vy, vf


@triton.jit
def judge(
    x,
    gx,
    control,
    atol,
    status,
    num_steps,
    residual,
    ff,
    gg,
    xx,
    ss,
    yy,
    dim,
    rtol,
    max_steps,
    beta,
    EPSILON: tl.constexpr,
    STALL_STEPS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Count the evaluation and decide.

    Returns:
        move, improved, anchors, the mixing, the columns kept, and whether to form a fresh one.
    """
    step = tl.load(num_steps) + 1
    counters = control.to(FLOATS, bitcast=True)
    has_previous = tl.load(counters + HAS_PREVIOUS) != 0
    head = tl.load(counters + HEAD)
    norm_f, norm_gx, norm_x = measured_alone(x, gx, ff, gg, xx, dim, COMPUTE, BLOCK)
    move, now, improved, anchors, mixing_scale, best, columns = decide(
        control, norm_f, norm_gx, norm_x, tl.load(atol), rtol, max_steps, step,
        EPSILON, STALL_STEPS, True,
    )  # fmt: skip
    tl.store(num_steps, step)
    tl.store(status, now.to(tl.int8))
    tl.store(residual, tl.where((move != STOP) | improved, norm_f, best))
    onward = (move == MIX) | (move == PICARD)
    kept = kept_columns(columns, DEPTH)
    left = tl.where(onward, kept.to(tl.float64), columns)
    tl.store(counters + COLUMNS, left.to(tl.float32))
    tl.store(counters + HEAD, tl.where(step == 1, 0.0, head).to(tl.float32))
    tl.store(counters + HAS_PREVIOUS, tl.where(onward, 1.0, 0.0).to(tl.float32))
    # A difference that is rounding noise would fill H with it.
    sound = (yy < float("inf")) & (tl.sqrt(yy) > norm_gx * EPSILON * 0.5) & (ss > 0)
    updates = onward & has_previous & (step > 1) & sound
    return move, improved, anchors, beta * mixing_scale, kept, updates


@triton.jit
def form(
    x,
    gx,
    f_previous,
    x_previous,
    columns_u,
    columns_v,
    begin,
    end,
    dim,
    mixing,
    kept,
    us,
    vy,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """v = H^T s into its slot, and s - H y beside it, not yet divided by s^T H y.

    WIDE takes the sums in float64, from a fresh v that is written already.

    Returns:
        v.v, v.y and v.f of the fresh v.
    """
    SUM: tl.constexpr = tl.float64 if WIDE else COMPUTE
    HISTORY: tl.constexpr = columns_u.dtype.element_ty
    slots = tl.arange(0, M)
    rows = slots.to(tl.int64) * dim
    beta = mixing.to(COMPUTE)
    fresh = kept.to(tl.int64) * dim
    fresh_vv = tl.zeros([BLOCK], SUM)
    fresh_vy = tl.zeros([BLOCK], SUM)
    fresh_vf = tl.zeros([BLOCK], SUM)
    for at in range(begin, end, BLOCK):
        d = at + tl.arange(0, BLOCK)
        inside = d < end
        here = tl.load(x + d, mask=inside, other=0.0).to(COMPUTE)
        f = tl.load(gx + d, mask=inside, other=0.0).to(COMPUTE) - here
        y = f - tl.load(f_previous + d, mask=inside, other=0.0)
        if WIDE:
            v = tl.load(columns_v + fresh + d, mask=inside, other=0.0).to(COMPUTE)
        else:
            s = here - tl.load(x_previous + d, mask=inside, other=0.0)
            place = rows[:, None] + d[None, :]
            valid = (slots < kept)[:, None] & inside[None, :]
            u = tl.load(columns_u + place, mask=valid, other=0.0).to(COMPUTE)
            u = s + beta * y - tl.sum(vy.to(COMPUTE)[:, None] * u, axis=0)
            v = tl.load(columns_v + place, mask=valid, other=0.0).to(COMPUTE)
            v = tl.sum(us.to(COMPUTE)[:, None] * v, axis=0) - beta * s
            tl.store(columns_u + fresh + d, narrowed(u, HISTORY), mask=inside)
            stored = narrowed(v, HISTORY)
            tl.store(columns_v + fresh + d, stored, mask=inside)
            v = stored.to(COMPUTE)
        fresh_vv += v.to(SUM) * v.to(SUM)
        fresh_vy += v.to(SUM) * y.to(SUM)
        fresh_vf += v.to(SUM) * f.to(SUM)
    return (
        tl.sum(fresh_vv.to(tl.float64), axis=0),
        tl.sum(fresh_vy.to(tl.float64), axis=0),
        tl.sum(fresh_vf.to(tl.float64), axis=0),
    )


@triton.jit
def form_soundly(
    x,
    gx,
    f_previous,
    x_previous,
    columns_u,
    columns_v,
    begin,
    end,
    dim,
    mixing,
    kept,
    us,
    vy,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`form`, its sums taken again in float64 where a float32 sum left its range."""
    fresh_vv, fresh_vy, fresh_vf = form(
        x, gx, f_previous, x_previous, columns_u, columns_v, begin, end, dim, mixing, kept,
        us, vy, M, BLOCK, COMPUTE, False,
    )  # fmt: skip
    if tl.float32 == COMPUTE:
        if trustworthy(fresh_vv, end - begin, COMPUTE) == 0:
            tl.debug_barrier()
            fresh_vv, fresh_vy, fresh_vf = form(
                x, gx, f_previous, x_previous, columns_u, columns_v, begin, end, dim, mixing,
                kept, us, vy, M, BLOCK // 2, COMPUTE, True,
            )  # fmt: skip
    return fresh_vv, fresh_vy, fresh_vf


@triton.jit
def is_sound(fresh_vv, fresh_vy, fresh_vf, yy):
    """Whether s^T H y = v.y is large enough to divide by."""
    size = tl.sqrt(fresh_vv) * tl.sqrt(yy)
    finite = (size < float("inf")) & (tl.abs(fresh_vf) < float("inf"))
    return finite & (tl.abs(fresh_vy) > size * SMALLEST_COSINE)


@triton.jit
def advance(
    x,
    gx,
    best,
    anchor,
    f_previous,
    x_previous,
    columns_u,
    columns_v,
    begin,
    end,
    dim,
    move,
    improved,
    anchors,
    mixing,
    kept,
    vf,
    updates,
    fresh_vy,
    fresh_vf,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Write x - H f, divide the fresh u, and remember this evaluation."""
    HISTORY: tl.constexpr = columns_u.dtype.element_ty
    slots = tl.arange(0, M)
    rows = slots.to(tl.int64) * dim
    beta = mixing.to(COMPUTE)
    fresh = kept.to(tl.int64) * dim
    mixes = move == MIX
    onward = mixes | (move == PICARD)
    weight = vf.to(COMPUTE)[:, None]
    fresh_weight = tl.where(mixes, fresh_vf, 0.0).to(COMPUTE)
    scale = 1.0 / tl.where(updates, fresh_vy, 1.0)
    for at in range(begin, end, BLOCK):
        d = at + tl.arange(0, BLOCK)
        inside = d < end
        here = tl.load(x + d, mask=inside, other=0.0).to(COMPUTE)
        f = tl.load(gx + d, mask=inside, other=0.0).to(COMPUTE) - here
        valid = tl.where(mixes, slots < kept, False)[:, None] & inside[None, :]
        u = tl.load(columns_u + rows[:, None] + d[None, :], mask=valid, other=0.0).to(COMPUTE)
        h_f = tl.sum(tl.where(valid, weight * u, 0.0), axis=0)
        renewed = tl.where(updates, inside, False)
        u = tl.load(columns_u + fresh + d, mask=renewed, other=0.0)
        # In float64: the denominator is a product of two differences, maybe beyond a float's.
        u = narrowed((u.to(tl.float64) * scale).to(COMPUTE), HISTORY)
        h_f += tl.where(renewed, fresh_weight * u.to(COMPUTE), 0.0)
        go(x + d, best + d, anchor + d, inside, here + beta * f - h_f, move, improved, anchors,
           COMPUTE, True)  # fmt: skip
        tl.store(columns_u + fresh + d, u, mask=renewed)
        keeps = tl.where(onward, inside, False)
        tl.store(f_previous + d, f, mask=keeps)
        tl.store(x_previous + d, here, mask=keeps)
