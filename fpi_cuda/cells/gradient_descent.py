"""FPI_GD: one gradient step on an energy, whose fixed points are its stationary points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fpi_cuda.cells.cell import Cell
from fpi_cuda.cells.lowering import (
    EVALUATION,
    describes,
    is_described_here,
    replaced_method,
    why_inconsistent,
)
from fpi_cuda.evaluation.shortcuts import redefined_below, why_call_matters, why_parts_matter
from fpi_cuda.lowered import Lowered, NotLowered
from fpi_cuda.options import require_real
from fpi_cuda.partial import IndependentError, partial


class GradientDescent(Cell):
    """g(x, *z) = x - step_size * d energy / dx.

    Args:
        energy: one value per sample, in one of three forms, the later the faster:

            a function or module (x, *z) -> (B,);

            an object with prepare(*z) -> prepared and value(x, prepared) -> (B,), where prepare
            does once per solve what does not depend on x;

            the same with gradient(x, prepared) -> like x as well, the derivative in closed
            form. A subclass that redefines the energy but not this falls back to autograd.

            An attribute rowwise = True says that sample i of all these depends on sample i of x
            and z alone, and that dim 0 of what prepare returns is the batch. Without it no
            sample is left out of an evaluation.
        step_size: above 0. The step contracts where it is below 2 / (largest curvature of the
            energy).
    Raises:
        TypeError: energy is none of these.
        ValueError: step_size is not positive and finite; from a step, an energy that does not
            return one value per sample or does not depend on x.
    Source:
        Jeon, Lee, Choi, IEEE Access 2021, the FPI_GD layer.
    """

    def __init__(self, energy: Callable[..., Tensor], step_size: float) -> None:
        super().__init__()
        require_real("GradientDescent", "step_size", step_size, 0.0, open_below=True)
        hoisted = offers(energy, "prepare", "value") and stands_for(energy, "value", WHOLE)
        closed_form = offers(energy, "prepare", "gradient") and stands_for(
            energy, "gradient", METHODS
        )
        if not (hoisted or closed_form or callable(energy)):
            raise TypeError(
                "GradientDescent: energy must be a function or module (x, *z) -> (B,), "
                f"got {type(energy).__name__}"
            )
        # Typed Any: which methods it has was settled just now.
        self.energy: Any = energy
        self.step_size = float(step_size)
        self.hoisted = hoisted or closed_form
        self.closed_form = closed_form
        self.rowwise = bool(getattr(energy, "rowwise", False))
        self.x_features = getattr(energy, "x_features", None)

    def prepare(self, *z: Tensor) -> Any:
        """What the energy can do with z alone; z itself where it offers nothing.

        Whether its methods still stand for it is looked at here, once per solve: hooks and
        other methods may be set at any time.
        """
        if not self.hoisted:
            return z
        energy = self.energy
        if self.why_not_closed() is None:
            return energy.prepare(*z)
        if self.offers_value():
            return Valued((energy.prepare(*z),)) if self.closed_form else energy.prepare(*z)
        return Whole(z) if callable(energy) else energy.prepare(*z)

    def why_not_closed(self) -> str | None:
        """Why the energy's own methods need not stand for it any more, or None if they do."""
        energy = self.energy
        if not is_described_here(energy, "lower_descent"):
            if not stands_for(energy, "gradient" if self.closed_form else "value", METHODS):
                return f"{type(energy).__name__} redefines its value"
            replaced = replaced_method(type(energy), "lower_descent")
            if replaced is not None:
                return f"{replaced}() was replaced"
        return why_parts_matter(energy) if isinstance(energy, nn.Module) else None

    def offers_value(self) -> bool:
        """Whether value(x, prepare(*z)) is what calling the energy gives."""
        energy = self.energy
        return (
            offers(energy, "value")
            and stands_for(energy, "value", WHOLE)
            and replaced_method(type(energy), "lower_descent") is None
            and (not isinstance(energy, nn.Module) or why_call_matters(energy) is None)
        )

    def step(self, x: Tensor, prepared: Any) -> Tensor:
        """One gradient step, shaped like x."""
        kind = type(prepared)
        if self.closed_form and kind is not Whole and kind is not Valued:
            gradient = self.energy.gradient(x, prepared)
        else:
            gradient = self._partial(x, prepared)
        return (x - self.step_size * gradient).to(x.dtype)

    def lower(self, prepared: Tensor) -> Lowered:
        """step() for the fused loop, if the energy offers lower_descent()."""
        lower_descent = getattr(self.energy, "lower_descent", None)
        if not self.closed_form or lower_descent is None:
            raise NotLowered(f"{type(self.energy).__name__} has no lower_descent()")
        evaluations = (*EVALUATION, "value", "gradient", "_hidden_input")
        reason = why_inconsistent(self.energy, evaluations, "lower_descent")
        reason = reason or self.why_not_closed()
        if reason is not None:
            raise NotLowered(reason)
        result: Lowered = lower_descent(prepared, self.step_size)
        return result

    def _partial(self, x: Tensor, prepared: Any) -> Tensor:
        kind = type(prepared)

        def value(at: Tensor) -> Tensor:
            if kind is Valued:
                energy = self.energy.value(at, *prepared)
            elif self.hoisted and kind is not Whole:
                energy = self.energy.value(at, prepared)
            else:
                energy = self.energy(at, *prepared)
            # A mean would tie the samples together. A one-dimensional x may be a single sample seen
            # by vmap, whose energy is a scalar.
            fits = (at.shape[:1], at.shape[:0]) if at.dim() < 2 else (at.shape[:1],)
            if not isinstance(energy, Tensor) or energy.shape not in fits:
                given = tuple(energy.shape) if isinstance(energy, Tensor) else type(energy).__name__
                raise ValueError(
                    "GradientDescent: energy must return one value per sample, (B,), "
                    f"got x={tuple(at.shape)}, energy={given}. Sum over all but dim 0"
                )
            return energy

        try:
            return partial(value, x)
        except IndependentError as error:
            raise ValueError(
                "GradientDescent: energy does not depend on x; is it computed under no_grad or "
                "from x.detach()?"
            ) from error

    def extra_repr(self) -> str:
        """What repr shows besides the submodules."""
        return f"step_size={self.step_size}"


describes(GradientDescent.lower, GradientDescent, "step", "_partial")

# How an energy is called when nothing of it is hoisted.
WHOLE = ("forward", "__call__")
METHODS = ("value", *WHOLE)


class Whole(tuple[Any, ...]):
    """The z of an energy that offers prepare, and has to be called whole all the same."""


class Valued(tuple[Any, ...]):
    """What such an energy's prepare returned, alone in here: its gradient does not stand for it."""


def offers(energy: object, *names: str) -> bool:
    """True if `energy` has all these methods."""
    return all(callable(getattr(energy, name, None)) for name in names)


def stands_for(energy: object, name: str, others: tuple[str, ...]) -> bool:
    """Whether method `name` says what the others do, which were not redefined without it.

    A subclass that changes the energy and inherits its gradient must not be stepped along it.
    """
    return redefined_below(energy, others, name) is None
