"""The rules of csrc/common/decide.h and small_solve.h, for any number of samples at once.

`xp` is torch here. fpi_cuda.ops.triton.rules compiles the same source with xp = triton.language,
so the functions that use it keep to what both know: `== 0` for not, axis for dim, arguments that
are a Tensor, a float or an int; and nothing in place, for Unroll differentiates them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpi_cuda.ops.solver_state import CONTROL_FIELDS, COUNTERS, NORMS
from fpi_cuda.solution import Status

xp: Any = torch

ACTIVE, CONVERGED, MAX_STEPS, STALLED, DIVERGED, NONFINITE = map(int, Status)
MOVES = STOP, MIX, PICARD, REJECT, RETURN, ANCHOR = range(6)

CAP = 0.1
FALL = 0.01
LEAST_FALL = 0.125
SETTLED = 4.0
DRIFT_FRACTION = 0.25
GROWTH = 10.0
PATIENCE = 3.0
PROGRESS = 0.9
ANCHOR_RELEASE = 0.35
FIRST_PICARD = 9.0
MIN_FIRST_PICARD = 4.0
FIRST_GAIN = 0.05
FIRST_GROWTH = 8.0
PICARD_LENGTH = 8.0
PICARD_GROWTH = 4.0
DIVERGENCE = 1e6
RISE = 1.1
NEAR_PEAK = 0.5
OVERFLOW = 1e-3
REJECTIONS = 8
GAIN = 0.9
FLOOR = 64.0
HALF_FLOOR = 8.0
HALF_EPSILON = 1e-4
SMALLEST_PIVOT = 1e-10
LEAST_GAIN = 1.0 - 0.99 * 0.99

Control = dict[str, Tensor]
"""The columns of the `control` tensor by name, each (B,) float64, counters too."""


DECIDED = CONTROL_FIELDS[: CONTROL_FIELDS.index("columns") + 1]
"""Those that `decide` brings up to date; the rest is the history's."""


class Rules(NamedTuple):
    """What the stop test is judged by; `atol` is (B,), the rest one number for the batch."""

    atol: Tensor
    rtol: float
    max_steps: int
    epsilon: float
    largest: float
    stall_steps: int
    safeguarded: bool


def read_control(control: Tensor) -> Control:
    """The columns of `control` by name."""
    counters = control.view(torch.float32)[:, 2 * len(NORMS) :].double()
    values = (*control[:, : len(NORMS)].unbind(1), *counters.unbind(1))
    return dict(zip(CONTROL_FIELDS, values, strict=True))


def write_control(columns: Control) -> Tensor:
    """The (B, CONTROL_SIZE) tensor of these columns."""
    norms = torch.stack([columns[name] for name in NORMS], dim=1)
    counters = torch.stack([columns[name] for name in COUNTERS], dim=1).float()
    return torch.cat([norms, counters.view(torch.float64)], dim=1)


def least_floor(epsilon: float) -> float:
    """The part of ||g|| below which the state's rounding decides; see csrc/common/decide.h."""
    return epsilon * (HALF_FLOOR if epsilon > HALF_EPSILON else FLOOR)


def lower_triangle(gram: Tensor) -> Tensor:
    """(B, m (m + 1) / 2), row by row, of Gram matrices (B, m, m)."""
    i, j = torch.tril_indices(*gram.shape[1:], device=gram.device)
    return gram[:, i, j]


def whole_gram(triangle: Tensor, depth: int) -> Tensor:
    """(B, depth, depth), of which `triangle` is the lower triangle."""
    i, j = torch.tril_indices(depth, depth, device=triangle.device)
    place = torch.empty(depth, depth, dtype=torch.int64, device=triangle.device)
    place[i, j] = place[j, i] = torch.arange(len(i), device=triangle.device)
    return triangle[:, place]


