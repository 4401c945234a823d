"""The host's loop: torch evaluates g, then one step of the solver advances all samples."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.coupling import Coupling
from fpi_cuda.implicit import Account, FlatMap
from fpi_cuda.loops.plan import LoopAdjoint, Plan, Request, Solved
from fpi_cuda.solvers import loop

name = "host"
is_late = False
sees_all_rows = False


def why_not(request: Request, *, rehearse: bool) -> str | None:
    """Nothing: it runs any g."""
    return None


def solve(plan: Plan, flat_map: FlatMap, x0: Tensor, coupling: Coupling | None) -> Solved:
    """See Loop."""
    options = plan.options
    with torch.inference_mode(False):  # whose tensors do not count how often they are changed
        result = loop.solve(
            flat_map.evaluate,
            x0,
            options.solver,
            rtol=options.rtol,
            atol=options.atol,
            max_steps=options.max_steps,
            backend=plan.engine,
            rowwise=plan.rowwise and plan.layout.batch > 1 and flat_map.selectable(),
            coupling=coupling,
            arithmetic=flat_map.arithmetic,
        )
    return Solved(result)


def adjoint(plan: Plan, flat_map: FlatMap, solved: Solved, account: Account) -> LoopAdjoint | None:
    """None: the host solves it after any solve that has no way of its own."""
    return None
