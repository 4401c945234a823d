"""The partial differentiation operator P(s; r): gradients that are part of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class IndependentError(ValueError):
    """r does not depend on s."""


def partial(r: Tensor | Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """P(s; r), the partial derivatives of r with respect to s, themselves differentiable.

    With it a gradient step is a layer like any other: `x - step_size * partial(f, x)`.

    Args:
        r: what is differentiated. Its entries are summed, so that one value per sample, (B,) or
            (B, 1), gives each sample's own gradient.

            A tensor computed from s: everything that s reached r through counts, other tensors
            computed from s among them.

            A function s -> tensor: it is called with a stand-in for s, and all that it closes
            over is held fixed, even what was computed from s. This is the partial derivative
            in the strict sense. s need not require grad; under no_grad a graph is built for
            the call alone. It also runs inside torch.func transforms, inference_mode and
            torch.compile.
        s: floating tensor of any shape.
    Returns:
        Like s. Where grad mode is on it can be differentiated again, in s, in parameters and in
        whatever else r depends on.
    Raises:
        TypeError: s or r is not a floating tensor.
        ValueError: r does not depend on s. A lost graph (detach, no_grad) looks the same as a
            true constant, so no zeros are returned in its place; only inside torch.func
            transforms and inference_mode, where the two cannot be told from a dependence on
            something else, is the answer zeros.
    Source:
        Jeon, Lee, Choi, IEEE Access 2021, the operator P of the FPI_GD layer and of the
        backward FPI layer.
    """
    require_floating("s", s)
    if isinstance(r, Tensor):
        return of_tensor(r, s)
    if not callable(r):
        raise TypeError(f"partial: r must be a tensor or a function of s, got {type(r).__name__}")
    if needs_transform():
        return by_transform(r, s)
    return by_tape(r, s)


def of_tensor(r: Tensor, s: Tensor) -> Tensor:
    """The derivative along the graph that already joins r to s; the graph is kept."""
    require_floating("r", r)
    if not s.requires_grad:
        raise ValueError(
            "partial: s must require grad before r is computed from it. Call s.requires_grad_() "
            "first, or pass r as a function of s"
        )
    if not r.requires_grad:
        raise independent()
    (gradient,) = torch.autograd.grad(
        r,
        s,
        torch.ones_like(r),
        create_graph=torch.is_grad_enabled(),
        retain_graph=True,
        allow_unused=True,
    )
    if gradient is None:
        raise independent()
    return gradient


def by_tape(r: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """The derivative of r(s) at an alias of s, so that no path around r is followed."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        alias = s.view_as(s)
        if not alias.requires_grad:
            alias.requires_grad_()
        value = r(alias)
        require_floating("r(s)", value)
        if not value.requires_grad:
            raise independent()
        (gradient,) = torch.autograd.grad(
            value, alias, torch.ones_like(value), create_graph=create_graph, allow_unused=True
        )
    if gradient is None:
        raise independent()
    return gradient


def by_transform(r: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """The same derivative by torch.func, which composes with its own transforms."""

    def total(alias: Tensor) -> Tensor:
        value = r(alias)
        require_floating("r(s)", value)
        return value.sum()

    if torch.is_inference_mode_enabled():
        # Before torch 2.13, torch.func.grad silently returns zeros in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return torch.func.grad(total)(s)
    return torch.func.grad(total)(s)


def needs_transform() -> bool:
    """True where a tape of our own cannot be started.

    Elsewhere the tape is the better one: it is faster, and it allows saved-tensor hooks
    (activation checkpointing) and plain autograd.Function, which torch.func refuses.
    """
    return (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._are_functorch_transforms_active()
    )


def require_floating(name: str, value: object) -> None:
    """Raise unless `value` is a real floating tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"partial: {name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"partial: {name} must be floating, got {value.dtype}")


def independent() -> IndependentError:
    """The error for an r without a derivative in s."""
    return IndependentError(
        "partial: r does not depend on s. If the graph between them was cut by detach() or "
        "no_grad(), compute r from s itself; if the derivative is truly zero, use "
        "torch.zeros_like(s)"
    )
