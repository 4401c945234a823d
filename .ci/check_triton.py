"""Compile the Triton kernels ahead of time and hold each to its register budget.

.ci/triton_budgets.json names what a kernel may use where it is more than the default; the longest
key that the name of a variant contains applies, and a name begins with Triton's version, as each
comes with another compiler:

    {"anderson_step_kernel fp64/fp64 m=16": {"registers": 255, "spill_bytes": 64},
     "Triton 3.8 cell_loop_kernel": {"registers": 255, "spill_bytes": 896}}

No GPU is needed. Where Triton is not installed, says so and succeeds: the gate was not run.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from check_cuda import REPORT, budget_for

ROOT = Path(__file__).parents[1]
CAPABILITY = 90
BUDGETS = Path(__file__).with_name("triton_budgets.json")

# v - v of what is a product becomes a fused multiply-add, which is not 0; the interpreter, which
# the tests run under, has none.
SELF_DIFFERENCE = re.compile(r"arith\.subf (%[\w#]+), \1[ ,]")

# (state, history, m, dim): what is compiled. dim is in one program up to 8192, else in splits.
ANDERSON = [
    ("fp32", "fp32", 0, 1024),
    ("fp32", "fp32", 5, 128),
    ("fp32", "fp32", 5, 159),
    ("fp32", "fp32", 8, 1024),
    ("fp32", "fp32", 16, 1024),
    ("fp32", "bf16", 5, 1024),
    ("fp64", "fp64", 16, 1024),
    ("bf16", "bf16", 5, 1024),
    ("fp16", "fp16", 5, 1024),
    ("fp32", "fp32", 5, 65536),
    ("fp64", "fp64", 16, 65536),
    ("bf16", "bf16", 5, 65536),
]

# (capability, state, precision, m, layers): a loop's shape depends on nothing else.
CELL_LOOP = [
    (90, "fp32", "ieee", 0, 1),
    (90, "fp32", "ieee", 1, 2),
    (90, "fp32", "ieee", 5, 2),
    (90, "fp32", "ieee", 8, 1),
    (90, "fp32", "tf32x3", 8, 2),
    (90, "fp32", "tf32", 3, 2),
    (90, "fp32", "bf16", 0, 2),
    (90, "fp32", "bf16", 8, 2),
    (90, "fp64", "ieee", 8, 2),
    (80, "fp32", "ieee", 8, 2),
    (80, "fp32", "tf32x3", 5, 2),
    (80, "fp32", "bf16", 2, 1),
    (80, "fp64", "ieee", 5, 2),
]

INTEGERS = {"dim", "splits", "max_steps", "batch", "width"}
ARRAYS = {"status": "*i8", "num_steps": "*i32", "queue": "*i64"}
DOUBLES = {"gram", "control", "atol", "residual", "partial", "plan"}
OPTIONS = {"rtol", "beta", "ridge", "carry"}


def type_of(name, state, history):
    """Triton's name of the type of an argument."""
    compute = "fp64" if state == "fp64" else "fp32"
    if name in ARRAYS:
        return ARRAYS[name]
    if name in INTEGERS or "_stride" in name:
        return "i32"
    if name in DOUBLES:
        return "*fp64"
    if name in OPTIONS:
        return "fp64"
    if name.startswith("columns_"):
        return f"*{history}"
    return f"*{compute}" if name.endswith("_previous") else f"*{state}"


def variants():
    """(kernel, state, history, m, dim) of everything to compile."""
    for state, history, m, dim in ANDERSON:
        if dim <= 8192:
            yield "anderson_step_kernel", state, history, m, dim
            continue
        for stage in ("measure", "judge", "advance"):
            yield f"anderson_{stage}_kernel", state, history, m, dim


def name_of(variant):
    """Such as "anderson_step_kernel fp32/bf16 m=5 d=1024"."""
    kernel, state, history, m, dim = variant
    return f"{kernel} {state}/{history} m={m} d={dim}"


def name_of_loop(variant):
    """Such as "cell_loop_kernel fp32/tf32 m=5 2 layers sm_80"."""
    capability, state, precision, m, layers = variant
    return f"cell_loop_kernel {state}/{precision} m={m} {layers} layers sm_{capability}"


def compile_step(variant):
    """(capability, registers, spill bytes) of one kernel."""
    import triton.language as tl

    from fpi_cuda.ops.triton import anderson_step
    from fpi_cuda.ops.triton.shape import SPLIT, shape_of

    name, state, history, m, dim = variant
    kernel = getattr(anderson_step, name)
    compute = "fp64" if state == "fp64" else "fp32"
    shape = shape_of(dim, m, 8 if compute == "fp64" else 4)
    constants = {
        "sample_of": None,
        "SPLIT": SPLIT,
        "DEPTH": m,
        "M": shape.tile_rows,
        "BLOCK": shape.block,
        "COMPUTE": tl.float64 if compute == "fp64" else tl.float32,
        "IN_SLOT": m > 0 and history == compute,
        "EPSILON": 1.0e-7,
        "STALL_STEPS": 20.0,
    }
    divisible = {"dim"} if dim % 16 == 0 else set()
    options = {"num_warps": shape.num_warps}
    return built(kernel, constants, state, history, divisible, options, CAPABILITY)


