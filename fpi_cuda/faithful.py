"""Evaluations of g that all see what the first one saw: autocast and random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fpi_cuda.capturing import NoRandomNumbers, being_captured

T = TypeVar("T")


class Replay:
    """What surrounds a call of fixed_point, laid around every evaluation of its g.

    Autocast: an evaluation in backward runs under the autocast state of the call, on whatever
    thread autograd uses. Inference mode: likewise, where the solver itself runs outside of it.

    Random numbers: a g that draws some from torch's default generators in its first evaluation
    draws the same ones in every other, so dropout has one mask per solve and its adjoint. Once
    that evaluation is over, the generators are left where it left them. Numbers from a
    torch.Generator of g's own, from numpy or from random are out of reach.

    Attributes:
        stochastic: the first evaluation drew random numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._autocast = AutocastState.current(device.type)
        self._inference = torch.is_inference_mode_enabled()
        self._generators: list[Tensor] | None = None
        self._first = True
        self.stochastic = False

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype that autocast gives to products on the device; None where it is off."""
        return self._autocast.dtype_on(self._device.type)

    @property
    def autocast_key(self) -> Hashable:
        """Equal for calls that were made under the same autocast."""
        return self._autocast.key

    def __call__(self, evaluation: Callable[[], T]) -> T:
        """evaluation(), in the surroundings of the first one."""
        with contextlib.ExitStack() as stack:
            if self._inference and not torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode())
            if self._autocast != AutocastState.current(self._device.type):
                stack.enter_context(self._autocast.entered())
            return self._with_random_numbers(evaluation)

    @contextlib.contextmanager
    def solving(self) -> Iterator[None]:
        """Around a whole solve: what it does not leave behind.

        The solver's own arithmetic runs without autocast, which would round it.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(caches_kept_clean())
            if self._autocast.enabled:
                stack.enter_context(self._autocast.switched_off())
            yield

    def _with_random_numbers(self, evaluation: Callable[[], T]) -> T:
        if self._first and being_captured(self._device):
            # The generators cannot be asked now.
            self._first = False
            with NoRandomNumbers():
                return evaluation()
        if self._first:
            self._first = False
            before = generator_states(self._device)
            result = evaluation()
            after = generator_states(self._device)
            # Raw numbers: torch.func transforms must not see these tensors.
            with torch._C._DisableFuncTorch():
                self.stochastic = not all(map(torch.equal, before, after))
            if self.stochastic:
                self._generators = before
            return result
        if self._generators is None:
            return evaluation()
        outside = generator_states(self._device)
        set_generator_states(self._device, self._generators)
        try:
            return evaluation()
        finally:
            set_generator_states(self._device, outside)


class AutocastState:
    """Autocast as it stands for the CPU and one more device type."""

    def __init__(self, dtypes: dict[str, torch.dtype | None], cache: bool) -> None:
        self._dtypes = dtypes
        self._cache = cache

    @classmethod
    def current(cls, device_type: str) -> AutocastState:
        """The state now, on this thread."""
        dtypes = {
            name: torch.get_autocast_dtype(name) if torch.is_autocast_enabled(name) else None
            for name in {"cpu", device_type}
        }
        return cls(dtypes, torch.is_autocast_cache_enabled())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AutocastState) and self._dtypes == other._dtypes

    __hash__ = None  # type: ignore[assignment]

    @property
    def key(self) -> Hashable:
        """Equal for equal states."""
        return tuple(sorted(self._dtypes.items(), key=lambda item: item[0]))

    @property
    def enabled(self) -> bool:
        """On for any device type."""
        return any(dtype is not None for dtype in self._dtypes.values())

    def dtype_on(self, device_type: str) -> torch.dtype | None:
        """What products are computed in there; None where autocast is off."""
        return self._dtypes[device_type]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Autocast as it was."""
        with contextlib.ExitStack() as stack:
            for name, dtype in self._dtypes.items():
                if dtype is None:
                    stack.enter_context(torch.autocast(name, enabled=False))
                else:
                    stack.enter_context(torch.autocast(name, dtype, cache_enabled=self._cache))
            yield

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """No autocast on any of the device types."""
        with contextlib.ExitStack() as stack:
            for name in self._dtypes:
                stack.enter_context(torch.autocast(name, enabled=False))
            yield


def generator_states(device: torch.device) -> list[Tensor]:
    """States of the default generators that an op on `device` may draw from."""
    with torch._C._DisableFuncTorch():
        states = [torch.get_rng_state()]
        if device.type != "cpu":
            states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def set_generator_states(device: torch.device, states: list[Tensor]) -> None:
    """Undo what was drawn since `generator_states(device)`."""
    with torch._C._DisableFuncTorch():
        torch.set_rng_state(states[0])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(states[1], device)


@contextlib.contextmanager
def counting_changes() -> Iterator[None]:
    """no_grad, and not inference mode: what is made inside counts how often it is changed."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def rehearsal(device: torch.device) -> Iterator[None]:
    """An evaluation that does not count: the random numbers it draws will be drawn again."""
    states = generator_states(device)
    try:
        with caches_kept_clean():
            yield
    finally:
        set_generator_states(device, states)


def rehearsed(evaluation: Callable[[], T], device: torch.device) -> tuple[T, bool]:
    """evaluation() of what does not count, and whether it drew random numbers."""
    before = generator_states(device)
    drew = False
    try:
        result = evaluation()
    finally:
        drew = not all(map(torch.equal, before, generator_states(device)))
        if drew:
            set_generator_states(device, before)
    return result, drew


@contextlib.contextmanager
def caches_kept_clean() -> Iterator[None]:
    """Drop what is cached inside: under no_grad it has no graph.

    Whoever used it next under grad mode would silently lose a gradient. Autocast caches the
    weights that it casts, parametrize.cached() those that it computes.
    """
    known = set(parametrize._cache)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        for key in set(parametrize._cache) - known:
            parametrize._cache.pop(key, None)


@contextlib.contextmanager
def fresh_cache() -> Iterator[None]:
    """Let parametrize.cached() compute its weights anew, from the parameters that it finds now.

    Those in the cache come from other tensors than the stand-ins of this evaluation.
    """
    outside = parametrize._cache
    parametrize._cache = {}
    try:
        yield
    finally:
        parametrize._cache = outside
