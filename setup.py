"""Build libfpi_cuda: C++ kernels for the CPU, and CUDA kernels where toolkit and torch allow.

Environment:
    FPI_CUDA: 1 builds the CUDA kernels or fails, 0 leaves them out; unset, nvcc and the torch
        build decide. A visible GPU is never asked for.
    FPI_CUDA_ARCHS, else TORCH_CUDA_ARCH_LIST: such as "8.0 9.0+PTX", the default.
    CUDA_HOME, CXX, CXXFLAGS: as usual.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

CPP_SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
CUDA_SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cu"))
BUILD = Path("build", "native")


def find_torch():
    """Return the folder of an installed torch >= 2.10, and its version module as a dict.

    An isolated build cannot import the torch that it builds for, but it runs on the target's
    interpreter, so site-packages are searched by path. The library keeps to torch's stable ABI:
    the headers of any torch on the machine will do.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parents[1]] if spec and spec.origin else []
    hints = [sys.prefix, os.getenv("VIRTUAL_ENV"), os.getenv("CONDA_PREFIX"), sys.base_prefix]
    for base in filter(None, hints):
        for scheme in sysconfig.get_scheme_names():
            paths = sysconfig.get_paths(scheme, {"base": base, "platbase": base})
            folders += [Path(paths["purelib"]), Path(paths["platlib"])]
    found = []
    for file in dict.fromkeys(folder / "torch" / "version.py" for folder in folders):
        if file.exists():
            version = runpy.run_path(str(file))
            if tuple(map(int, re.findall(r"\d+", version["__version__"])[:2])) >= (2, 10):
                return file.parent, version
            found.append(version["__version__"])
    sys.exit(
        f"fpi_cuda: torch >= 2.10 is needed to build, found {', '.join(found) or 'none'}. First "
        'pip install "torch>=2.10" in the environment that you build for. If it is there already, '
        "an isolated build does not see it: add --no-build-isolation to pip install, or "
        "--no-isolation to python -m build."
    )


def plan_cuda(torch_version):
    """Return (nvcc, None), or (None, the reason why no CUDA kernels are built)."""
    home = os.getenv("CUDA_HOME") or os.getenv("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    choice = os.getenv("FPI_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"fpi_cuda: FPI_CUDA must be 0, 1 or unset, got {choice!r}")
    if choice == "0":
        return None, "FPI_CUDA=0 at install"
    reason = None
    if not CUDA_SOURCES:
        reason = "this version has no CUDA kernels"
    elif not nvcc:
        reason = "no nvcc at install"
    elif not torch_version.get("cuda") and choice != "1":
        reason = f"torch {torch_version['__version__']} at install was a build without CUDA"
    if reason and choice == "1":
        sys.exit(f"fpi_cuda: FPI_CUDA=1 asks for the CUDA kernels, but: {reason}")
    return (None, reason) if reason else (nvcc, None)


def newer_toolkit(nvcc, torch_version, archs):
    """Return a warning where nvcc is later than torch's CUDA in what a driver minds, else None.

    A driver that is new enough for this torch may refuse kernels of a later major version, and PTX
    of any later one.
    """
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    cuda = torch_version.get("cuda")
    if not release or not cuda:
        return None
    minded = 2 if "+PTX" in archs else 1
    ours, theirs = ([*map(int, v.split(".")[:minded])] for v in (release[1], cuda))
    if ours <= theirs:
        return None
    return (
        f"fpi_cuda: warning: nvcc is of CUDA {release[1]}, torch {torch_version['__version__']} of "
        f"CUDA {cuda}: a driver that serves this torch may be too old for the CUDA backend. Have a "
        f"driver for CUDA {release[1]}, or set CUDA_HOME to a toolkit of CUDA {cuda}."
    )


