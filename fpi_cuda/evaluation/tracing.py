"""Where torch.compile meets a solve, which it runs as it is.

How many steps a solve takes depends on numbers, which a compiler does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

COMPILED = (
    "fpi_cuda solves fixed points outside of compiled graphs: their length depends on the data. "
    "Compile without fullgraph=True, or compile g"
)


def untraced(function: F) -> F:
    """`function`, before which torch.compile breaks its graph, and that it does not look into."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg=COMPILED)
            return torch.compiler.disable(function, reason=COMPILED)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
