"""A solve on the device, of the whole batch or of chunks whose history fits the device's cache."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fpi_cuda.autograd import BoundMap
from fpi_cuda.evaluation.bound_map import select
from fpi_cuda.loops.device import planner
from fpi_cuda.loops.device.cache import PlanCache
from fpi_cuda.loops.device.graphs import Graphs
from fpi_cuda.loops.device.method import Method
from fpi_cuda.loops.workspace import depth_of
from fpi_cuda.options import Anderson
from fpi_cuda.solution import SolveResult

CHUNK_BYTES: int | None = None
"""Memory that the iterates of one chunk may take; None solves the whole batch at once.

None until a device has shown chunks to be faster: bench.device_loop measures both.
"""


def solve(
    bound_map: BoundMap,
    x0: Tensor,
    method: Method,
    *,
    atol: float,
    graphs: Graphs,
    cache: PlanCache,
    at_once: bool,
    rowwise: bool,
) -> SolveResult:
    """See planner.solve.

    Args:
        rowwise: g may be evaluated on some of the samples.
    """
    rows = len(x0)
    if rowwise and CHUNK_BYTES is not None:
        rows = rows_of_chunk(x0, method, CHUNK_BYTES)

    def part(begin: int, end: int) -> BoundMap:
        read = select(bound_map.read, lambda t: t[begin:end])
        return bound_map.reading(read, dataclasses.replace(bound_map.layout, batch=end - begin))

    parts = [
        planner.solve(
            bound_map if rows == len(x0) else part(begin, end),
            x0[begin:end],
            method,
            atol=atol,
            graphs=graphs,
            cache=cache,
            at_once=at_once,
        )
        for begin, end in spans(len(x0), rows)
    ]
    if len(parts) == 1:
        return parts[0]
    return SolveResult(*(torch.cat(column) for column in zip(*parts, strict=True)))


def rows_of_chunk(x0: Tensor, method: Method, most_bytes: int) -> int:
    """Samples in a chunk whose iterates and history take up to `most_bytes`; the same in each."""
    batch, dim = x0.shape
    solver = method.solver
    narrow = solver.history_dtype if isinstance(solver, Anderson) else None
    stored = (narrow or x0.dtype).itemsize
    row = dim * (2 * depth_of(solver, dim) * stored + 4 * x0.element_size())
    most = max(1, most_bytes // max(1, row))
    if most >= batch:
        return batch
    count = -(-batch // most)
    return -(-batch // count)


def spans(batch: int, rows: int) -> list[tuple[int, int]]:
    """Where chunks of up to `rows` samples begin and end; one, if the batch is empty."""
    starts = range(0, batch, rows) if batch else [0]
    return [(begin, min(begin + rows, batch)) for begin in starts]
