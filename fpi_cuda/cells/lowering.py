"""What a cell must be for the fused loop to run it: then its weights say all about it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fpi_cuda.activations import ACTIVATIONS, BUILT_IN
from fpi_cuda.evaluation.shortcuts import (
    LINEAR,
    plain_classes,
    redefined_below,
    why_modes_matter,
    why_parts_matter,
)
from fpi_cuda.evaluation.state import Layout
from fpi_cuda.lowered import Layer, Lowered, NotLowered

# How a cell may be evaluated otherwise than by what lower() says.
EVALUATION = ("prepare", "step", "_hidden_input", "forward", "__call__")
# A kernel's and torch's rounding of the same numbers, in units of the terms that are summed.
MOST_UNITS = 256
WRONG_SHAPE = "a tensor of it has shape {}, not {}"

_described: dict[Any, tuple[type, dict[str, Any]]] = {}
"""By a lower() or lower_descent() of this package: its class, and the methods it stands for."""


def describes(lower: Any, kind: type, *methods: str) -> None:
    """Say that `lower` of this class is what these methods of it compute, as they are now."""
    _described[lower] = (kind, {name: getattr(kind, name) for name in methods})


def described(cell: Any, prepared: object) -> tuple[Lowered, bool]:
    """What lower() says of a cell, and is_lowered_here.

    Args:
        cell: for which why_not_lowerable has nothing to say.
        prepared: what cell.prepare returned.
    Raises:
        NotLowered: it is none that the kernels can run.
        TypeError: lower() returned something else than it has to.
    """
    if not isinstance(prepared, Tensor):
        raise NotLowered("prepare returns more than one tensor")
    result: Lowered = cell.lower(prepared)
    ours = is_lowered_here(cell)
    if not ours:
        require_types(type(cell).__name__, result)
    return result, ours


def require_types(name: str, result: Any) -> None:
    """Raise unless lower() of `name` returned one or two layers made of tensors.

    Raises:
        NotLowered: another number of layers.
        TypeError: it is no Lowered, or something in it is of the wrong type.
    """

    def require(given: object, kinds: Any, what: str) -> None:
        if not isinstance(given, kinds):
            raise TypeError(
                f"fixed_point: {name}.lower() must return a fpi_cuda.lowered.Lowered whose {what}, "
                f"got {type(given).__name__}. Where it cannot, raise NotLowered(reason)"
            )

    require(result, Lowered, "layers are one or two Layer")
    require(result.layers, (tuple, list), "layers are a tuple")
    for layer in result.layers:
        require(layer, Layer, "layers are Layer")
        require(layer.weight, Tensor, "weights are tensors")
        require(layer.activation, str, "activations are names")
        for t in layer.tensors()[1:]:
            require(t, (Tensor, type(None)), "bias, shift and factor are tensors or None")
    require(result.x_factor, (Tensor, type(None)), "x_factor is a tensor or None")
    require(result.carry, (int, float), "carry is a number")
    if len(result.layers) not in (1, 2):
        raise NotLowered(f"it has {len(result.layers)} layers, and the kernels run one or two")


def why_not_lowerable(g: object, whole: str | None, *, rows_known: bool) -> str | None:
    """What speaks against lowering g before it is given inputs; None: nothing.

    Args:
        whole: why prepare and step do not stand for g; None if they do.
        rows_known: why_rows_unknown had nothing to say, which looks at all parts of g.
    """
    name = type(g).__name__
    if not callable(getattr(g, "lower", None)):
        return f"{name} has no lower(prepared)"
    if not isinstance(g, nn.Module):
        return f"{name} is not a module"
    replaced = replaced_method(type(g), "lower")
    if replaced is not None:
        return f"{replaced}() was replaced"
    reason = why_inconsistent(g, EVALUATION, "lower") or whole
    if reason is None and not rows_known:
        reason = why_parts_matter(g)
    return reason or why_modes_matter()


def replaced_method(kind: type, description: str) -> str | None:
    """The method of this package that its description is of and that was replaced since."""
    owner, methods = _described.get(getattr(kind, description, None), (kind, {}))
    if not issubclass(kind, owner):
        return None
    for name, method in methods.items():
        if getattr(owner, name) is not method:
            return f"{owner.__name__}.{name}"
    return None


def why_inconsistent(owner: object, evaluations: tuple[str, ...], description: str) -> str | None:
    """Which evaluation was redefined below the class of `description`, or None."""
    redefined = redefined_below(owner, evaluations, description)
    if redefined is None:
        return None
    return (
        f"{plain_classes(owner)[0].__name__} redefines {redefined}() and inherits {description}()"
    )


def linear_terms(
    owner: str, name: str, module: nn.Module, *, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Weight (outputs, inputs) and bias of a Linear, computed where it is parametrized.

    Raises:
        NotLowered: it is another kind of module by now, or has a bias without `bias`.
    """
    kind = type(module)
    if kind is not LINEAR:
        kind = plain_classes(module)[0]  # of a parametrized one
    if kind is not LINEAR or "forward" in vars(module):
        raise NotLowered(f"{owner}.{name} is a {type(module).__name__}, not nn.Linear")
    weight: Tensor = module.weight  # type: ignore[assignment]
    added: Tensor | None = module.bias  # type: ignore[assignment]
    if added is not None and not bias:
        raise NotLowered(f"{owner}.{name} has a bias")
    return weight, added


