"""Anderson acceleration, type II, in Triton, for S samples at a time: one in the step kernels.

What differs by sample is a block (S,), pointers to its row of an array among them; `alive` (S,)
tells which of them are stepped. Nothing of a sample depends on the others. By slot of the history
and sample it is (M, S), so that blocks (M, S, BLOCK) put samples on warps and elements on lanes.

Source: Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, eq. (2.2), in difference form.
"""

import torch
import triton
import triton.language as tl

from fpi_cuda.ops.triton.row import go, narrowed, next_slot, safe_norm, trustworthy
from fpi_cuda.ops.triton.rules import (
    COLUMNS,
    FIRST_COUNTER,
    FLOATS,
    HAS_PREVIOUS,
    HEAD,
    MIX,
    NUM_NORMS,
    PICARD,
    STOP,
    decide,
    solve_small,
    worth_mixing,
)

LARGEST_SINGLE = tl.constexpr(torch.finfo(torch.float32).max)
LARGEST_DOUBLE = tl.constexpr(torch.finfo(torch.float64).max)


@triton.jit
def take_sums(
    x,
    gx,
    f_previous,
    g_previous,
    columns_f,
    columns_g,
    begin,
    end,
    dim,
    alive,
    differs,
    columns,
    head,
    S: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums over the elements from `begin` to `end`; writes the fresh differences, unless WIDE.

    WIDE takes them in float64, from differences that are written already: their slot may have
    held the evaluation before this one.
    """
    SUM: tl.constexpr = tl.float64 if WIDE else COMPUTE
    HISTORY: tl.constexpr = columns_f.dtype.element_ty
    slots = tl.arange(0, M)[:, None]
    if DEPTH > 0:
        fresh = next_slot(columns, head, DEPTH)
        is_fresh = differs[None, :] & (slots == fresh[None, :])
        age = (head[None, :] - slots + DEPTH) % DEPTH
        old = (slots < DEPTH) & (age < columns[None, :]) & (is_fresh == 0)
        rows = tl.arange(0, M).to(tl.int64) * dim
    ff = tl.zeros([S, BLOCK], SUM)
    gg = tl.zeros([S, BLOCK], SUM)
    xx = tl.zeros([S, BLOCK], SUM)
    with_df = tl.zeros([M, S, BLOCK], SUM)
    with_f = tl.zeros([M, S, BLOCK], SUM)
    for at in range(begin, end, BLOCK):
        d = (at + tl.arange(0, BLOCK))[None, :]
        inside = alive[:, None] & (d < end)
        here = tl.load(x[:, None] + d, mask=inside, other=0.0).to(COMPUTE)
        g = tl.load(gx[:, None] + d, mask=inside, other=0.0).to(COMPUTE)
        f = g - here
        # In the wider type first: the difference of two large floats may overflow.
        f_sum = g.to(SUM) - here.to(SUM)
        ff += f_sum * f_sum
        gg += g.to(SUM) * g.to(SUM)
        xx += here.to(SUM) * here.to(SUM)
        if DEPTH > 0:
            taken = differs[:, None] & inside
            column_f = (columns_f + fresh * dim)[:, None] + d
            if WIDE:
                df = tl.load(column_f, mask=taken, other=0.0).to(COMPUTE)
            else:
                df = f - tl.load(f_previous[:, None] + d, mask=taken, other=0.0)
                dg = g - tl.load(g_previous[:, None] + d, mask=taken, other=0.0)
                stored = narrowed(df, HISTORY)
                tl.store(column_f, stored, mask=taken)
                column_g = (columns_g + fresh * dim)[:, None] + d
                tl.store(column_g, narrowed(dg, HISTORY), mask=taken)
                # As it is stored, so that the Gram matrix is that of the stored columns.
                df = stored.to(COMPUTE)
            place = columns_f[None, :, None] + rows[:, None, None] + d[None, :, :]
            known = old[:, :, None] & inside[None, :, :]
            tile = tl.load(place, mask=known, other=0.0).to(COMPUTE)
            tile = tl.where(is_fresh[:, :, None], df[None, :, :], tile).to(SUM)
            with_df += tl.where(differs[:, None], df, 0.0).to(SUM)[None, :, :] * tile
            with_f += f.to(SUM)[None, :, :] * tile
    return (
        tl.sum(ff.to(tl.float64), axis=1),
        tl.sum(gg.to(tl.float64), axis=1),
        tl.sum(xx.to(tl.float64), axis=1),
        tl.sum(with_df.to(tl.float64), axis=2),
        tl.sum(with_f.to(tl.float64), axis=2),
    )


@triton.jit
def measure(
    x,
    gx,
    own_f_previous,
    own_g_previous,
    columns_f,
    columns_g,
    control,
    begin,
    end,
    dim,
    alive,
    first_step,
    S: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    IN_SLOT: tl.constexpr,
):
    """Sums of a split, taken again in float64 where a float32 sum left its range."""
    counters = control.to(FLOATS, bitcast=True)
    columns = tl.load(counters + COLUMNS).to(tl.int32)
    head = tl.load(counters + HEAD).to(tl.int32)
    differs = tl.load(counters + HAS_PREVIOUS) != 0
    f_previous = own_f_previous
    g_previous = own_g_previous
    if IN_SLOT:
        f_previous = columns_f + next_slot(columns, head, DEPTH) * dim
        g_previous = columns_g + next_slot(columns, head, DEPTH) * dim
    ff, gg, xx, with_df, with_f = take_sums(
        x, gx, f_previous, g_previous, columns_f, columns_g, begin, end, dim, alive, differs,
        columns, head, S, DEPTH, M, BLOCK, COMPUTE, False,
    )  # fmt: skip
    if tl.float32 == COMPUTE:
        count = end - begin
        sound = trustworthy(ff, count, COMPUTE) & trustworthy(gg, count, COMPUTE)
        sound &= trustworthy(xx, count, COMPUTE) | (first_step == 0)
        if DEPTH > 0:
            is_fresh = tl.arange(0, M)[:, None] == next_slot(columns, head, DEPTH)[None, :]
            dfdf = tl.sum(tl.where(is_fresh, with_df, 0.0), axis=0)
            sound &= trustworthy(dfdf, count, COMPUTE) | (differs == 0)
        sound = sound | (alive == 0)
        if tl.sum((sound == 0).to(tl.int32), axis=0) > 0:
            tl.debug_barrier()
            ff_wide, gg_wide, xx_wide, with_df_wide, with_f_wide = take_sums(
                x, gx, f_previous, g_previous, columns_f, columns_g, begin, end, dim, alive,
                differs, columns, head, S, DEPTH, M, BLOCK // 2, COMPUTE, True,
            )  # fmt: skip
            ff = tl.where(sound, ff, ff_wide)
            gg = tl.where(sound, gg, gg_wide)
            xx = tl.where(sound, xx, xx_wide)
            with_df = tl.where(sound[None, :], with_df, with_df_wide)
            with_f = tl.where(sound[None, :], with_f, with_f_wide)
    return ff, gg, xx, with_df, with_f


@triton.jit
def judge(
    x,
    gx,
    gram,
    control,
    atol,
    status,
    num_steps,
    residual,
    alive,
    ff,
    gg,
    xx,
    with_df,
    with_f,
    dim,
    rtol,
    max_steps,
    beta,
    ridge,
    EPSILON: tl.constexpr,
    STALL_STEPS: tl.constexpr,
    S: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Count the evaluation, decide, bring the history up to date, and solve for gamma.

    Returns:
        move, improved, anchors, the mixing, gamma (M, S), and the slot for this evaluation.
    """
    step = tl.load(num_steps) + 1
    counters = control.to(FLOATS, bitcast=True)
    has_previous = tl.load(counters + HAS_PREVIOUS) != 0
    head = tl.load(counters + HEAD)
    norm_f = safe_norm(x, gx, ff, dim, alive, "f", S, COMPUTE, BLOCK)
    norm_gx = safe_norm(x, gx, gg, dim, alive, "gx", S, COMPUTE, BLOCK)
    norm_x = safe_norm(x, gx, xx, dim, alive, "x", S, COMPUTE, BLOCK)
    largest = LARGEST_DOUBLE if tl.float64 == COMPUTE else LARGEST_SINGLE
    floats = counters + FIRST_COUNTER
    # The row in the order of fpi_cuda.ops.solver_state, as decide takes and returns it.
    move, now, improved, anchors, norms, counts = decide(
        tl.load(control), tl.load(control + 1), tl.load(control + 2), tl.load(control + 3),
        tl.load(control + 4), tl.load(control + 5), tl.load(control + 6), tl.load(control + 7),
        tl.load(floats), tl.load(floats + 1), tl.load(floats + 2), tl.load(floats + 3),
        tl.load(floats + 4), tl.load(floats + 5), tl.load(floats + 6), tl.load(floats + 7),
        tl.load(floats + 8), tl.load(floats + 9), tl.load(floats + 10),
        norm_f, norm_gx, norm_x, step, tl.load(atol), rtol, max_steps, EPSILON, largest,
        STALL_STEPS, DEPTH > 0,
    )  # fmt: skip
    best, mixing_scale, columns = norms[2], counts[8], counts[10]
    # Every warp has read the whole row and the step count before any of it is overwritten.
    tl.debug_barrier()
    for i in tl.static_range(NUM_NORMS):
        tl.store(control + i, norms[i])
    # The columns left are not what is kept.
    for i in tl.static_range(10):
        tl.store(floats + i, counts[i].to(tl.float32))
    tl.store(num_steps, step, mask=alive)
    tl.store(status, now.to(tl.int8), mask=alive)
    tl.store(residual, tl.where((move != STOP) | improved, norm_f, best), mask=alive)
    gamma = tl.zeros([M, S], tl.float64)
    slot = tl.zeros([S], tl.int64)
    if DEPTH > 0:
        head = tl.where(step == 1, 0.0, head).to(tl.int32)
        columns = columns.to(tl.int32)
        differs = has_previous & (step > 1)
        onward = (move == MIX) | (move == PICARD)
        fresh = next_slot(columns, head, DEPTH)
        slots = tl.arange(0, M)[:, None]
        is_fresh = slots == fresh[None, :]
        dfdf = tl.sum(tl.where(is_fresh, with_df, 0.0), axis=0)
        noise = norm_gx * EPSILON * 0.5
        admits = differs & onward & (dfdf < float("inf")) & (tl.sqrt(dfdf) > noise)
        columns = tl.where(differs, tl.minimum(columns, DEPTH - 1), columns)
        columns = tl.where(admits, columns + 1, columns)
        head = tl.where(admits, fresh.to(tl.int32), head)
        age = tl.where(slots < DEPTH, (head[None, :] - slots + DEPTH) % DEPTH, M)
        valid = age < columns[None, :]

        row, column = tl.arange(0, M)[:, None, None], tl.arange(0, M)[None, :, None]
        low, high = tl.minimum(row, column), tl.maximum(row, column)
        place = gram[None, None, :] + high * (high + 1) // 2 + low
        stored = alive[None, None, :] & (row < DEPTH) & (column <= row)
        is_fresh = admits[None, :] & is_fresh
        in_row, in_column = is_fresh[:, None, :], is_fresh[None, :, :]
        is_new = in_row | in_column
        both = valid[:, None, :] & valid[None, :, :]
        matrix = tl.load(place, mask=alive[None, None, :] & both & (is_new == 0), other=0.0)
        matrix = tl.where(in_row, with_df[None, :, :], matrix)
        matrix = tl.where(in_column, with_df[:, None, :], matrix)
        tl.store(place, matrix, mask=stored & is_new)

        taking_part = tl.where(alive & (move == MIX), tl.minimum(columns, dim), 0)
        rhs = tl.where(valid, with_f, 0.0)
        matrix = tl.where(both, matrix, 0.0)
        solved = solve_small(matrix, rhs, age, taking_part, ridge, tl.max(taking_part, axis=0))
        mixes = (move == MIX) & worth_mixing(solved, rhs, norm_f * norm_f)
        gamma = tl.where(mixes[None, :], solved, 0.0)
        slot = next_slot(columns, head, DEPTH)
        tl.store(counters + COLUMNS, columns.to(tl.float32), mask=alive)
        tl.store(counters + HEAD, head.to(tl.float32), mask=alive)
        remembers = tl.where(onward, 1.0, 0.0).to(tl.float32)
        tl.store(counters + HAS_PREVIOUS, remembers, mask=alive)
    else:
        tl.store(counters + COLUMNS, columns.to(tl.float32), mask=alive)
    return move, improved, anchors, beta * mixing_scale, gamma, slot


@triton.jit
def advance(
    x,
    gx,
    best,
    anchor,
    own_f_previous,
    own_g_previous,
    columns_f,
    columns_g,
    begin,
    end,
    dim,
    alive,
    move,
    improved,
    anchors,
    beta,
    gamma,
    slot,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    IN_SLOT: tl.constexpr,
):
    """Write the next point, and remember this evaluation."""
    rest = (1.0 - beta.to(COMPUTE)).to(COMPUTE)[:, None]
    rows = tl.arange(0, M).to(tl.int64) * dim
    weight = gamma.to(COMPUTE)[:, :, None]
    used = (gamma != 0)[:, :, None]
    keeps = ((move == MIX) | (move == PICARD))[:, None]
    for at in range(begin, end, BLOCK):
        d = (at + tl.arange(0, BLOCK))[None, :]
        inside = alive[:, None] & (d < end)
        g = tl.load(gx[:, None] + d, mask=inside, other=0.0).to(COMPUTE)
        f = g - tl.load(x[:, None] + d, mask=inside, other=0.0).to(COMPUTE)
        g_mixed, f_mixed = g, f
        if DEPTH > 0:
            place = rows[:, None, None] + d[None, :, :]
            taken = used & inside[None, :, :]
            tile = tl.load(columns_g[None, :, None] + place, mask=taken, other=0.0).to(COMPUTE)
            g_mixed -= tl.sum(weight * tile, axis=0)
            taken = taken & (rest != 0)[None, :, :]
            tile = tl.load(columns_f[None, :, None] + place, mask=taken, other=0.0).to(COMPUTE)
            f_mixed -= tl.sum(weight * tile, axis=0)
        stepped = tl.where(rest != 0, g_mixed - rest * f_mixed, g_mixed)
        go(
            x[:, None] + d, best[:, None] + d, anchor[:, None] + d, inside, stepped,
            move[:, None], improved[:, None], anchors[:, None], COMPUTE, DEPTH > 0,
        )  # fmt: skip
        if DEPTH > 0:
            # After the mixing: the slot may hold the oldest of its columns.
            f_to, g_to = own_f_previous[:, None] + d, own_g_previous[:, None] + d
            if IN_SLOT:
                f_to = (columns_f + slot * dim)[:, None] + d
                g_to = (columns_g + slot * dim)[:, None] + d
            tl.store(f_to, f, mask=keeps & inside)
            tl.store(g_to, g, mask=keeps & inside)
