"""The gradient through every step of a solver, without the samples that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.autograd.attach import attach
from fpi_cuda.autograd.flat_map import FlatMap, replace_rows
from fpi_cuda.autograd.strategy import Account, Strategy, dropped, failed, unmeasured
from fpi_cuda.result import AdjointRecord, SolveResult


def attach_unrolled(
    flat_map: FlatMap,
    x0: Tensor,
    result: SolveResult,
    run: Callable[[FlatMap, Tensor], SolveResult],
    record: AdjointRecord,
    born_after: int,
) -> Any:
    """The x of `result`, which `run` gave for x0, differentiable where the solve succeeded.

    It is returned as the user's state. run(map, x0) is a differentiable solve.

    A failed sample would poison parameters, for zero times NaN is NaN. So the solve that is
    differentiated is repeated with a good sample in its place.
    """
    bad = failed(result.status)
    if not bool(bad.any()):
        return as_state(flat_map, result.x)
    account = Account(result.status, record)
    plain = result.x.detach()
    if bool(bad.all()):
        nothing = Strategy(account, flat_map.arithmetic, truncation=0)
        return attach(flat_map, plain, None, nothing, born_after)
    mended = flat_map.mended_if_batchwise(plain, bad)
    value = run(mended, replace_rows(x0, bad)).x.clone()
    with torch.no_grad():
        value.copy_(torch.where(bad[:, None], plain, value))

    def without_failed(v: Tensor) -> Tensor:
        account.close(v.detach(), unmeasured(v.detach(), v.detach(), 0), truncation=0)
        return dropped(v, bad)

    if value.requires_grad:
        value.register_hook(without_failed)
    return as_state(flat_map, value)


def as_state(flat_map: FlatMap, value: Tensor) -> Any:
    """The user's state that lies in `value` (B, D), which nobody else holds."""
    if transforms.active():
        # No torch.func.vmap of what takes a tensor apart.
        return flat_map.layout.unflatten(value, writable=True)
    return flat_map.layout.taken_apart(value)
