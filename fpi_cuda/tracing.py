"""Where torch's tracers meet a solve: torch.compile runs it as it is, the others are refused.

How many steps a solve takes depends on numbers, which tracers do not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._subclasses.fake_tensor import FakeTensor

F = TypeVar("F", bound=Callable[..., Any])

COMPILED = (
    "fpi_cuda solves fixed points outside of compiled graphs: their length depends on the data. "
    "Compile without fullgraph=True, or compile g"
)
NO_NUMBERS = "fixed_point: a solve needs the numbers in x0 and z, and {} has none. {}"


def untraced(function: F) -> F:
    """`function`, before which torch.compile breaks its graph, and that it does not look into."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg=COMPILED)
            return torch.compiler.disable(function, reason=COMPILED)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def require_numbers(*tensors: Tensor) -> None:
    """Raise where tensors only stand for numbers.

    Raises:
        ValueError: a tensor on the meta device.
        RuntimeError: fake tensors, or a trace that would hold the steps taken for these data.
    """
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "fixed_point: torch.jit.trace would keep the steps that these data need for all "
            "others. Trace what is around the layer, or call it as it is"
        )
    for t in tensors:
        if isinstance(t, FakeTensor) or _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None:
            raise RuntimeError(
                NO_NUMBERS.format("a FakeTensor", "torch.export of a solve is not possible")
            )
        if t.is_meta:
            raise ValueError(NO_NUMBERS.format("device meta", "Pass tensors on a real device"))
    if _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None:
        raise RuntimeError(
            "fixed_point: make_fx and torch.func.linearize cannot trace a solve, whose steps "
            "depend on the data. In the place of linearize use torch.func.jvp"
        )
