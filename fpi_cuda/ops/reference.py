"""The step ops in plain torch: the oracle of every other backend, on any device.

`anderson_step` and `broyden_step` are functions without side effects, and differentiable: Unroll
runs them under autograd. The ops with a trailing underscore wrap them in the schema of
csrc/step_ops.cpp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.norms import num_moved as num_moved
from fpi_cuda.norms import row_norm
from fpi_cuda.ops.rules import (
    ANCHOR,
    DECIDED,
    MIX,
    PICARD,
    REJECT,
    RETURN,
    STOP,
    Control,
    Rules,
    decide,
    lower_triangle,
    read_control,
    solve_small,
    whole_gram,
    worth_mixing,
    write_control,
)
from fpi_cuda.options import Anderson, Broyden, FixedPointSolver
from fpi_cuda.solution import Status

name = "reference"


@dataclass(frozen=True)
class StepState:
    """What one step reads and writes, for the samples at hand.

    x, best: (n, D). anchor, f_previous, partner_previous: (n, D) or (0, D), see Workspace.
    columns_f, columns_g: (n, m, D).
    gram: (n, m (m + 1) / 2). control: (n, CONTROL_SIZE). status, num_steps, residual: (n,).
    """

    x: Tensor
    best: Tensor
    anchor: Tensor
    f_previous: Tensor
    partner_previous: Tensor
    columns_f: Tensor
    columns_g: Tensor
    gram: Tensor
    control: Tensor
    status: Tensor
    num_steps: Tensor
    residual: Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> over the last dimension in float64."""
    return (a.double() * b.double()).sum(-1)


def unless(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`old` where mask (n,) holds, else `new`; a frozen NaN cannot spread."""
    if len(old) == 0:
        return old
    return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), old, new)


def with_column(columns: Tensor, slot: Tensor, column: Tensor, where: Tensor) -> Tensor:
    """`columns` (n, m, D) with `column` (n, D) in `slot` (n,) of the samples of `where`."""
    depth = columns.shape[1]
    slots = torch.arange(depth, device=columns.device)
    chosen = (slots == slot[:, None]) & where[:, None]
    return torch.where(chosen[:, :, None], column[:, None, :].to(columns.dtype), columns)


def judge(
    s: StepState, gx: Tensor, rules: Rules, c: Control
) -> tuple[StepState, Control, Tensor, Tensor]:
    """Count the evaluation, decide, and write the account, but for `control`.

    Args:
        c: the columns of `control`.
    Returns:
        The state, the columns as they are now, the move, and g(x) - x (n, D).
    """
    wide = torch.float64 if gx.dtype == torch.float64 else torch.float32
    f = gx.to(wide) - s.x.to(wide)
    x, at_x = s.x.detach(), gx.detach()
    norms = (row_norm(at_x.double() - x.double()), row_norm(at_x), row_norm(x))
    step = s.num_steps + 1
    row: list[Any] = [*(c[name] for name in DECIDED), *norms, step, *rules]
    move, status, improved, anchors, *now = decide(*row)
    c = {**c, **dict(zip(DECIDED, (*now[0], *now[1]), strict=True))}
    judged = replace(
        s,
        num_steps=step,
        status=status.to(torch.int8),
        residual=torch.where((move != STOP) | improved, norms[0], c["best"]),
        best=unless(~improved, s.x, s.best),
        anchor=unless(~anchors, s.x, s.anchor),
    )
    return judged, c, move, f


def where_to_go(s: StepState, move: Tensor, stepped: Tensor) -> Tensor:
    """The next x: `stepped`, halfway back to the best point, or a point that was kept."""
    middle = s.best + (s.x - s.best) / 2
    back = torch.where(torch.isfinite(middle), middle, s.best)
    x = unless(move == REJECT, stepped.to(s.x.dtype), back)
    x = unless(move == ANCHOR, x, s.anchor) if len(s.anchor) else x
    return unless((move == STOP) | (move == RETURN), x, s.best)


def anderson_step(s: StepState, gx: Tensor, rules: Rules, beta: float, ridge: float) -> StepState:
    """One Anderson step of every sample, stopped ones too; Picard where m = 0.

    Source:
        Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, eq. (2.2), in difference form.
    """
    depth = s.columns_f.shape[1]
    before = read_control(s.control)
    differs = (before["has_previous"] > 0) & (s.num_steps > 0)
    s, c, move, f = judge(s, gx, rules, before)
    mixing = (beta * c["mixing_scale"])[:, None].to(f.dtype)
    g = gx.to(f.dtype)
    if depth == 0:
        x = where_to_go(s, move, g - (1 - mixing) * f)
        return replace(s, x=x, control=write_control(c))

    goes_on = (move == MIX) | (move == PICARD)
    others = torch.where(differs, c["columns"].clamp(max=depth - 1), c["columns"])
    fresh = next_slot(depth, before["columns"], before["head"])
    f_previous, g_previous = previous(s, fresh)
    df = (f - f_previous).to(s.columns_f.dtype)
    dg = (g - g_previous).to(s.columns_g.dtype)
    size = row_norm(df.detach())
    useful = (size > 0.5 * rules.epsilon * row_norm(gx.detach())) & torch.isfinite(size)
    admits = differs & goes_on & useful
    # Zeroed where it is not taken: under autograd 0 * NaN would reach the products below.
    df, dg = unless(~admits, df, torch.zeros_like(df)), unless(~admits, dg, torch.zeros_like(dg))
    columns_f = with_column(s.columns_f, fresh, df, admits)
    columns_g = with_column(s.columns_g, fresh, dg, admits)

    row = dot(columns_f, df[:, None, :])
    slots = torch.arange(depth, device=gx.device)
    at_fresh = slots == fresh[:, None]
    gram = whole_gram(s.gram, depth)
    gram = torch.where((at_fresh & admits[:, None])[:, :, None], row[:, None, :], gram)
    gram = torch.where((at_fresh & admits[:, None])[:, None, :], row[:, :, None], gram)
    count = torch.where(admits, others + 1, others)
    head = torch.where(admits, fresh, before["head"])
    age = (head[:, None] - slots) % depth
    valid = age < count[:, None]
    rhs = torch.where(valid, dot(torch.where(valid[:, :, None], columns_f, 0.0), f[:, None]), 0.0)
    gram_of_valid = torch.where(valid[:, :, None] & valid[:, None, :], gram, 0.0)
    taking_part = count.clamp(max=f.shape[1])
    gamma = solve_small(gram_of_valid.movedim(0, 2), rhs.mT, age.mT, taking_part, ridge, depth)
    ff = row_norm(f.detach()).square()
    mixes = (move == MIX) & worth_mixing(gamma, rhs.mT, ff)
    gamma = gamma.mT
    gamma = torch.where(valid & mixes[:, None], gamma, 0.0).to(f.dtype)
    taken = gamma[:, :, None]
    g_mixed = g - torch.where(taken != 0, taken * columns_g.to(f.dtype), 0.0).sum(1)
    f_mixed = f - torch.where(taken != 0, taken * columns_f.to(f.dtype), 0.0).sum(1)
    f_previous, partner_previous = s.f_previous, s.partner_previous
    if len(f_previous):
        f_previous = unless(~goes_on, f, f_previous)
        partner_previous = unless(~goes_on, g, partner_previous)
    else:
        slot = next_slot(depth, count, head)
        columns_f = with_column(columns_f, slot, f, goes_on)
        columns_g = with_column(columns_g, slot, g, goes_on)
    return replace(
        s,
        x=where_to_go(s, move, g_mixed - (1 - mixing) * f_mixed),
        f_previous=f_previous,
        partner_previous=partner_previous,
        columns_f=columns_f,
        columns_g=columns_g,
        gram=lower_triangle(gram),
        control=write_control(
            {**c, "columns": count, "head": head, "has_previous": goes_on.double()}
        ),
    )


def next_slot(depth: int, columns: Tensor, head: Tensor) -> Tensor:
    """(n,) the slot of the next difference: the oldest one's, once the history is full."""
    return torch.where(columns == 0, 0.0, (head + 1) % depth)


def previous(s: StepState, slot: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) f and g(x) of the evaluation before this one."""
    if len(s.f_previous):
        return s.f_previous, s.partner_previous
    index = slot.long()[:, None, None].expand(-1, 1, s.x.shape[1])
    return s.columns_f.gather(1, index)[:, 0], s.columns_g.gather(1, index)[:, 0]


SMALLEST_COSINE = 1e-8


def broyden_step(s: StepState, gx: Tensor, rules: Rules, beta: float) -> StepState:
    """One limited-memory Broyden step of every sample, stopped ones too.

    H = -beta I + sum u_i v_i^T approximates the inverse Jacobian of f(x) = g(x) - x; the memory
    starts afresh when full.

    Source:
        Broyden, Math. Comp. 19, 1965; Bai, Kolter, Koltun, NeurIPS 2019, section 3.1.3.
    """
    depth = s.columns_f.shape[1]
    before = read_control(s.control)
    differs = (before["has_previous"] > 0) & (s.num_steps > 0)
    x = s.x.to(torch.float64 if gx.dtype == torch.float64 else torch.float32)
    s, c, move, f = judge(s, gx, rules, before)
    goes_on = (move == MIX) | (move == PICARD)
    mixing = (beta * c["mixing_scale"])[:, None].to(f.dtype)
    count = torch.where(before["columns"] >= depth, 0.0, before["columns"])
    valid = torch.arange(depth, device=gx.device) < count[:, None]
    u = torch.where(valid[:, :, None], s.columns_f, 0.0).to(f.dtype)
    v = torch.where(valid[:, :, None], s.columns_g, 0.0).to(f.dtype)

    step = torch.where(differs[:, None], x - s.partner_previous, 0.0)
    y = torch.where(differs[:, None], f - s.f_previous, 0.0)
    us, vy, vf = dot(u, step[:, None]), dot(v, y[:, None]), dot(v, f[:, None])
    fresh_v = -mixing * step + (us[:, :, None].to(f.dtype) * v).sum(1)
    h_y = -mixing * y + (vy[:, :, None].to(f.dtype) * u).sum(1)
    fresh_v = fresh_v.to(s.columns_g.dtype).to(f.dtype)
    fresh_u = (step - h_y).to(s.columns_f.dtype).to(f.dtype)
    denominator = dot(fresh_v, y)
    size = row_norm(fresh_v.detach()) * row_norm(y.detach())
    updates = goes_on & differs & torch.isfinite(size) & (row_norm(step.detach()) > 0)
    updates &= row_norm(y.detach()) > 0.5 * rules.epsilon * row_norm(gx.detach())
    updates &= denominator.detach().abs() > SMALLEST_COSINE * size
    # In float64: the denominator is a product of two differences, beyond a float's range at times.
    fresh_u = fresh_u.double() / torch.where(updates, denominator, 1.0)[:, None]
    fresh_u = fresh_u.to(s.columns_f.dtype)
    fresh_vf = torch.where(updates, dot(fresh_v, f), 0.0)

    mixes = (move == MIX)[:, None]
    h_f = (vf[:, :, None].to(f.dtype) * u).sum(1)
    h_f = h_f + torch.where(updates[:, None], fresh_vf[:, None].to(f.dtype) * fresh_u, 0.0)
    stepped = x + mixing * f - torch.where(mixes, h_f, 0.0)
    columns = torch.where(goes_on, count + updates, c["columns"])
    return replace(
        s,
        x=where_to_go(s, move, stepped),
        f_previous=unless(~goes_on, f, s.f_previous),
        partner_previous=unless(~goes_on, x, s.partner_previous),
        columns_f=with_column(s.columns_f, count, fresh_u, updates),
        columns_g=with_column(s.columns_g, count, fresh_v, updates),
        control=write_control({**c, "columns": columns, "has_previous": goes_on.double()}),
    )


def step(s: StepState, gx: Tensor, rules: Rules, solver: FixedPointSolver) -> StepState:
    """One step of `solver` on every active sample, without side effects and differentiable."""
    if isinstance(solver, Broyden):
        return frozen(s, broyden_step(s, gx, rules, solver.beta))
    if isinstance(solver, Anderson):
        return frozen(s, anderson_step(s, gx, rules, solver.beta, solver.ridge))
    return frozen(s, anderson_step(s, gx, rules, solver.damping, 0.0))


def rules_for(state: torch.dtype, depth: int, atol: Tensor, rtol: float, max_steps: int) -> Rules:
    """The rules of one solve; patience with a floor grows with the history."""
    return Rules(
        atol=atol,
        rtol=rtol,
        epsilon=torch.finfo(state).eps,
        largest=torch.finfo(torch.promote_types(state, torch.float32)).max,
        max_steps=max_steps,
        stall_steps=max(20, 3 * depth),
        safeguarded=depth > 0,
    )


def scratch(x: Tensor) -> Tensor | None:
    """What a solve from x (B, D) must pass to every step as `scratch`: nothing."""
    return None


def anderson_step_(
    x: Tensor,
    gx: Tensor,
    sample_of: Tensor | None,
    best: Tensor,
    anchor: Tensor,
    f_previous: Tensor,
    g_previous: Tensor,
    columns_f: Tensor,
    columns_g: Tensor,
    gram: Tensor,
    control: Tensor,
    atol: Tensor,
    status: Tensor,
    num_steps: Tensor,
    residual: Tensor,
    *,
    rtol: float,
    max_steps: int,
    beta: float,
    ridge: float,
    scratch: Tensor | None = None,
) -> None:
    """Advance every active sample by one Anderson step, in place; Picard where m = 0.

    Args:
        x: (n, D) current iterate; overwritten with the next.
        gx: (n, D) g(x), same dtype.
        sample_of: (n,) int64, the sample of each row of x; None where n = B.
        best: (B, D) best point so far; the point to return once the sample has stopped.
        anchor: (B, D) where the last Picard phase ended; (0, D) where m = 0.
        f_previous, g_previous: (B, D) g(x) - x and g(x) one step ago; (0, D) where the history
            has the compute dtype: they then lie in the slot of the next difference.
        columns_f, columns_g: (B, m, D) the last m differences of each, a ring.
        gram: (B, m (m + 1) / 2) float64 <dF_i, dF_j>, j <= i, row by row.
        control: (B, CONTROL_SIZE) float64, see csrc/common/control.h.
        atol: (B,) float64.
        status: (B,) int8; set where the sample stops. num_steps: (B,) int32.
        residual: (B,) float64, ||gx - x||_2, of the point to return once stopped.
        scratch: room for the partial sums of the CUDA kernels; nothing here needs it.
    Source:
        Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, eq. (2.2).
    """
    arrays = (best, anchor, f_previous, g_previous, columns_f, columns_g, gram)
    account = (control, status, num_steps, residual)
    take = functools.partial(anderson_step, beta=beta, ridge=ridge)
    in_place(take, x, gx, sample_of, (*arrays, *account), atol, rtol, max_steps)


def broyden_step_(
    x: Tensor,
    gx: Tensor,
    sample_of: Tensor | None,
    best: Tensor,
    anchor: Tensor,
    f_previous: Tensor,
    x_previous: Tensor,
    columns_u: Tensor,
    columns_v: Tensor,
    control: Tensor,
    atol: Tensor,
    status: Tensor,
    num_steps: Tensor,
    residual: Tensor,
    *,
    rtol: float,
    max_steps: int,
    beta: float,
    scratch: Tensor | None = None,
) -> None:
    """Advance every active sample by one Broyden step, in place.

    Args:
        columns_u, columns_v: (B, m, D) the updates of the inverse Jacobian.
        x_previous: (B, D) x one step ago. The rest as in anderson_step_.
    Source:
        Broyden, Math. Comp. 19, 1965; Bai, Kolter, Koltun, NeurIPS 2019, section 3.1.3.
    """
    unused_gram = control.new_empty((control.shape[0], 0))
    arrays = (best, anchor, f_previous, x_previous, columns_u, columns_v, unused_gram)
    account = (control, status, num_steps, residual)
    take = functools.partial(broyden_step, beta=beta)
    in_place(take, x, gx, sample_of, (*arrays, *account), atol, rtol, max_steps)


def in_place(
    take: Callable[[StepState, Tensor, Rules], StepState],
    x: Tensor,
    gx: Tensor,
    sample_of: Tensor | None,
    arrays: tuple[Tensor, ...],
    atol: Tensor,
    rtol: float,
    max_steps: int,
) -> None:
    """Write one step of the active samples that x holds over x and the arrays of a solve."""
    rows = slice(None) if sample_of is None else sample_of
    # Arrays without rows (m = 0) stay so.
    s = StepState(x, *(t[rows] if len(t) else t for t in arrays))
    rules = rules_for(x.dtype, s.columns_f.shape[1], atol[rows], rtol, max_steps)
    new = frozen(s, take(s, gx, rules))
    x.copy_(new.x)
    for target, field in zip(arrays, fields(StepState)[1:], strict=True):
        if len(target):
            target[rows] = getattr(new, field.name)


def frozen(old: StepState, new: StepState) -> StepState:
    """`new`, but `old` in the samples that had already stopped."""
    stopped = old.status != Status.ACTIVE
    kept = {
        field.name: unless(stopped, getattr(new, field.name), getattr(old, field.name))
        for field in fields(StepState)
    }
    return StepState(**kept)
