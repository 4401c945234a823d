"""Dispatch modes of this package: what they do to this thread, other threads do not notice.

torch keeps a mode for the thread that enters it, but for the whole process it keeps whether one
is entered at all, by which torch.compile leaves code alone. Each mode puts back what it found
there, so two threads whose modes overlap leave it set for ever.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch._C import _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from typing_extensions import Self

FLAGS = (
    "_is_in_torch_dispatch_mode",
    "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)
SET_IN_C = "set_is_in_mode_without_ignore_compile_internals"


class QuietMode(TorchDispatchMode):
    """Sees the ops of compiled code, which stays compiled; nothing is said to the process."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """The decorator that this would put around each call of an op costs as much as the op."""
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled."""
        return True

    def __enter__(self) -> Self:
        _push_on_torch_dispatch_stack(self)
        return self

    def __exit__(self, *raised: object) -> None:
        _pop_torch_dispatch_stack(None)


class EagerMode(TorchDispatchMode):
    """Sees every op, for torch.compile leaves code alone; what the process is told is put right."""

    _lock = threading.Lock()
    _entered = 0
    _outside: tuple[bool, ...] = ()

    def __enter__(self) -> Self:
        with EagerMode._lock:
            if EagerMode._entered == 0:
                EagerMode._outside = tuple(getattr(_python_dispatch, f, False) for f in FLAGS)
            EagerMode._entered += 1
            super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        with EagerMode._lock:
            super().__exit__(*raised)
            EagerMode._entered -= 1
            inside = EagerMode._entered > 0
            for name, outside in zip(FLAGS, EagerMode._outside, strict=True):
                setattr(_python_dispatch, name, inside or outside)
            tell = getattr(_python_dispatch, SET_IN_C, None)
            if tell is not None:
                tell(inside or EagerMode._outside[-1])
