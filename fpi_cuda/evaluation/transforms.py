"""Where torch.func transforms are active, and calls that only take numbers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

active = torch._C._are_functorch_transforms_active
"""Whether any transform is active."""


_probe = torch.empty(0)


def in_dual_level() -> bool:
    """Whether tensors may have tangents: only there is one taken apart to give its primal."""
    return forward_ad.unpack_dual(_probe).primal is not _probe


in_forward_mode = functools.partial(forward_ad._set_fwd_grad_enabled, True)
"""A context in which tensors have tangents, which the jvp of a Function is outside of."""


def require_working() -> None:
    """Raise where torch itself loses the derivatives that an active transform asks for.

    Raises:
        RuntimeError: grad, vjp or jvp inside inference_mode, before torch 2.13.
    """
    if active() and torch.is_inference_mode_enabled() and not works_in_inference():
        raise RuntimeError(
            "fixed_point: inside torch.inference_mode this torch computes no derivatives for "
            "torch.func.grad, vjp and jvp. Use torch.no_grad"
        )


@functools.cache
def works_in_inference() -> bool:
    """Whether torch.func.grad knows in inference mode that (t^2)' = 2t: not before torch 2.13."""
    with torch.inference_mode():
        return bool(torch.func.grad(torch.square)(torch.ones(())) == 2)


numbers = torch.func.debug_unwrap
"""What lies in t, without the wrapper of any transform; t itself where there is none."""

unwrapped = functools.partial(torch.func.debug_unwrap, recurse=False)
"""What lies in t, without the wrapper of the transform that sees it first."""

unwrap_if_dead = functorch.unwrap_if_dead
"""t without the wrappers of transforms that have ended."""


def zero_of(*tensors: Tensor) -> Tensor:
    """0, as a 0-dim bool, with the dimension of every vmap that one of the tensors has."""
    device = tensors[0].device
    zeros = [t.new_zeros((), dtype=torch.bool, device=device) for t in tensors]
    return torch.stack(zeros).any()


def num_batches(*tensors: Tensor) -> int:
    """How many vmaps the tensors have a dimension of, all together."""
    return numbers(zero_of(*tensors)).dim()


def is_batched(t: Tensor) -> bool:
    """Whether t has a dimension of the vmap that sees it first."""
    return unwrapped(t).dim() > t.dim()


is_legacy_batched = functorch.is_legacy_batchedtensor
"""Whether t is seen by the older vmap behind torch.autograd.grad(is_grads_batched=True)."""


_calls: dict[int, Callable[[Tensor], Tensor]] = {}
_numbers = itertools.count()


@functools.cache
def _op() -> Any:
    """call(v, number) of the calls that are under way, an op that no transform looks into.

    It is made where it is needed, and of a name of its own, for this package may be imported again.
    """
    name = f"fpi_cuda_calls_{id(_calls)}"
    library = torch.library.Library(name, "FRAGMENT")
    library.define("call(Tensor v, int number) -> Tensor")
    library.impl("call", lambda v, number: _calls[number](v), "CompositeExplicitAutograd")
    call = getattr(torch.ops, name).call

    def of_each(info: Any, dims: Any, v: Tensor, number: int) -> tuple[Tensor, int]:
        if not info.batch_size:
            return v.movedim(dims[0], 0), 0
        return torch.stack([call(t, number) for t in v.unbind(dims[0])]), 0

    torch.library.register_vmap(f"{name}::call", of_each, lib=library)
    return call, library


def one_by_one(function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """function(v) of numbers alone, for each sample of the vmaps that batch v, of either kind."""
    number = next(_numbers)
    _calls[number] = function
    try:
        found: Tensor = _op()[0](v, number)
        return found
    finally:
        del _calls[number]


def all_one_by_one(
    function: Callable[[Tensor], Sequence[Tensor | None]], v: Tensor
) -> list[Tensor | None]:
    """The same for a function that returns several tensors, or None in the place of some."""
    shapes: list[torch.Size | None] = []

    def flat(v: Tensor) -> Tensor:
        found = function(v)
        shapes[:] = [None if t is None else t.shape for t in found]
        return torch.cat([v.new_zeros(0), *(t.flatten() for t in found if t is not None)])

    together = one_by_one(flat, v)
    parts = iter(together.split([shape.numel() for shape in shapes if shape is not None]))
    return [None if shape is None else next(parts).view(shape) for shape in shapes]
