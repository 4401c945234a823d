"""The rules of csrc/common/decide.h for one sample, on scalars.

Here and in the other kernels small expressions are written out, not made functions: Triton's
interpreter, which tests run under, takes a millisecond to call one. It cannot spread a boolean
scalar over a block either: hence tl.where(flag, mask, False) for `flag & mask`. What is finite
is found by size: `v - v == 0` of a product v is contracted to a fused multiply-add on a device,
which leaves the product's rounding.
"""

import torch
import triton
import triton.language as tl

from fpi_cuda.ops import rules
from fpi_cuda.ops.solver_state import CONTROL_SIZE, NORMS, counter_at
from fpi_cuda.solution import Status

# Triton's kernels may read no other globals than these.
ACTIVE = tl.constexpr(int(Status.ACTIVE))
CONVERGED = tl.constexpr(int(Status.CONVERGED))
MAX_STEPS = tl.constexpr(int(Status.MAX_STEPS))
STALLED = tl.constexpr(int(Status.STALLED))
DIVERGED = tl.constexpr(int(Status.DIVERGED))
NONFINITE = tl.constexpr(int(Status.NONFINITE))

STOP = tl.constexpr(rules.STOP)
MIX = tl.constexpr(rules.MIX)
PICARD = tl.constexpr(rules.PICARD)
REJECT = tl.constexpr(rules.REJECT)
RETURN = tl.constexpr(rules.RETURN)
ANCHOR = tl.constexpr(rules.ANCHOR)

CAP = tl.constexpr(rules.CAP)
FALL = tl.constexpr(rules.FALL)
LEAST_FALL = tl.constexpr(rules.LEAST_FALL)
SETTLED = tl.constexpr(rules.SETTLED)
HIDDEN = tl.constexpr(rules.HIDDEN)
GROWTH = tl.constexpr(rules.GROWTH)
PATIENCE = tl.constexpr(rules.PATIENCE)
PROGRESS = tl.constexpr(rules.PROGRESS)
LET_GO = tl.constexpr(rules.LET_GO)
FIRST_PICARD = tl.constexpr(rules.FIRST_PICARD)
FIRST_LEAST = tl.constexpr(rules.FIRST_LEAST)
FIRST_GAIN = tl.constexpr(rules.FIRST_GAIN)
FIRST_GROWTH = tl.constexpr(rules.FIRST_GROWTH)
PICARD_LENGTH = tl.constexpr(rules.PICARD_LENGTH)
PICARD_GROWTH = tl.constexpr(rules.PICARD_GROWTH)
DIVERGENCE = tl.constexpr(rules.DIVERGENCE)
RISE = tl.constexpr(rules.RISE)
NEAR_PEAK = tl.constexpr(rules.NEAR_PEAK)
OVERFLOW = tl.constexpr(rules.OVERFLOW)
LARGEST_SINGLE = tl.constexpr(torch.finfo(torch.float32).max)
LARGEST_DOUBLE = tl.constexpr(torch.finfo(torch.float64).max)
DOUBLE_EPSILON = tl.constexpr(torch.finfo(torch.float64).eps)
REJECTIONS = tl.constexpr(rules.REJECTIONS)
GAIN = tl.constexpr(rules.GAIN)
FLOOR = tl.constexpr(rules.FLOOR)
HALF_FLOOR = tl.constexpr(rules.HALF_FLOOR)
HALF_EPSILON = tl.constexpr(rules.HALF_EPSILON)

CONTROL_STRIDE = tl.constexpr(CONTROL_SIZE)
SCALE0 = tl.constexpr(NORMS.index("scale0"))
FIRST = tl.constexpr(NORMS.index("first"))
BEST = tl.constexpr(NORMS.index("best"))
PREVIOUS = tl.constexpr(NORMS.index("previous"))
GAIN_RESIDUAL = tl.constexpr(NORMS.index("gain_residual"))
PEAK = tl.constexpr(NORMS.index("peak"))
PEAK_NORM = tl.constexpr(NORMS.index("peak_norm"))
ANCHORED = tl.constexpr(NORMS.index("anchored"))
FLOATS = tl.constexpr(tl.pointer_type(tl.float32))
BEST_RELATIVE = tl.constexpr(counter_at("best_relative"))
LEAST_FLOOR = tl.constexpr(counter_at("floor"))
GAIN_STEP = tl.constexpr(counter_at("gain_step"))
GROWTH_STEP = tl.constexpr(counter_at("growth_step"))
SINCE_BEST = tl.constexpr(counter_at("since_best"))
PATIENCE_LEFT = tl.constexpr(counter_at("patience"))
NEXT_LENGTH = tl.constexpr(counter_at("picard_length"))
PICARD_LEFT = tl.constexpr(counter_at("picard_left"))
MIXING_SCALE = tl.constexpr(counter_at("mixing_scale"))
REJECTED = tl.constexpr(counter_at("rejections"))
COLUMNS = tl.constexpr(counter_at("columns"))
HEAD = tl.constexpr(counter_at("head"))
HAS_PREVIOUS = tl.constexpr(counter_at("has_previous"))


