"""How fast one core of this CPU can multiply and add: the roof over every product."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

# Twelve sums, so that none waits for its last addition; the registers of AVX2 hold no more.
SOURCE = """
#include <stdio.h>
#include <time.h>
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vec __attribute__((vector_size(BYTES)));
#define EACH(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)
#define START(s) vec sum##s = b;
#define STEP(s) sum##s = sum##s * a + b;
#define KEEP(s) __asm__ volatile("" : "+CONSTRAINT"(sum##s));
int main(void) {
  double best = 0;
  for (int attempt = 0; attempt < 8; ++attempt) {
    vec a, b;
    for (unsigned i = 0; i < BYTES / 4; ++i) { a[i] = 0.999f; b[i] = 0.001f; }
    EACH(START)
    const long count = 4000000;
    const clock_t start = clock();
    for (long i = 0; i < count; ++i) { EACH(STEP) EACH(KEEP) }
    const double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    const double rate = 2.0 * 12 * (BYTES / 4) * count / seconds / 1e9;
    if (rate > best) best = rate;
  }
  printf("%.3f\\n", best);
  return 0;
}
"""


def fma_gflops() -> float | None:
    """Multiplications and additions in float32, 1e9 per CPU second; None without a compiler."""
    compiler = shlex.split(os.getenv("CC", "cc"))
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "peak.c"), Path(folder, "peak")
        source.write_text(SOURCE.replace("CONSTRAINT", register_constraint()))
        try:
            subprocess.run(
                [*compiler, "-O3", "-march=native", "-o", str(program), str(source)],
                check=True,
                capture_output=True,
            )
            return float(subprocess.run([program], check=True, capture_output=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            return None


def register_constraint() -> str:
    """What the compiler calls the widest registers of this machine."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "w"
    try:
        return "v" if " avx512f " in Path("/proc/cpuinfo").read_text() else "x"
    except OSError:
        return "x"
