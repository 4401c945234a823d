"""The program that runs every CUDA kernel for compute-sanitizer: as C++ under ASan and UBSan."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulation.emulated import (
    EMULATION,
    ROOT,
    build,
    compile_all,
    compile_driver,
    compiled_once,
    link,
)
from emulation.emulated_loop import compile_loop

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None,
    reason="the emulation needs Linux and g++",
)

SANITIZE = ROOT / "tests" / "sanitize"
SOURCES = [SANITIZE / f"{name}.cu" for name in ("main", "steps", "cell_loops")]
STEP_OBJECTS = ("anderson_step", "broyden_step", "emulation")
LOOP_OBJECTS = ("cell_loop", "cell_loop_plan", "mma")

# For code on a device: every access to memory calls emulation/initcheck.cpp first.
INITCHECK = ["-fsanitize=kernel-address", "--param=asan-instrumentation-with-call-threshold=0",
             "--param=asan-stack=0", "--param=asan-globals=0"]  # fmt: skip
ON_DEVICE = [*(ROOT / "csrc" / "cuda" / f"{name}.cu" for name in
               ("anderson_step", "broyden_step", "cell_loop")), SANITIZE / "steps.cu"]  # fmt: skip
ON_HOST = [
    *(SANITIZE / f"{name}.cu" for name in ("main", "cell_loops")),
    *(EMULATION / f"{name}.cpp" for name in ("emulation", "initcheck", "mma")),
    ROOT / "csrc" / "cuda" / "cell_loop_plan.cpp",
]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The emulated kernels that other tests run too, as objects by name."""
    steps = compiled_once(tmp_path_factory, "emulation", compile_driver).parent
    loops = compiled_once(tmp_path_factory, "emulated_loop", compile_loop).parent
    return {
        **{name: steps / f"driver-{name}.o" for name in STEP_OBJECTS},
        **{name: loops / f"loop-{name}.o" for name in LOOP_OBJECTS},
    }


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory, kernels: dict[str, Path]) -> Path:
    """The driver of the kernels."""

    def compile_into(folder: Path) -> Path:
        return build(SOURCES, folder / "sanitize", list(kernels.values()))

    return compiled_once(tmp_path_factory, "sanitize", compile_into)


@pytest.fixture(scope="session")
def initcheck(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without ASan, to find reads of memory that nobody wrote."""

    def compile_into(folder: Path) -> Path:
        program = folder / "initcheck"
        host = compile_all(ON_HOST, program, ["-DEMULATION_INITCHECK"])
        return link([*host, *compile_all(ON_DEVICE, program, INITCHECK)], program, ["-no-pie"])

    return compiled_once(tmp_path_factory, "initcheck", compile_into)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def families(program: Path) -> list[str]:
    return run(program, "--list").stdout.split()


def test_every_family_is_listed(program: Path) -> None:
    """The WHILE graph, which needs a device, is left out here alone."""
    text = (ROOT / "tests" / "sanitize" / "families.h").read_text()
    declared = [line.split("(")[0].split()[-1] for line in text.splitlines() if "(Family&" in line]
    assert [*families(program), "device_loop"] == declared


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "cell_loop"])
def test_every_kernel_runs_clean(program: Path, solver: str) -> None:
    done = run(program, "--only", solver)
    assert done.returncode == 0, done.stderr
    ran = [name for name in families(program) if name.startswith(solver)]
    *lines, last = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ran
    launches = [int(line.split(" launches")[0].split()[-1]) for line in lines]
    assert last == f"{sum(launches)} launches ok"
    assert min(launches) >= 10


LOOPS = [f"cell_loop_{name}" for name in ("float32", "tf32", "bf16")]


@pytest.mark.parametrize("family", ["picard", "anderson", "broyden", *LOOPS])
def test_nothing_is_read_that_was_never_written(initcheck: Path, family: str) -> None:
    done = run(initcheck, "--only", family)
    assert done.returncode == 0, done.stderr


def test_options_that_name_nothing_are_refused(program: Path) -> None:
    for arguments in (["--only", "anderso"], ["--only"], ["-x"]):
        assert run(program, *arguments).returncode == 2


@dataclass(frozen=True)
class Fault:
    """A kernel that is wrong in one place.

    Attributes:
        file, right, wrong: what stands in csrc, and what is put there.
        family: that runs it.
        tells: what the driver or a sanitizer says.
    """

    file: str
    right: str
    wrong: str
    family: str
    tells: str


FAULTS = {
    "reads past the end": Fault(
        "cuda/tile.cuh", "left > e * kWarpThreads ?", "left >= e * kWarpThreads ?",
        "anderson_warp", "heap-buffer-overflow",
    ),
    "blocks of one sample never meet again": Fault(
        "cuda/step_kernel.cuh", "meeting.arrived = 0;", "",
        "anderson_split", "sample 0: took 1 steps",
    ),
}  # fmt: skip
NEVER_WRITTEN = Fault(
    "cuda/shared.cuh", "p.num_steps[sample] == 0;", "p.num_steps[sample] < 0;",
    "anderson_warp", "initcheck: a read of 8 bytes at 0 of an allocation of 40",
)  # fmt: skip


def with_fault(fault: Fault, folder: Path) -> Path:
    """A copy of anderson_step.cu and of what it includes, the fault among it."""
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cpu"))
    file = folder / "csrc" / fault.file
    text = file.read_text()
    assert fault.right in text
    file.write_text(text.replace(fault.right, fault.wrong))
    return folder / "csrc" / "cuda" / "anderson_step.cu"


def assert_found(program: Path, fault: Fault) -> None:
    done = run(program, "--only", fault.family)
    assert done.returncode != 0
    assert fault.tells in done.stderr


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_a_wrong_kernel_is_found(
    tmp_path: Path, program: Path, kernels: dict[str, Path], fault: Fault
) -> None:
    objects = [program.with_name(f"sanitize-{source.stem}.o") for source in SOURCES]
    objects += [kernels[name] for name in kernels if name != "anderson_step"]
    wrong = build([with_fault(fault, tmp_path)], tmp_path / "wrong", objects)
    assert_found(wrong, fault)


def test_a_read_of_what_nobody_wrote_is_found(tmp_path: Path, initcheck: Path) -> None:
    (step,) = compile_all([with_fault(NEVER_WRITTEN, tmp_path)], tmp_path / "wrong", INITCHECK)
    objects = [initcheck.with_name(f"initcheck-{source.stem}.o") for source in
               (*ON_HOST, *ON_DEVICE) if source.stem != "anderson_step"]  # fmt: skip
    assert_found(link([step, *objects], tmp_path / "wrong", ["-no-pie"]), NEVER_WRITTEN)
