"""First light: which mechanism of fpi_cuda works on this GPU, each check in a process of its own.

    python .ci/first_light.py NAME [--cpu]     run one check; its last line is JSON
    python .ci/first_light.py --list           name them, the risky ones last

gpu_check.py runs them, several at a time and each under a clock. --cpu takes the native backend and
skips what needs a device: a test of this script, not of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

CHECKS: dict[str, Callable[[], Any]] = {}
NEEDS_DEVICE: set[str] = set()
ON_CPU = False
RESULT = "RESULT "  # begins the line of the result


class Incomplete(Exception):
    """A check that failed in part; it carries what to show."""


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    """Add a check that the CPU can run too. It returns what to show, or raises."""
    CHECKS[function.__name__] = function
    return function


def device_check(function: Callable[[], Any]) -> Callable[[], Any]:
    NEEDS_DEVICE.add(function.__name__)
    return check(function)


def here() -> str:
    return "cpu" if ON_CPU else "cuda"


def ours(dtype: Any = None, name: str | None = None) -> Any:
    """Our backend for this device."""
    import torch

    from fpi_cuda import ops

    name = name or ("native" if ON_CPU else "cuda")
    return ops.resolve(name, torch.device(here()), dtype or torch.float32)


def close(found: Any, expected: Any, tolerance: float, what: str) -> str:
    """The relative error, in words; raises where it is too large."""
    import torch

    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    norm = torch.linalg.vector_norm
    error = float(norm(a - b) / norm(b).clamp_min(1e-30))
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:g}"
    return f"{error:.0e}"


# Does it load.


@check
def environment() -> Any:
    import torch

    said = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    if not ON_CPU:
        p = torch.cuda.get_device_properties(0)
        said += [p.name, f"{p.multi_processor_count} SMs", f"L2 {p.L2_cache_size >> 20} MiB"]
        said += [f"shared memory {p.shared_memory_per_block_optin >> 10} KiB"]
    with contextlib.suppress(ImportError):
        import triton

        said.append(f"triton {triton.__version__}")
    return ", ".join(said)


@check
def extension_loads() -> Any:
    from fpi_cuda import _extension
    from fpi_cuda.loops.device.cuda_graphs import CudaGraphs

    info = _extension.build_info()
    return f"{info}; device loop: {CudaGraphs().why_not() or 'ready'}"


# One step, by launch shape and dtype.


def steps_agree(
    solver: Any, dtype: Any, batch: int, dim: int, *, offset: int = 0, tolerance: float = 0.0,
    backend: str | None = None,
) -> str:  # fmt: skip
    """14 steps by our op and by the reference; x lies `offset` elements into its memory."""
    import torch

    from fpi_cuda.loops.stepping import allocate, step
    from fpi_cuda.ops import reference

    torch.manual_seed(0)
    z = torch.randn(batch, dim, device=here()).to(dtype)
    scale = torch.linspace(-0.6, 0.95, batch * dim, device=here()).reshape(batch, dim).to(dtype)
    runs = []
    for engine in (ours(dtype, backend), reference):
        room = torch.zeros(batch * dim + offset, dtype=dtype, device=here())
        x = room[offset:].view(batch, dim)
        work = allocate(x, solver, 0.0, engine.scratch(x))
        for _ in range(14):
            gx = (scale * torch.tanh(x) + z).contiguous()
            step(engine, solver, work, x, gx, None, 1e-9, 500)
        runs.append((x, work))
    (x, mine), (expected, theirs) = runs
    assert float((mine.status == theirs.status).float().mean()) >= 0.98, "another status"
    assert int((mine.num_steps - theirs.num_steps).abs().max()) <= 2, "other step counts"
    eps = torch.finfo(dtype).eps
    narrow = dtype in (torch.bfloat16, torch.float16)
    tolerance = tolerance or max(1e-9, (30 if narrow else 3000) * eps)
    return close(x, expected, tolerance, f"{solver} {dtype} d={dim}")


def solvers() -> Any:
    import torch

    from fpi_cuda.options import Anderson, Broyden, Picard

    return Anderson, Broyden, Picard, torch


@check
def step_warp_per_sample() -> Any:
    anderson, _, picard, t = solvers()
    cases = ((picard(), 4, 33), (anderson(m=3), 4, 33), (anderson(m=5), 257, 128))
    return [steps_agree(solver, t.float32, *size) for solver, *size in cases]


@check
def step_block_per_sample() -> Any:
    anderson, _, _, t = solvers()
    cases = ((anderson(m=5), 4, 1000), (anderson(m=16), 3, 5000))
    return [steps_agree(solver, t.float32, *size) for solver, *size in cases]


@check
def step_split_last_block_decides() -> Any:
    anderson, _, _, t = solvers()
    sizes = ((3, 20_000),) if ON_CPU else ((3, 20_000), (128, 65_536), (1, 3_000_001))
    return [steps_agree(anderson(m=5), t.float32, *size) for size in sizes]


@check
def step_other_dtypes() -> Any:
    anderson, _, _, t = solvers()
    dtypes = (t.float64, t.bfloat16) if ON_CPU else (t.float64, t.bfloat16, t.float16)
    said = [steps_agree(anderson(m=3), dtype, 5, 777) for dtype in dtypes]
    narrow = anderson(m=2, history_dtype=t.bfloat16)
    return [*said, steps_agree(narrow, t.float32, 5, 129, tolerance=3e-2)]


@check
def step_broyden() -> Any:
    _, broyden, _, t = solvers()
    said = [steps_agree(broyden(m=3), t.float32, 4, dim) for dim in (33, 1000, 20_000)]
    return [*said, steps_agree(broyden(m=3), t.float64, 4, 20_000)]


@check
def step_on_unaligned_views() -> Any:
    anderson, _, _, t = solvers()
    return [
        steps_agree(anderson(m=3), t.float32, 3, dim, offset=offset)
        for dim in (128, 129, 20_000, 20_001)
        for offset in (1, 2)
    ]


# The host loop: polling, streams.


def whole_solve(batch: int, dim: int, solver: Any) -> Callable[..., Any]:
    """A row-wise problem that reads nothing from the device; call it with rowwise=."""
    import torch

    from fpi_cuda.loops.host import iterate

    torch.manual_seed(0)
    z = torch.randn(batch, dim, device=here())

    def g(x: Any, rows: Any) -> Any:
        return 0.8 * torch.tanh(x) + (z if rows is None else z[rows])

    def run(rowwise: bool = False) -> Any:
        options = {"rtol": 1e-5, "atol": 0.0, "max_steps": 200, "backend": ours()}
        return iterate(g, torch.zeros_like(z), solver, rowwise=rowwise, **options)

    return run


@check
def polling_without_synchronization() -> Any:
    anderson, _, _, t = solvers()
    run = whole_solve(256, 128, anderson(m=5))
    one, two = run(False), run(True)
    assert bool((one.status == 1).all()), one.status
    assert t.equal(one.status, two.status)
    if not ON_CPU:
        t.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            t.cuda.set_sync_debug_mode("error")
        try:
            run(False)
            run(True)
        finally:
            t.cuda.set_sync_debug_mode("default")
    return f"{int(one.num_steps.max())} steps, equal bits compacted: {t.equal(one.x, two.x)}"


@device_check
def side_streams() -> Any:
    anderson, _, _, t = solvers()
    run = whole_solve(8, 20_000, anderson(m=3))
    expected = run()
    stream = t.cuda.Stream()
    stream.wait_stream(t.cuda.current_stream())
    with t.cuda.stream(stream):
        t.cuda._sleep(20_000_000)
        found = run()
    t.cuda.synchronize()
    assert t.equal(found.x, expected.x)
    return "equal bits"


# The fused loop.


def products_agree(
    precision: str, tolerance: float, sizes: list[tuple[int, int]], backend: str | None = None
) -> Any:
    """x W^T by the loop's kernel, against its twin and float64; one-hot rows show a swap."""
    import torch

    from fpi_cuda.loops.fused import cell_loop as fused
    from fpi_cuda.lowered import Layer, Lowered
    from fpi_cuda.ops import reference_loop
    from fpi_cuda.options import Picard

    def run(engine: Any, max_steps: int) -> Any:
        options = {"rtol": 1e-30, "atol": 0.0, "max_steps": max_steps, "precision": precision}
        return fused.run(lowered, x0, Picard(), backend=engine, **options)

    said = []
    norm = torch.linalg.vector_norm
    for batch, dim in sizes:
        torch.manual_seed(dim)
        weight = torch.randn(dim, dim, device=here()) / dim**0.5
        x0 = torch.randn(batch, dim, device=here())
        half = min(batch, dim) // 2
        x0[:half] = torch.eye(dim, device=here())[:half]
        lowered = Lowered((Layer(weight, bias=None),))
        mine, twin = (run(e, 1).residual for e in (ours(name=backend), reference_loop))
        said.append(close(mine, twin, tolerance, f"{precision} B={batch} d={dim}"))
        once = x0.double() @ weight.double().T
        twice = once @ weight.double().T
        # Of the two points, the better is returned.
        best = torch.minimum(norm(once - x0, dim=1), norm(twice - once, dim=1))
        coarse = 5e-2 if precision == "bf16" else 1e-2
        found = run(ours(name=backend), 2).residual
        said.append(close(found, best, coarse, f"{precision} B={batch} d={dim}, float64"))
    return said


