"""The rules of csrc/common/decide.h and small_solve.h in plain torch, for a whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpi_cuda.ops.solver_state import CONTROL_FIELDS, COUNTERS, NORMS
from fpi_cuda.solution import Status

STOP, MIX, PICARD, REJECT, RETURN, ANCHOR = range(6)

CAP = 0.1
FALL = 0.01
LEAST_FALL = 0.125
SETTLED = 4.0
HIDDEN = 0.25
GROWTH = 10.0
PATIENCE = 3.0
PROGRESS = 0.9
LET_GO = 0.35
FIRST_PICARD = 9.0
FIRST_LEAST = 4.0
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


@dataclass(frozen=True)
class Rules:
    """What the stop test is judged by; `atol` is (B,), the rest one number for the batch."""

    atol: Tensor
    rtol: float
    epsilon: float
    largest: float
    max_steps: int
    stall_steps: int
    safeguarded: bool


@dataclass(frozen=True)
class Measured:
    """(B,) float64 norms of one evaluation."""

    residual: Tensor
    norm_gx: Tensor
    norm_x: Tensor


@dataclass(frozen=True)
class Decision:
    """(B,) move, status, whether x is the best point so far, and whether it becomes the anchor.

    Moves: STOP, MIX, PICARD, REJECT, RETURN, ANCHOR; see csrc/common/decide.h.
    """

    move: Tensor
    status: Tensor
    improved: Tensor
    anchors: Tensor


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


def relative(at: Measured) -> Tensor:
    """The residual over ||g||, as it is kept: 1 where it is more."""
    ratio = at.residual / at.norm_gx
    return torch.where(ratio < 1, ratio, 1.0).float().double()


def started(at: Measured, floor: Tensor) -> Control:
    """What the rules remember at the first evaluation, beside the floor that was given."""
    zero = torch.zeros_like(at.residual)
    fresh = dict.fromkeys(CONTROL_FIELDS, zero)
    fresh["floor"] = floor
    fresh["scale0"] = torch.maximum(at.norm_x, at.norm_gx)
    for name in ("first", "best", "gain_residual", "peak"):
        fresh[name] = at.residual
    fresh["peak_norm"] = at.norm_gx
    fresh["best_relative"] = relative(at)
    fresh["previous"] = FIRST_GROWTH * at.residual
    for name in ("gain_step", "growth_step", "mixing_scale"):
        fresh[name] = zero + 1
    fresh["picard_left"] = zero + FIRST_PICARD
    fresh["patience"] = zero + PATIENCE
    fresh["picard_length"] = zero + PICARD_LENGTH
    return fresh


def chosen(where: Tensor, new: Control, old: Control) -> Control:
    """`new` in the samples of `where`, `old` in the others."""
    return {name: torch.where(where, new[name], old[name]) for name in CONTROL_FIELDS}


def decide(c: Control, at: Measured, rules: Rules, step: Tensor) -> tuple[Control, Decision]:
    """Judge evaluation number `step` (B,), from 1, of every sample; see csrc/common/decide.h."""
    c = chosen(step == 1, started(at, c["floor"]), c)
    finite = torch.isfinite(at.residual)
    improved = finite & ((step == 1) | (at.residual < c["best"]))

    starts_over = finite if rules.safeguarded else improved
    rejections = torch.where(starts_over, 0.0, c["rejections"] + (~finite).double())
    hopeless = ~finite & ((step == 1) | (rejections >= REJECTIONS))

    plain = c["picard_left"] > 0 if rules.safeguarded else finite
    rose = plain & (at.residual > RISE * c["peak"])
    peaks = rose | (plain & (at.norm_gx > SETTLED * c["peak_norm"]))
    best = torch.where(improved, at.residual, c["best"])
    progressed = finite & ((step == 1) | (at.residual < PROGRESS * c["best"]))
    since_best = torch.where(progressed, 0.0, c["since_best"] + 1)
    mixing = torch.where(improved, (2 * c["mixing_scale"]).clamp(max=1.0), c["mixing_scale"])
    gained = best <= GAIN * c["gain_residual"]
    judged = {
        **c,
        "peak": torch.where(peaks, at.residual, c["peak"]),
        "peak_norm": torch.where(peaks, at.norm_gx, c["peak_norm"]),
        "growth_step": torch.where(rose, step.double(), c["growth_step"]),
        "best": best,
        "best_relative": torch.where(improved, relative(at), c["best_relative"]),
        "since_best": since_best,
        "mixing_scale": mixing,
        "gain_residual": torch.where(gained, best, c["gain_residual"]),
        "gain_step": torch.where(gained, step.double(), c["gain_step"]),
        "rejections": rejections,
    }
    rejected = {**c, "rejections": rejections, "mixing_scale": c["mixing_scale"] * 0.5}
    c = chosen(finite, judged, rejected)

    rounding = rules.epsilon * at.norm_gx
    cap, most_hidden = drift_limits(c["scale0"], c["peak"], c["peak_norm"], at.norm_gx, rounding)
    passes = at.residual <= rules.atol + torch.minimum(rules.rtol * at.norm_gx, cap)
    hidden = rounding > rules.atol + most_hidden
    converged = passes & ~hidden
    reference = torch.maximum(c["first"], FLOOR * rules.epsilon * c["scale0"])
    grows = (c["peak"] > DIVERGENCE * reference) & ~(at.residual < NEAR_PEAK * c["peak"])
    grows &= step - c["growth_step"] < rules.stall_steps
    ran_away = grows & (at.residual > OVERFLOW * rules.largest) & (not rules.safeguarded)
    least = least_floor(rules.epsilon)
    waits = (c["floor"] <= least) & rules.safeguarded
    phase = torch.where(waits, c["picard_length"], 0.0)
    at_floor = step - c["gain_step"] >= phase.clamp(min=rules.stall_steps)
    at_floor &= c["best_relative"] <= c["floor"].clamp(min=least)
    status = torch.full_like(step, Status.ACTIVE)
    for holds, name in (
        (step >= rules.max_steps, Status.MAX_STEPS),
        ((step >= rules.max_steps) & grows, Status.DIVERGED),
        (finite & at_floor, Status.STALLED),
        (finite & (ran_away | (passes & hidden)), Status.DIVERGED),
        (finite & converged, Status.CONVERGED),
        (hopeless, Status.NONFINITE),
    ):
        status = torch.where(holds, int(name), status)

    move = torch.where(finite, PICARD, REJECT)
    going = finite & (status == Status.ACTIVE)
    if rules.safeguarded:
        advanced, chosen_move, anchors = next_move(c, at)
        c = chosen(going, advanced, c)
        move = torch.where(going, chosen_move, move)
        anchors = going & anchors
    else:
        anchors = torch.zeros_like(going)
    move = torch.where(status == Status.ACTIVE, move, STOP)
    improved = improved | (status == Status.CONVERGED) | (hopeless & (step == 1))
    return c, Decision(move, status, improved, anchors)


def drift_limits(
    scale0: Tensor, peak: Tensor, peak_norm: Tensor, norm_gx: Tensor, rounding: Tensor
) -> tuple[Tensor, Tensor]:
    """What a residual, and a rounding of g, may be at most: drifting off is no convergence.

    Args:
        scale0, peak, peak_norm: see fpi_cuda.ops.solver_state.
        rounding: epsilon ||g||.
    """
    of_peak = torch.where(norm_gx <= SETTLED * peak_norm, peak, 0.0)
    fallen = torch.minimum(HALF_FLOOR * rounding, LEAST_FALL * of_peak)
    fallen = torch.where(rounding <= HIDDEN * of_peak, fallen, 0.0)
    cap = torch.maximum(CAP * scale0, torch.maximum(FALL * of_peak, fallen))
    return cap, HIDDEN * torch.maximum(scale0, of_peak)


def least_floor(epsilon: float) -> float:
    """The part of ||g|| below which the state's rounding decides; see csrc/common/decide.h."""
    return epsilon * (HALF_FLOOR if epsilon > HALF_EPSILON else FLOOR)


