"""The contract holds on every way that a solve may go: each test runs in both of these."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

SWITCH = "FPI_CUDA_CAPTURE"
PLAIN, KEPT = "as g is", "captured and kept"


@pytest.fixture(params=[PLAIN, KEPT], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether g is captured, and a solve that a plan can be kept of goes by that plan."""
    monkeypatch.setenv(SWITCH, "1" if request.param == KEPT else "0")
    if request.param == KEPT:
        monkeypatch.setattr("fpi_cuda.loops.traced.WORTH_A_TRACE", -1.0)
        monkeypatch.setattr("fpi_cuda.loops.traced.saves_time", lambda *_: True)
        keep_beforehand(monkeypatch)
    return str(request.param)


class Nobody:
    """A Notice that says nothing."""

    def look(self, *_: Any) -> None:
        """See Notice."""

    def look_at_adjoint(self, *_: Any) -> bool:
        """See Notice."""
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No plan is kept of what other backends than the native one solve."""
    items[:] = [
        item
        for item in items
        if KEPT not in item.name or not any(b in item.name for b in ("reference", "triton"))
    ]


def keep_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every call of a solve the second one like it, where its g has a form to keep."""
    from fpi_cuda import layer, lowered
    from fpi_cuda.loops.fused import kept
    from fpi_cuda.loops.fused.forms import forms

    fixed_point = sys.modules["fpi_cuda.fixed_point"]  # the package has a function of this name
    solve = fixed_point.solve_as_told

    def second(g: Any, x0: Any, z: tuple[Any, ...], options: Any) -> Any:
        if (
            isinstance(x0, torch.Tensor)
            and x0.dim() == 2
            and not torch._C._len_torch_dispatch_stack()
        ):
            try:
                if not hasattr(type(g), "lower"):
                    forms.of(g, x0.detach(), z)
                quiet = replace(options, throw=False, notice=Nobody())
                if kept.is_plain_call(grad=True):
                    with torch.random.fork_rng(devices=[]), torch.no_grad():
                        solve(g, x0.detach(), z, quiet)
            except (lowered.NotLowered, TypeError, ValueError, RuntimeError):
                pass  # as the call itself will say
        return solve(g, x0, z, options)

    # A warning names the line that called into the package, which `second` is a part of here.
    inside = globals() | {"__name__": "fpi_cuda.second"}
    call = types.FunctionType(second.__code__, inside, closure=second.__closure__)
    monkeypatch.setattr(fixed_point, "solve_as_told", call)
    monkeypatch.setattr(layer, "solve_as_told", call)
