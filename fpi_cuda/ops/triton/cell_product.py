"""Layers of a lowered cell on a tile of samples, in Triton: products in the precision asked for."""

import triton
import triton.language as tl

from fpi_cuda.ops.triton.activation import activate
from fpi_cuda.ops.triton.row import narrowed
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
