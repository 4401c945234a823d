"""The WHILE loop of csrc/device_loop, called through its C interface."""

from __future__ import annotations

import ctypes
import functools

from fpi_cuda import _extension

# A cudaGraph_t, cudaStream_t, device address or handle.
Pointer = ctypes.c_void_p

SIGNATURES = {
    "fpi_node_refusal": (ctypes.c_int,),
    "fpi_device_loop_unsupported": (),
    "fpi_captured_nodes": (Pointer, ctypes.POINTER(ctypes.c_int64)),
    "fpi_restart_capture": (Pointer,),
    "fpi_device_loop_create": (
        Pointer,
        Pointer,
        ctypes.c_int64,
        Pointer,
        ctypes.c_int64,
        ctypes.POINTER(Pointer),
    ),
    "fpi_device_loop_launch": (Pointer, Pointer),
    "fpi_device_loop_destroy": (Pointer,),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The library that torch.ops has loaded, with the types of its C functions.

    A call releases the GIL, and costs less than a microsecond more than from C.
    """
    loaded = ctypes.CDLL(str(_extension.LIBRARY))
    for name, argument_types in SIGNATURES.items():
        if hasattr(loaded, name):
            function = getattr(loaded, name)
            function.argtypes = argument_types
            function.restype = ctypes.c_char_p
    if hasattr(loaded, "fpi_device_loop_destroy"):
        loaded.fpi_device_loop_destroy.restype = None
    return loaded


def why_not() -> str | None:
    """Why no loop can be built in this process, or None."""
    if _extension.load_error is not None:
        return _extension.load_error
    if not hasattr(library(), "fpi_device_loop_create"):
        return f"built without CUDA ({_extension.build_info().get('no_cuda', 'an older build')})"
    error = library().fpi_device_loop_unsupported()
    return None if error is None else error.decode()


def node_refusal(node_type: int) -> str | None:
    """Why the loop's body may not hold a node of this cudaGraphNodeType, or None."""
    error = library().fpi_node_refusal(node_type)
    return None if error is None else error.decode()


def captured_nodes(stream: int) -> int:
    """Nodes captured on a cudaStream_t so far; -1 where it is not capturing, or in vain."""
    count = ctypes.c_int64()
    check(library().fpi_captured_nodes(stream, ctypes.byref(count)))
    return count.value


def restart_capture(stream: int) -> None:
    """Replace the void capture on a cudaStream_t by an empty one, which can be ended well."""
    check(library().fpi_restart_capture(stream))


def check(error: bytes | None) -> None:
    """Raise what a C function returned, if that is an error."""
    if error is not None:
        raise RuntimeError(f"device loop: {error.decode()}")


class DeviceLoop:
    """An executable CUDA graph that repeats a captured one on the device that is current now.

    Args:
        graph: cudaGraph_t of one round. It is copied; the memory it uses must stay.
        status: address of (batch,) int8 on the device; rounds end when none is 0.
        batch: samples.
        rounds: address of (1,) int32 on the device; counts the rounds of the latest launch.
        max_steps: most rounds of a launch.
    Raises:
        RuntimeError: graph holds what cannot be repeated on the device, or CUDA failed.
    """

    def __init__(self, graph: int, status: int, batch: int, rounds: int, max_steps: int) -> None:
        self._handle: int | None = None
        handle = Pointer()
        check(
            library().fpi_device_loop_create(
                graph, status, batch, rounds, max_steps, ctypes.byref(handle)
            )
        )
        self._handle = handle.value
        self._destroy = library().fpi_device_loop_destroy

    def launch(self, stream: int) -> None:
        """Enqueue the loop on a cudaStream_t; one thread at a time."""
        if self._handle is None:
            raise RuntimeError("device loop: it was closed")
        check(library().fpi_device_loop_launch(self._handle, stream))

    def close(self) -> None:
        """Free the graph; a launch under way ends as it should."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._destroy(handle)

    def __del__(self) -> None:
        self.close()
