"""What differs where the caller captures the whole solve into a CUDA graph of their own.

The host can read nothing then, so the loop takes max_steps steps, of which those after the last
sample has stopped change nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from fpi_cuda.evaluation.dispatch_modes import EagerMode


class NoRandomNumbers(EagerMode):
    """Raises where an op may draw random numbers: a capture cannot give each step the same."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at the op, then call it."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not never_drops(func, args, kwargs):
            raise RuntimeError(
                f"fixed_point: g draws random numbers ({func.name()}), and in a solve that is "
                "being captured into a CUDA graph they would change from step to step. Draw them "
                "before the call"
            )
        return func(*args, **kwargs)


def never_drops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the op is an attention without dropout, which needs no random numbers."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[index] if index < len(args) else kwargs.get("dropout_p")
            return (argument.default_value if given is None else given) == 0.0
    return False
