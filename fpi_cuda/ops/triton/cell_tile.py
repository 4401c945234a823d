"""The whole fixed-point loop of a lowered cell in one launch: a tile of samples per program.

A program iterates the samples in its slots and fills a slot whose sample has stopped from a queue
that all programs share. Nothing that a sample's result depends on depends on its slot, its tile, or
what else is in the batch. Barriers stand wherever threads read what other threads of the program
wrote to the workspace: Triton orders its own exchanges of values, not those through memory.
"""

import triton
import triton.language as tl

from fpi_cuda.ops.triton.activation import activate
from fpi_cuda.ops.triton.anderson import advance, judge, measure
from fpi_cuda.ops.triton.row import narrowed
from fpi_cuda.ops.triton.rules import (
    COLUMNS,
    CONTROL_STRIDE,
    FLOATS,
    HAS_PREVIOUS,
    HEAD,
    LEAST_FLOOR,
    STOP,
)
from fpi_cuda.options import PRECISIONS

IEEE = tl.constexpr(PRECISIONS.index("ieee"))
TF32X3 = tl.constexpr(PRECISIONS.index("tf32x3"))
TF32 = tl.constexpr(PRECISIONS.index("tf32"))
BF16 = tl.constexpr(PRECISIONS.index("bf16"))


@triton.jit
def round_tf32(value):
    """float32 to 10 bits after the leading one: to nearest, ties away from zero; NaN stays NaN.

    Left to itself tl.dot drops the other bits on some devices, and the interpreter keeps them.
    """
    bits = value.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(value == value, rounded, value)


@triton.jit
def product(h, weight, sums, PRECISION: tl.constexpr, BF16_DOT: tl.constexpr):
    """sums + h weight. BF16_DOT: bfloat16 goes to tl.dot as it is, which interpreters cannot."""
    if PRECISION == TF32X3:
        h_high, weight_high = round_tf32(h), round_tf32(weight)
        h_low, weight_low = round_tf32(h - h_high), round_tf32(weight - weight_high)
        sums = tl.dot(h_low, weight_high, sums, input_precision="tf32")
        sums = tl.dot(h_high, weight_low, sums, input_precision="tf32")
        sums = tl.dot(h_high, weight_high, sums, input_precision="tf32")
    elif PRECISION == TF32:
        sums = tl.dot(round_tf32(h), round_tf32(weight), sums, input_precision="tf32")
    elif PRECISION == BF16:
        h, weight = narrowed(h, tl.bfloat16), narrowed(weight, tl.bfloat16)
        if BF16_DOT:
            sums = tl.dot(h, weight, sums)
        else:
            sums = tl.dot(h.to(tl.float32), weight.to(tl.float32), sums, input_precision="ieee")
    else:
        tl.static_assert(PRECISION == IEEE)
        sums = tl.dot(h, weight, sums, input_precision="ieee", out_dtype=sums.dtype)
    return sums


@triton.jit
def apply_layer(
    out,
    h,
    h_factor,
    weight,
    output_stride,
    input_stride,
    bias,
    shift,
    factor,
    sample,
    carried,
    carry,
    alive,
    inputs,
    outputs,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BF16_DOT: tl.constexpr,
    CARRIES: tl.constexpr,
    S: tl.constexpr,
    PANEL: tl.constexpr,
    INNER: tl.constexpr,
):
    """out = factor * activation(weight (h_factor * h) + bias + shift) + carry * carried.

    Args:
        out, h, carried: (S,) pointers to rows of the workspace. alive: (S,) the rows to write.
        h_factor, shift, factor: (batch, inputs or outputs), or None. sample: (S,) their rows.
        PANEL, INNER: outputs and inputs taken at a time. Together with S they fix the order of
            every sum.
    """
    for first in range(0, outputs, PANEL):
        o = (first + tl.arange(0, PANEL)).to(tl.int64)
        known = o < outputs
        sums = tl.zeros([S, PANEL], h.dtype.element_ty)
        for at in range(0, inputs, INNER):
            i = (at + tl.arange(0, INNER)).to(tl.int64)
            taken = alive[:, None] & (i < inputs)[None, :]
            value = tl.load(h[:, None] + i[None, :], mask=taken, other=0.0)
            if h_factor is not None:
                place = h_factor + (sample * inputs)[:, None] + i[None, :]
                value *= tl.load(place, mask=taken, other=0.0)
            place = weight + i[:, None] * input_stride + o[None, :] * output_stride
            exists = (i < inputs)[:, None] & known[None, :]
            panel = tl.load(place, mask=exists, other=0.0)
            sums = product(value, panel, sums, PRECISION, BF16_DOT)
        inside = alive[:, None] & known[None, :]
        if bias is not None:
            sums += tl.load(bias + o, mask=known, other=0.0)[None, :]
        place = (sample * outputs)[:, None] + o[None, :]
        if shift is not None:
            sums += tl.load(shift + place, mask=inside, other=0.0)
        y = activate(sums, ACTIVATION)
        if factor is not None:
            y *= tl.load(factor + place, mask=inside, other=0.0)
        if CARRIES:
            x = tl.load(carried[:, None] + o[None, :], mask=inside, other=0.0)
            y += tl.cast(carry, y.dtype) * x
        tl.store(out[:, None] + o[None, :], y, mask=inside)