def require_shapes(result: Lowered, tensors: tuple[Tensor, ...], layout: Layout) -> None:
    """Raise NotLowered unless the map takes such states, and is all of their dtype and device.

    Args:
        tensors: all that it is made of.
    """
    batch, (features,) = layout.batch, layout.shapes[0]
    width = features
    for layer in result.layers:
        if layer.weight.dim() != 2 or layer.weight.shape[1] != width:
            raise NotLowered(f"a weight is {tuple(layer.weight.shape)}, its input has {width}")
        width = layer.weight.shape[0]
        rows = (batch, width)
        for t, shape in ((layer.bias, (width,)), (layer.shift, rows), (layer.factor, rows)):
            if t is not None and t.shape != shape:
                raise NotLowered(WRONG_SHAPE.format(tuple(t.shape), shape))
    if width != features:
        raise NotLowered(f"the last weight gives {width} features, x has {features}")
    if result.x_factor is not None and result.x_factor.shape != (batch, features):
        raise NotLowered(WRONG_SHAPE.format(tuple(result.x_factor.shape), (batch, features)))
    for t in tensors:
        if type(t) is not Tensor or t.layout != torch.strided:
            raise NotLowered(f"it holds a {type(t).__name__} of layout {t.layout}")
        if t.dtype != layout.dtype or t.device != layout.device:
            raise NotLowered(
                f"x is {layout.dtype} on {layout.device}, a weight or z {t.dtype} on {t.device}"
            )


def require_same_map(name: str, result: Lowered, x: Tensor, expected: Tensor) -> None:
    """Raise unless lower() of `name` describes what step() computes.

    Args:
        x, expected: (B, D), and step() there.
    Raises:
        ValueError: they differ by more than rounding.
    """
    error, off = difference(result, x, expected)
    if bool(off.any()):
        rows = torch.nonzero(off.any(1)).flatten().tolist()
        worst = float(error[off].nan_to_num(torch.inf).max())
        raise ValueError(
            f"fixed_point: {name}.lower() must describe the map of step(), but they differ by "
            f"{worst:.3g} in samples {rows[:8]}"
        )


def difference(result: Lowered, x: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """How far the map is from `expected` at x, and where by more than rounding, both (B, D)."""
    given = result(x)
    error = (given - expected).abs()
    terms = rounding(result, x)
    terms = torch.where(terms.isinf(), torch.maximum(given.abs(), expected.abs()), terms)
    finfo = torch.finfo(x.dtype)
    agree = (error <= MOST_UNITS * finfo.eps * terms + finfo.tiny) & error.isfinite()
    return error, ~(agree | (~given.isfinite() & ~expected.isfinite()))


def rounding(result: Lowered, x: Tensor) -> Tensor:
    """What an error of one unit in each term and each sum adds up to, (B, D), in units."""
    h = x if result.x_factor is None else x * result.x_factor
    error = torch.zeros_like(h) if result.x_factor is None else h.abs()
    for layer in result.layers:
        weight = layer.weight.abs()
        u = layer.sums(h)
        terms = (h.abs() + error) @ weight.mT
        for t in (layer.bias, layer.shift):
            terms = terms if t is None else terms + t.abs()
        slope = dataclasses.replace(layer, factor=None).slope(u)
        if slope is not None:
            terms = terms * slope.abs().clamp(min=1.0)
        h = layer.finished(u)
        error = terms if layer.factor is None else terms * layer.factor.abs()
        error = error + h.abs()
    return error + abs(result.carry) * x.abs()


def is_lowered_here(g: object) -> bool:
    """Whether lower() of g is this package's own, and so are the methods that it stands for."""
    energy = getattr(g, "energy", None)
    return is_described_here(g, "lower") and (
        not hasattr(energy, "lower_descent") or is_described_here(energy, "lower_descent")
    )


def is_described_here(owner: object, description: str) -> bool:
    """Whether a method is this package's own description of this owner's methods."""
    known = _described.get(getattr(type(owner), description, None))
    if known is None or not isinstance(owner, known[0]):
        return False
    own, kind = vars(owner), type(owner)
    return description not in own and all(
        name not in own and getattr(kind, name) is method for name, method in known[1].items()
    )


def require_no_decline(g: Any) -> None:
    """Raise NotLowered where lower() will, whatever it is given.

    Only the cells of this package are asked, for they look at their weights alone.
    """
    if is_lowered_here(g):
        with torch.no_grad():
            g.lower(torch.empty(0))


def require_compiled(name: str) -> str:
    """`name`, if kernels compute ACTIVATIONS[name] too.

    Raises:
        NotLowered: it was added or exchanged by the user.
    """
    if ACTIVATIONS[name] is not BUILT_IN.get(name):
        raise NotLowered(f"no kernel computes the activation {name!r}")
    return name
