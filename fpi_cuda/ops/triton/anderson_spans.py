"""The Anderson step of large samples: each span of a sample is a program's, in three launches."""

import triton
import triton.language as tl

from fpi_cuda.ops.triton.anderson import advance, judge, measure
from fpi_cuda.ops.triton.row import totals
from fpi_cuda.ops.triton.rules import ACTIVE, CONTROL_STRIDE

# Of the plan that judge leaves for advance: move, improved, anchors, mixing, slot, then gamma.
PLAN_GAMMA = tl.constexpr(5)
IDLE = tl.constexpr(-1.0)  # in its place for a move, of a sample that had stopped before


@triton.jit
def anderson_measure_kernel(
    x,
    gx,
    sample_of,
    f_previous,
    g_previous,
    columns_f,
    columns_g,
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
    IN_SLOT: tl.constexpr,
):
    """Sums of span j of row i, into partial (rows, 3 + 2 M, spans)."""
    row = (tl.program_id(0) // spans).to(tl.int64)
    span = (tl.program_id(0) % spans).to(tl.int64)
    sample = row
    if sample_of is not None:
        sample = tl.load(sample_of + row)
    if tl.load(status + sample) != ACTIVE:
        return
    one = tl.zeros([1], tl.int64)
    row += one
    sample += one
    at = sample * dim
    history = sample * DEPTH * dim
    end = tl.minimum((span + 1) * SPAN, dim)
    ff, gg, xx, with_df, with_f = measure(
        x + row * dim, gx + row * dim, f_previous + at, g_previous + at, columns_f + history,
        columns_g + history, control + sample * CONTROL_STRIDE, span * SPAN, end, dim,
        one == 0, tl.load(num_steps + sample) == 0, 1, DEPTH, M, BLOCK, COMPUTE, IN_SLOT,
    )  # fmt: skip
    partial += row * (3 + 2 * M) * spans + span
    columns = (tl.arange(0, M) * spans)[:, None]
    tl.store(partial, ff)
    tl.store(partial + spans, gg)
    tl.store(partial + 2 * spans, xx)
    tl.store((partial + 3 * spans)[None, :] + columns, with_df)
    tl.store((partial + (3 + M) * spans)[None, :] + columns, with_f)


@triton.jit
def anderson_judge_kernel(
    x,
    gx,
    sample_of,
    gram,
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
    ridge: tl.float64,
    EPSILON: tl.constexpr,
    STALL_STEPS: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Decide on row i, into plan (rows, 5 + M)."""
    row = tl.program_id(0).to(tl.int64)
    sample = row
    if sample_of is not None:
        sample = tl.load(sample_of + row)
    plan += row * (PLAN_GAMMA + M)
    if tl.load(status + sample) != ACTIVE:
        tl.store(plan, IDLE)
        return
    partial += row * (3 + 2 * M) * spans
    ff = totals(partial, spans, 1, 256)
    gg = totals(partial + spans, spans, 1, 256)
    xx = totals(partial + 2 * spans, spans, 1, 256)
    with_df = totals(partial + 3 * spans, spans, M, 256)[:, None]
    with_f = totals(partial + (3 + M) * spans, spans, M, 256)[:, None]
    one = tl.zeros([1], tl.int64)
    row += one
    sample += one
    plan += one
    move, improved, anchors, mixing, gamma, slot = judge(
        x + row * dim, gx + row * dim, gram + sample * (DEPTH * (DEPTH + 1) // 2),
        control + sample * CONTROL_STRIDE, atol + sample, status + sample, num_steps + sample,
        residual + sample, one == 0, ff, gg, xx, with_df, with_f, dim, rtol, max_steps, beta,
        ridge, EPSILON, STALL_STEPS, 1, DEPTH, M, BLOCK, COMPUTE,
    )  # fmt: skip
    tl.store(plan, move.to(tl.float64))
    tl.store(plan + 1, improved.to(tl.float64))
    tl.store(plan + 2, anchors.to(tl.float64))
    tl.store(plan + 3, mixing)
    tl.store(plan + 4, slot.to(tl.float64))
    tl.store((plan + PLAN_GAMMA)[None, :] + tl.arange(0, M)[:, None], gamma)


@triton.jit
def anderson_advance_kernel(
    x,
    gx,
    sample_of,
    best,
    anchor,
    f_previous,
    g_previous,
    columns_f,
    columns_g,
    plan,
    dim,
    spans,
    SPAN: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    IN_SLOT: tl.constexpr,
):
    """Move span j of row i as its plan says."""
    row = (tl.program_id(0) // spans).to(tl.int64)
    span = (tl.program_id(0) % spans).to(tl.int64)
    plan += row * (PLAN_GAMMA + M)
    if tl.load(plan) == IDLE:
        return
    sample = row
    if sample_of is not None:
        sample = tl.load(sample_of + row)
    one = tl.zeros([1], tl.int64)
    row += one
    sample += one
    plan += one
    at = sample * dim
    history = sample * DEPTH * dim
    end = tl.minimum((span + 1) * SPAN, dim)
    gamma = tl.load((plan + PLAN_GAMMA)[None, :] + tl.arange(0, M)[:, None])
    advance(
        x + row * dim, gx + row * dim, best + at, anchor + at, f_previous + at, g_previous + at,
        columns_f + history, columns_g + history, span * SPAN, end, dim, one == 0,
        tl.load(plan).to(tl.int32), tl.load(plan + 1) != 0, tl.load(plan + 2) != 0,
        tl.load(plan + 3), gamma, tl.load(plan + 4).to(tl.int64),
        DEPTH, M, BLOCK, COMPUTE, IN_SLOT,
    )  # fmt: skip
