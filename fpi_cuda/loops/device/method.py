"""What is iterated, by which solver, and how a captured solve is told apart from another."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fpi_cuda.autograd import BoundMap
from fpi_cuda.coupling import site_of
from fpi_cuda.loops.stepping import Backend
from fpi_cuda.options import FixedPointSolver


@dataclass(frozen=True)
class Method:
    """How a system is solved: all that a captured step holds besides the map.

    Attributes:
        solver, rtol, max_steps, backend: as in fpi_cuda.loops.host.iterate. The floor is that of
            the state's dtype, under autocast too: a captured step measures no noise of g.
    """

    solver: FixedPointSolver
    rtol: float
    max_steps: int
    backend: Backend

    @property
    def key(self) -> Hashable:
        """Equal for methods that take the same steps."""
        return (self.solver, self.rtol, self.max_steps, self.backend.name)


def key_of(
    kind: str, bound_map: BoundMap, method: Method, *, with_graph: bool
) -> tuple[Hashable, ...]:
    """Where the plan of such a solve is kept.

    A key need not tell two maps apart, since the plan's trace does; it spares the attempt.
    """
    return (
        kind,
        site_of(bound_map.g),
        bound_map.layout,
        tuple(form_of(t, with_graph) for t in pytree.tree_leaves(bound_map.read)),
        method.key,
        bound_map.damping,
        bound_map.replay.autocast_key,
        numeric_flags(),
    )


def form_of(value: Any, with_graph: bool) -> Hashable:
    """Shape, strides and dtype of a tensor; of anything else the type."""
    if not isinstance(value, Tensor):
        return type(value).__qualname__
    strides = value.stride() if value.layout == torch.strided else None
    needs_grad = with_graph and value.requires_grad
    return type(value), value.device, value.dtype, tuple(value.shape), strides, needs_grad


def numeric_flags() -> Hashable:
    """Global switches that decide which kernels an op becomes, and which torch does not record."""
    backends: Any = torch.backends
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    # Asked one by one: the switches over all of them raise where a user has set single ones.
    precisions = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul)
    return (
        *(op.fp32_precision for op in precisions),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )
