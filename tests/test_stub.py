"""`_C.pyi` names what the extension has, no more and no less."""

import subprocess
import sys
from pathlib import Path

import pytest

import metaaug_fast as mf

STUB = Path(mf.__file__).with_name("_C.pyi")
# What pybind11 gives to every class, and to every enumeration.
ALLOWED = r"""
metaaug_fast\._C\.[A-Z]\w+
.*\.__pybind11_module_local_.*
.*\.(__index__|__int__|__members__|name|value)
"""


def stubtest(tmp_path, stub):
    """The differences that mypy's stubtest finds for an extension with this stub."""
    package = tmp_path / "metaaug_fast"
    package.mkdir()
    (package / "__init__.pyi").touch()
    (package / "_C.pyi").write_text(stub)
    (tmp_path / "allowed").write_text(ALLOWED)
    (tmp_path / "config").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\nignore_missing_imports = True\n")
    program = f"""
import sys
sys.path.append({str(STUB.parents[1])!r})
from mypy import stubtest
sys.exit(stubtest.main())
"""
    options = ["--concise", "--ignore-unused-allowlist", "--allowlist", "allowed", "--mypy-config-file", "config"]
    done = subprocess.run(
        [sys.executable, "-c", program, *options, "metaaug_fast._C"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_stub_is_the_extensions(tmp_path):
    """But for two names that are taken out of it."""
    stub, missing = STUB.read_text(), []
    for name, line in (("OpKind.dropout", "    dropout: ClassVar[OpKind]\n"), ("why_no_cuda", "why_no_cuda: str\n")):
        assert stub.count(line) == 1
        stub = stub.replace(line, "")
        missing.append(f"metaaug_fast._C.{name} is not present in stub")
    assert stubtest(tmp_path, stub).splitlines() == missing
