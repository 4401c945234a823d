"""The Broyden step of a sample in one program."""

import triton
import triton.language as tl

from fpi_cuda.ops.triton.broyden import advance, form_soundly, is_sound, judge, measure
from fpi_cuda.ops.triton.decide import ACTIVE, COLUMNS, CONTROL_STRIDE, FLOATS


@triton.jit
def broyden_step_kernel(
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
    atol,
    status,
    num_steps,
    residual,
    dim,
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
    """The whole step of one sample: program i works on row i of x. See broyden_step_."""
    row = tl.program_id(0).to(tl.int64)
    sample = row
    if sample_of is not None:
        sample = tl.load(sample_of + row)
    if tl.load(status + sample) != ACTIVE:
        return
    x += row * dim
    gx += row * dim
    best += sample * dim
    anchor += sample * dim
    f_previous += sample * dim
    x_previous += sample * dim
    columns_u += sample * DEPTH * dim
    columns_v += sample * DEPTH * dim
    control += sample * CONTROL_STRIDE
    first_step = tl.load(num_steps + sample) == 0
    ff, gg, xx, ss, yy, us, vy, vf = measure(
        x, gx, f_previous, x_previous, columns_u, columns_v, control, 0, dim, dim, first_step,
        DEPTH, M, BLOCK, COMPUTE,
    )  # fmt: skip
    move, improved, anchors, mixing, kept, updates = judge(
        x, gx, control, atol + sample, status + sample, num_steps + sample, residual + sample,
        ff, gg, xx, ss, yy, dim, rtol, max_steps, beta, EPSILON, STALL_STEPS, DEPTH, BLOCK,
        COMPUTE,
    )  # fmt: skip
    fresh_vv = yy * 0
    fresh_vy = yy * 0
    fresh_vf = yy * 0
    if updates:
        fresh_vv, fresh_vy, fresh_vf = form_soundly(
            x, gx, f_previous, x_previous, columns_u, columns_v, 0, dim, dim, mixing, kept,
            us, vy, M, BLOCK, COMPUTE,
        )  # fmt: skip
    updates = updates & is_sound(fresh_vv, fresh_vy, fresh_vf, yy)
    if updates:
        tl.store(control.to(FLOATS, bitcast=True) + COLUMNS, kept.to(tl.float32) + 1)
    tl.debug_barrier()
    advance(
        x, gx, best, anchor, f_previous, x_previous, columns_u, columns_v, 0, dim, dim, move,
        improved, anchors, mixing, kept, vf, updates, fresh_vy, fresh_vf, M, BLOCK, COMPUTE,
    )  # fmt: skip