def next_move(c: Control, at: Measured) -> tuple[Control, Tensor, Tensor]:
    """The move and whether x becomes the anchor; see csrc/common/decide.h."""
    in_phase = c["picard_left"] > 0
    picard_grew = at.residual > PICARD_GROWTH * c["previous"]
    grew = at.residual > GROWTH * c["best"]

    gained = (
        (c["patience"] == PATIENCE)
        & (c["picard_left"] <= FIRST_PICARD - (FIRST_LEAST - 1))
        & (at.residual <= FIRST_GAIN * c["first"])
    )
    left = torch.where(picard_grew | gained, 0.0, c["picard_left"] - 1)
    leaves = in_phase & (left <= 0)
    returns = leaves & picard_grew & grew
    anchors = leaves & ~returns
    enters = ~in_phase & (grew | (c["since_best"] >= c["patience"]))
    lets_go = ~in_phase & (c["best"] <= LET_GO * c["anchored"])
    anchored = torch.where(lets_go, 0.0, c["anchored"])
    to_anchor = enters & (anchored > 0)
    anchored = torch.where(returns | to_anchor, 0.0, torch.where(anchors, c["best"], anchored))
    length = c["picard_length"] + to_anchor
    against = torch.where(to_anchor, torch.inf, at.residual)
    advanced = {
        **c,
        "anchored": anchored,
        "columns": torch.where(returns, 0.0, c["columns"]),
        "previous": torch.where(enters, against, c["previous"]),
        "picard_left": torch.where(enters, length, torch.where(in_phase, left, 0.0)),
        "patience": torch.where(enters, 2 * c["patience"], c["patience"]),
        "picard_length": torch.where(enters, 2 * c["picard_length"], c["picard_length"]),
        "since_best": torch.where(enters | leaves, 0.0, c["since_best"]),
    }
    move = torch.where(enters | (in_phase & ~leaves), PICARD, MIX)
    for holds, other in ((returns, RETURN), (to_anchor, ANCHOR)):
        move = torch.where(holds, other, move)
    return advanced, move, anchors


