"""The rules of csrc/common/decide.h for one sample, on scalars.

Here and in the other kernels small expressions are written out, not made functions: Triton's
interpreter, which tests run under, takes a millisecond to call one. It cannot spread a boolean
scalar over a block either: hence tl.where(flag, mask, False) for `flag & mask`. What is finite
is found by size: `v - v == 0` of a product v is contracted to a fused multiply-add on a device,
which leaves the product's rounding.
"""

import triton
import triton.language as tl

from fpi_cuda.backends import rules
from fpi_cuda.control import CONTROL_FIELDS, CONTROL_SIZE
from fpi_cuda.result import Status

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
GROWTH = tl.constexpr(rules.GROWTH)
HIDDEN = tl.constexpr(rules.HIDDEN)
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
DIVERGENCE_STEPS = tl.constexpr(rules.DIVERGENCE_STEPS)
REJECTIONS = tl.constexpr(rules.REJECTIONS)
GROWTHS = tl.constexpr(rules.GROWTHS)
GAIN = tl.constexpr(rules.GAIN)
FLOOR = tl.constexpr(rules.FLOOR)

CONTROL_STRIDE = tl.constexpr(CONTROL_SIZE)
SCALE0 = tl.constexpr(CONTROL_FIELDS.index("scale0"))
FIRST = tl.constexpr(CONTROL_FIELDS.index("first"))
BEST = tl.constexpr(CONTROL_FIELDS.index("best"))
PREVIOUS = tl.constexpr(CONTROL_FIELDS.index("previous"))
GAIN_RESIDUAL = tl.constexpr(CONTROL_FIELDS.index("gain_residual"))
GAIN_STEP = tl.constexpr(CONTROL_FIELDS.index("gain_step"))
SINCE_BEST = tl.constexpr(CONTROL_FIELDS.index("since_best"))
PATIENCE_LEFT = tl.constexpr(CONTROL_FIELDS.index("patience"))
NEXT_LENGTH = tl.constexpr(CONTROL_FIELDS.index("picard_length"))
PICARD_LEFT = tl.constexpr(CONTROL_FIELDS.index("picard_left"))
MIXING_SCALE = tl.constexpr(CONTROL_FIELDS.index("mixing_scale"))
REJECTED = tl.constexpr(CONTROL_FIELDS.index("rejections"))
GREW = tl.constexpr(CONTROL_FIELDS.index("growths"))
COLUMNS = tl.constexpr(CONTROL_FIELDS.index("columns"))
HEAD = tl.constexpr(CONTROL_FIELDS.index("head"))
HAS_PREVIOUS = tl.constexpr(CONTROL_FIELDS.index("has_previous"))
ANCHORED = tl.constexpr(CONTROL_FIELDS.index("anchored"))


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
    first_step = step == 1
    scale0 = tl.where(first_step, tl.maximum(norm_x, norm_gx), tl.load(control + SCALE0))
    first = tl.where(first_step, residual, tl.load(control + FIRST))
    best = tl.where(first_step, residual, tl.load(control + BEST))
    previous = tl.where(first_step, residual * FIRST_GROWTH, tl.load(control + PREVIOUS))
    gain_residual = tl.where(first_step, residual, tl.load(control + GAIN_RESIDUAL))
    gain_step = tl.where(first_step, 1.0, tl.load(control + GAIN_STEP))
    since_best = tl.where(first_step, 0.0, tl.load(control + SINCE_BEST))
    patience = tl.where(first_step, PATIENCE, tl.load(control + PATIENCE_LEFT))
    picard_length = tl.where(first_step, PICARD_LENGTH, tl.load(control + NEXT_LENGTH))
    picard_left = tl.where(first_step, FIRST_PICARD, tl.load(control + PICARD_LEFT))
    mixing_scale = tl.where(first_step, 1.0, tl.load(control + MIXING_SCALE))
    rejections = tl.where(first_step, 0.0, tl.load(control + REJECTED))
    growths = tl.where(first_step, 0.0, tl.load(control + GREW))
    columns = tl.where(first_step, 0.0, tl.load(control + COLUMNS))
    anchored = tl.where(first_step, 0.0, tl.load(control + ANCHORED))

    finite = residual < float("inf")
    rejections = tl.where(finite, 0.0, rejections + 1)
    hopeless = (finite == 0) & (first_step | (rejections >= REJECTIONS))
    improved = finite & (first_step | (residual < best))
    progressed = finite & (first_step | (residual < best * PROGRESS))
    since_best = tl.where(finite, tl.where(progressed, 0.0, since_best + 1), since_best)
    best = tl.where(improved, residual, best)
    mixing_scale = tl.where(improved, tl.minimum(2 * mixing_scale, 1.0), mixing_scale)
    mixing_scale = tl.where(finite, mixing_scale, mixing_scale * 0.5)
    gained = finite & (best <= gain_residual * GAIN)
    gain_residual = tl.where(gained, best, gain_residual)
    gain_step = tl.where(gained, step.to(tl.float64), gain_step)

    passes = residual <= atol + tl.minimum(rtol * norm_gx, scale0 * CAP)
    hidden = norm_gx * EPSILON > atol + scale0 * HIDDEN
    reference = tl.maximum(first, scale0 * EPSILON * FLOOR)
    ran_away = (step > DIVERGENCE_STEPS) & (residual > reference * DIVERGENCE)
    floor_steps = tl.maximum(picard_length, STALL_STEPS) if SAFEGUARDED else STALL_STEPS
    at_floor = (step - gain_step >= floor_steps) & (best <= norm_gx * EPSILON * FLOOR)
    status = tl.where(step >= max_steps, MAX_STEPS, ACTIVE)
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
        growths = tl.where(going, tl.where(grew & (in_phase == 0), growths + 1, 0.0), growths)
        gives_up = growths >= GROWTHS
        clean = (patience == PATIENCE) & (picard_left <= FIRST_PICARD - (FIRST_LEAST - 1))
        clean = clean & (residual <= first * FIRST_GAIN)
        left = tl.where(picard_grew | clean, 0.0, picard_left - 1)
        leaves = in_phase & (left <= 0)
        returns = leaves & picard_grew & grew
        anchors = going & leaves & (returns == 0) & (gives_up == 0)
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
        chosen = tl.where(gives_up, STOP, chosen)
        move = tl.where(going, chosen, move)
        changes = going & (gives_up == 0)
        status = tl.where(going & gives_up, DIVERGED, status)
        enters = changes & enters
        columns = tl.where(changes & returns, 0.0, columns)
        anchored = tl.where(changes, now_anchored, anchored)
        left = tl.where(in_phase, left, 0.0)
        picard_left = tl.where(changes, tl.where(enters, length, left), picard_left)
        previous = tl.where(enters, against, previous)
        patience = tl.where(enters, 2 * patience, patience)
        picard_length = tl.where(enters, 2 * picard_length, picard_length)
        since_best = tl.where(enters | (changes & leaves), 0.0, since_best)
    move = tl.where(status == ACTIVE, move, STOP)
    improved = improved | (status == CONVERGED) | (hopeless & first_step)

    # Every warp has read the whole row and the step count before any of it is overwritten.
    tl.debug_barrier()
    tl.store(control + SCALE0, scale0)
    tl.store(control + FIRST, first)
    tl.store(control + BEST, best)
    tl.store(control + PREVIOUS, previous)
    tl.store(control + GAIN_RESIDUAL, gain_residual)
    tl.store(control + GAIN_STEP, gain_step)
    tl.store(control + SINCE_BEST, since_best)
    tl.store(control + PATIENCE_LEFT, patience)
    tl.store(control + NEXT_LENGTH, picard_length)
    tl.store(control + PICARD_LEFT, picard_left)
    tl.store(control + MIXING_SCALE, mixing_scale)
    tl.store(control + REJECTED, rejections)
    tl.store(control + GREW, growths)
    tl.store(control + ANCHORED, anchored)
    return move, status, improved, anchors, mixing_scale, best, columns
