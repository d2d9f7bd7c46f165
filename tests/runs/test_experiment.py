import json
from dataclasses import replace

import pytest

from metaaug_fast.errors import CheckpointError, NotFusedError
from metaaug_fast.files import best_of
from metaaug_fast.runs import checkpoint, configure, experiment, run
from metaaug_fast.runs.build import fitted
from metaaug_fast.runs.experiment import check_goes_on
from tests.building import same
from tests.runs.small import done, small


def timeless(state):
    """A checkpoint's state without its times."""
    history = state["history"]
    training = [{**point, "tasks_per_second": 0} for point in history["training"]]
    validation = [{**point, "seconds": 0} for point in history["validation"]]
    return {**state, "history": {**history, "seconds": 0, "training": training, "validation": validation}}


@pytest.mark.parametrize(
    ("learner", "data", "options"),
    [
        ("maml", "sinusoid", ["--schedule", "cosine", "--clip-norm", "1.0", "--meta-lr", "0.01"]),
        ("maml", "glyphs", ["--learn-inner-lr", "--inner-lr", "0.1", "--batch-norm", "per_step"]),
        ("reptile", "glyphs", ["--inner-batch", "3", "--train-shots", "2", "--schedule", "linear", "--meta-lr", "0.5"]),
        ("protonet", "glyphs", ["--train-ways", "7", "--schedule", "halving"]),
    ],
)
def test_a_resumed_run_is_the_whole_one_bit_for_bit(tmp_path, learner, data, options):
    config = small(learner, data, "--checkpoint-every", "2", "--validate-every", "2", *options, steps=4)
    whole = done(config, tmp_path / "whole.safetensors")
    again = done(config, tmp_path / "again.safetensors", resume=tmp_path / "whole.previous.safetensors")
    assert checkpoint.load(tmp_path / "whole.previous.safetensors")["step"] == 2
    assert same(timeless(whole), timeless(again))
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "again")]
    assert reports[0]["evaluation"] == reports[1]["evaluation"]
    assert reports[0]["config"] == reports[1]["config"]


def test_a_run_says_what_it_does_and_reports_all_that_it_depends_on(tmp_path):
    said = []
    path = tmp_path / "c.safetensors"
    outcome = run(small("maml", "sinusoid", "--inner-steps", "2"), path, progress=False, say=said.append)
    assert said[0].startswith("maml on sinusoid, 1 points: mlp, 2 tasks, inner lr 0.4, inner steps 2, 4 steps; fused, ")
    assert said[1] == f"checkpoint: {path}"
    assert said[2].startswith("new tasks: mse ")
    assert said[3].startswith("  after 0, 1, ... steps: ")
    assert said[4:] == [f"report: {tmp_path / 'c.json'}"]
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["config"] == outcome.config.as_dict() == checkpoint.load(path)["config"]
    assert configure(report["config"]) == outcome.config
    assert report["config"]["model"]["sample_shape"] == [1]
    assert report["evaluation"]["episodes"] == 20
    assert len(report["evaluation"]["by_step"]) == 3
    assert [point["step"] for point in report["history"]["validation"]] == [1, 2, 3, 4]


def test_seeds_are_all_that_runs_differ_by(tmp_path):
    states = [
        done(small("maml", "sinusoid", "--seed", seed), tmp_path / f"c{index}") for index, seed in enumerate("110")
    ]
    assert same(states[0]["learner"], states[1]["learner"])
    assert not same(states[0]["learner"], states[2]["learner"])


def test_the_best_state_is_kept_and_tested(tmp_path):
    path, said = tmp_path / "c.safetensors", []
    config = small("maml", "sinusoid", "--keep-best", "--validate-every", "1", "--meta-lr", "0.3", steps=8)
    outcome = run(config, path, progress=False, say=said.append)
    best = checkpoint.load(best_of(path))
    assert best["step"] == outcome.history.best.step
    assert same(best["learner"], dict(outcome.learner.state_dict()))
    assert f"best after {best['step']} meta-steps: {best_of(path)}" in said
    said.clear()
    longer = replace(config, training=replace(config.training, steps=9))
    again = run(longer, tmp_path / "again.safetensors", resume=path, progress=False, say=said.append)
    assert again.history.best == outcome.history.best
    assert f"best after {best['step']} meta-steps: {best_of(path)}" in said
    assert again.evaluation == outcome.evaluation


def test_a_best_state_that_was_not_kept_is_said(tmp_path):
    path, said = tmp_path / "c.safetensors", []
    config = small("maml", "sinusoid", "--validate-every", "1", "--meta-lr", "0.3", steps=4)
    outcome = run(config, path, progress=False, say=lambda text: None)
    keeping = replace(config, training=replace(config.training, keep_best=True))
    stale = small("maml", "sinusoid", "--keep-best", "--meta-lr", "0.2", "--seed", "7", steps=outcome.history.best.step)
    for before in (None, stale):
        if before is not None:  # another run's best lies there
            done(before, tmp_path / "stale.safetensors")
            best_of(tmp_path / "stale.safetensors").rename(best_of(path))
        with pytest.warns(UserWarning, match="has 4 meta-steps already"):
            again = run(keeping, path, resume=path, progress=False, say=said.append)
        step = outcome.history.best.step
        assert f"the best state, after {step} meta-steps, was not kept: the last one is tested" in said
        assert again.evaluation == outcome.evaluation
        said.clear()