def arch_flags(archs):
    """Turn "8.0 9.0+PTX" into nvcc's options."""
    for arch in re.split(r"[;,\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not match:
            sys.exit(f'fpi_cuda: CUDA architectures are written "8.0 9.0+PTX", got {archs!r}')
        number = match[1] + match[2]
        yield f"-gencode=arch=compute_{number},code=sm_{number}"
        if match[3]:
            yield f"-gencode=arch=compute_{number},code=compute_{number}"


def run_all(compiles, link):
    """Run the commands, given as {output: (inputs, command)}: by ninja where there is one."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    ninja = shutil.which("ninja", path=scripts)
    if not ninja:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            codes = list(pool.map(subprocess.call, [command for _, command in compiles.values()]))
        if any(codes) or any(subprocess.call(command) for _, command in link.values()):
            sys.exit("fpi_cuda: the build failed, see the compiler's message above")
        return
    line = [" command = $line", " description = $out"]
    lines = [f"builddir = {BUILD}", "rule link", *line]
    lines += ["rule compile", *line, " depfile = $out.d", " deps = gcc"]
    for rule, edges in (("compile", compiles), ("link", link)):
        for output, (inputs, command) in edges.items():
            lines += [f"build {output}: {rule} {' '.join(inputs)}"]
            lines += [" line = " + shlex.join(command).replace("$", "$$")]
    Path(BUILD, "build.ninja").write_text("\n".join(lines) + "\n")
    if subprocess.call([ninja, "-f", str(BUILD / "build.ninja")]):
        sys.exit("fpi_cuda: the build failed, see the compiler's message above")


class BuildLibrary(build_ext):
    """Compile csrc with the C++ compiler and nvcc; setuptools only puts the result in place."""

    def get_ext_filename(self, fullname):
        # Loaded by torch.ops.load_library, never imported: no Python version in the name.
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        torch, version = find_torch()
        nvcc, no_cuda = plan_cuda(version)
        archs = os.getenv("FPI_CUDA_ARCHS") or os.getenv("TORCH_CUDA_ARCH_LIST") or "8.0 9.0+PTX"
        cuda = f"CUDA backend for {archs}" if nvcc else f"no CUDA backend ({no_cuda})"
        print(f"fpi_cuda: native CPU backend, {cuda}; torch {version['__version__']}", flush=True)
        warning = newer_toolkit(nvcc, version, archs) if nvcc else None
        if warning:
            print(warning, flush=True)
        cxx = shlex.split(os.getenv("CXX", "c++"))
        if not shutil.which(cxx[0]):
            sys.exit(f"fpi_cuda: a C++17 compiler is needed, but there is no {cxx[0]}. Set CXX.")
        define = [f'-DFPI_CUDA_ARCHS="{archs}"'] if nvcc else [f'-DFPI_NO_CUDA="{no_cuda}"']
        common = ["-std=c++17", "-O3", "-Icsrc"]
        # Nobody reads errno or the exception flags, and loops with either are not vectorised.
        host = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
        host += ["-Wall", "-Wextra"]
        host += [*define, "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
        host += ["-isystem", str(torch / "include"), *shlex.split(os.getenv("CXXFLAGS", ""))]
        compilers = {".cpp": [*cxx, *common, *host]}
        if nvcc:
            quiet = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-ccbin", cxx[-1]]
            compilers[".cu"] = [nvcc, *common, *quiet, *arch_flags(archs)]
        compiles = {}
        for source in CPP_SOURCES + (CUDA_SOURCES if nvcc else []):
            output = str(BUILD / (source.replace(os.sep, "_") + ".o"))
            command = [*compilers[Path(source).suffix], "-MMD", "-MF", f"{output}.d"]
            compiles[output] = ([source], [*command, "-c", source, "-o", output])
        BUILD.mkdir(parents=True, exist_ok=True)
        library = str(BUILD / "libfpi_cuda.so")
        # libtorch pulls in libtorch_cuda where there is one; the linker would drop it as unused.
        keep = "--no-as-needed" if sys.platform == "linux" else "-undefined,dynamic_lookup"
        linker = [nvcc, "-ccbin", cxx[-1]] if nvcc else cxx
        flags = [arg for word in keep.split(",") for arg in ("-Xlinker", word)]
        line = [*linker, "-shared", *compiles, "-o", library, f"-L{torch / 'lib'}", *flags]
        run_all(compiles, {library: (list(compiles), [*line, "-ltorch", "-ltorch_cpu"])})
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(library, str(target))


class CheckedDistInfo(dist_info):
    """Fail before pip downloads the dependencies of a build that cannot succeed."""

    def run(self):
        find_torch()
        super().run()


setup(
    ext_modules=[Extension("fpi_cuda.libfpi_cuda", CPP_SOURCES)],
    cmdclass={"build_ext": BuildLibrary, "dist_info": CheckedDistInfo},
    # The library uses no Python API, so one wheel serves every Python.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