def worth_mixing(gamma: Tensor, rhs: Tensor, ff: Tensor) -> Tensor:
    """(B,) whether gamma (B, m) takes enough off ||f||^2 = ff; see csrc/common/small_solve.h."""
    return torch.where(gamma != 0, gamma * rhs, 0.0).sum(1) >= LEAST_GAIN * ff


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


def solve_small(gram: Tensor, rhs: Tensor, columns: Tensor, head: Tensor, ridge: float) -> Tensor:
    """gamma (B, m) by slot, of min ||f - dF gamma||^2 + ridge |D gamma|^2, D the column norms.

    Columns are scaled to unit norm and factored newest first; one whose pivot is below
    SMALLEST_PIVOT is skipped.

    Args:
        gram: (B, m, m) float64 by slot. rhs: (B, m) float64. columns, head: (B,).
    Source:
        Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, section 4 (on conditioning).
    """
    depth = gram.shape[1]
    ages = torch.arange(depth, device=gram.device)
    slot_of = (head[:, None].long() - ages) % depth
    square = torch.gather(gram.diagonal(dim1=1, dim2=2), 1, slot_of)
    exists = (ages < columns[:, None]) & (square > 0)
    inverse_norm = torch.where(exists, torch.where(exists, square, 1.0).rsqrt(), 0.0)
    by_age = gram.gather(1, slot_of[:, :, None].expand_as(gram))
    by_age = by_age.gather(2, slot_of[:, None, :].expand_as(gram))
    scaled = by_age * inverse_norm[:, :, None] * inverse_norm[:, None, :]
    target = torch.gather(rhs, 1, slot_of) * inverse_norm

    factor: list[list[Tensor]] = []
    inverse: list[Tensor] = []
    kept: list[Tensor] = []
    gamma: list[Tensor] = []
    zero = torch.zeros_like(target[:, 0])
    for a in range(depth):
        row: list[Tensor] = []
        pivot, value = zero + 1.0 + ridge, target[:, a]
        for b in range(a):
            entry = scaled[:, a, b]
            for k in range(b):
                entry = entry - row[k] * factor[b][k]
            entry = torch.where(kept[b], entry * inverse[b], 0.0)
            row.append(entry)
            pivot = pivot - entry * entry
            value = value - entry * gamma[b]
        keeps = exists[:, a] & (pivot >= SMALLEST_PIVOT) & pivot.isfinite() & value.isfinite()
        kept.append(keeps)
        inverse.append(torch.where(keeps, pivot, 1.0).rsqrt())
        factor.append([torch.where(keeps, entry, 0.0) for entry in row])
        gamma.append(torch.where(keeps, value * inverse[a], 0.0))
    for a in reversed(range(depth)):
        value = gamma[a]
        for b in range(a + 1, depth):
            value = value - factor[b][a] * gamma[b]
        gamma[a] = torch.where(kept[a], value * inverse[a], 0.0)
    by_age_gamma = torch.stack(gamma, dim=1) * inverse_norm
    return torch.zeros_like(rhs).scatter(1, slot_of, by_age_gamma)
