import json
from functools import partial

import pytest
import torch

from metaaug_fast.cli import demo as demos
from metaaug_fast.cli.main import main
from metaaug_fast.data import ClassSamples, Episodes
from metaaug_fast.learners.maml import MAML
from metaaug_fast.models import conv4, strided_conv4


@pytest.mark.parametrize("net", [conv4, strided_conv4])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_rival_does_the_same_work(net, steps):
    images = ClassSamples.from_arrays(torch.rand(30, 1, 28, 28), torch.arange(30) % 6)
    tasks = next(Episodes(images, queries=2, tasks=3))
    learner = MAML(net(hidden=4), inner_lr=0.2, inner_steps=steps)
    assert demos.difference(learner, tasks) < 1e-9
    learner.first_order = True
    assert demos.difference(learner, tasks) > 1e-3


@pytest.mark.slow
def test_demo_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demos, "EPISODES", 8)
    monkeypatch.setattr(demos, "compare", partial(demos.compare, rounds=1))
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--steps", "2", "--quiet"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "maml.safetensors",
        "maml.json",
        "episode.png",
        "learning_curve.png",
    }
    shown = capsys.readouterr().out
    assert "torch.func vmap" in shown
    assert "transductive" in shown
    report = json.loads((out / "maml.json").read_text())
    assert len(report["before"]) == len(report["after"]) == 2
    assert all(rate > 0 for rate in report["meta_gradients_per_second"].values())
    assert main(["evaluate", str(out / "maml.safetensors"), "--episodes", "8"]) == 0
    assert json.loads((out / "maml.evaluation.json").read_text())["evaluation"] == report["after"][0]
