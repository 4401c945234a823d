"""What a solve will do, in words."""

from __future__ import annotations

import torch

from fpi_cuda import backends
from fpi_cuda.options import Implicit, Unroll
from fpi_cuda.request import Options


def explain(options: Options, g: object, device: torch.device, dtype: torch.dtype) -> str:
    """Which way a solve goes, and why, for states of this device and dtype."""
    engine = backends.resolve(options.backend, device, dtype).name
    reason = "asked for"
    if options.backend is None:
        missing = backends.why_not_native(device, dtype)
        reason = "the best available" if missing is None else f"native is unavailable: {missing}"
    compacted = options.asks_rowwise(g)
    adjoint = options.adjoint
    lines = [
        f"solver: {options.solver}, rtol={options.rtol}, atol={options.atol}, "
        f"max_steps={options.max_steps}",
        "route: host loop; g by torch, one solver step on the whole batch after it",
        f"backend: {engine} for {dtype} on {device} ({reason})",
        "active batch: "
        + (
            "stopped samples are no longer evaluated (g is row-wise)"
            if compacted
            else "all samples are evaluated until the last one stops (g is not known row-wise)"
        ),
        f"adjoint: {adjoint}",
    ]
    if isinstance(adjoint, Implicit) and adjoint.solver is None:
        lines.append("adjoint solver: the forward's; an Anderson deeper and without a ridge")
    if isinstance(adjoint, Unroll):
        lines.append("under grad mode the solver's steps run in plain torch, to be differentiated")
    return "\n".join(lines)