SMALL, LARGE = [(5, 37), (300, 96)], [(40, 700), (3000, 512)]


@check
def loop_ieee_resident() -> Any:
    return products_agree("ieee", 1e-5, SMALL)


@check
def loop_ieee_streamed() -> Any:
    return products_agree("ieee", 1e-5, LARGE)


@check
def loop_tf32() -> Any:
    return products_agree("tf32", 1e-3, SMALL)


@check
def loop_tf32x3() -> Any:
    return products_agree("tf32x3", 1e-4, SMALL + LARGE)


@check
def loop_bf16() -> Any:
    return products_agree("bf16", 1e-3, SMALL + LARGE)


@check
def fused_solve_and_gradient() -> Any:
    import torch

    import fpi_cuda as fpi

    said = []
    for cell in (fpi.cells.Dense(5, 33), fpi.cells.MLP(5, 159, 600)):
        cell = cell.to(here())
        z = torch.randn(500, 5, device=here())
        x0 = torch.zeros(500, cell.x_features, device=here())
        runs = []
        for route in ("fused", "host"):
            leaf = z.clone().requires_grad_()
            sol = fpi.fixed_point(cell, x0, leaf, rtol=1e-5, max_steps=100, route=route)
            (gradient,) = torch.autograd.grad(sol.value.square().sum(), leaf)
            runs.append((sol.value, gradient, int(sol.num_steps.max())))
        (x, dz, steps), (x_host, dz_host, host_steps) = runs
        errors = close(x, x_host, 1e-3, "x"), close(dz, dz_host, 1e-2, "dz")
        said.append(f"{'/'.join(errors)}, {steps}/{host_steps} steps")
    return said


