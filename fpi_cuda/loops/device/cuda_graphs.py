"""Captures and replays by CUDA graphs."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fpi_cuda import _extension
from fpi_cuda.declined import Declined

if _extension.module_error is None:  # else there is none to be asked for: why_not() says so
    from fpi_cuda import _C

# One capture at a time: cuBLAS workspaces, which a capture must not share, are per process.
CAPTURES = threading.Lock()


class Refused(Declined):
    """This solve cannot run on the device; the text says why.

    Args:
        passing: the next solve may fare better.
    """

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


class CudaGraphs:
    """CUDA graphs on NVIDIA devices, through torch's capture and the loop of csrc/device_loop."""

    def why_not(self) -> str | None:
        """Why nothing can be captured now, or None."""
        if torch.version.hip is not None:
            return "ROCm has no conditional graph nodes"
        reason = _extension.module_error or _C.why_not()
        if reason is None and torch.cuda.is_current_stream_capturing():
            reason = "the call is itself being captured into a CUDA graph"
        return reason

    @contextlib.contextmanager
    def session(self, device: torch.device) -> Iterator[CudaSession]:
        """Captures of one plan; other threads' captures wait."""
        with CAPTURES, torch.cuda.device(device):
            torch.cuda.synchronize()
            # What the collector would free on the device cannot be freed in a capture.
            collecting = gc.isenabled()
            gc.disable()
            try:
                yield CudaSession(device)
            finally:
                if collecting:
                    gc.enable()

    def launches(self) -> int:
        """Nodes in the graph that the current stream is captured into; -1 where there is none."""
        return _C.captured_nodes(torch.cuda.current_stream().cuda_stream)

    def fence(self, device: torch.device) -> CudaFence:
        """A new one."""
        return CudaFence(device)


class CudaSession:
    """Captures that share a stream and a memory pool, so that one may read what another made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], None]) -> CapturedGraph:
        """Capture what body computes, without running it.

        Raises:
            Refused: there is something in it that a graph cannot hold.
        """
        graph, memory = self._captured(body)
        with errors_refused("g cannot be captured: "):
            graph.instantiate()
        return CapturedGraph(graph, memory, self._device)

    def capture_loop(
        self, body: Callable[[], None], status: Tensor, rounds: Tensor, max_steps: int
    ) -> CapturedGraph:
        """The same, repeated while any of status (B,) int8 is 0, max_steps times at most.

        rounds (1,) int32 counts the repetitions of the latest replay.
        """
        graph, memory = self._captured(body)
        with errors_refused():
            loop = _C.DeviceLoop(
                graph.raw_cuda_graph(),
                status.data_ptr(),
                status.numel(),
                rounds.data_ptr(),
                max_steps,
            )
        return CapturedGraph(graph, memory, self._device, loop)

    def _captured(self, body: Callable[[], None]) -> tuple[torch.cuda.CUDAGraph, int]:
        """The graph of body, and the bytes that its pool took."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # A workspace that eager calls or other graphs use too would be written by both at once.
        torch._C._cuda_clearCublasWorkspaces()
        before = torch.cuda.memory_reserved(self._device)
        try:
            with errors_refused("g cannot be captured: "), torch.cuda.stream(self._stream):
                # Only this thread is held to what capturing allows; others may load data.
                with self._pool_ended():
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    body()
                    if _C.captured_nodes(self._stream.cuda_stream) < 0:
                        raise Refused("g cannot be captured: it does what a capture forbids")
                    graph.capture_end()
                except BaseException:
                    self._abandon(graph)
                    raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        return graph, max(0, torch.cuda.memory_reserved(self._device) - before)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed, so that torch's allocators leave its pool, the host's too.

        torch before 2.12 keeps them in it where the stream's capture ends with an error.
        """
        with contextlib.suppress(RuntimeError), self._pool_ended(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty", UserWarning)
            _C.restart_capture(self._stream.cuda_stream)
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
    """A captured computation.

    Args:
        loop: repeats the graph; None: it runs once per replay.
    Attributes:
        memory: bytes that it holds besides the tensors it was given.
    """

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        memory: int,
        device: torch.device,
        loop: _C.DeviceLoop | None = None,
    ) -> None:
        self.memory = memory
        # It owns the memory pool that a loop works in too.
        self._graph: torch.cuda.CUDAGraph | None = graph
        self._device = device
        self._loop = loop

    def replay(self) -> None:
        """Enqueue it on the current stream, on what its tensors hold then."""
        if self._loop is not None:
            with torch.cuda.device(self._device):
                self._loop.launch(torch.cuda.current_stream().cuda_stream)
        else:
            assert self._graph is not None
            self._graph.replay()

    def close(self) -> None:
        """Give its memory back; a replay under way ends as it should."""
        if self._loop is not None:
            self._loop.close()
        self._graph = None


class CudaFence:
    """The order of the replays of one plan, whichever streams they run on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()
        self._stream: torch.cuda.Stream | None = None

    def wait(self) -> None:
        """Let the current stream wait for the latest replay."""
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and self._stream != stream:
            stream.wait_event(self._event)

    def mark(self) -> None:
        """Remember what the current stream has been given."""
        self._stream = torch.cuda.current_stream(self._device)
        self._event.record(self._stream)

    def retire(self, tensors: Iterable[Tensor]) -> None:
        """Let the memory of these tensors be reused only after the latest replay."""
        if self._stream is not None:
            for t in tensors:
                t.record_stream(self._stream)


@contextlib.contextmanager
def errors_refused(what: str = "", kind: type[Exception] = RuntimeError) -> Iterator[None]:
    """Raise Refused where a body raises an error of this kind."""
    try:
        yield
    except Refused:
        raise
    except kind as error:
        # What CUDA errors say goes on with a traceback.
        said = str(error).strip().split("\n", 1)[0]
        # A warning that the user has made an error: torch gives some of its own only once.
        raise Refused(what + said, passing=isinstance(error, Warning)) from error
