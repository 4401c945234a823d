"""The program that runs every CUDA kernel for compute-sanitizer: as C++ under ASan and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulated import ROOT, build, compile_driver, compiled_once
from emulated_loop import compile_loop

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None,
    reason="the emulation needs Linux and g++",
)

SOURCES = [ROOT / "tests" / "sanitize" / f"{name}.cu" for name in ("main", "steps", "cell_loops")]
STEP_OBJECTS = ("anderson_step", "broyden_step", "emulation")
LOOP_OBJECTS = ("cell_loop", "cell_loop_plan", "mma")
# Bytes that make memory which nobody wrote hold NaNs, and numbers near 1 that nobody would drop.
NANS, NUMBERS = "255", "63"


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


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments], env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


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


@pytest.mark.parametrize(
    "family",
    ["anderson_warp", "anderson_block", "broyden_warp", "broyden_block", "cell_loop_float32"],
)
def test_nothing_depends_on_memory_that_was_never_written(program: Path, family: str) -> None:
    """Nor on the order in which threads run: the digests are those of all results."""
    one = run(program, "--only", family, EMULATION_FILL=NANS, EMULATION_SEED="1")
    other = run(program, "--only", family, EMULATION_FILL=NUMBERS, EMULATION_SEED="2")
    assert one.returncode == 0, one.stderr
    assert one.stdout == other.stdout


def test_options_that_name_nothing_are_refused(program: Path) -> None:
    for arguments in (["--only", "anderso"], ["--only"], ["-x"]):
        assert run(program, *arguments).returncode == 2


@dataclass(frozen=True)
class Fault:
    """A kernel that is wrong in one place.

    Attributes:
        file, right, wrong: what stands in csrc, and what is put there.
        family: that runs it.
        tells: what the driver or a sanitizer says; None where two fills of memory tell.
    """

    file: str
    right: str
    wrong: str
    family: str
    tells: str | None


FAULTS = {
    "reads past the end": Fault(
        "cuda/tile.cuh", "left > e * kWarpThreads ?", "left >= e * kWarpThreads ?",
        "anderson_warp", "heap-buffer-overflow",
    ),
    "blocks of one sample never meet again": Fault(
        "cuda/step_kernel.cuh", "meeting.arrived = 0;", "",
        "anderson_split", "sample 0: took 1 steps",
    ),
    "mixes a column that nobody wrote": Fault(
        "common/anderson_judge.h", "columns < depth ? columns :", "columns < depth ? columns + 1 :",
        "anderson_warp", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_a_wrong_kernel_is_found(
    tmp_path: Path, program: Path, kernels: dict[str, Path], fault: Fault
) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("cpu"))
    file = tmp_path / "csrc" / fault.file
    text = file.read_text()
    assert fault.right in text
    file.write_text(text.replace(fault.right, fault.wrong))
    objects = [program.with_name(f"sanitize-{source.stem}.o") for source in SOURCES]
    objects += [kernels[name] for name in kernels if name != "anderson_step"]
    wrong = build([tmp_path / "csrc" / "cuda" / "anderson_step.cu"], tmp_path / "wrong", objects)
    nans = run(wrong, "--only", fault.family, EMULATION_FILL=NANS)
    if fault.tells is not None:
        assert nans.returncode == 1
        assert fault.tells in nans.stderr
        return
    numbers = run(wrong, "--only", fault.family, EMULATION_FILL=NUMBERS)
    assert nans.stdout != numbers.stdout