# Triton.


@device_check
def triton_step() -> Any:
    anderson, _, _, t = solvers()
    cases = ((anderson(m=5), 257, 128), (anderson(m=3), 4, 33), (anderson(m=16), 3, 1000))
    return [steps_agree(s, t.float32, *size, backend="triton") for s, *size in cases]


@device_check
def triton_step_in_spans() -> Any:
    anderson, _, _, t = solvers()
    return steps_agree(anderson(m=5), t.float32, 3, 20_000, backend="triton")


@device_check
def triton_loop_ieee() -> Any:
    return products_agree("ieee", 1e-5, [(300, 96)], "triton")


@device_check
def triton_loop_tf32x3() -> Any:
    return products_agree("tf32x3", 1e-4, [(300, 96)], "triton")


@device_check
def triton_loop_bf16() -> Any:
    return products_agree("bf16", 1e-3, [(300, 96)], "triton")


# The graph that iterates.


def looped(body: Callable[[Any], Any], batch: int, most: int) -> Any:
    """`body(status)` in a WHILE graph: the capture, the loop, status and rounds."""
    import torch

    from fpi_cuda import _C

    status = torch.zeros(batch, dtype=torch.int8, device="cuda")
    rounds = torch.zeros(1, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        body(status)
    loop = _C.DeviceLoop(graph.raw_cuda_graph(), status.data_ptr(), batch, rounds.data_ptr(), most)
    return graph, loop, status, rounds


def launch(loop: Any) -> None:
    import torch

    loop.launch(torch.cuda.current_stream().cuda_stream)


@device_check
def while_graph_counts() -> Any:
    import torch

    counter = torch.zeros(1000, dtype=torch.int32, device="cuda")

    def body(status: Any) -> None:
        counter.add_(1)
        status.copy_(counter >= 7)

    _graph, loop, status, rounds = looped(body, 1000, 100)
    for _ in range(2):
        counter.zero_()
        status.zero_()
        launch(loop)
        assert rounds.item() == int(counter.max()) == 7, (rounds, counter.max())
    _graph, loop, _status, rounds = looped(lambda _: counter.add_(1), 1000, 1000)
    launch(loop)
    assert rounds.item() == 1000, rounds
    return f"7 rounds; {1e3 * seconds(lambda: launch(loop)):.2f} us a round of one add"


@device_check
def while_graph_of_linear_and_tanh() -> Any:
    import torch

    linear = torch.nn.Linear(256, 256, device="cuda")
    x, z = torch.zeros(64, 256, device="cuda"), torch.randn(64, 256, device="cuda")
    with torch.no_grad():
        torch.tanh(0.5 * linear(x) + z)  # cuBLAS sets itself up
        loop = looped(lambda _: x.copy_(torch.tanh(0.5 * linear(x) + z)), 64, 9)
        x.zero_()
        launch(loop[1])
        y = torch.zeros_like(x)
        for _ in range(9):
            y = torch.tanh(0.5 * linear(y) + z)
    return loop[3].item(), close(x, y, 1e-5, "linear and tanh")


@device_check
def while_graph_of_autograd() -> Any:
    import torch

    from fpi_cuda.loops.device.cuda_graphs import CudaGraphs

    linear = torch.nn.Linear(64, 64, device="cuda")
    v, c = torch.randn(8, 64, device="cuda"), torch.randn(8, 64, device="cuda")
    kept: list[Any] = []

    def at_x() -> None:
        w = v.detach().requires_grad_()
        with torch.enable_grad():
            kept.append((w, torch.tanh(0.5 * linear(w))))

    def body() -> None:
        w, g = kept[-1]
        c.copy_(torch.autograd.grad(g, w, c, retain_graph=True)[0])

    at_x()
    body()
    torch.cuda.synchronize()  # kernels, handles and autograd's thread are there
    start = c.clone()
    status = torch.zeros(8, dtype=torch.int8, device="cuda")
    rounds = torch.zeros(1, dtype=torch.int32, device="cuda")
    with CudaGraphs().session(torch.device("cuda", 0)) as session:
        first = session.capture(at_x)
        loop = session.capture_loop(body, status, rounds, 3)
    c.copy_(start)
    first.replay()
    loop.replay()
    y, w = start.clone(), v.detach().requires_grad_()
    g = torch.tanh(0.5 * linear(w))
    for _ in range(3):
        y = torch.autograd.grad(g, w, y, retain_graph=True)[0]
    return rounds.item(), close(c, y, 1e-5, "vjp")


@device_check
def device_route_end_to_end() -> Any:
    import torch

    import fpi_cuda as fpi

    g = fpi.cells.Dense(16, 256).to("cuda")
    x0 = torch.zeros(6, 256, device="cuda")
    said = []
    for seed in range(3):
        torch.manual_seed(seed)
        z = torch.randn(6, 16, device="cuda")
        runs = []
        for route in ("device", "host"):
            leaf = z.clone().requires_grad_()
            sol = fpi.fixed_point(g, x0, leaf, rtol=1e-5, rowwise=False, route=route)
            loss = sol.value.square().sum()
            runs.append((sol.value, *torch.autograd.grad(loss, [leaf, *g.parameters()])))
        errors = [close(a, b, 1e-3, "device and host") for a, b in zip(*runs, strict=True)]
        said.append(max(errors, key=float))
    return said


@device_check
def a_failed_capture_leaves_nothing_open() -> Any:
    import torch

    import fpi_cuda as fpi

    x0 = torch.zeros(4, 8, device="cuda")
    z = torch.ones_like(x0)

    def reads(x: Any, z: Any) -> Any:
        return torch.tanh(0.5 * x + z) * (1.0 + 0.0 * x.sum().item())

    def waits(x: Any, z: Any) -> Any:
        torch.cuda.synchronize()  # torch's dispatcher does not see it, a capture forbids it
        return torch.tanh(0.5 * x + z)

    said = []
    with torch.no_grad():
        for g in (reads, waits):
            try:
                fpi.fixed_point(g, x0, z, route="device")
            except RuntimeError as error:
                said.append(str(error).split("cannot run there: ")[1][:50])
            assert not torch.cuda.is_current_stream_capturing()
            torch.randn(1 << 20, device="cuda")  # a generator still in a capture would refuse
        assert len(said) == 2, f"not refused: {said}"
        sol = fpi.fixed_point(lambda x, z: torch.tanh(0.5 * x + z), x0, z, route="device")
    assert bool(sol.converged.all())
    return said


# First figures.


def seconds(call: Callable[[], Any], times: int = 1) -> float:
    """Of the device, for one call: the median of some."""
    from bench.measure import cuda_clock

    return median(cuda_clock(call).device for _ in range(times))


@device_check
def timings() -> Any:
    """Of an accelerated step on samples that are all active, and of a round of the fused loop."""
    import torch

    from bench.step_rows import Case

    source = torch.empty(2**28, device="cuda").normal_()
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / seconds(functools.partial(target.copy_, source), 5)
    said: dict[str, str] = {"copy": f"{rate / 1e12:.2f} TB/s read and written"}
    del source, target
    cases = [
        Case(*size, torch.float32)
        for size in (
            (128, 65_536, 5), (16_384, 1024, 8), (1, 10**7, 5), (4096, 159, 5), (256, 128, 3),
            (256, 128, 5), (256, 128, 10), (256, 128, 16),
        )
    ]  # fmt: skip
    rows = {f"step {case.title}": functools.partial(one_step, case, rate) for case in cases}
    for precision in ("ieee", "tf32x3", "tf32", "bf16"):
        for name in ("Picard", "Anderson"):
            title = f"fused {name} {precision} 2515x159 hidden 600"
            rows[title] = functools.partial(round_of_the_loop, precision, name)
    failed = []
    for title, row in rows.items():
        try:
            said[title] = row()
        except Exception as error:
            said[title] = f"{type(error).__name__}: {str(error)[:100]}"
            failed.append(title)
    if failed:
        raise Incomplete(said)
    return said


def one_step(case: Any, rate: float) -> str:
    """Microseconds of an accelerated step of ours, and how far above its least traffic."""
    import torch

    from bench.measure import cuda_clock
    from bench.step_rows import Ours, snapshot
    from fpi_cuda.ops import reference

    row = Ours(ours(), case, snapshot(case, torch.device("cuda"), reference))
    row.require_right()
    us = 1e6 * median(row.timing(cuda_clock).device for _ in range(9))
    return f"{us:.1f} us, {us / (1e6 * case.bytes / rate):.2f} of 2m+4 passes"


def round_of_the_loop(precision: str, solver: str) -> str:
    """Microseconds of a round: the slope from solves of 20 rounds to 60, in which nobody stops."""
    import torch

    import fpi_cuda as fpi
    from fpi_cuda.loops.fused import cell_loop as fused

    torch.manual_seed(0)
    cell = fpi.cells.MLP(20, 159, 600, activation="tanh", out_activation="tanh").to(here())
    z, x0 = torch.randn(2515, 20, device=here()), torch.randn(2515, 159, device=here())
    how = fpi.Picard() if solver == "Picard" else fpi.Anderson(m=5)
    with torch.no_grad():
        for parameter in cell.parameters():  # a chaotic map, which goes on for ever
            if parameter.dim() == 2:
                parameter.normal_(std=3.0 / parameter.shape[1] ** 0.5)
        lowered = cell.lower(cell.prepare(z))
        taken = {}
        for most in (20, 60):
            run = functools.partial(
                fused.run, lowered, x0, how, backend=ours(), rtol=1e-30, atol=0.0,
                max_steps=most, precision=precision,
            )  # fmt: skip
            assert bool((run().num_steps == most).all()), "a sample has stopped"
            taken[most] = seconds(run, 5)
    return f"{1e6 * (taken[60] - taken[20]) / 40:.1f} us a round"


ALONE = ("timings",)


@contextlib.contextmanager
def warnings_seen() -> Iterator[list[str]]:
    """What was warned of: tests turn each of these into a failure."""
    seen: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield seen
    seen += sorted(
        {f"{w.category.__name__}: {str(w.message).splitlines()[0][:140]}" for w in caught}
    )


def run_one(name: str) -> dict[str, Any]:
    """Run a check, and say how it went."""
    started = time.perf_counter()
    with warnings_seen() as seen:
        try:
            said, ok = CHECKS[name](), True
            if not ON_CPU:
                import torch

                torch.cuda.synchronize()
        except Incomplete as part:
            said, ok = part.args[0], False
        except Exception as error:
            said, ok = f"{type(error).__name__}: {str(error).strip()[:300]}", False
            traceback.print_exc()
    seconds = round(time.perf_counter() - started, 1)
    return {"ok": ok, "said": said, "warnings": seen, "seconds": seconds}


def main() -> int:
    global ON_CPU
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=[*CHECKS])
    parser.add_argument("--cpu", action="store_true", help="the native backend, without a device")
    parser.add_argument("--list", action="store_true", help="the names, the risky ones last")
    options = parser.parse_args()
    if options.list or options.name is None:
        print("\n".join(CHECKS))
        return 0
    ON_CPU = options.cpu
    result = run_one(options.name)
    print(RESULT + json.dumps(result, default=str))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
