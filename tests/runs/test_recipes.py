import dataclasses
import json

import pytest
import torch

from metaaug_fast.learners.reptile import Reptile
from metaaug_fast.runs import recipes
from metaaug_fast.runs.recipes import Settings, settings


@pytest.mark.parametrize("learner", recipes.LEARNERS)
@pytest.mark.parametrize("data", recipes.DATA)
def test_every_pair_has_settings_that_survive_a_report(learner, data):
    given = {"root": "here"} if data == "omniglot" else {}
    run = settings(learner, data, **given)
    assert Settings(**json.loads(json.dumps(run.as_dict()))) == run
    assert data in str(run)
    learner = recipes.make_learner(run)
    assert learner.problem().steps == run.inner_steps
    assert learner.problem().loss == ("mse" if data == "sinusoid" else "cross_entropy")


@pytest.mark.parametrize("learner", recipes.LEARNERS)
@pytest.mark.parametrize("data", ["glyphs", "sinusoid"])
def test_the_data_hold_enough_for_every_split(learner, data):
    run = settings(learner, data, tasks=2)
    for split in recipes.SPLITS:
        assert recipes.make_episodes(run, split).batch(0).tasks == 2


def test_the_papers_settings():
    run = settings("maml", "omniglot", root="x")
    assert (run.inner_lr, run.inner_steps, run.meta_lr, run.tasks) == (0.4, 1, 1e-3, 32)
    run = settings("maml", "sinusoid")
    assert (run.inner_lr, run.inner_steps, run.tasks, run.shots, run.steps) == (0.01, 1, 25, 10, 70_000)
    run = settings("reptile", "omniglot", root="x")
    assert (run.inner_lr, run.inner_batch, run.inner_steps, run.tasks, run.train_shots) == (1e-3, 25, 3, 10, 15)


def test_splits_share_no_class_and_tests_do_not_follow_the_seed():
    names = {}
    for split in recipes.SPLITS:
        episodes = recipes.make_episodes(settings("maml", "glyphs", seed=3), split)
        names[split] = set(episodes.dataset.names)
    assert not names["train"] & names["validation"]
    assert not names["train"] & names["test"]
    assert not names["validation"] & names["test"]
    first, second = (
        {
            split: recipes.make_episodes(settings("maml", "sinusoid", seed=seed), split).batch(0)
            for split in recipes.SPLITS
        }
        for seed in (0, 1)
    )
    assert not torch.equal(first["train"].support_x, second["train"].support_x)
    assert torch.equal(first["test"].support_x, second["test"].support_x)
    assert len({float(batch.support_x.sum()) for batch in first.values()}) == 3


def test_reptile_trains_on_more_shots_and_falls_to_zero():
    run = settings("reptile", "sinusoid", steps=10, meta_lr=0.5)
    assert recipes.make_episodes(run, "train").batch(0).support_x.shape[1] == 50
    assert recipes.make_episodes(run, "test").batch(0).support_x.shape[1] == 10
    learner = recipes.make_learner(run)
    assert isinstance(learner, Reptile)
    assert recipes.make_optimizer(run, learner) is None
    anneal = recipes.make_schedule(run, learner)
    rates = []
    for step in range(11):
        anneal(step)
        rates.append(learner.meta_lr)
    assert rates == pytest.approx([0.5 * (1 - step / 10) for step in range(11)])


def test_weights_follow_the_seed():
    one, same, other = (recipes.make_learner(settings("maml", "sinusoid", seed=seed)) for seed in (4, 4, 5))
    assert torch.equal(one.model.head.weight, same.model.head.weight)
    assert not torch.equal(one.model.head.weight, other.model.head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learner": "anil"}, r"learner must be one of maml, reptile \(got 'anil'\)"),
        ({"data": "mnist"}, r"data must be one of glyphs, omniglot, sinusoid \(got 'mnist'\)"),
        ({"steps": 0}, r"steps must be >= 1 \(got 0\)"),
        ({"meta_lr": float("nan")}, r"meta_lr must be > 0 and finite in float32 \(got nan\)"),
        ({"seed": -2}, r"seed must be >= 0 \(got -2\)"),
        ({"train_shots": 4}, r"train_shots is for reptile only \(got a run of maml on glyphs\)"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings("maml", "glyphs"), **change)
    with pytest.raises(ValueError, match=message):
        settings(**{"learner": "maml", "data": "glyphs", **change})