@triton.jit
def refill(
    queue, batch, x, start, control, num_steps, dim, sample, alive, S: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Put the next samples of the batch into the empty slots.

    Args:
        x: (S,) pointers to where the points of the slots lie. start: (batch, dim).
    Returns:
        sample and alive (S,), and whether the queue may hold more.
    """
    empty = (alive == 0).to(tl.int32)
    wanted = tl.sum(empty, axis=0)
    first = tl.atomic_add(queue, wanted.to(tl.int64))
    # tl.cumsum would say it shorter; Triton 3.7 fails to compile that here.
    slots = tl.arange(0, S)
    before = tl.sum(tl.where(slots[None, :] < slots[:, None], empty[None, :], 0), axis=1)
    place = first + before.to(tl.int64)
    fresh = (alive == 0) & (place < batch)
    sample = tl.where(fresh, place, sample)
    counters = control.to(FLOATS, bitcast=True)
    tl.store(counters + LEAST_FLOOR, 0.0, mask=fresh)
    tl.store(counters + COLUMNS, 0.0, mask=fresh)
    tl.store(counters + HEAD, 0.0, mask=fresh)
    tl.store(counters + HAS_PREVIOUS, 0.0, mask=fresh)
    tl.store(num_steps + sample, 0, mask=fresh)
    for at in range(0, dim, BLOCK):
        d = (at + tl.arange(0, BLOCK))[None, :]
        inside = fresh[:, None] & (d < dim)
        value = tl.load(start + (sample * dim)[:, None] + d, mask=inside, other=0.0)
        tl.store(x[:, None] + d, value, mask=inside)
    return sample, alive | fresh, first + wanted < batch


@triton.jit
def cell_loop_kernel(
    best,
    x_factor,
    weight1,
    bias1,
    shift1,
    factor1,
    weight2,
    bias2,
    shift2,
    factor2,
    atol,
    status,
    num_steps,
    residual,
    queue,
    x,
    gx,
    hidden,
    anchor,
    columns_f,
    columns_g,
    gram,
    control,
    batch,
    dim,
    width,
    output_stride1,
    input_stride1,
    output_stride2,
    input_stride2,
    carry: tl.float64,
    rtol: tl.float64,
    max_steps,
    beta: tl.float64,
    ridge: tl.float64,
    ACTIVATION1: tl.constexpr,
    ACTIVATION2: tl.constexpr,
    CARRIES: tl.constexpr,
    PRECISION: tl.constexpr,
    BF16_DOT: tl.constexpr,
    EPSILON: tl.constexpr,
    STALL_STEPS: tl.constexpr,
    S: tl.constexpr,
    PANEL: tl.constexpr,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Solve for every sample. `best` holds where they start, and in the end what to return.

    x, gx, anchor (programs * S, dim), hidden (programs * S, width), columns, gram and control are
    the workspace, by slot; the rest is as in fpi_cuda.ops.reference_loop.cell_loop_.
    """
    row = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    x += row * dim
    gx += row * dim
    anchor += row * dim
    hidden += row * width
    columns_f += row * DEPTH * dim
    columns_g += row * DEPTH * dim
    gram += row * (DEPTH * (DEPTH + 1) // 2)
    control += row * CONTROL_STRIDE
    # An empty slot keeps the number of a sample that exists, of which it reads and writes nothing.
    sample, alive, more = refill(
        queue, batch, x, best, control, num_steps, dim, row * 0, row < 0, S, BLOCK
    )
    while tl.sum(alive.to(tl.int32), axis=0) > 0:
        # x was written by advance or refill.
        tl.debug_barrier()
        if weight2 is not None:
            apply_layer(
                hidden, x, x_factor, weight1, output_stride1, input_stride1, bias1, shift1,
                factor1, sample, x, carry, alive, dim, width, ACTIVATION1, PRECISION, BF16_DOT,
                False, S, PANEL, INNER,
            )  # fmt: skip
            tl.debug_barrier()
            apply_layer(
                gx, hidden, None, weight2, output_stride2, input_stride2, bias2, shift2, factor2,
                sample, x, carry, alive, width, dim, ACTIVATION2, PRECISION, BF16_DOT, CARRIES,
                S, PANEL, INNER,
            )  # fmt: skip
        else:
            apply_layer(
                gx, x, x_factor, weight1, output_stride1, input_stride1, bias1, shift1, factor1,
                sample, x, carry, alive, dim, dim, ACTIVATION1, PRECISION, BF16_DOT, CARRIES,
                S, PANEL, INNER,
            )  # fmt: skip
        # gx is read in another layout than it was written in; so are the rows of control.
        tl.debug_barrier()
        first_step = tl.load(num_steps + sample) == 0
        ff, gg, xx, with_df, with_f = measure(
            x, gx, columns_f, columns_g, columns_f, columns_g, control, 0, dim, dim, alive,
            first_step, S, DEPTH, M, BLOCK, COMPUTE, DEPTH > 0,
        )  # fmt: skip
        move, improved, anchors, mixing, gamma, slot = judge(
            x, gx, gram, control, atol + sample, status + sample, num_steps + sample,
            residual + sample, alive, ff, gg, xx, with_df, with_f, dim, rtol, max_steps, beta,
            ridge, EPSILON, STALL_STEPS, S, DEPTH, M, BLOCK, COMPUTE,
        )  # fmt: skip
        # Columns that other threads wrote are read next.
        tl.debug_barrier()
        advance(
            x, gx, best + sample * dim, anchor, columns_f, columns_g, columns_f, columns_g, 0,
            dim, dim, alive, move, improved, anchors, mixing, gamma, slot, DEPTH, M, BLOCK,
            COMPUTE, DEPTH > 0,
        )  # fmt: skip
        alive = alive & (move != STOP)
        if more & (tl.sum(alive.to(tl.int32), axis=0) < S):
            # What a slot's last sample left is overwritten.
            tl.debug_barrier()
            sample, alive, more = refill(
                queue, batch, x, best, control, num_steps, dim, sample, alive, S, BLOCK
            )
