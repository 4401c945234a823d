"""The norm that tolerances are relative to."""

from __future__ import annotations

import torch
from torch import Tensor


def row_norm(a: Tensor) -> Tensor:
    """(B,) float64 2-norm of each row of a (B, D); squares neither overflow nor vanish."""
    if a.dtype != torch.float64 or a.shape[1] == 0:
        return torch.linalg.vector_norm(a, dim=1, dtype=torch.float64)
    largest = a.abs().amax(1)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    return scale * torch.linalg.vector_norm(a / scale[:, None], dim=1)
