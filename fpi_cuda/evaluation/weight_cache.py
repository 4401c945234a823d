"""The cache of torch.nn.utils.parametrize, of which a thread may lay a part aside.

torch keeps one for the whole process. What a solve computes under no_grad, or from stand-ins for
the parameters, must not be found by another thread, which would silently lose a gradient.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize


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


class caches_kept_clean(laid_aside):
    """Drop what is cached inside: under no_grad it has no graph.

    Whoever used it next under grad mode would silently lose a gradient. Autocast caches the
    weights that it casts, parametrize.cached() those that it computes.
    """

    def __init__(self) -> None:
        super().__init__(covers=False)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        torch.clear_autocast_cache()
