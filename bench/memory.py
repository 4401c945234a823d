"""Peak memory of one call, by the allocator's own account."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch


def torch_peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `call` holds at once through torch's allocator, beyond what was there.

    On the CPU the profiler's allocation events are added up; on CUDA the caching allocator keeps
    the maximum itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _silent_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler,
    ):
        call()
    held = peak = 0
    results = profiler.profiler.kineto_results  # events() drops the allocations inside an op
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler logs its start and stop on the process's stderr, whatever its log level."""
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
