"""The Anderson step of a sample in one program."""

import triton
import triton.language as tl

from fpi_cuda.ops.triton.anderson import advance, judge, measure
from fpi_cuda.ops.triton.rules import ACTIVE, CONTROL_STRIDE


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
