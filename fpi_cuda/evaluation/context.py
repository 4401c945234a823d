"""Evaluations of g that all see what the first one saw: autocast and random numbers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.random_draws import Draw, Generators, Recording, Replaying, here
from fpi_cuda.evaluation.stream_capture import NoRandomNumbers

UNDER_GRAD = (
    "fixed_point: under grad mode a solve cannot be captured into a CUDA graph, for backward has "
    "to read how it ended. Capture it under torch.no_grad(), or not at all: the device loop makes "
    "a graph of its own"
)


def being_captured(device: torch.device) -> bool:
    """Whether the caller is capturing what the current stream of `device` is given."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())


T = TypeVar("T")


class EvaluationContext:
    """What surrounds a call of fixed_point, laid around every evaluation of its g.

    Autocast: an evaluation in backward runs under the autocast state of the call, on whatever
    thread autograd uses. Inference mode: likewise, where the solver itself runs outside of it.

    Random numbers: what a g draws in its first evaluation, from torch's default generators or
    from one of its own, it is given in every other, so dropout has one mask per solve and its
    adjoint. No generator is wound back: other threads may draw from them meanwhile. Numbers from
    numpy or from random are out of reach.

    Args:
        device: of the state.
        g, method: whose evaluations they are; "" is its call.
    Attributes:
        stochastic: the first evaluation drew random numbers.
        changes_x: it changed the x that it was given, so each gets a copy; None: there was none
            yet. Whoever makes it notes it.
        is_plain: an evaluation is a call of g, as the first one has shown, for as long as autocast
            is off on all of device_types and parametrize knows of this thread's layers.
        device_types: those whose autocast concerns the evaluations.
        autocast_dtype: what autocast gives to products on the device; None where it is off.
    """

    def __init__(self, device: torch.device, g: Any = None, method: str = "") -> None:
        self._device = device
        self._g = g
        self._method = method
        self._autocast = autocast_state(device.type)
        self.device_types = self._autocast.device_types
        self.autocast_dtype = self._autocast.dtypes[device.type]
        self._inference = torch.is_inference_mode_enabled()
        self._first = True
        self._compare = True
        self._draws: Sequence[Draw] = ()
        self.is_plain = False
        self.changes_x: bool | None = None

    @property
    def stochastic(self) -> bool:
        return bool(self._draws)

    @property
    def autocast_key(self) -> Hashable:
        """Equal for calls that were made under the same autocast."""
        return self._autocast.key

    def __call__(self, evaluation: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """evaluation(), in the surroundings of the first one.

        Args:
            again: the same, from fresh copies of what it may have changed; it is called where
                another thread draws at that time, to see whether g does.
        """
        if type(parametrize._cache) is not WeightCache:
            watch_weight_cache()
        inference = self._inference and not torch.is_inference_mode_enabled()
        if not inference and self._autocast.is_current():
            return self._with_random_numbers(evaluation, again or evaluation)
        with contextlib.ExitStack() as stack:
            if inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(self._autocast.entered())
            return self._with_random_numbers(evaluation, again or evaluation)

    def solving(self) -> contextlib.AbstractContextManager[None]:
        """Around a whole solve: what it does not leave behind.

        The solver's own arithmetic runs without autocast, which would round it.
        """
        return self._without_autocast() if self._autocast.enabled else caches_kept_clean()

    @contextlib.contextmanager
    def _without_autocast(self) -> Iterator[None]:
        with caches_kept_clean(), self._autocast.switched_off():
            yield

    def _with_random_numbers(self, evaluation: Callable[[], T], again: Callable[[], T]) -> T:
        if not self._first:
            return self._later_evaluation(evaluation, again) if self._draws else evaluation()
        self._first = False
        if being_captured(self._device):
            # The generators cannot be asked now.
            with NoRandomNumbers():
                result = evaluation()
        else:
            result = self._first_evaluation(evaluation, again)
        self.is_plain = not (self._draws or self._inference or self._autocast.enabled)
        return result

    def _first_evaluation(self, evaluation: Callable[[], T], again: Callable[[], T]) -> T:
        habit = habit_of(self._g, self._method)
        self._g = None
        before = generator_states(self._device)
        if habit.drew is False and not here.depth:
            result = evaluation()
            if unmoved(before, self._device) or self._told_apart(result, before, again, habit):
                return result
            evaluation = again
        return self._recorded(evaluation, before, again, habit)

    def _recorded(
        self,
        evaluation: Callable[[], T],
        before: list[Tensor],
        again: Callable[[], T],
        habit: Habit,
    ) -> T:
        with Recording() as recording:
            result = evaluation()
        self._draws = recording.draws
        habit.drew = bool(recording.draws)
        if not recording.draws and not here.depth and not unmoved(before, self._device):
            between = generator_states(self._device)
            self._require_alike(result, again(), between)
        return result

    def _told_apart(
        self, result: T, before: list[Tensor], again: Callable[[], T], habit: Habit
    ) -> bool:
        """Whether `result` is that of an evaluation whose draws, if any, are known now.

        Since `before` either g or another thread has drawn. That g would draw the same again shows
        it.
        """
        between = generator_states(self._device)
        with Recording(Generators(before, self._device)) as recording:
            repeated = again()
        if not recording.draws:
            self._require_alike(result, repeated, between)
            return True
        if not same_numbers(result, repeated, 0.0):
            return False
        self._draws = recording.draws
        habit.drew = True
        return True

    def look_on(self, evaluation: Callable[[], Any], again: Callable[[], Any]) -> Any:
        """evaluation(), the first one, of a g that an earlier solve has seen to draw nothing.

        UNSEEN_YET, and nothing done, where that is not known, or this may be more than a call. It
        is what __call__ comes to then, for whoever sees to what g may change, in less time.
        """
        if not self._first or self._inference or self._autocast.enabled or here.depth:
            return UNSEEN_YET
        habit = habit_of(self._g, self._method)
        if habit.drew is not False or self._device.type != "cpu" or transforms.active():
            return UNSEEN_YET
        if type(parametrize._cache) is not WeightCache or torch.is_autocast_enabled("cpu"):
            return UNSEEN_YET
        generator = torch.default_generator
        before = generator.get_state()
        result = evaluation()
        self._first, self._g = False, None
        if not torch.equal(before, generator.get_state()) and not self._told_apart(
            result, [before], again, habit
        ):
            result = self._recorded(again, [before], again, habit)
        self.is_plain = not self._draws
        return result

    def _later_evaluation(self, evaluation: Callable[[], T], again: Callable[[], T]) -> T:
        before = generator_states(self._device) if self._compare else []
        with Replaying(self._draws) as replaying:
            result = evaluation()
            replaying.require_all()
        if self._compare:
            self._compare = False
            if not here.depth and not unmoved(before, self._device):
                between = generator_states(self._device)
                with Replaying(self._draws):
                    repeated = again()
                self._require_alike(result, repeated, between)
        return result

    def _require_alike(self, result: object, repeated: object, between: list[Tensor]) -> None:
        """Raise if g draws unseen: numbers were drawn in both evaluations, and they differ.

        Args:
            result, repeated: what the two gave.
            between: where the generators stood before the second.
        """
        if not same_numbers(result, repeated, SAME_VALUE) and not unmoved(between, self._device):
            raise RuntimeError(UNSEEN)


UNSEEN_YET = object()
"""In the place of a value of g: nobody knows whether it draws random numbers."""

UNSEEN = (
    "fixed_point: g draws random numbers in an op that is not tagged as such "
    "(torch.Tag.nondeterministic_seeded), so that other evaluations of the solve could not be "
    "given the same ones. Draw them before the call and pass them as z"
)
# Two evaluations of one g may differ by rounding, not by this share.
SAME_VALUE = 1e-2


class Habit:
    """What is remembered of a g from solve to solve.

    Attributes:
        drew: it drew random numbers when it was evaluated first in the latest solve; None: it
            never was. A wrong answer costs an evaluation, no more.
        looks: how often its graph was looked at; see autograd.cut_graph.
    """

    __slots__ = ("__weakref__", "drew", "looks")

    def __init__(self) -> None:
        self.drew: bool | None = None
        self.looks = 0


_habits: weakref.WeakKeyDictionary[Any, dict[Any, Habit]] = weakref.WeakKeyDictionary()


def habit_of(g: Any, method: str) -> Habit:
    """That of a module in training or not, of a function's code, or of an object's class.

    Args:
        method: which of g's; "" for its call.
    """
    if isinstance(g, nn.Module):
        return habits_of(
            g if g.__hash__ is not None else type(g), (method, getattr(g, "training", None))
        )
    while isinstance(g, functools.partial):
        g = g.func
    called = inspect.unwrap(getattr(g, "__func__", g))
    if isinstance(called, types.FunctionType):
        return habits_of(called.__code__, method)
    return habits_of(type(called), method)


def habits_of(known: Any, use: Any) -> Habit:
    """That of one use of what is known by a weak reference."""
    by_use = _habits.get(known)
    if by_use is None:
        by_use = _habits.setdefault(known, {})
    habit = by_use.get(use)
    return by_use.setdefault(use, Habit()) if habit is None else habit


def unmoved(before: list[Tensor], device: torch.device) -> bool:
    """Whether nobody has drawn from the default generators since."""
    with torch._C._DisableFuncTorch():
        return all(map(torch.equal, before, generator_states(device)))


def same_numbers(one: Any, other: Any, share: float) -> bool:
    """Whether two results differ by no more than a share of the largest, or a hundred roundings."""
    ones, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(ones) == len(others) and all(
        same_leaf(a, b, share) for a, b in zip(ones, others, strict=True)
    )


def same_leaf(one: Any, other: Any, share: float) -> bool:
    """The same for a tensor, whatever transforms it is wrapped for; True for anything else."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return True
    one, other = transforms.numbers(one), transforms.numbers(other)
    if one.shape != other.shape or not one.is_floating_point():
        return one.shape == other.shape
    with torch._C._DisableFuncTorch(), torch.no_grad():
        allowed = max(share, 100 * torch.finfo(one.dtype).eps)
        largest = one.abs().nan_to_num(0.0, 0.0, 0.0).amax() if one.numel() else 0.0
        off = (one - other).abs() > allowed * largest
        return not bool(off.any())


class AutocastState:
    """Autocast as it stands on this thread, for the CPU and one more device type.

    Attributes:
        device_types: those.
        dtypes: what products are computed in, by device type; None where autocast is off.
        enabled: on for any of them.
    """

    def __init__(self, device_type: str) -> None:
        self.device_types = ("cpu",) if device_type == "cpu" else ("cpu", device_type)
        self.dtypes: dict[str, torch.dtype | None] = dict.fromkeys(self.device_types)
        self.enabled = False
        for name in self.device_types:
            if torch.is_autocast_enabled(name):
                self.enabled = True
                self.dtypes[name] = torch.get_autocast_dtype(name)
        self._cache = torch.is_autocast_cache_enabled()

    def is_current(self) -> bool:
        """Whether it is the state now, on this thread."""
        for name, dtype in self.dtypes.items():
            if torch.is_autocast_enabled(name) != (dtype is not None):
                return False
            if dtype is not None and torch.get_autocast_dtype(name) != dtype:
                return False
        return True

    @property
    def key(self) -> Hashable:
        """Equal for equal states."""
        return tuple(self.dtypes.items())

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Autocast as it was."""
        with contextlib.ExitStack() as stack:
            for name, dtype in self.dtypes.items():
                if dtype is None:
                    stack.enter_context(torch.autocast(name, enabled=False))
                else:
                    stack.enter_context(torch.autocast(name, dtype, cache_enabled=self._cache))
            yield

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """No autocast on any of the device types."""
        with contextlib.ExitStack() as stack:
            for name in self.dtypes:
                stack.enter_context(torch.autocast(name, enabled=False))
            yield


def autocast_state(device_type: str) -> AutocastState:
    """As it stands on this thread; one for all that have it switched off."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled(device_type):
        return AutocastState(device_type)
    return switched_off_everywhere(device_type)


switched_off_everywhere = functools.cache(AutocastState)
"""The state of those where autocast is off."""


def generator_states(device: torch.device) -> list[Tensor]:
    """States of the default generators that an op on `device` may draw from."""
    # Raw numbers: torch.func transforms must not see these tensors.
    with torch._C._DisableFuncTorch():
        states = [torch.default_generator.get_state()]
        if device.type != "cpu":
            states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextlib.contextmanager
def rehearsal(device: torch.device) -> Iterator[None]:
    """An evaluation that does not count: the random numbers it draws will be drawn again."""
    with caches_kept_clean(), Recording(Generators(generator_states(device), device)):
        yield


def rehearsed(
    evaluation: Callable[[], T], device: torch.device, g: Any, method: str
) -> tuple[T, bool]:
    """evaluation() of what does not count, and whether it drew random numbers.

    Args:
        g, method: whose evaluation it is. Where it never drew any, a look at the generators
            will do.
    """
    habit = habit_of(g, method)
    before = generator_states(device)
    if habit.drew is False and not here.depth:
        result = evaluation()
        if unmoved(before, device):
            return result, False
    recording = Recording(Generators(before, device))
    with recording:
        result = evaluation()
    habit.drew = bool(recording.draws)
    return result, habit.drew


# The cache of torch.nn.utils.parametrize, of which a thread may lay a part aside. torch keeps one
# for the whole process. What a solve computes under no_grad, or from stand-ins for the parameters,
# must not be found by another thread, which would silently lose a gradient.


class Layer:
    """What one thread computes for itself.

    Args:
        covers: what lies below is not seen.
    """

    def __init__(self, *, covers: bool) -> None:
        self.covers = covers
        self._cache: WeightCache | None = None
        self._weights: dict[Any, Tensor | None] = {}

    def weights_over(self, cache: WeightCache) -> dict[Any, Tensor | None]:
        """By module and name. The end of parametrize.cached() makes another cache and ends them."""
        if self._cache is not cache:
            self._cache = cache
            self._weights = {}
        return self._weights


class ThreadLayers(threading.local):
    """The layers of this thread, uppermost last."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []


_here = ThreadLayers()


class WeightCache(dict[Any, "Tensor | None"]):
    """Like the dictionary it takes the place of, for every thread that has laid nothing aside."""

    def get(self, key: Any, default: Any = None) -> Any:
        """The weight of a module and name."""
        for layer in reversed(_here.layers):
            weights = layer.weights_over(self)
            if key in weights:
                return weights[key]
            if layer.covers:
                return default
        return super().get(key, default)

    def __setitem__(self, key: Any, weight: Tensor | None) -> None:
        if _here.layers:
            _here.layers[-1].weights_over(self)[key] = weight
        else:
            super().__setitem__(key, weight)


weight_cache: Callable[[], Any] = functools.partial(getattr, parametrize, "_cache")
"""The one in use, which the end of parametrize.cached() replaces; without a Python function."""


def watch_weight_cache() -> None:
    """See to it that the cache in use knows of layers."""
    if type(parametrize._cache) is not WeightCache:
        parametrize._cache = WeightCache(parametrize._cache)


class laid_aside:
    """Keep what parametrize.cached() computes inside to this thread, and drop it in the end.

    Args:
        covers: let it compute its weights anew, from the parameters that it finds now. Those in
            the cache come from other tensors than the stand-ins of this evaluation.
    """

    def __init__(self, *, covers: bool) -> None:
        self._covers = covers

    def __enter__(self) -> None:
        watch_weight_cache()
        _here.layers.append(Layer(covers=self._covers))

    def __exit__(self, *_: object) -> None:
        _here.layers.pop()


class caches_kept_clean:
    """Keep it to this thread, and drop what is cached inside: under no_grad it has no graph.

    Whoever used it next under grad mode would silently lose a gradient. Autocast caches the
    weights that it casts, parametrize.cached() those that it computes.
    """

    def __enter__(self) -> None:
        if type(parametrize._cache) is not WeightCache:
            watch_weight_cache()
        _here.layers.append(Layer(covers=False))

    def __exit__(self, *_: object) -> None:
        _here.layers.pop()
        torch.clear_autocast_cache()
