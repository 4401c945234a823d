"""The small least-squares problem of one Anderson step, as csrc/common/small_solve.h."""

import triton
import triton.language as tl

from fpi_cuda.ops import rules

SMALLEST_PIVOT = tl.constexpr(rules.SMALLEST_PIVOT)
LEAST_GAIN = tl.constexpr(rules.LEAST_GAIN)


@triton.jit
def solve_small(gram, rhs, age, columns, ridge, S: tl.constexpr, M: tl.constexpr):
    """gamma (M, S) by slot, of min ||f - dF gamma||^2 + ridge |D gamma|^2, D the column norms.

    Columns are scaled to unit norm and factored newest first, by outer products; one whose pivot
    is below SMALLEST_PIVOT is skipped.

    Args:
        gram: (M, M, S) float64 by slot, of S samples. rhs: (M, S) float64, <dF_slot, f>.
        age: (M, S) of each slot, 0 for the newest. columns: (S,) how many take part.
    Source:
        Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, section 4 (on conditioning).
    """
    slots = tl.arange(0, M)
    diagonal = (slots[:, None] == slots[None, :])[:, :, None]
    square = tl.sum(tl.where(diagonal, gram, 0.0), axis=1)
    exists = (age < columns[None, :]) & (square > 0)
    inverse_norm = tl.where(exists, 1.0 / tl.sqrt(tl.where(exists, square, 1.0)), 0.0)
    both = exists[:, None, :] & exists[None, :, :]
    rest = tl.where(both, gram * inverse_norm[:, None, :] * inverse_norm[None, :, :], 0.0)
    rest = tl.where(both & diagonal, 1.0 + ridge, rest)
    target = tl.where(exists, rhs * inverse_norm, 0.0)

    factor = tl.zeros([M, M, S], tl.float64)
    roots = tl.zeros([M, S], tl.float64)  # 0 for a column that was skipped
    solved = tl.zeros([M, S], tl.float64)
    # Where a sample has fewer columns its pivots are 0, and nothing of it changes.
    most = tl.max(columns, axis=0)
    for a in range(most):
        here = age == a
        below = tl.sum(tl.where(here[None, :, :], rest, 0.0), axis=1)
        pivot = tl.sum(tl.where(here, below, 0.0), axis=0)
        value = tl.sum(tl.where(here, target, 0.0), axis=0)
        keeps = (pivot >= SMALLEST_PIVOT) & (pivot < float("inf"))
        keeps &= tl.abs(value) < float("inf")
        root = tl.sqrt(tl.where(keeps, pivot, 1.0))[None, :]
        below = tl.where(keeps[None, :] & (age > a), below / root, 0.0)
        value = tl.where(keeps[None, :], value[None, :] / root, 0.0)
        rest -= below[:, None, :] * below[None, :, :]
        target -= below * value
        factor = tl.where(here[None, :, :], below[:, None, :], factor)
        roots = tl.where(keeps[None, :] & here, root, roots)
        solved = tl.where(here, value, solved)

    gamma = tl.zeros([M, S], tl.float64)
    for younger in range(most):
        here = age == most - 1 - younger
        below = tl.sum(tl.where(here[None, :, :], factor, 0.0), axis=1)
        value = solved - tl.sum(tl.where(roots > 0, below * gamma, 0.0), axis=0)[None, :]
        gamma = tl.where(here & (roots > 0), value / tl.where(roots > 0, roots, 1.0), gamma)
    return gamma * inverse_norm


@triton.jit
def worth_mixing(gamma, rhs, ff):
    """(S,) whether gamma takes enough off ||f||^2 = ff to be worth a step that is not Picard's."""
    return tl.sum(tl.where(gamma != 0, gamma * rhs, 0.0), axis=0) >= ff * LEAST_GAIN
