"""Compile the Triton kernels ahead of time for sm_90 and hold each to its register budget.

.ci/triton_budgets.json names what a kernel may use where it is more than the default; the longest
key that the name of a variant contains applies:

    {"broyden_step_kernel fp64/fp64 m=16": {"registers": 255, "spill_bytes": 64}}

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

# (state, history, m, dim): what is compiled. dim is in one program up to 8192, else in spans.
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
BROYDEN = [
    ("fp32", "fp32", 5, 159),
    ("fp32", "fp32", 16, 1024),
    ("fp64", "fp64", 16, 1024),
    ("bf16", "bf16", 5, 1024),
    ("fp32", "fp32", 5, 65536),
]

ACCOUNT = {"status": "*i8", "num_steps": "*i32", "dim": "i32", "spans": "i32", "max_steps": "i32"}
DOUBLES = {"gram", "control", "atol", "residual", "partial", "plan"}
OPTIONS = {"rtol", "beta", "ridge"}


def type_of(name, state, history):
    """Triton's name of the type of an argument."""
    compute = "fp64" if state == "fp64" else "fp32"
    if name in ACCOUNT:
        return ACCOUNT[name]
    if name in DOUBLES:
        return "*fp64"
    if name in OPTIONS:
        return "fp64"
    if name.startswith("columns_"):
        return f"*{history}"
    return f"*{compute}" if name.endswith("_previous") else f"*{state}"


def variants():
    """(module, kernel, state, history, m, dim) of everything to compile."""
    for method, cases in (("anderson", ANDERSON), ("broyden", BROYDEN)):
        stages = ["measure", "judge", "advance"] + ["form"] * (method == "broyden")
        for state, history, m, dim in cases:
            if dim <= 8192:
                yield f"{method}_step", f"{method}_step_kernel", state, history, m, dim
                continue
            for stage in stages:
                yield f"{method}_spans", f"{method}_{stage}_kernel", state, history, m, dim


def name_of(variant):
    """Such as "anderson_step_kernel fp32/bf16 m=5 d=1024"."""
    _, kernel, state, history, m, dim = variant
    return f"{kernel} {state}/{history} m={m} d={dim}"


def compile_one(variant):
    """(registers, spill bytes) of one kernel."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fpi_cuda.backends.triton.shape import ANDERSON_SUMS, BROYDEN_SUMS, SPAN, shape_of

    module, kernel_name, state, history, m, dim = variant
    kernel = getattr(importlib.import_module(f"fpi_cuda.backends.triton.{module}"), kernel_name)
    compute = "fp64" if state == "fp64" else "fp32"
    sums = ANDERSON_SUMS if module.startswith("anderson") else BROYDEN_SUMS
    shape = shape_of(dim, m, 8 if compute == "fp64" else 4, sums)
    constants = {
        "sample_of": None,
        "SPAN": SPAN,
        "DEPTH": m,
        "M": shape.tile_rows,
        "BLOCK": shape.block,
        "COMPUTE": tl.float64 if compute == "fp64" else tl.float32,
        "IN_SLOT": m > 0 and history == compute,
        "EPSILON": 1.0e-7,
        "STALL_STEPS": 20.0,
    }
    constants = {
        (kernel.arg_names.index(k),): v for k, v in constants.items() if k in kernel.arg_names
    }
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if (i,) in constants else type_of(name, state, history)
        signature[name] = kind
        if kind.startswith("*") or (name == "dim" and dim % 16 == 0):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    target = GPUTarget("cuda", CAPABILITY, 32)
    built = triton.compile(source, target=target, options={"num_warps": shape.num_warps})
    return resources(built.asm["ptx"])


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
    chosen = [v for v in variants() if arguments.only in name_of(v)]
    if not chosen:
        sys.exit(f"triton gate: no kernel is named like {arguments.only!r}")
    if importlib.util.find_spec("triton") is None:
        print(f"triton gate: NOT RUN, Triton is not installed ({len(chosen)} kernels)")
        return
    budgets = json.loads(arguments.budgets.read_text())
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))
    failures = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(min(len(chosen), os.cpu_count())) as pool:
            for variant, used in zip(chosen, pool.map(compile_one, chosen), strict=True):
                name = name_of(variant)
                print(f"  sm_{CAPABILITY} {used[0]:3} registers, {used[1]} spill bytes: {name}")
                failures += filter(None, [over_budget(name, *used, budgets)])
    version = importlib.metadata.version("triton")
    print(f"triton gate: {len(chosen)} kernels by Triton {version}, {len(failures)} over budget")
    if failures:
        sys.exit("triton gate: over budget\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
