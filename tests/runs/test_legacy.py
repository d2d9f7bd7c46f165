"""Checkpoints of version 2, put together as that version wrote them."""

import pytest
import torch

import metaaug_fast as mf
from metaaug_fast import models
from metaaug_fast.cli.main import main
from metaaug_fast.errors import CheckpointError
from metaaug_fast.runs import checkpoint, run
from metaaug_fast.runs.load import configuration
from tests.runs.small import small

SETTINGS = {
    "learner": "maml", "data": "sinusoid", "model": "mlp", "steps": 3, "tasks": 25, "inner_lr": 0.02, "inner_steps": 2,
    "meta_lr": 0.001, "ways": 5, "shots": 10, "queries": 10, "train_shots": None, "test_steps": None, "seed": 0,
    "inner_batch": None, "first_order": False, "split_styles": False, "root": None,
}  # fmt: skip
REPTILE = {
    "learner": "reptile", "tasks": 5, "train_shots": 50, "inner_steps": 10, "inner_batch": 10, "meta_lr": 1.0,
    "seed": 4,
}  # fmt: skip
GLYPHS = {"data": "glyphs", "model": "strided_conv4", "shots": 1, "queries": 5, "ways": 3, "first_order": True}


def write(path, monkeypatch, made, /, **settings):
    state = {
        "config": SETTINGS | settings,
        "step": 3,
        "episodes": {"seed": 0, "position": 3},
        "learner": made.state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "generator": torch.get_rng_state(),
        "history": {"training": [], "validation": [], "seconds": 1.0, "stopped_by": None},
    }
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 2)
        checkpoint.save(path, state)


CASES = {
    "maml on sinusoids": (lambda: mf.MAML(models.mlp([1, 40, 40, 1]), 0.02, 2, loss="mse"), {}),
    "reptile on sinusoids": (
        lambda: mf.Reptile(models.mlp([1, 40, 40, 1]), 0.02, 10, inner_batch=10, loss="mse", seed=4),
        REPTILE,
    ),
    "maml on glyphs": (lambda: mf.MAML(models.strided_conv4(3), 0.02, 2, first_order=True), GLYPHS),
    "a model of the user's own": (lambda: mf.MAML(models.mlp([1, 4, 1]), 0.02, 2, loss="mse"), {"model": "old:net"}),
    "with ways": (
        lambda: mf.MAML(models.strided_conv4(3, hidden=4), 0.02, 2, first_order=True),
        GLYPHS | {"model": "old:wide"},
    ),
}
OLD = """
from metaaug_fast.models import mlp, strided_conv4
def net(): return mlp([1, 4, 1])
def wide(ways=3): return strided_conv4(ways, hidden=4)
"""


@pytest.mark.parametrize("case", CASES)
def test_they_can_be_loaded_and_evaluated(tmp_path, monkeypatch, own_code, capsys, case):
    own_code("old", OLD)
    path = tmp_path / "old.safetensors"
    make, settings = CASES[case]
    learner = make()
    write(path, monkeypatch, learner, **settings)
    loaded = mf.load(path, allow=["old"])
    classes = settings.get("data") == "glyphs"
    x = torch.rand(2, 15, 1, 28, 28) if classes else torch.randn(2, 10, 1)
    y = torch.arange(3).repeat(2, 5) if classes else torch.randn(2, 10, 1)
    with torch.no_grad():
        ours, theirs = (each.eval().adapt(x, y)(x) for each in (loaded, learner))
    assert torch.equal(ours, theirs)
    assert main(["evaluate", str(path), "--allow", "old", "--episodes", "4"]) == 0
    assert "3-way 1-shot" in capsys.readouterr().out if classes else True


def test_the_settings_say_the_same(tmp_path, monkeypatch):
    path = tmp_path / "old.safetensors"
    make, settings = CASES["reptile on sinusoids"]
    write(path, monkeypatch, make(), **settings, test_steps=7)
    config = configuration(path, checkpoint.load(path))
    assert (config.sampling.train_shots, config.sampling.shots, config.sampling.tasks) == (50, 10, 5)
    assert (config.training.schedule, config.training.meta_lr, config.training.seed) == ("linear", 1.0, 4)
    assert config.evaluation.test_steps == 7
    assert (config.learner.fields["inner_batch"], config.learner.fields["loss"]) == (10, "mse")


def test_their_runs_cannot_go_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "old.safetensors"
    write(path, monkeypatch, CASES["maml on sinusoids"][0]())
    before = path.read_bytes()
    message = f"{path} is of an older metaaug_fast: it can be evaluated and loaded, but its run cannot go on"
    for arguments in (["maml"], [], ["maml", "--steps", "9", "--inner-lr", "0.5"]):
        assert main(["train", *arguments, "--resume", str(path)]) == 2
        assert capsys.readouterr().err == f"metaaug-fast train: error: {message}\n"
    with pytest.raises(CheckpointError, match="older metaaug_fast"):
        run(small("maml", "sinusoid"), tmp_path / "new", resume=path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [{"data": "mnist"}, {"learner": "lost"}, {"inner_lr": "x"}, {"model": 3}, {"steps": None}, {"model": "resnet"}],
)
def test_settings_that_are_none(tmp_path, monkeypatch, change):
    path = tmp_path / "old.safetensors"
    write(path, monkeypatch, CASES["maml on sinusoids"][0](), **change)
    with pytest.raises(CheckpointError, match=str(path)):
        mf.load(path)
    state = checkpoint.load(path)
    del state["config"]["data"]
    checkpoint.save(path, state)
    with pytest.raises(CheckpointError, match=rf"{path} has no configuration of a run \(KeyError: 'data'\)"):
        mf.load(path)
