"""Builds `metaaug_fast._C`; everything else about the project is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup


def find_cuda() -> None:
    """Set CUDA_HOME where `nvcc` is a script that starts one from elsewhere: torch would take the script's folder."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys():
        return
    if (Path(nvcc).resolve().parents[1] / "include" / "cuda_runtime.h").exists():
        return
    steps = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    for line in (steps.stdout + steps.stderr).splitlines():
        if line.startswith("#$ TOP="):
            os.environ["CUDA_HOME"] = str(Path(line.removeprefix("#$ TOP=")).resolve())


find_cuda()
try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError:
    sys.exit("metaaug_fast is built against the torch you run: install it, then pip install --no-build-isolation .")

ROOT = Path(__file__).parent


def with_cuda() -> bool:
    """Whether to build the CUDA engine: as METAAUG_CUDA says, else where torch has CUDA and there is nvcc.

    Whether there is a GPU makes no difference.
    """
    asked = os.environ.get("METAAUG_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"METAAUG_CUDA must be 0 or 1 (got {asked!r})")
    nvcc = CUDA_HOME is not None and (Path(CUDA_HOME) / "include" / "cuda_runtime.h").exists()
    if asked == "1" and torch.version.cuda is None:
        sys.exit(f"METAAUG_CUDA=1 needs a CUDA build of torch (got torch {torch.__version__})")
    if asked == "1" and not nvcc:
        sys.exit(f"METAAUG_CUDA=1 needs nvcc and its headers: put it on PATH or set CUDA_HOME (got {CUDA_HOME})")
    return asked != "0" and torch.version.cuda is not None and nvcc


def extension() -> Extension:
    """The extension's sources and flags; DEBUG=1 builds it with checks and symbols."""
    debug = os.environ.get("DEBUG", "0") not in ("", "0")
    cuda = with_cuda()
    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    files = sorted((ROOT / "csrc").rglob("*.*"))
    sources = [str(path.relative_to(ROOT)) for path in files if path.suffix in suffixes]
    headers = [str(path.relative_to(ROOT)) for path in files if path.suffix == ".h"]
    flags = ["-O0", "-g"] if debug else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-g0"]
    flags += ["-Wall", "-fvisibility=hidden"]
    if not cuda:
        return CppExtension("metaaug_fast._C", sources, depends=headers, extra_compile_args=flags)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # torch would choose by the GPU that is there
    return CUDAExtension(
        "metaaug_fast._C",
        sources,
        depends=headers,
        define_macros=[("METAAUG_CUDA", "1")],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--threads", "2", *(["-G"] if debug else ["-lineinfo"])]},
    )


def check_compiler() -> None:
    """Exit with one sentence where there is no C++ compiler."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler) and not shutil.which("g++") and not shutil.which("cl"):
        sys.exit(f"metaaug_fast needs a C++17 compiler: {compiler!r} was not found (install g++ or clang, or set CXX)")


if __name__ == "__main__":
    if any(command.startswith(("build", "bdist", "develop", "install", "editable")) for command in sys.argv[1:]):
        check_compiler()
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
