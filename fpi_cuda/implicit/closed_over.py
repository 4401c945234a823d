"""The tensors that g closes over, found and exchanged while it is evaluated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class Watch(TorchFunctionMode):
    """Finds the tensors that g uses and that it was neither given nor has made itself.

    Attributes:
        functions: it calls an autograd.Function.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        # Kept, for numbers of what is gone are given anew.
        self._known = {id(t): t for t in given}
        self._used: list[weakref.ref[Tensor]] = []
        self.functions = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Look at what comes out, and if that has tensors at what has gone in."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        for t in pytree.tree_leaves((args, kwargs)) if made else ():
            if isinstance(t, Tensor) and id(t) not in self._known:
                self._known[id(t)] = t
                self._used.append(weakref.ref(t))
        self.functions |= getattr(func, "__name__", "") == "custom_function_call"
        self._known.update((id(t), t) for t in made)
        return result

    def captured(self) -> list[Tensor]:
        """Those that are still there; what transforms inside of g have wrapped is not."""
        self._known.clear()
        return [t for used in self._used if (t := used()) is not None]


class Substitution(TorchFunctionMode):
    """Puts stand-ins in the place of tensors that g closes over.

    Attributes:
        hooks_set: g has set hooks on tensors meanwhile.
        used: ids of the originals that were met.
    """

    def __init__(self, stand_ins: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._pairs = {id(original): (original, other) for original, other in stand_ins}
        self.hooks_set = False
        self.used: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Exchange the arguments, then call."""
        if func is Tensor.register_hook:
            self.hooks_set = True
        args, kwargs = pytree.tree_map_only(Tensor, self._exchange, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _exchange(self, t: Tensor) -> Tensor:
        pair = self._pairs.get(id(t))
        if pair is None:
            return t
        self.used.add(id(t))
        return pair[1]