def compile_loop(variant):
    """(capability, registers, spill bytes) of one fused loop, with every term that may be there."""
    import triton.language as tl

    from fpi_cuda.ops.triton.cell_tile import cell_loop_kernel
    from fpi_cuda.ops.triton.shape import cell_shape
    from fpi_cuda.options import PRECISIONS

    capability, state, precision, m, layers = variant
    shape = cell_shape(m, 8 if state == "fp64" else 4)
    second = dict.fromkeys(("weight2", "bias2", "shift2", "factor2"))
    constants = {
        **({} if layers == 2 else second),
        "ACTIVATION1": "softplus",
        "ACTIVATION2": "gelu_derivative",
        "CARRIES": True,
        "PRECISION": PRECISIONS.index(precision),
        "BF16_DOT": True,
        "EPSILON": 1.0e-7,
        "STALL_STEPS": 20.0,
        "S": shape.slots,
        "PANEL": shape.panel,
        "INNER": shape.inner,
        "DEPTH": m,
        "M": shape.tile_rows,
        "BLOCK": shape.block,
        "COMPUTE": tl.float64 if state == "fp64" else tl.float32,
    }
    options = {"num_warps": shape.num_warps, "maxnreg": shape.registers}
    return built(cell_loop_kernel, constants, state, state, (), options, capability)


def built(kernel, constants, state, history, divisible, options, capability):
    """(capability, registers, spill bytes) of a kernel compiled for these constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        (kernel.arg_names.index(k),): v for k, v in constants.items() if k in kernel.arg_names
    }
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if (i,) in constants else type_of(name, state, history)
        signature[name] = kind
        if kind.startswith("*") or name in divisible:
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    target = GPUTarget("cuda", capability, 32)
    code = triton.compile(source, target=target, options=options)
    found = SELF_DIFFERENCE.search(code.asm["ttir"])
    if found:
        raise RuntimeError(
            f"check_triton: {kernel.fn.__name__} takes a number from itself ({found[0]}): if it is "
            "a product, contraction leaves its rounding. Compare it with infinity instead"
        )
    return capability, *resources(code.asm["ptx"])


def resources(ptx):
    """(registers, spill bytes) that ptxas reports for one kernel."""
    from triton import knobs

    ptxas = knobs.nvidia.ptxas.path
    arch = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        done = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch}", str(file), "-o", str(file) + ".cubin"],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"check_triton: {ptxas} failed: {done.stderr.strip()}")
    found = REPORT.search(done.stderr + done.stdout)
    return int(found["registers"]), int(found["stores"]) + int(found["loads"])


def over_budget(name, registers, spills, budgets):
    """What is wrong with a kernel, or None."""
    allowed = budget_for(name, budgets)
    for key, used in (("registers", registers), ("spill_bytes", spills)):
        if used > allowed[key]:
            return f"{name}: {used} {key}, budget {allowed[key]}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="?", default="", help="compile the kernels named like this")
    parser.add_argument("--budgets", type=Path, default=BUDGETS)
    arguments = parser.parse_args()
    chosen = [(name_of(v), compile_step, v) for v in variants()]
    chosen += [(name_of_loop(v), compile_loop, v) for v in CELL_LOOP]
    chosen = [c for c in chosen if arguments.only in c[0]]
    if not chosen:
        sys.exit(f"triton gate: no kernel is named like {arguments.only!r}")
    if importlib.util.find_spec("triton") is None:
        print(f"triton gate: NOT RUN, Triton is not installed ({len(chosen)} kernels)")
        return
    budgets = json.loads(arguments.budgets.read_text())
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))
    failures = []
    version = importlib.metadata.version("triton")
    series = "Triton " + ".".join(version.split(".")[:2])
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(min(len(chosen), os.cpu_count())) as pool:
            waiting = [(name, pool.submit(*task)) for name, *task in chosen]
            for name, job in waiting:
                capability, *used = job.result()
                print(f"  sm_{capability} {used[0]:3} registers, {used[1]} spill bytes: {name}")
                failures += filter(None, [over_budget(f"{series} {name}", *used, budgets)])
    print(f"triton gate: {len(chosen)} kernels by Triton {version}, {len(failures)} over budget")
    if failures:
        sys.exit("triton gate: over budget\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
