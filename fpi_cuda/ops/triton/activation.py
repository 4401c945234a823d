"""The activations of lowered cells in Triton, as csrc/cpu/activation.h has them.

All come from expm1 of a number that is not positive, so nothing overflows and nothing cancels;
and the interpreter, which tests run under, evaluates the same polynomials as a device.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponential(y):
    """(p, q) with exp(y) = p (1 + q), p a power of two, for y <= 0 or NaN.

    y = n ln 2 + r with |r| <= ln(2) / 2, p = 2^n, and q = expm1(r) by its Taylor series.
    """
    WIDE: tl.constexpr = y.dtype == tl.float64
    LEAST: tl.constexpr = -708.0 if WIDE else -87.0  # exp of it is still a normal number
    # n times the high part is exact.
    LN2_HIGH: tl.constexpr = 0.693147180369123816490 if WIDE else 0.693359375
    LN2_LOW: tl.constexpr = 1.90821492927058770002e-10 if WIDE else -2.12194440e-4
    TERMS: tl.constexpr = 13 if WIDE else 7
    clamped = tl.where(y < LEAST, LEAST, y)
    n = tl.floor(clamped * LOG2_E + 0.5)
    r = (clamped - n * LN2_HIGH) - n * LN2_LOW
    # Where y is NaN the power is garbage, and what it is multiplied with is NaN.
    if WIDE:
        power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    q = r * (1.0 / TERMS) + 1.0
    for k in tl.static_range(TERMS - 1, 1, -1):
        q = q * r * (1.0 / k) + 1.0
    return power, q * r


@triton.jit
def exp_minus(magnitude):
    """exp(-magnitude), for magnitude >= 0."""
    power, q = exponential(-magnitude)
    return power + power * q


@triton.jit
def tanh_of(u):
    """tanh(u), from expm1(-2 |u|)."""
    power, q = exponential(-2.0 * tl.abs(u))
    expm1 = power * q + (power - 1.0)
    positive = -expm1 / (2.0 + expm1)
    return tl.where(u < 0, -positive, positive)


@triton.jit
def softplus_of(u):
    """log(1 + exp(u)) = max(u, 0) + log1p(t); log1p(t) = 2 artanh(t / (2 + t)) by its series."""
    TERMS: tl.constexpr = 17 if u.dtype == tl.float64 else 8
    t = exp_minus(tl.abs(u))
    s = t / (2.0 + t)
    square = s * s
    series = square * 0.0 + 2.0 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS - 1, -1, -1):
        series = series * square + 2.0 / (2 * k + 1)
    value = tl.where(u < 0, 0.0, u) + s * series
    return tl.where(u > 20, u, value)  # as torch has it


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    """The function of that name in fpi_cuda.activations.FUNCTIONS; NaN stays NaN."""
    if ACTIVATION == "tanh":
        y = tanh_of(u)
    elif ACTIVATION == "relu":
        y = tl.where(u < 0, 0.0, u)
    elif ACTIVATION == "sigmoid":
        t = exp_minus(tl.abs(u))
        y = tl.where(u < 0, t, 1.0) / (1.0 + t)
    elif ACTIVATION == "gelu":
        y = 0.5 * u * (1.0 + tl.erf(u * 0.70710678118654752))
    elif ACTIVATION == "softplus":
        y = softplus_of(u)
    elif ACTIVATION == "tanh_derivative":
        t = tanh_of(u)
        y = 1.0 - t * t
    elif ACTIVATION == "relu_derivative":
        y = tl.where(u > 0, 1.0, 0.0).to(u.dtype)
    elif ACTIVATION == "sigmoid_derivative":
        t = exp_minus(tl.abs(u))
        y = t / ((1.0 + t) * (1.0 + t))
    elif ACTIVATION == "gelu_derivative":
        density = exp_minus(0.5 * u * u) * 0.3989422804014327
        y = 0.5 * (1.0 + tl.erf(u * 0.70710678118654752)) + u * density
    elif ACTIVATION == "one":
        y = tl.full(u.shape, 1.0, u.dtype)
    else:
        tl.static_assert(ACTIVATION == "identity")
        y = u
    return y
