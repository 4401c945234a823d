"""What a cell must be for the fused loop to run it: then its weights say all about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from fpi_cuda.lowered import Lowered, NotLowered, activation_number
from fpi_cuda.state import Layout

# How a cell may be evaluated otherwise than by what lower() says.
EVALUATION = ("prepare", "step", "forward", "__call__")
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# At which a lowered map is compared with the step that it stands for.
COMPARED_SAMPLES = 4


def lowered(g: object, prepared: object) -> Lowered:
    """g as the fused loop runs it.

    Args:
        prepared: what g.prepare returned.
    Returns:
        Without a graph.
    Raises:
        NotLowered: g is none of the cells that can be, or was changed since.
    """
    require_lowerable(g)
    if not isinstance(prepared, Tensor):
        raise NotLowered("prepare returns more than one tensor")
    cell: Any = g
    result: Lowered = cell.lower(prepared)
    for layer in result.layers:
        if activation_number(layer.activation) is None:
            raise NotLowered(f"no kernel knows the activation {layer.activation!r}")
    return result.detached()


def require_lowerable(g: object) -> None:
    """Raise NotLowered for what can be told of g before it is given inputs."""
    name = type(g).__name__
    if not callable(getattr(g, "lower", None)):
        raise NotLowered(f"{name} has no lower(prepared)")
    if not isinstance(g, nn.Module):
        raise NotLowered(f"{name} is not a module")
    for method in EVALUATION:
        require_consistent(g, method, "lower")
    for module in g.modules():
        if any(getattr(module, hooks, None) for hooks in HOOKS):
            raise NotLowered(f"{type(module).__name__} has hooks, which must see its evaluations")
    if any(getattr(torch_module, "_global" + hooks, None) for hooks in HOOKS):
        raise NotLowered("there are hooks on all modules, which must see their evaluations")


def require_consistent(owner: object, evaluation: str, description: str) -> None:
    """Raise NotLowered where `evaluation` was redefined below the class of `description`."""
    classes = plain_classes(owner)

    def depth(method: str) -> int:
        return next((i for i, c in enumerate(classes) if method in vars(c)), len(classes))

    if evaluation in vars(owner) or depth(evaluation) < depth(description):
        raise NotLowered(
            f"{classes[0].__name__} redefines {evaluation}() and inherits {description}()"
        )


def plain_classes(owner: object) -> tuple[type, ...]:
    """The classes of `owner`, without the one that holds its parametrizations."""
    classes = type(owner).__mro__
    parametrized = isinstance(owner, nn.Module) and parametrize.is_parametrized(owner)
    return classes[1:] if parametrized else classes


def linear_terms(owner: str, name: str, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (outputs, inputs) and bias of a Linear, computed where it is parametrized.

    Raises:
        NotLowered: it is another kind of module by now.
    """
    if plain_classes(module)[0] is not nn.Linear or "forward" in vars(module):
        raise NotLowered(f"{owner}.{name} is a {type(module).__name__}, not nn.Linear")
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return weight, bias


def without_bias(owner: str, name: str, module: nn.Module) -> Tensor:
    """The weight of a Linear that has no bias."""
    weight, bias = linear_terms(owner, name, module)
    if bias is not None:
        raise NotLowered(f"{owner}.{name} has a bias")
    return weight


def require_shapes(result: Lowered, layout: Layout) -> None:
    """Raise NotLowered unless the map takes such states, and is all of their dtype and device."""
    batch, features = layout.batch, layout.sizes[0]
    width = features
    for layer in result.layers:
        if layer.weight.dim() != 2 or layer.weight.shape[1] != width:
            raise NotLowered(f"a weight is {tuple(layer.weight.shape)}, its input has {width}")
        width = layer.weight.shape[0]
        require_shape(layer.bias, (width,))
        require_shape(layer.shift, (batch, width))
        require_shape(layer.factor, (batch, width))
    if width != features:
        raise NotLowered(f"the last weight gives {width} features, x has {features}")
    require_shape(result.x_factor, (batch, features))
    for t in result.tensors():
        if type(t) is not Tensor or t.layout != torch.strided:
            raise NotLowered(f"it holds a {type(t).__name__} of layout {t.layout}")
        if t.dtype != layout.dtype or t.device != layout.device:
            raise NotLowered(
                f"x is {layout.dtype} on {layout.device}, a weight or z {t.dtype} on {t.device}"
            )


def require_shape(t: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise NotLowered unless t, if there is one, has this shape."""
    if t is not None and tuple(t.shape) != shape:
        raise NotLowered(f"a tensor of it has shape {tuple(t.shape)}, not {shape}")


def require_same_map(g: Any, prepared: Tensor, result: Lowered, x: Tensor) -> None:
    """Raise unless lower() describes what step() computes, at points near the first samples of x.

    The cells of this package are not asked.

    Raises:
        ValueError: they differ by more than rounding.
    """
    if is_lowered_here(g):
        return
    # Not at x itself: zeros, for one, would hide a wrong weight.
    away = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype, device=x.device)
    points = x[:COMPARED_SAMPLES] + away
    expected = g.step(points.clone(), prepared[:COMPARED_SAMPLES].detach())
    given = result.rows(COMPARED_SAMPLES)(points)
    error = (given - expected).abs().nan_to_num(0.0)
    scale = expected.abs().nan_to_num(0.0, 0.0, 0.0)
    if bool((error > 1e3 * torch.finfo(x.dtype).eps * (1 + scale)).any()):
        raise ValueError(
            f"fixed_point: {type(g).__name__}.lower() must describe the map of step(), but they "
            f"differ by {float(error.max()):.3g}"
        )


def is_lowered_here(g: object) -> bool:
    """Whether lower() of g is this package's own."""
    owners = [g, getattr(g, "energy", g)]
    methods = [
        getattr(owner, name, None) for owner in owners for name in ("lower", "lower_descent")
    ]
    authors = [getattr(method, "__module__", None) or "" for method in methods if method]
    return all(author.startswith("fpi_cuda.") for author in authors)


def require_no_decline(g: Any) -> None:
    """Raise NotLowered where lower() will, whatever it is given.

    Only the cells of this package are asked, for they look at their weights alone.
    """
    if is_lowered_here(g):
        with torch.no_grad():
            g.lower(torch.empty(0))
