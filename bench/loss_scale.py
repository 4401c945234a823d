"""How the gradient's relative error depends on the scale of the loss."""

from __future__ import annotations

from typing import Any

import torch

from bench.settings import Chosen, Task

SCALES = (1e-6, 1.0, 65536.0)


def loss_scale(chosen: Chosen, task: Task) -> dict[str, Any]:
    """The largest relative error of a sample's gradient in z, with the loss times each scale.

    The adjoint tolerance is the one calibrated at scale 1: a training loop has one, too.
    """
    result: dict[str, Any] = {"label": chosen.label}
    if chosen.both is None:
        return result
    both = chosen.both
    result["setting"] = both.peer.name
    for scale in SCALES:
        try:
            _, grads = both.peer.solve_and_grad(
                task.problem, both.tol.tol, both.adjoint.tol, scale * task.v
            )
        except Exception as error:
            result[f"{scale:g}"] = type(error).__name__
            continue
        errors = task.gradient_errors(grads[0].to(torch.float64) / scale)
        result[f"{scale:g}"] = float(errors.max())
    return result
