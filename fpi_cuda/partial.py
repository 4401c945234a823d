"""The partial differentiation operator P(s; r): gradients that are part of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Nodes = TypeVar("Nodes")


class IndependentError(ValueError):
    """r does not depend on s."""


@overload
def partial(r: Tensor | Callable[[Tensor], Tensor], s: Tensor) -> Tensor: ...


@overload
def partial(r: Tensor | Callable[..., Tensor], s: Nodes) -> Nodes: ...


def partial(r: Any, s: Any) -> Any:
    """P(s; r), the partial derivatives of r with respect to s, themselves differentiable.

    With it a gradient step is a layer like any other: `x - step_size * partial(f, x)`. With a set
    of nodes for s, each is held fixed while another is moved, even if one was computed from it:

        y = 3 * x
        dx, dy = partial(lambda a, b: (a**2 * b).sum(), (x, y))  # 2 x y and x^2

    Args:
        r: what is differentiated. Its entries are summed, so that one value per sample, (B,) or
            (B, 1), gives each sample's own gradient.

            A tensor computed from s, a single one: everything that s reached r through counts,
            other tensors computed from s among them.

            A function of s -> tensor: it is called with stand-ins for s, as r(s) for a tensor,
            r(*s) for a tuple, a list or a named tuple, and r(**s) for a dict. All that it closes
            over is held fixed, even what was computed from s. This is the partial derivative
            in the strict sense. s need not require grad; under no_grad a graph is built for
            the call alone. It also runs inside torch.func transforms, inference_mode and
            torch.compile, with fullgraph=True too.
        s: floating tensor of any shape, or a tuple, list, named tuple or dict of them, which may
            hold further ones. What is not in s is not differentiated by.
    Returns:
        Like s. Where grad mode is on it can be differentiated again, in s and what s was computed
        from, in parameters and in whatever else r depends on.
    Raises:
        TypeError: r or an entry of s is not a floating tensor; r is a tensor, and s a set.
        ValueError: s is empty; r does not depend on an entry of s, which is named. A lost graph
            (detach, no_grad) looks the same as a true constant, so no zeros are returned in its
            place; only inside torch.func transforms, inference_mode and torch.compile, where the
            two cannot be told from a dependence on something else, is the answer zeros.
    Source:
        Jeon, Lee, Choi, IEEE Access 2021, section 3.3: the operator P of the FPI_GD layer and of
        the backward FPI layer, on a set of nodes.
    """
    nodes: Sequence[Any] = (s,)
    names: Sequence[str] = ("s",)
    structure = None
    if not isinstance(s, Tensor):
        nodes, structure = pytree.tree_flatten(s)
        paths, _ = pytree.tree_flatten_with_path(s)
        names = ["s" + pytree.keystr(path) for path, _ in paths]
        if not nodes:
            raise ValueError("partial: s must hold at least one tensor, got none")
    for name, node in zip(names, nodes, strict=True):
        require_floating(name, node)
    if isinstance(s, dict) and not all(isinstance(name, str) for name in s):
        raise TypeError(f"partial: the keys of s name arguments of r, got {list(s)}")
    if isinstance(r, Tensor):
        found = of_tensor(r, nodes, names)
    elif not callable(r):
        raise TypeError(f"partial: r must be a tensor or a function of s, got {type(r).__name__}")
    else:

        def called(*given: Tensor) -> Any:
            if structure is None:
                return r(*given)
            like_s = pytree.tree_unflatten(list(given), structure)
            return r(**like_s) if isinstance(s, dict) else r(*like_s)

        if (
            torch.compiler.is_compiling()
            or torch.is_inference_mode_enabled()
            or torch._C._are_functorch_transforms_active()
        ):
            found = by_transform(called, nodes)  # a tape of our own cannot be started here
        else:
            found = by_tape(called, nodes, names)
    return found[0] if structure is None else pytree.tree_unflatten(list(found), structure)


def of_tensor(r: Tensor, nodes: Sequence[Tensor], names: Sequence[str]) -> Sequence[Tensor]:
    """The derivatives along the graph that already joins r to the nodes; the graph is kept."""
    require_floating("r", r)
    for name, node in zip(names, nodes, strict=True):
        if not node.requires_grad:
            raise ValueError(
                f"partial: {name} must require grad before r is computed from it. Call "
                f"{name}.requires_grad_() first, or pass r as a function of s"
            )
    if r.requires_grad and len(nodes) > 1:
        # Along one graph none of them can be held while another moves, but by hooks on nodes that
        # backward passes of other threads run through too.
        raise TypeError(
            f"partial: r must be a function of a set of nodes, got a tensor and {len(nodes)} "
            "nodes. Pass what computes it, such as lambda a, b: (a * b).sum()"
        )
    return along_graph(r, nodes, names, create_graph=torch.is_grad_enabled(), retain_graph=True)


def by_tape(
    r: Callable[..., Tensor], nodes: Sequence[Tensor], names: Sequence[str]
) -> Sequence[Tensor]:
    """The derivatives of r at aliases of the nodes, so that no path around r is followed.

    Faster than torch.func, and it allows what that refuses: saved-tensor hooks (activation
    checkpointing) and plain autograd.Function.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [node.view_as(node).requires_grad_() for node in nodes]
        value = r(*aliases)
        require_floating("r(s)", value)
        return along_graph(value, aliases, names, create_graph, retain_graph=create_graph)


def along_graph(
    value: Tensor,
    nodes: Sequence[Tensor],
    names: Sequence[str],
    create_graph: bool,
    retain_graph: bool,
) -> Sequence[Tensor]:
    """The derivatives of a value in its nodes; raise where there is none in one of them."""
    found: Sequence[Tensor | None] = [None]
    if value.requires_grad:
        found = torch.autograd.grad(
            value,
            nodes,
            torch.ones_like(value),
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    for name, gradient in zip(names, found, strict=False):
        if gradient is None:
            raise IndependentError(
                f"partial: r does not depend on {name}. If the graph between them was cut by "
                f"detach() or no_grad(), compute r from {name} itself; if the derivative is truly "
                f"zero, use torch.zeros_like({name})"
            )
    return cast(Sequence[Tensor], found)


def by_transform(r: Callable[..., Tensor], nodes: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same derivatives by torch.func, which composes with its own transforms."""

    def total(*aliases: Tensor) -> Tensor:
        value = r(*aliases)
        require_floating("r(s)", value)
        return value.sum()

    differentiate = torch.func.grad(total, argnums=tuple(range(len(nodes))))
    # Dynamo cannot ask for the mode. Where it is on it compiles for it, and gets it right.
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        # Before torch 2.13, torch.func.grad silently returns zeros in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return differentiate(*nodes)
    return differentiate(*nodes)


def require_floating(name: str, value: object) -> None:
    """Raise unless `value` is a real floating tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"partial: {name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"partial: {name} must be floating, got {value.dtype}")
