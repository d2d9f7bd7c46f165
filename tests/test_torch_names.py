"""Which names of torch the package leans on: private ones come and go between releases."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.engine.lowering import randomness
from metaaug_fast.engine.lowering.graph import LoweringError
from metaaug_fast.engine.lowering.trace import lower

PACKAGE = Path(mf.__file__).parent
MODULES = {"torch", "nn", "fx", "F"}


def private(tree):
    """Dotted names under torch's modules with a private part, and private names that are imported from torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first in MODULES and any(part.startswith("_") and not part.endswith("__") for part in rest):
                yield name


# Each with a way for a torch without it, which a test takes.
KNOWN = {
    "reptile.py": {"torch._foreach_add_"},
    "randomness.py": {"torch.utils._python_dispatch.TorchDispatchMode"},
}


def test_no_other_private_name_of_torch_is_used():
    source = "import torch\nfrom torch._utils import x\nfrom torch import nn, _C\nnn.modules._y(torch.z.__version__)"
    assert set(private(ast.parse(source))) == {"torch._utils.x", "torch._C", "nn.modules._y"}
    found = {path.name: set(private(ast.parse(path.read_text()))) for path in PACKAGE.rglob("*.py")}
    assert {name: names for name, names in found.items() if names} == KNOWN


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_of_all_modules_are_seen(kind, monkeypatch):
    monkeypatch.setattr(nn.modules.module, "_global_is_full_backward_hook", None)
    model = nn.Sequential(nn.Linear(4, 4))
    lower(model, (4,))
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda *_: None)
    try:
        with pytest.raises(LoweringError, match="it has hooks, which the engine would skip"):
            lower(model, (4,))
    finally:
        handle.remove()
    lower(model, (4,))


def test_a_torch_that_does_not_show_its_hooks_is_not_trusted(monkeypatch):
    monkeypatch.delattr(nn.modules.module, "_has_any_global_hook", raising=False)
    lower(nn.Sequential(nn.Linear(4, 4)), (4,))
    monkeypatch.delattr(nn.modules.module, "_global_backward_hooks")
    message = rf"torch {torch.__version__}.* does not tell whether all modules have hooks".replace("+", r"\+")
    with pytest.raises(LoweringError, match=message):
        lower(nn.Sequential(nn.Linear(4, 4)), (4,))


class Noisy(nn.Module):
    def forward(self, x):
        torch.rand(())
        return x


@pytest.mark.parametrize("shown", [True, False])
def test_draws_are_seen_without_seeing_calls_too(shown, monkeypatch):
    if not shown:
        monkeypatch.setattr(randomness, "TorchDispatchMode", None)
    lower(nn.Sequential(nn.Linear(4, 4)), (4,))
    with pytest.raises(LoweringError, match="draws random numbers outside dropout"):
        lower(nn.Sequential(nn.Linear(4, 4), Noisy()), (4,))
