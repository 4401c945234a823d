"""FPI_GD: one gradient step on an energy, whose fixed points are its stationary points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fpi_cuda.cells.cell import Cell
from fpi_cuda.cells.lowering import EVALUATION, require_consistent
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
        hoisted = offers(energy, "prepare", "value") and overrides(energy, "value", WHOLE)
        closed_form = offers(energy, "prepare", "gradient") and overrides(
            energy, "gradient", ("value", *WHOLE)
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
        """What the energy can do with z alone; z itself where it offers nothing."""
        return self.energy.prepare(*z) if self.hoisted else z

    def step(self, x: Tensor, prepared: Any) -> Tensor:
        """One gradient step, shaped like x."""
        if self.closed_form:
            gradient = self.energy.gradient(x, prepared)
        else:
            gradient = self._partial(x, prepared)
        return (x - self.step_size * gradient).to(x.dtype)

    def lower(self, prepared: Tensor) -> Lowered:
        """step() for the fused loop, if the energy offers lower_descent()."""
        lower_descent = getattr(self.energy, "lower_descent", None)
        if not self.closed_form or lower_descent is None:
            raise NotLowered(f"{type(self.energy).__name__} has no lower_descent()")
        for method in (*EVALUATION, "value", "gradient", "_hidden_input"):
            require_consistent(self.energy, method, "lower_descent")
        result: Lowered = lower_descent(prepared, self.step_size)
        return result

    def _partial(self, x: Tensor, prepared: Any) -> Tensor:
        def value(at: Tensor) -> Tensor:
            energy = self.energy.value(at, prepared) if self.hoisted else self.energy(at, *prepared)
            require_per_sample(energy, at)
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


# How an energy is called when nothing of it is hoisted.
WHOLE = ("forward", "__call__")


def offers(energy: object, *names: str) -> bool:
    """True if `energy` has all these methods."""
    return all(callable(getattr(energy, name, None)) for name in names)


def overrides(energy: object, name: str, others: tuple[str, ...]) -> bool:
    """True if no class derived from the one that defines `name` redefines one of `others`.

    A subclass that changes the energy and inherits its gradient must not be stepped along it.
    """
    classes = type(energy).__mro__

    def depth(method: str) -> int:
        return next((i for i, c in enumerate(classes) if method in vars(c)), len(classes))

    return all(depth(name) <= depth(other) for other in others)


def require_per_sample(energy: Tensor, x: Tensor) -> None:
    """Raise unless the energy has one value per sample: a mean would tie the samples together.

    A one-dimensional x may be a single sample seen by vmap, whose energy is a scalar.
    """
    fits = (x.shape[:1], x.shape[:0]) if x.dim() < 2 else (x.shape[:1],)
    if not isinstance(energy, Tensor) or energy.shape not in fits:
        given = tuple(energy.shape) if isinstance(energy, Tensor) else type(energy).__name__
        raise ValueError(
            "GradientDescent: energy must return one value per sample, (B,), "
            f"got x={tuple(x.shape)}, energy={given}. Sum over all but dim 0"
        )
