"""The Anderson step: a sample in one program, or each split of a large one, in three launches."""

import triton
import triton.language as tl

from fpi_cuda.ops.triton.anderson import advance, judge, measure
from fpi_cuda.ops.triton.row import totals
from fpi_cuda.ops.triton.rules import ACTIVE, CONTROL_STRIDE

# Of the plan that judge leaves for advance: move, improved, anchors, mixing, slot, then gamma.
PLAN_GAMMA = tl.constexpr(5)
IDLE = tl.constexpr(-1.0)  # in its place for a move, of a sample that had stopped before


@triton.jit
def anderson_step_kernel(
    x,
    gx,
    sample_of,
    best,
    anchor,
    f_previous,
    g_previous,
    columns_f,
    columns_g,
    gram,
    control,
    atol,
    status,
    num_steps,
    residual,
    dim,
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
    IN_SLOT: tl.constexpr,
):
    """The whole step of one sample: program i works on row i of x. See anderson_step_."""
    row = tl.program_id(0).to(tl.int64)
    sample = row
    if sample_of is not None:
        sample = tl.load(sample_of + row)
    if tl.load(status + sample) != ACTIVE:
        return
    one = tl.zeros([1], tl.int64)
    alive = one == 0
    row += one
    sample += one
    x += row * dim
    gx += row * dim
    best += sample * dim
    anchor += sample * dim
    f_previous += sample * dim
    g_previous += sample * dim
    columns_f += sample * DEPTH * dim
    columns_g += sample * DEPTH * dim
    control += sample * CONTROL_STRIDE
    first_step = tl.load(num_steps + sample) == 0
    ff, gg, xx, with_df, with_f = measure(
        x, gx, f_previous, g_previous, columns_f, columns_g, control, 0, dim, dim, alive,
        first_step, 1, DEPTH, M, BLOCK, COMPUTE, IN_SLOT,
    )  # fmt: skip
    move, improved, anchors, mixing, gamma, slot = judge(
        x, gx, gram + sample * (DEPTH * (DEPTH + 1) // 2), control, atol + sample, status + sample,
        num_steps + sample, residual + sample, alive, ff, gg, xx, with_df, with_f, dim, rtol,
        max_steps, beta, ridge, EPSILON, STALL_STEPS, 1, DEPTH, M, BLOCK, COMPUTE,
    )  # fmt: skip
    # Columns that other threads wrote are read next.
    tl.debug_barrier()
    advance(
        x, gx, best, anchor, f_previous, g_previous, columns_f, columns_g, 0, dim, dim, alive,
        move, improved, anchors, mixing, gamma, slot, DEPTH, M, BLOCK, COMPUTE, IN_SLOT,
    )  # fmt: skip


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
    splits,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    IN_SLOT: tl.constexpr,
):
    """Sums of split j of row i, into partial (rows, 3 + 2 M, splits)."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
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
    end = tl.minimum((split + 1) * SPLIT, dim)
    ff, gg, xx, with_df, with_f = measure(
        x + row * dim, gx + row * dim, f_previous + at, g_previous + at, columns_f + history,
        columns_g + history, control + sample * CONTROL_STRIDE, split * SPLIT, end, dim,
        one == 0, tl.load(num_steps + sample) == 0, 1, DEPTH, M, BLOCK, COMPUTE, IN_SLOT,
    )  # fmt: skip
    partial += row * (3 + 2 * M) * splits + split
    columns = (tl.arange(0, M) * splits)[:, None]
    tl.store(partial, ff)
    tl.store(partial + splits, gg)
    tl.store(partial + 2 * splits, xx)
    tl.store((partial + 3 * splits)[None, :] + columns, with_df)
    tl.store((partial + (3 + M) * splits)[None, :] + columns, with_f)


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
    splits,
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
    partial += row * (3 + 2 * M) * splits
    ff = totals(partial, splits, 1, 256)
    gg = totals(partial + splits, splits, 1, 256)
    xx = totals(partial + 2 * splits, splits, 1, 256)
    with_df = totals(partial + 3 * splits, splits, M, 256)[:, None]
    with_f = totals(partial + (3 + M) * splits, splits, M, 256)[:, None]
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
    splits,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    IN_SLOT: tl.constexpr,
):
    """Move split j of row i as its plan says."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
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
    end = tl.minimum((split + 1) * SPLIT, dim)
    gamma = tl.load((plan + PLAN_GAMMA)[None, :] + tl.arange(0, M)[:, None])
    advance(
        x + row * dim, gx + row * dim, best + at, anchor + at, f_previous + at, g_previous + at,
        columns_f + history, columns_g + history, split * SPLIT, end, dim, one == 0,
        tl.load(plan).to(tl.int32), tl.load(plan + 1) != 0, tl.load(plan + 2) != 0,
        tl.load(plan + 3), gamma, tl.load(plan + 4).to(tl.int64),
        DEPTH, M, BLOCK, COMPUTE, IN_SLOT,
    )  # fmt: skip
