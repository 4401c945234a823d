"""What differs where the caller captures the whole solve into a CUDA graph of their own.

The host can read nothing then, so the loop takes max_steps steps, of which those after the last
sample has stopped change nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from fpi_cuda.evaluation.dispatch_modes import EagerMode
from fpi_cuda.evaluation.random_draws import draws_none


class NoRandomNumbers(EagerMode):
    """Raises where an op may draw random numbers: a capture cannot give each step the same."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at the op, then call it."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not draws_none(func, args, kwargs):
            raise RuntimeError(
                f"fixed_point: g draws random numbers ({func.name()}), and in a solve that is "
                "being captured into a CUDA graph they would change from step to step. Draw them "
                "before the call"
            )
        return func(*args, **kwargs)
