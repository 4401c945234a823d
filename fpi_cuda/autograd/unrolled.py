"""The gradient through every step of a solver, without the samples that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.autograd.attach import attach
from fpi_cuda.autograd.strategy import Account, Strategy, dropped, failed, unmeasured
from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.bound_map import BoundMap, replace_rows
from fpi_cuda.solution import AdjointRecord, SolveResult


def attach_unrolled(
    bound_map: BoundMap,
    x0: Tensor,
    result: SolveResult,
    run: Callable[[BoundMap, Tensor], SolveResult],
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
        return as_state(bound_map, result.x)
    account = Account(result.status, record)
    plain = result.x.detach()
    if bool(bad.all()):
        nothing = Strategy(account, bound_map.arithmetic, truncation=0)
        return attach(bound_map, plain, None, nothing, born_after)
    replaced = bound_map.replace_failed_if_batchwise(plain, bad)
    value = run(replaced, replace_rows(x0, bad)).x.clone()
    with torch.no_grad():
        value.copy_(torch.where(bad[:, None], plain, value))

    def without_failed(v: Tensor) -> Tensor:
        account.close(v.detach(), unmeasured(v.detach(), v.detach(), 0), truncation=0)
        return dropped(v, bad)

    if value.requires_grad:
        value.register_hook(without_failed)
    return as_state(bound_map, value)


def as_state(bound_map: BoundMap, value: Tensor) -> Any:
    """The user's state that lies in `value` (B, D), which nobody else holds."""
    if transforms.active():
        # No torch.func.vmap of what takes a tensor apart.
        return bound_map.layout.unflatten(value, writable=True)
    return bound_map.layout.taken_apart(value)