def drift_limits(
    scale0: Tensor, peak: Tensor, peak_norm: Tensor, norm_gx: Tensor, rounding: Tensor
) -> tuple[Tensor, Tensor]:
    """What a residual, and a rounding of g, may be at most: drifting off is no convergence.

    Args:
        scale0, peak, peak_norm: see fpi_cuda.ops.solver_state.
        rounding: epsilon ||g||.
    """
    of_peak = xp.where(norm_gx <= peak_norm * SETTLED, peak, 0.0)
    fallen = xp.minimum(rounding * HALF_FLOOR, of_peak * LEAST_FALL)
    fallen = xp.where(rounding <= of_peak * DRIFT_FRACTION, fallen, 0.0)
    cap = xp.maximum(scale0 * CAP, xp.maximum(of_peak * FALL, fallen))
    return cap, xp.maximum(scale0, of_peak) * DRIFT_FRACTION


def decide(
    scale0: Tensor,
    first: Tensor,
    best: Tensor,
    previous: Tensor,
    gain_residual: Tensor,
    peak: Tensor,
    peak_norm: Tensor,
    anchored: Tensor,
    best_relative: Tensor,
    floor: Tensor,
    gain_step: Tensor,
    growth_step: Tensor,
    since_best: Tensor,
    patience: Tensor,
    picard_length: Tensor,
    picard_left: Tensor,
    mixing_scale: Tensor,
    rejections: Tensor,
    columns: Tensor,
    residual: Tensor,
    norm_gx: Tensor,
    norm_x: Tensor,
    step: Tensor,
    atol: Tensor,
    rtol: float,
    max_steps: int,
    epsilon: float,
    largest: float,
    stall_steps: float,
    safeguarded: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Judge evaluation number `step`, from 1, of every sample; see csrc/common/decide.h.

    Args:
        scale0 to columns: see fpi_cuda.ops.solver_state; columns, and what comes before it.
        residual, norm_gx, norm_x: ||g(x) - x||, ||g(x)|| and ||x||, float64.
        atol to safeguarded: see Rules.
    Returns:
        The move, the status, whether x is the best point so far, whether it becomes the anchor, and
        the norms and the counters as they are now.
    """
    first_step = step == 1
    relative = residual / norm_gx
    relative = xp.where(relative < 1, relative, 1.0).to(xp.float32).to(xp.float64)
    scale0 = xp.where(first_step, xp.maximum(norm_x, norm_gx), scale0)
    first = xp.where(first_step, residual, first)
    best = xp.where(first_step, residual, best)
    previous = xp.where(first_step, residual * FIRST_GROWTH, previous)
    gain_residual = xp.where(first_step, residual, gain_residual)
    peak = xp.where(first_step, residual, peak)
    peak_norm = xp.where(first_step, norm_gx, peak_norm)
    anchored = xp.where(first_step, 0.0, anchored)
    best_relative = xp.where(first_step, relative, best_relative.to(xp.float64))
    floor = floor.to(xp.float64)
    gain_step = xp.where(first_step, 1.0, gain_step.to(xp.float64))
    growth_step = xp.where(first_step, 1.0, growth_step.to(xp.float64))
    since_best = xp.where(first_step, 0.0, since_best.to(xp.float64))
    patience = xp.where(first_step, PATIENCE, patience.to(xp.float64))
    picard_length = xp.where(first_step, PICARD_LENGTH, picard_length.to(xp.float64))
    picard_left = xp.where(first_step, FIRST_PICARD, picard_left.to(xp.float64))
    mixing_scale = xp.where(first_step, 1.0, mixing_scale.to(xp.float64))
    rejections = xp.where(first_step, 0.0, rejections.to(xp.float64))
    columns = xp.where(first_step, 0.0, columns.to(xp.float64))

    # Not residual - residual == 0: contracted on a device, that leaves a product's rounding.
    finite = residual < float("inf")
    improved = finite & (first_step | (residual < best))
    starts_over = finite if safeguarded else improved
    rejections = xp.where(starts_over, 0.0, rejections + xp.where(finite, 0.0, 1.0))
    failed_forward = (finite == 0) & (first_step | (rejections >= REJECTIONS))
    plain = finite & (picard_left > 0) if safeguarded else finite
    rose = plain & (residual > peak * RISE)
    growth_step = xp.where(rose, step.to(xp.float64), growth_step)
    peaks = rose | (plain & (norm_gx > peak_norm * SETTLED))
    peak = xp.where(peaks, residual, peak)
    peak_norm = xp.where(peaks, norm_gx, peak_norm)
    progressed = finite & (first_step | (residual < best * PROGRESS))
    since_best = xp.where(finite, xp.where(progressed, 0.0, since_best + 1), since_best)
    best = xp.where(improved, residual, best)
    best_relative = xp.where(improved, relative, best_relative)
    doubled = xp.where(mixing_scale < 0.5, 2 * mixing_scale, 1.0)
    mixing_scale = xp.where(improved, doubled, mixing_scale)
    mixing_scale = xp.where(finite, mixing_scale, mixing_scale * 0.5)
    gained = finite & (best <= gain_residual * GAIN)
    gain_residual = xp.where(gained, best, gain_residual)
    gain_step = xp.where(gained, step.to(xp.float64), gain_step)

    rounding = norm_gx * epsilon
    cap, most_hidden = drift_limits(scale0, peak, peak_norm, norm_gx, rounding)
    passes = residual <= atol + xp.minimum(norm_gx * rtol, cap)
    hidden = rounding > atol + most_hidden
    reference = xp.maximum(first, scale0 * epsilon * FLOOR)
    grows = (peak > reference * DIVERGENCE) & ((residual < peak * NEAR_PEAK) == 0)
    grows = grows & (step - growth_step < stall_steps)
    ran_away = grows & (residual > largest * OVERFLOW) & (safeguarded == 0)
    least = epsilon * (HALF_FLOOR if epsilon > HALF_EPSILON else FLOOR)
    idle = step - gain_step
    at_floor = (idle >= stall_steps) & ((best_relative <= least) | (best_relative <= floor))
    if safeguarded:
        at_floor = at_floor & ((floor > least) | (idle >= picard_length))
    status = xp.where(step >= max_steps, xp.where(grows, DIVERGED, MAX_STEPS), ACTIVE)
    status = xp.where(finite & at_floor, STALLED, status)
    status = xp.where(finite & (ran_away | (passes & hidden)), DIVERGED, status)
    status = xp.where(finite & passes & (hidden == 0), CONVERGED, status)
    status = xp.where(failed_forward, NONFINITE, status)

    move = xp.where(finite, PICARD, REJECT)
    anchors = step < 0
    if safeguarded:
        going = finite & (status == ACTIVE)
        in_phase = picard_left > 0
        picard_grew = residual > previous * PICARD_GROWTH
        grew = residual > best * GROWTH
        clean = (patience == PATIENCE) & (picard_left <= FIRST_PICARD - (MIN_FIRST_PICARD - 1))
        clean = clean & (residual <= first * FIRST_GAIN)
        left = xp.where(picard_grew | clean, 0.0, picard_left - 1)
        leaves = going & in_phase & (left <= 0)
        returns = leaves & picard_grew & grew
        anchors = leaves & (returns == 0)
        enters = going & (in_phase == 0) & (grew | (since_best >= patience))
        lets_go = going & (in_phase == 0) & (best <= anchored * ANCHOR_RELEASE)
        anchored = xp.where(lets_go, 0.0, anchored)
        to_anchor = enters & (anchored > 0)
        anchored = xp.where(anchors, best, anchored)
        anchored = xp.where(returns | to_anchor, 0.0, anchored)
        columns = xp.where(returns, 0.0, columns)
        length = picard_length + xp.where(to_anchor, 1.0, 0.0)
        left = xp.where(in_phase, left, 0.0)
        picard_left = xp.where(going, xp.where(enters, length, left), picard_left)
        previous = xp.where(enters, xp.where(to_anchor, float("inf"), residual), previous)
        patience = xp.where(enters, 2 * patience, patience)
        picard_length = xp.where(enters, 2 * picard_length, picard_length)
        since_best = xp.where(enters | leaves, 0.0, since_best)
        chosen = xp.where(enters | (in_phase & (leaves == 0)), PICARD, MIX)
        chosen = xp.where(returns, RETURN, xp.where(to_anchor, ANCHOR, chosen))
        move = xp.where(going, chosen, move)
    move = xp.where(status == ACTIVE, move, STOP)
    improved = improved | (status == CONVERGED) | (failed_forward & first_step)
    norms = (scale0, first, best, previous, gain_residual, peak, peak_norm, anchored)
    counters = (
        best_relative, floor, gain_step, growth_step, since_best, patience, picard_length,
        picard_left, mixing_scale, rejections, columns,
    )  # fmt: skip
    return move, status, improved, anchors, norms, counters


def solve_small(
    gram: Tensor, rhs: Tensor, age: Tensor, columns: Tensor, ridge: float, most: int
) -> Tensor:
    """gamma (m, B) by slot, of min ||f - dF gamma||^2 + ridge |D gamma|^2, D the column norms.

    Columns are scaled to unit norm and factored newest first, by outer products; one whose pivot
    is below SMALLEST_PIVOT is skipped.

    Args:
        gram: (m, m, B) float64 by slot. rhs: (m, B) float64, <dF_slot, f>.
        age: (m, B) of each slot, 0 for the newest; no less than `most` where it holds nothing.
        columns: (B,) how many take part, at most `most` of them.
    Source:
        Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, section 4 (on conditioning).
    """
    diagonal = age[:, None, :] == age[None, :, :]
    square = xp.sum(xp.where(diagonal, gram, 0.0), axis=1)
    exists = (age < columns[None, :]) & (square > 0)
    inverse_norm = xp.where(exists, 1.0 / xp.sqrt(xp.where(exists, square, 1.0)), 0.0)
    both = exists[:, None, :] & exists[None, :, :]
    rest = xp.where(both, gram * inverse_norm[:, None, :] * inverse_norm[None, :, :], 0.0)
    rest = xp.where(both & diagonal, 1.0 + ridge, rest)
    target = xp.where(exists, rhs * inverse_norm, 0.0)

    factor = xp.zeros_like(rest)
    roots = xp.zeros_like(target)  # 0 for a column that was skipped
    solved = xp.zeros_like(target)
    # Where a sample has fewer columns its pivots are 0, and nothing of it changes.
    for a in range(most):
        here = age == a
        below = xp.sum(xp.where(here[None, :, :], rest, 0.0), axis=1)
        pivot = xp.sum(xp.where(here, below, 0.0), axis=0)
        value = xp.sum(xp.where(here, target, 0.0), axis=0)
        keeps = (pivot >= SMALLEST_PIVOT) & (pivot < float("inf"))
        keeps = keeps & (xp.abs(value) < float("inf"))
        root = xp.sqrt(xp.where(keeps, pivot, 1.0))[None, :]
        below = xp.where(keeps[None, :] & (age > a), below / root, 0.0)
        value = xp.where(keeps[None, :], value[None, :] / root, 0.0)
        rest = rest - below[:, None, :] * below[None, :, :]
        target = target - below * value
        factor = xp.where(here[None, :, :], below[:, None, :], factor)
        roots = xp.where(keeps[None, :] & here, root, roots)
        solved = xp.where(here, value, solved)

    gamma = xp.zeros_like(target)
    for younger in range(most):
        here = age == most - 1 - younger
        below = xp.sum(xp.where(here[None, :, :], factor, 0.0), axis=1)
        value = solved - xp.sum(xp.where(roots > 0, below * gamma, 0.0), axis=0)[None, :]
        gamma = xp.where(here & (roots > 0), value / xp.where(roots > 0, roots, 1.0), gamma)
    return gamma * inverse_norm


def worth_mixing(gamma: Tensor, rhs: Tensor, ff: Tensor) -> Tensor:
    """(B,) whether gamma (m, B) takes enough off ||f||^2 = ff to be worth a step not Picard's."""
    return xp.sum(xp.where(gamma != 0, gamma * rhs, 0.0), axis=0) >= ff * LEAST_GAIN
