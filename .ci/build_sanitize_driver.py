"""Build tests/sanitize into a program that runs every CUDA kernel, for compute-sanitizer.

    python .ci/build_sanitize_driver.py [--arch 9.0] [--own-objects]
    compute-sanitizer --tool=racecheck build/sanitize/sanitize_kernels

It needs no torch, and to run only a driver and a GPU: build it here, run it elsewhere. Kernels that
setup.py has compiled from the present sources are linked as they are; --own-objects compiles all of
them with line numbers for the sanitizer's reports, which takes a minute.

Where there is no nvcc, says so and succeeds: nothing was built.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
NATIVE = ROOT / "build" / "native"
OUT = ROOT / "build" / "sanitize"
DRIVER = sorted((ROOT / "tests" / "sanitize").glob("*.cu"))
KERNELS = [
    *sorted(CSRC.rglob("*.cu")),
    CSRC / "cuda" / "cell_loop_plan.cpp",
    CSRC / "device_loop" / "node_rules.cpp",
]


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)


def newest(*folders):
    """When the latest change to anything in these folders was made."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return max(file.stat().st_mtime for file in files)


def built_by_setup(source, arch, changed):
    """The object that setup.py has left of this source, or None where it is of something else."""
    file = NATIVE / (str(source.relative_to(ROOT)).replace(os.sep, "_") + ".o")
    plan = NATIVE / "build.ninja"
    if not file.exists() or file.stat().st_mtime < changed or not plan.exists():
        return None
    return file if f"code=sm_{arch.replace('.', '')}" in plan.read_text() else None


def build(nvcc, arch, own_objects):
    """Return the program's path, or exit with the compiler's message."""
    kernels_changed = newest(CSRC / "cuda", CSRC / "common", CSRC / "device_loop")
    driver_changed = max(
        kernels_changed, newest(ROOT / "tests" / "sanitize", ROOT / "tests" / "emulation")
    )
    number = arch.replace(".", "")
    compile_ = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-Icsrc", f"-arch=sm_{number}"]

    def object_of(source):
        is_driver = source in DRIVER
        if not is_driver and not own_objects:
            built = built_by_setup(source, arch, kernels_changed)
            if built:
                return built
        output = OUT / f"{source.name}.sm_{number}.o"
        changed = driver_changed if is_driver else kernels_changed
        if not output.exists() or output.stat().st_mtime < changed:
            run([*compile_, "-c", str(source), "-o", str(output)])
        return output

    OUT.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(object_of, [*KERNELS, *DRIVER]))
    program = OUT / "sanitize_kernels"
    static = "-Xcompiler=-static-libstdc++,-static-libgcc"
    run([nvcc, f"-arch=sm_{number}", "-cudart=static", static, *map(str, objects), "-o", program])
    reused = sum(object.parent == NATIVE for object in objects)
    print(f"sanitize driver: {program.relative_to(ROOT)} for {arch}, "
          f"{reused} of {len(KERNELS)} kernel objects from setup.py")  # fmt: skip
    return program


def run(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"sanitize driver: it does not build\n{done.stdout}{done.stderr}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    archs = re.findall(r"\d+\.\d", os.environ.get("FPI_CUDA_ARCHS", "9.0"))
    parser.add_argument("--arch", default=archs[-1], help="the last of FPI_CUDA_ARCHS, else 9.0")
    parser.add_argument("--own-objects", action="store_true", help="compile the kernels anew")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("sanitize driver: NOT BUILT, no nvcc on this machine")
        return
    build(nvcc, options.arch, options.own_objects)


if __name__ == "__main__":
    main()
