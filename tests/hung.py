"""What a user hangs on the call of g."""

from __future__ import annotations

from typing import Any

from hooked_maps import halved
from torch import Tensor, nn

# --- what hangs on the call of g ----------------------------------------------------------------


def forward_hook(g: nn.Module) -> None:
    g.register_forward_hook(lambda m, args, out: halved(out))


def hook_with_kwargs(g: nn.Module) -> None:
    g.register_forward_hook(
        lambda m, args, kwargs, out: halved(out), with_kwargs=True, always_call=True
    )


def pre_hook(g: nn.Module) -> None:
    g.register_forward_pre_hook(lambda m, args: (args[0], 2 * args[1]))


def patched_forward(g: nn.Module) -> None:
    old = g.forward
    g.forward = lambda x, *z: halved(old(x, *z))


def patched_call(g: nn.Module) -> None:
    old = g._call_impl
    g._call_impl = lambda *args: halved(old(*args))  # type: ignore[method-assign]


def compiled(g: nn.Module) -> None:
    # As module.compile() does, whose compiler would make this the slowest test of all.
    old = g._call_impl
    g._compiled_call_impl = lambda *args: halved(old(*args))  # type: ignore[assignment]


def other_class(g: nn.Module) -> None:
    kind = type(g)

    class Half(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Any, *z: Tensor) -> Any:
            return halved(super().forward(x, *z))

    g.__class__ = Half


def other_call(g: nn.Module) -> None:
    kind = type(g)

    class Half(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: Any, *z: Tensor) -> Any:
            return halved(super().__call__(x, *z))

    g.__class__ = Half


HUNG = {
    f.__name__: f
    for f in (
        forward_hook, hook_with_kwargs, pre_hook, patched_forward, patched_call, compiled,
        other_class, other_call,
    )
}  # fmt: skip