@triton.jit
def decide(
    control,
    residual,
    norm_gx,
    norm_x,
    atol,
    rtol,
    max_steps,
    step,
    EPSILON: tl.constexpr,
    STALL_STEPS: tl.constexpr,
    SAFEGUARDED: tl.constexpr,
):
    """Judge evaluation number `step`, from 1, and write the control row, but for the history.

    Args:
        control: pointer to the sample's row. residual, norm_gx, norm_x, atol, rtol: float64.
    Returns:
        move, status, improved, anchors, mixing_scale, best, and the columns left.
    """
    counters = control.to(FLOATS, bitcast=True)
    first_step = step == 1
    scale0 = tl.where(first_step, tl.maximum(norm_x, norm_gx), tl.load(control + SCALE0))
    first = tl.where(first_step, residual, tl.load(control + FIRST))
    best = tl.where(first_step, residual, tl.load(control + BEST))
    previous = tl.where(first_step, residual * FIRST_GROWTH, tl.load(control + PREVIOUS))
    gain_residual = tl.where(first_step, residual, tl.load(control + GAIN_RESIDUAL))
    peak = tl.where(first_step, residual, tl.load(control + PEAK))
    peak_norm = tl.where(first_step, norm_gx, tl.load(control + PEAK_NORM))
    anchored = tl.where(first_step, 0.0, tl.load(control + ANCHORED))
    relative = residual / norm_gx
    relative = tl.where(relative < 1, relative, 1.0).to(tl.float32)
    best_relative = tl.where(first_step, relative, tl.load(counters + BEST_RELATIVE))
    gain_step = tl.where(first_step, 1.0, tl.load(counters + GAIN_STEP).to(tl.float64))
    growth_step = tl.where(first_step, 1.0, tl.load(counters + GROWTH_STEP).to(tl.float64))
    since_best = tl.where(first_step, 0.0, tl.load(counters + SINCE_BEST).to(tl.float64))
    patience = tl.where(first_step, PATIENCE, tl.load(counters + PATIENCE_LEFT).to(tl.float64))
    picard_length = tl.load(counters + NEXT_LENGTH).to(tl.float64)
    picard_length = tl.where(first_step, PICARD_LENGTH, picard_length)
    picard_left = tl.load(counters + PICARD_LEFT).to(tl.float64)
    picard_left = tl.where(first_step, FIRST_PICARD, picard_left)
    mixing_scale = tl.where(first_step, 1.0, tl.load(counters + MIXING_SCALE).to(tl.float64))
    rejections = tl.where(first_step, 0.0, tl.load(counters + REJECTED).to(tl.float64))
    columns = tl.where(first_step, 0.0, tl.load(counters + COLUMNS).to(tl.float64))

    finite = residual < float("inf")
    improved = finite & (first_step | (residual < best))
    starts_over = finite if SAFEGUARDED else improved
    rejections = tl.where(starts_over, 0.0, rejections + tl.where(finite, 0.0, 1.0))
    hopeless = (finite == 0) & (first_step | (rejections >= REJECTIONS))
    plain = finite & (picard_left > 0) if SAFEGUARDED else finite
    rose = plain & (residual > peak * RISE)
    growth_step = tl.where(rose, step.to(tl.float64), growth_step)
    peaks = rose | (plain & (norm_gx > peak_norm * SETTLED))
    peak = tl.where(peaks, residual, peak)
    peak_norm = tl.where(peaks, norm_gx, peak_norm)
    progressed = finite & (first_step | (residual < best * PROGRESS))
    since_best = tl.where(finite, tl.where(progressed, 0.0, since_best + 1), since_best)
    best = tl.where(improved, residual, best)
    best_relative = tl.where(improved, relative, best_relative)
    mixing_scale = tl.where(improved, tl.minimum(2 * mixing_scale, 1.0), mixing_scale)
    mixing_scale = tl.where(finite, mixing_scale, mixing_scale * 0.5)
    gained = finite & (best <= gain_residual * GAIN)
    gain_residual = tl.where(gained, best, gain_residual)
    gain_step = tl.where(gained, step.to(tl.float64), gain_step)

    of_peak = tl.where(norm_gx <= peak_norm * SETTLED, peak, 0.0)
    rounding = norm_gx * EPSILON
    fallen = tl.minimum(rounding * HALF_FLOOR, of_peak * LEAST_FALL)
    fallen = tl.where(rounding <= of_peak * HIDDEN, fallen, 0.0)
    cap = tl.maximum(scale0 * CAP, tl.maximum(of_peak * FALL, fallen))
    passes = residual <= atol + tl.minimum(rtol * norm_gx, cap)
    hidden = rounding > atol + tl.maximum(scale0, of_peak) * HIDDEN
    reference = tl.maximum(first, scale0 * EPSILON * FLOOR)
    grows = (peak > reference * DIVERGENCE) & ((residual < peak * NEAR_PEAK) == 0)
    grows = grows & (step - growth_step < STALL_STEPS)
    largest = LARGEST_DOUBLE if EPSILON <= DOUBLE_EPSILON else LARGEST_SINGLE
    ran_away = grows & (residual > largest * OVERFLOW) & (SAFEGUARDED == 0)
    least = EPSILON * (HALF_FLOOR if EPSILON > HALF_EPSILON else FLOOR)
    floor = tl.load(counters + LEAST_FLOOR).to(tl.float64)
    phase = tl.where(floor <= least, picard_length, 0.0) if SAFEGUARDED else 0.0
    at_floor = step - gain_step >= tl.maximum(phase, STALL_STEPS)
    at_floor = at_floor & (best_relative.to(tl.float64) <= tl.maximum(floor, least))
    status = tl.where(step >= max_steps, tl.where(grows, DIVERGED, MAX_STEPS), ACTIVE)
    status = tl.where(finite & at_floor, STALLED, status)
    status = tl.where(finite & (ran_away | (passes & hidden)), DIVERGED, status)
    status = tl.where(finite & passes & (hidden == 0), CONVERGED, status)
    status = tl.where(hopeless, NONFINITE, status)

    move = tl.where(finite, PICARD, REJECT)
    anchors = step < 0
    if SAFEGUARDED:
        going = finite & (status == ACTIVE)
        in_phase = picard_left > 0
        picard_grew = residual > previous * PICARD_GROWTH
        grew = residual > best * GROWTH
        clean = (patience == PATIENCE) & (picard_left <= FIRST_PICARD - (FIRST_LEAST - 1))
        clean = clean & (residual <= first * FIRST_GAIN)
        left = tl.where(picard_grew | clean, 0.0, picard_left - 1)
        leaves = in_phase & (left <= 0)
        returns = leaves & picard_grew & grew
        anchors = going & leaves & (returns == 0)
        enters = (in_phase == 0) & (grew | (since_best >= patience))
        lets_go = (in_phase == 0) & (best <= anchored * LET_GO)
        now_anchored = tl.where(lets_go, 0.0, anchored)
        to_anchor = enters & (now_anchored > 0)
        now_anchored = tl.where(leaves & (returns == 0), best, now_anchored)
        now_anchored = tl.where(returns | to_anchor, 0.0, now_anchored)
        length = picard_length + tl.where(to_anchor, 1.0, 0.0)
        against = tl.where(to_anchor, float("inf"), residual)
        chosen = tl.where(enters | (in_phase & (leaves == 0)), PICARD, MIX)
        chosen = tl.where(returns, RETURN, chosen)
        chosen = tl.where(to_anchor, ANCHOR, chosen)
        move = tl.where(going, chosen, move)
        enters = going & enters
        columns = tl.where(going & returns, 0.0, columns)
        anchored = tl.where(going, now_anchored, anchored)
        left = tl.where(in_phase, left, 0.0)
        picard_left = tl.where(going, tl.where(enters, length, left), picard_left)
        previous = tl.where(enters, against, previous)
        patience = tl.where(enters, 2 * patience, patience)
        picard_length = tl.where(enters, 2 * picard_length, picard_length)
        since_best = tl.where(enters | (going & leaves), 0.0, since_best)
    move = tl.where(status == ACTIVE, move, STOP)
    improved = improved | (status == CONVERGED) | (hopeless & first_step)

    # Every warp has read the whole row and the step count before any of it is overwritten.
    tl.debug_barrier()
    tl.store(control + SCALE0, scale0)
    tl.store(control + FIRST, first)
    tl.store(control + BEST, best)
    tl.store(control + PREVIOUS, previous)
    tl.store(control + GAIN_RESIDUAL, gain_residual)
    tl.store(control + PEAK, peak)
    tl.store(control + PEAK_NORM, peak_norm)
    tl.store(control + ANCHORED, anchored)
    tl.store(counters + BEST_RELATIVE, best_relative)
    tl.store(counters + GAIN_STEP, gain_step.to(tl.float32))
    tl.store(counters + GROWTH_STEP, growth_step.to(tl.float32))
    tl.store(counters + SINCE_BEST, since_best.to(tl.float32))
    tl.store(counters + PATIENCE_LEFT, patience.to(tl.float32))
    tl.store(counters + NEXT_LENGTH, picard_length.to(tl.float32))
    tl.store(counters + PICARD_LEFT, picard_left.to(tl.float32))
    tl.store(counters + MIXING_SCALE, mixing_scale.to(tl.float32))
    tl.store(counters + REJECTED, rejections.to(tl.float32))
    return move, status, improved, anchors, mixing_scale, best, columns
