"""How CUDA launches are laid out, and what the emulation of CUDA finds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulation.emulated import EMULATION, FLAGS, ROOT, SANITIZE, run

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None,
    reason="the emulation needs Linux and g++",
)

WARP, BLOCK, SPLIT = range(3)


@pytest.fixture(scope="module")
def launch_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("launch") / "launch_config"
    run(["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", str(EMULATION / "launch_config.cpp"),
         "-o", str(program)])  # fmt: skip
    return program


SIZES = [0, 1, 31, 255, 256, 257, 1000, 4096, 16384, 16385, 65536, 10**7, 3 * 10**9, 10**13]


@pytest.mark.parametrize("number", [4, 8], ids=["float", "double"])
def test_launches_cover_every_sample_and_fit_the_device(launch_config: Path, number: int) -> None:
    command = [str(launch_config), str(number), *map(str, SIZES)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for dim, line in zip(SIZES, out.splitlines(), strict=True):
        shape, threads, parts, tiles_per_part, tile = map(int, line.split())
        tiles = -(-dim // tile)
        assert threads % 32 == 0
        assert 32 <= threads <= 256
        assert parts * tiles_per_part >= tiles
        # No part is empty: each of them must arrive.
        assert (parts - 1) * tiles_per_part < max(tiles, 1)
        assert shape == (WARP if dim <= tile else BLOCK if dim <= 16384 else SPLIT)
        assert (parts > 1) == (shape == SPLIT)
        assert parts <= 512
        if shape == WARP:
            assert threads == 32
        if shape == BLOCK:
            assert threads == 32 * min(tiles, 8)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("faults") / "faults"
    names = ("faults.cpp", "emulation.cpp", "mma.cpp")
    sources = [str(EMULATION / name) for name in names]
    run(["g++", *FLAGS, *SANITIZE, *sources, "-o", str(program)])
    return program


def outcome(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("past the end", "heap-buffer-overflow"),
        ("past shared memory", "use-after-poison"),
        ("some wait", "some threads wait for others that never come"),
        ("lane has left", "names a lane that does not exist or has left"),
        ("crooked vector", "misaligned address"),
        ("too many threads", "the launch was refused"),
        ("copy never awaited", "a thread left before its copies arrived"),
        ("crooked copy", "a copy that is not aligned to its size"),
        ("not in tf32", "an operand that was not rounded to tf32"),
    ],
)
def test_the_emulation_stops_at_a_fault(faults: Path, fault: str, message: str) -> None:
    done = outcome(faults, fault)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_missing_barrier_shows_in_the_results(faults: Path) -> None:
    expected = [str((i + 1) % 64) for i in range(64)]
    for seed in ("0", "1", "2"):
        assert outcome(faults, "with barrier", seed).stdout.split() == expected
        assert "-nan" in outcome(faults, "without barrier", seed).stdout


def test_a_warp_may_fall_behind_the_others(faults: Path) -> None:
    expected = [str((i + 32) % 64) for i in range(64)]
    found = [outcome(faults, "warps apart", str(seed)).stdout for seed in range(8)]
    assert found[0].split() == expected  # without a seed all go in step
    assert any("nan" in text for text in found)


def test_shared_memory_that_nobody_wrote_is_nan(faults: Path) -> None:
    assert outcome(faults, "never written").stdout.split()[0] in ("nan", "-nan")


def test_a_copy_arrives_once_it_is_awaited(faults: Path) -> None:
    expected = [str((i + 1) % 32) for i in range(32)]
    for seed in ("0", "1"):
        assert outcome(faults, "copy awaited", seed).stdout.split()[:32] == expected
        assert "nan" in outcome(faults, "copy read too early", seed).stdout


@pytest.mark.parametrize(("product", "depth"), [("tf32 product", 8), ("bf16 product", 16)])
def test_products_of_a_warp(faults: Path, product: str, depth: int) -> None:
    """Rows of ones by columns of n: every row of sums is 0, depth, 2 depth, ..."""
    found = list(map(float, outcome(faults, product, "2").stdout.split()[:64]))
    assert found == [depth * float(n) for _ in range(8) for n in range(8)]


def test_shuffles_add_up(faults: Path) -> None:
    assert outcome(faults, "butterfly", "3").stdout.split()[:32] == ["496"] * 32


def test_kernels_include_no_torch() -> None:
    """So that nvcc compiles them without one, and they link into any library."""
    sources = [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc" / "common").iterdir()]
    assert len(sources) > 10
    for source in sources:
        included = re.findall(r'#include [<"]([^>"]+)', source.read_text())
        assert not [name for name in included if "torch" in name or "ATen" in name], source


def test_shared_memory_is_dynamic() -> None:
    """The emulation fills that with NaNs, and cannot reach arrays inside a kernel."""
    for source in (ROOT / "csrc" / "cuda").iterdir():
        for line in source.read_text().splitlines():
            assert "__shared__" not in line or line.startswith("extern __shared__"), source
