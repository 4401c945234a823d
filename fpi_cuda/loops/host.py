"""The host's loop: torch evaluates g, then one step of the solver advances all samples."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.autograd import BoundMap
from fpi_cuda.coupling import Coupling
from fpi_cuda.loops import iteration
from fpi_cuda.loops.plan import Plan
from fpi_cuda.solution import SolveResult

name = "host"
is_late = False
sees_all_rows = False
why_not = None
adjoint = None


def solve(
    plan: Plan, bound_map: BoundMap, x0: Tensor, coupling: Coupling | None
) -> tuple[SolveResult, None]:
    """See Loop."""
    options = plan.options
    with torch.inference_mode(False):  # whose tensors do not count how often they are changed
        result = iteration.solve(
            bound_map.evaluate,
            x0,
            options.solver,
            rtol=options.rtol,
            atol=options.atol,
            max_steps=options.max_steps,
            backend=plan.engine,
            rowwise=plan.rowwise and plan.layout.batch > 1 and bound_map.selectable(),
            coupling=coupling,
            arithmetic=bound_map.arithmetic,
        )
    return result, None
