"""The scripts that make `benchmarks/RESULTS.md` start, each as `python benchmarks/NAME.py`."""

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda script: script.stem)
def test_it_finds_what_it_imports(script, monkeypatch):
    root = str(FOLDER.parent)
    monkeypatch.setattr(sys, "path", [str(FOLDER), *(entry for entry in sys.path if entry not in ("", root))])
    for name in [name for name in sys.modules if name == "benchmarks" or name.startswith("benchmarks.")]:
        monkeypatch.delitem(sys.modules, name)
    assert "main" in runpy.run_path(str(script)) or script.stem.startswith("test_")
