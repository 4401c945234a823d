"""Contract, 5: Anderson is safe.

It solves every problem that Picard solves, never takes more than 1.5 times Picard's evaluations on
a problem, and far fewer over all. The problems are those of the zoo, ``fpi_cuda.testing``.
"""

from __future__ import annotations

import pytest
import torch
from zoo_runs import every_problem, settings, solved

from bench.zoo import RATIO_LIMIT, Run, compare
from fpi_cuda.testing import names


@settings
@pytest.mark.parametrize("solver", ["anderson:m=5", "anderson:m=10"])
@every_problem
def test_anderson_is_safe(name: str, solver: str, dtype: torch.dtype, rtol: float) -> None:
    """Contract 5: whatever Picard solves, in at most 1.5 times its evaluations."""
    against = compare(solved(name, solver, dtype, rtol), solved(name, "picard", dtype, rtol))
    assert against.lost == []
    assert against.ratio is None or against.ratio <= RATIO_LIMIT


@settings
def test_anderson_needs_far_fewer_evaluations_over_all(dtype: torch.dtype, rtol: float) -> None:
    picard, anderson = (
        sum(solved(name, solver, dtype, rtol).evaluations for name in names())
        for solver in ("picard", "anderson:m=10")
    )
    assert anderson < 0.5 * picard


def test_a_slow_or_failing_solver_is_called_unsafe() -> None:
    """The comparison that contract 5 rests on can fail."""
    picard = solved("tanh/norm-0.9", "picard", torch.float64, 1e-6)
    slow = Run(**{**vars(picard), "num_steps": [2 * n for n in picard.num_steps]})
    failing = Run(**{**vars(picard), "status": ["MAX_STEPS", *picard.status[1:]]})
    assert compare(slow, picard).breaks_promise
    assert compare(failing, picard).lost == [0]
    assert not compare(picard, picard).breaks_promise
