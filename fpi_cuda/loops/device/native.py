"""The WHILE loop of csrc/device_loop, as fpi_cuda._C wraps it."""

from __future__ import annotations

from fpi_cuda import _extension

if _extension.module_error is None:  # else there is none to be asked for: why_not() says so
    from fpi_cuda._C import DeviceLoop, captured_nodes, node_refusal, restart_capture

__all__ = ["DeviceLoop", "captured_nodes", "node_refusal", "restart_capture", "why_not"]


def why_not() -> str | None:
    """Why no loop can be built in this process, or None."""
    if _extension.module_error is not None:
        return _extension.module_error
    from fpi_cuda import _C

    return _C.why_not()
