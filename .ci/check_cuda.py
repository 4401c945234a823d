"""Compile every CUDA kernel for sm_80 and sm_90 and hold each to its register and spill budget.

csrc/cuda/budgets.json names what a kernel may use where it is more than the default; the longest
key that the demangled kernel name contains applies, to all architectures:

    {"anderson_step_kernel<float": {"registers": 128, "spill_bytes": 16}}

Where there is no nvcc, says so and succeeds: the gate was not run.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
ARCHS = ("sm_80", "sm_90")
DEFAULT = {"registers": 255, "spill_bytes": 0}

# What ptxas -v writes for one kernel.
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)


def compile_one(nvcc, source, arch, folder):
    """Return ptxas's report, or exit with the compiler's message."""
    output = Path(folder, f"{source.stem}.{arch}.o")
    command = [nvcc, "-std=c++17", "-O3", "-Icsrc", f"-arch={arch}", "-Xptxas=-v"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(output)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        messages = done.stdout + done.stderr
        sys.exit(f"cuda gate: {source.name} does not compile for {arch}\n{messages}")
    return done.stdout + done.stderr


def budget_for(name, budgets):
    keys = sorted((key for key in budgets if key in name), key=len)
    return {**DEFAULT, **budgets[keys[-1]]} if keys else DEFAULT


def demangle(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else names


def check(reports, budgets):
    """Return the failures, printing one line per kernel."""
    kernels = [match for report in reports for match in REPORT.finditer(report)]
    failures = []
    for match, name in zip(kernels, demangle([k["name"] for k in kernels]), strict=True):
        used = {
            "registers": int(match["registers"]),
            "spill_bytes": int(match["stores"]) + int(match["loads"]),
        }
        allowed = budget_for(name, budgets)
        registers, spills = used.values()
        print(f"  {match['arch']} {registers:3} registers, {spills} spill bytes: {name}")
        failures += [
            f"{name} ({match['arch']}): {used[key]} {key}, budget {allowed[key]}"
            for key in used
            if used[key] > allowed[key]
        ]
    print(f"cuda gate: {len(kernels)} kernels, {len(failures)} over budget")
    return failures


def main():
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    nvcc = find_nvcc()
    if nvcc is None:
        named = ", ".join(source.name for source in sources) or "0 kernels"
        print(f"cuda gate: NOT RUN, no nvcc on this machine ({named})")
        return
    budget_file = CUDA / "budgets.json"
    budgets = json.loads(budget_file.read_text()) if budget_file.exists() else {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(nvcc, source, arch, folder) for source in sources for arch in ARCHS]
        reports = list(pool.map(lambda job: compile_one(*job), jobs))
    failures = check(reports, budgets)
    if failures:
        sys.exit("cuda gate: over budget\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
