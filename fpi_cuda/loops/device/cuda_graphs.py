"""Captures and replays by CUDA graphs."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fpi_cuda.loops.device import native
from fpi_cuda.loops.device.graphs import Refused, first_line

# One capture at a time: cuBLAS workspaces, which a capture must not share, are per process.
CAPTURES = threading.Lock()


class CudaGraphs:
    """CUDA graphs on NVIDIA devices, through torch's capture and the loop of csrc/device_loop."""

    def why_not(self) -> str | None:
        """Why nothing can be captured now, or None."""
        if torch.version.hip is not None:
            return "ROCm has no conditional graph nodes"
        if torch.cuda.is_current_stream_capturing():
            return "the call is itself being captured into a CUDA graph"
        return native.why_not()

    @contextlib.contextmanager
    def session(self, device: torch.device) -> Iterator[CudaSession]:
        """Captures on a stream of their own, which waits for the current one."""
        with CAPTURES, torch.cuda.device(device):
            torch.cuda.synchronize()
            with collector_off():
                yield CudaSession(device)

    def launches(self) -> int:
        """Nodes in the graph that the current stream is captured into."""
        return native.captured_nodes(torch.cuda.current_stream().cuda_stream)

    def fence(self, device: torch.device) -> CudaFence:
        """A new one."""
        return CudaFence(device)


class CudaSession:
    """See Session."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], None]) -> CapturedGraph:
        """See Session."""
        return CapturedGraph(*self._captured(body))

    def capture_loop(
        self, body: Callable[[], None], status: Tensor, rounds: Tensor, max_steps: int
    ) -> CapturedLoop:
        """See Session."""
        return CapturedLoop(*self._captured(body), status, rounds, max_steps)

    def _captured(self, body: Callable[[], None]) -> tuple[torch.cuda.CUDAGraph, int]:
        """The graph of body, and the bytes that its pool took."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # A workspace that eager calls or other graphs use too would be written by both at once.
        torch._C._cuda_clearCublasWorkspaces()
        before = torch.cuda.memory_reserved(self._device)
        try:
            with torch.cuda.stream(self._stream):
                # Only this thread is held to what capturing allows; others may load data.
                with self._pool_ended():
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    body()
                    if native.captured_nodes(self._stream.cuda_stream) < 0:
                        raise Refused("g cannot be captured: it does what a capture forbids")
                    graph.capture_end()
                except BaseException:
                    self._abandon(graph)
                    raise
        except Refused:
            raise
        except RuntimeError as error:
            raise Refused(f"g cannot be captured: {first_line(error)}") from error
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        return graph, max(0, torch.cuda.memory_reserved(self._device) - before)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed, so that torch's allocators leave its pool, the host's too.

        torch before 2.12 keeps them in it where the stream's capture ends with an error.
        """
        with contextlib.suppress(RuntimeError), self._pool_ended(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty", UserWarning)
            native.restart_capture(self._stream.cuda_stream)
            graph.capture_end()

    @contextlib.contextmanager
    def _pool_ended(self) -> Iterator[None]:
        """Take the device's allocator out of a capture that did not begin or end well."""
        try:
            yield
        except BaseException:
            for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with contextlib.suppress(RuntimeError):
                    end(self._device.index, self._pool)
            raise


class CapturedGraph:
    """A graph that runs once per replay."""

    def __init__(self, graph: torch.cuda.CUDAGraph, memory: int) -> None:
        self.memory = memory
        self._graph: torch.cuda.CUDAGraph | None = graph
        try:
            graph.instantiate()
        except RuntimeError as error:
            raise Refused(f"g cannot be captured: {first_line(error)}") from error

    def replay(self) -> None:
        """See Replayable."""
        assert self._graph is not None
        self._graph.replay()

    def close(self) -> None:
        """See Replayable."""
        self._graph = None


class CapturedLoop:
    """A graph that repeats the captured one until no status is 0."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        memory: int,
        status: Tensor,
        rounds: Tensor,
        max_steps: int,
    ) -> None:
        self.memory = memory
        self._device = status.device
        # It owns the memory pool that the loop works in.
        self._graph: torch.cuda.CUDAGraph | None = graph
        try:
            self._loop = native.DeviceLoop(
                graph.raw_cuda_graph(),
                status.data_ptr(),
                status.numel(),
                rounds.data_ptr(),
                max_steps,
            )
        except RuntimeError as error:
            raise Refused(first_line(error)) from error

    def replay(self) -> None:
        """See Replayable."""
        with torch.cuda.device(self._device):
            self._loop.launch(torch.cuda.current_stream().cuda_stream)

    def close(self) -> None:
        """See Replayable."""
        self._loop.close()
        self._graph = None


class CudaFence:
    """See Fence."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()
        self._stream: torch.cuda.Stream | None = None

    def wait(self) -> None:
        """See Fence."""
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and self._stream != stream:
            stream.wait_event(self._event)

    def mark(self) -> None:
        """See Fence."""
        self._stream = torch.cuda.current_stream(self._device)
        self._event.record(self._stream)

    def retire(self, tensors: Iterable[Tensor]) -> None:
        """See Fence."""
        if self._stream is not None:
            for t in tensors:
                t.record_stream(self._stream)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No garbage is collected: what it would free on the device cannot be freed in a capture."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
