"""The Broyden step of large samples: each span of a sample is a program's, in four launches."""

import triton
import triton.language as tl

from fpi_cuda.ops.triton.broyden import advance, form_soundly, is_sound, judge, measure
from fpi_cuda.ops.triton.decide import ACTIVE, COLUMNS, CONTROL_STRIDE, FLOATS
from fpi_cuda.ops.triton.row import IDLE, total, totals

# Of the plan that judge leaves for the rest: move, improved, anchors, mixing, kept columns,
# whether to update, y.y, then u.s, v.y and v.f of each column.
PLAN_US = tl.constexpr(7)


@triton.jit
def broyden_measure_kernel(
    x,
    gx,
    sample_of,
    f_previous,
    x_previous,
    columns_u,
    columns_v,
    control,
    status,
    num_steps,
    partial,
    dim,
    spans,
    SPAN: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sums of span j of row i, into partial (rows, 5 + 3 M, spans)."""
    row = (tl.program_id(0) // spans).to(tl.int64)
    span = (tl.program_id(0) % spans).to(tl.int64)
    sample = row
    if sample_of is not None:
        sample = tl.load(sample_of + row)
    if tl.load(status + sample) != ACTIVE:
        return
    at = sample * dim
    history = sample * DEPTH * dim
    end = tl.minimum((span + 1) * SPAN, dim)
    ff, gg, xx, ss, yy, us, vy, vf = measure(
        x + row * dim, gx + row * dim, f_previous + at, x_previous + at, columns_u + history,
        columns_v + history, control + sample * CONTROL_STRIDE, span * SPAN, end, dim,
        tl.load(num_steps + sample) == 0, DEPTH, M, BLOCK, COMPUTE,
    )  # fmt: skip
    partial += row * (5 + 3 * M) * spans + span
    columns = tl.arange(0, M) * spans
    tl.store(partial, ff)
    tl.store(partial + spans, gg)
    tl.store(partial + 2 * spans, xx)
    tl.store(partial + 3 * spans, ss)
    tl.store(partial + 4 * spans, yy)
    tl.store(partial + 5 * spans + columns, us)
    tl.store(partial + (5 + M) * spans + columns, vy)
    tl.store(partial + (5 + 2 * M) * spans + columns, vf)


@triton.jit
def broyden_judge_kernel(
    x,
    gx,
    sample_of,
    control,
    atol,
    status,
    num_steps,
    residual,
    partial,
    plan,
    dim,
    spans,
    rtol: tl.float64,
    max_steps,
    beta: tl.float64,
    EPSILON: tl.constexpr,
    STALL_STEPS: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Decide on row i, into plan (rows, 7 + 3 M)."""
    row = tl.program_id(0).to(tl.int64)
    sample = row
    if sample_of is not None:
        sample = tl.load(sample_of + row)
    plan += row * (PLAN_US + 3 * M)
    if tl.load(status + sample) != ACTIVE:
        tl.store(plan, IDLE)
        return
    partial += row * (5 + 3 * M) * spans
    ff = total(partial, spans, 256)
    gg = total(partial + spans, spans, 256)
    xx = total(partial + 2 * spans, spans, 256)
    ss = total(partial + 3 * spans, spans, 256)
    yy = total(partial + 4 * spans, spans, 256)
    move, improved, anchors, mixing, kept, updates = judge(
        x + row * dim, gx + row * dim, control + sample * CONTROL_STRIDE, atol + sample,
        status + sample, num_steps + sample, residual + sample, ff, gg, xx, ss, yy, dim, rtol,
        max_steps, beta, EPSILON, STALL_STEPS, DEPTH, BLOCK, COMPUTE,
    )  # fmt: skip
    tl.store(plan, move.to(tl.float64))
    tl.store(plan + 1, improved.to(tl.float64))
    tl.store(plan + 2, anchors.to(tl.float64))
    tl.store(plan + 3, mixing)
    tl.store(plan + 4, kept.to(tl.float64))
    tl.store(plan + 5, updates.to(tl.float64))
    tl.store(plan + 6, yy)
    columns = tl.arange(0, M)
    plan += PLAN_US
    tl.store(plan + columns, totals(partial + 5 * spans, spans, M, 256))
    tl.store(plan + M + columns, totals(partial + (5 + M) * spans, spans, M, 256))
    tl.store(plan + 2 * M + columns, totals(partial + (5 + 2 * M) * spans, spans, M, 256))


@triton.jit
def broyden_form_kernel(
    x,
    gx,
    sample_of,
    f_previous,
    x_previous,
    columns_u,
    columns_v,
    plan,
    partial,
    dim,
    spans,
    SPAN: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The fresh columns in span j of row i, and their sums, into partial (rows, 3, spans)."""
    row = (tl.program_id(0) // spans).to(tl.int64)
    span = (tl.program_id(0) % spans).to(tl.int64)
    plan += row * (PLAN_US + 3 * M)
    if tl.load(plan) == IDLE:
        return
    if tl.load(plan + 5) == 0:
        return
    sample = row
    if sample_of is not None:
        sample = tl.load(sample_of + row)
    at = sample * dim
    history = sample * DEPTH * dim
    columns = tl.arange(0, M)
    end = tl.minimum((span + 1) * SPAN, dim)
    fresh_vv, fresh_vy, fresh_vf = form_soundly(
        x + row * dim, gx + row * dim, f_previous + at, x_previous + at, columns_u + history,
        columns_v + history, span * SPAN, end, dim, tl.load(plan + 3),
        tl.load(plan + 4).to(tl.int32), tl.load(plan + PLAN_US + columns),
        tl.load(plan + PLAN_US + M + columns), M, BLOCK, COMPUTE,
    )  # fmt: skip
    partial += row * 3 * spans + span
    tl.store(partial, fresh_vv)
    tl.store(partial + spans, fresh_vy)
    tl.store(partial + 2 * spans, fresh_vf)


@triton.jit
def broyden_advance_kernel(
    x,
    gx,
    sample_of,
    best,
    anchor,
    f_previous,
    x_previous,
    columns_u,
    columns_v,
    control,
    plan,
    partial,
    dim,
    spans,
    SPAN: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Move span j of row i as its plan says; every span comes to the same view of the update."""
    row = (tl.program_id(0) // spans).to(tl.int64)
    span = (tl.program_id(0) % spans).to(tl.int64)
    plan += row * (PLAN_US + 3 * M)
    move = tl.load(plan)
    if move == IDLE:
        return
    sample = row
    if sample_of is not None:
        sample = tl.load(sample_of + row)
    kept = tl.load(plan + 4)
    updates = tl.load(plan + 5) != 0
    partial += row * 3 * spans
    formed = tl.where(updates, spans, 0)
    fresh_vv = total(partial, formed, 256)
    fresh_vy = total(partial + spans, formed, 256)
    fresh_vf = total(partial + 2 * spans, formed, 256)
    updates = updates & is_sound(fresh_vv, fresh_vy, fresh_vf, tl.load(plan + 6))
    if updates & (span == 0):
        counters = (control + sample * CONTROL_STRIDE).to(FLOATS, bitcast=True)
        tl.store(counters + COLUMNS, (kept + 1).to(tl.float32))
    at = sample * dim
    history = sample * DEPTH * dim
    end = tl.minimum((span + 1) * SPAN, dim)
    advance(
        x + row * dim, gx + row * dim, best + at, anchor + at, f_previous + at, x_previous + at,
        columns_u + history, columns_v + history, span * SPAN, end, dim, move.to(tl.int32),
        tl.load(plan + 1) != 0, tl.load(plan + 2) != 0, tl.load(plan + 3), kept.to(tl.int32),
        tl.load(plan + PLAN_US + 2 * M + tl.arange(0, M)), updates, fresh_vy, fresh_vf,
        M, BLOCK, COMPUTE,
    )  # fmt: skip