def test_early_stopping_is_said(tmp_path):
    said = []
    config = small("maml", "sinusoid", "--patience", "1", "--validate-every", "1", "--meta-lr", "1.0", steps=50)
    outcome = run(config, tmp_path / "c", progress=False, say=said.append)
    assert outcome.history.stopped_by == "early stopping"
    assert "stopped early: 1 validations without a better one" in said
    assert outcome.evaluation is not None


@pytest.mark.parametrize(
    ("options", "field", "was", "got"),
    [
        (["--inner-lr", "0.5"], "learner.inner_lr", "0.4", "0.5"),
        (["--seed", "3"], "training.seed", "0", "3"),
        (["--schedule", "linear"], "training.schedule", "constant", "linear"),
        (["--tasks", "3"], "sampling.tasks", "2", "3"),
        (["--hidden", "[5]"], "model.hidden", r"\[4\]", r"\[5\]"),
        (["--amplitude", "[1, 2]"], "data.amplitude", r"\[0.1, 5.0\]", r"\[1.0, 2.0\]"),
    ],
)
def test_a_run_goes_on_as_it_was(tmp_path, options, field, was, got):
    path = tmp_path / "c"
    done(small("maml", "sinusoid"), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{field} must be that of the checkpoint, {was} \(got {got}\)"):
        run(small("maml", "sinusoid", *options, steps=6), path, resume=path)
    assert path.read_bytes() == before


def test_what_a_run_may_have_in_another_way(tmp_path):
    path = tmp_path / "c"
    done(small("maml", "sinusoid"), path)
    more = ["--validate-every", "3", "--patience", "9", "--checkpoint-every", "1", "--episodes", "5"]
    assert done(small("maml", "sinusoid", *more, steps=6), path, resume=path)["step"] == 6
    with pytest.raises(ValueError, match=r"learner.name must be that of the checkpoint, maml \(got reptile\)"):
        run(small("reptile", "sinusoid"), path, resume=path)


def test_a_model_that_the_data_fill_in_may_be_left_open():
    open_ = small("maml", "glyphs")
    filled = replace(
        open_, model=replace(open_.model, fields={**open_.model.fields, "ways": 5, "sample_shape": [1, 28, 28]})
    )
    check_goes_on(filled, open_)
    check_goes_on(filled, filled)
    with pytest.raises(ValueError, match=r"model.ways must be that of the checkpoint, 5 \(got 6\)"):
        check_goes_on(filled, replace(filled, model=replace(filled.model, fields={**filled.model.fields, "ways": 6})))
    open_ = configure({"learner": {"name": "maml"}, "data": {"name": "csv", "root": "x"}})
    filled = fitted(open_, (32,), None, 77)
    assert {open_.model.fields["vocabulary"], filled.model.fields["vocabulary"]} == {None, 77}
    check_goes_on(filled, open_)


@pytest.mark.parametrize(
    ("learner", "data", "options", "message"),
    [
        ("maml", "glyphs", ["--train-ways", "7"], r"train_ways must be ways, 5, for maml"),
        (
            "protonet",
            "glyphs",
            ["--test-steps", "3"],
            r"test_steps must be null for protonet, .* no inner loop \(got 3\)",
        ),
        ("maml", "sinusoid", ["--backend", "gpu"], r"backend must be one of auto, fused, fallback \(got 'gpu'\)"),
        ("maml", "sinusoid", ["--inner-lr", "-1"], r"inner_lr must be >= 0 and finite"),
        ("maml", "glyphs", ["--ways", "5000"], r"ways must be at most the data set's 974 classes"),
        ("maml", "sinusoid", ["--amplitude", "[3, 1]"], r"amplitude must be two finite numbers in ascending order"),
        ("maml", "sinusoid", ["--split-styles"], r"split_styles needs a data set with styles"),
    ],
)
def test_what_cannot_work_is_found_before_any_work(tmp_path, monkeypatch, learner, data, options, message):
    monkeypatch.setattr(experiment, "train", lambda *_, **__: pytest.fail("work was done"))
    said = []
    with pytest.raises(ValueError, match=message):
        run(small(learner, data, *options), tmp_path / "c", say=said.append)
    assert not said
    assert not list(tmp_path.iterdir())


def test_training_ways_are_found_wrong_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "make_sources", lambda *_, **__: pytest.fail("data were read"))
    with pytest.raises(ValueError, match="train_ways must be ways"):
        run(small("maml", "glyphs", "--train-ways", "7"), tmp_path / "c")


def test_what_cannot_be_fused_is_found_before_any_work(tmp_path, own_code):
    own_code("net", "import torch\ndef made(): return torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.SiLU())\n")
    with pytest.raises(NotFusedError):
        run(small("maml", "sinusoid", "--backend", "fused", model="net:made"), tmp_path / "c")
    assert not list(tmp_path.glob("c*"))


def test_a_checkpoint_of_a_run_that_nobody_configured(tmp_path):
    state = done(small("maml", "sinusoid"), tmp_path / "c")
    checkpoint.save(tmp_path / "c", state | {"config": {}})
    with pytest.raises(CheckpointError, match="has no configuration"):
        run(small("maml", "sinusoid", steps=9), tmp_path / "d", resume=tmp_path / "c")
