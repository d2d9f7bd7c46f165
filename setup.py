"""Builds `metaaug_fast._C`; everything else about the project is in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:
    sys.exit("metaaug_fast is built against the torch you run: install it, then pip install --no-build-isolation .")

ROOT = Path(__file__).parent


def extension() -> CppExtension:
    """The extension's sources and flags; DEBUG=1 builds it with checks and symbols."""
    debug = os.environ.get("DEBUG", "0") not in ("", "0")
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))]
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]
    flags = ["-O0", "-g"] if debug else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-g0"]
    flags += ["-Wall", "-fvisibility=hidden"]
    return CppExtension("metaaug_fast._C", sources, depends=headers, extra_compile_args=flags)


def check_compiler() -> None:
    """Exit with one sentence where there is no C++ compiler."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler) and not shutil.which("g++") and not shutil.which("cl"):
        sys.exit(f"metaaug_fast needs a C++17 compiler: {compiler!r} was not found (install g++ or clang, or set CXX)")


if __name__ == "__main__":
    if any(command.startswith(("build", "bdist", "develop", "install", "editable")) for command in sys.argv[1:]):
        check_compiler()
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
