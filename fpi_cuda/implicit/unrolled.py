"""The gradient through every step of a solver, without the samples that failed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fpi_cuda.implicit.attach import attach
from fpi_cuda.implicit.flat_map import FlatMap, replace_rows
from fpi_cuda.implicit.mending import mended_if_batchwise
from fpi_cuda.implicit.strategy import Account, Truncated, dropped, failed, unmeasured
from fpi_cuda.result import AdjointRecord, SolveResult

Run = Callable[[FlatMap, Tensor], SolveResult]
"""A differentiable solve of a map from an x0 (B, D)."""


def attach_unrolled(
    flat_map: FlatMap,
    x0: Tensor,
    result: SolveResult,
    run: Run,
    record: AdjointRecord,
    born_after: int,
) -> Tensor:
    """The x of `result`, which `run` gave for x0, differentiable where the solve succeeded.

    A failed sample would poison parameters, for zero times NaN is NaN. So the solve that is
    differentiated is repeated with a good sample in its place.
    """
    bad = failed(result.status)
    if not bool(bad.any()):
        return result.x
    account = Account(result.status, record)
    plain = result.x.detach()
    if bool(bad.all()):
        return attach(flat_map, plain, None, Truncated(account, truncation=0), born_after)
    mended = mended_if_batchwise(flat_map, plain, bad)
    good = int(torch.nonzero(~bad)[0])
    again = run(mended, replace_rows(x0, bad, good))
    value = again.x.clone()
    with torch.no_grad():
        value.copy_(torch.where(bad[:, None], plain, value))

    def without_failed(v: Tensor) -> Tensor:
        account.close(v.detach(), unmeasured(v.detach(), v.detach(), 0))
        return dropped(v, bad)

    if value.requires_grad:
        value.register_hook(without_failed)
    return value
