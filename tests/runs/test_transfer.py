"""From many sources to a target of few labels: what is held out, what is compared, what is refused."""

import json
import math
from operator import attrgetter

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.learners.supervised import classifier_accuracy
from metaaug_fast.runs.config import configure
from metaaug_fast.runs.transfer import (
    WAYS,
    Figures,
    Recipe,
    Transferred,
    brought,
    divided,
    few,
    joined,
    transfer,
)

QUICK = {"pretrain_steps": 30, "meta_steps": 3, "tasks": 2, "queries": 2, "tune_steps": 30, "tune_lr": 0.05}


def clusters(classes, each=12, features=6, noise=0.1):
    """Classes that a line tells apart."""
    labels = torch.arange(classes).repeat_interleave(each)
    return mf.data.ClassSamples.from_arrays(
        4 * torch.randn(classes, features)[labels] + noise * torch.randn(len(labels), features), labels
    )


def config(name="mlp", **fields):
    return configure(
        {
            "learner": {"name": "meta_transfer", "inner_lr": 0.1, "inner_steps": 3},
            "data": {"name": "glyphs"},
            "model": {"name": name, **fields},
        }
    )


def test_what_can_be_told_apart_is_learned():
    """Whatever other numbers of labels and seeds there are."""
    sources, target = {"one": clusters(6), "other": clusters(5)}, clusters(4, 30)
    said = []
    recipe = Recipe(**QUICK, target_weight=0.5, train_shots=2)
    found = transfer(config(), sources, target, (1, 3), seeds=2, recipe=recipe, say=said.append)
    assert {(each.shots, each.way) for each in found.figures} == {(count, way) for count in (1, 3) for way in WAYS}
    assert all(len(each.accuracies) == 2 for each in found.figures)
    assert {each.way: each.mean for each in found.figures if each.shots == 3}["meta-transfer"] > 0.9
    assert found.pictures == 4 * 15
    assert said[0] == "4 classes of 60 held-out samples; meta-tasks of 4 ways, 1, 2 shots"
    assert said[1].startswith("seed 0, 1 label a class: scratch ")
    assert len(said) == 5
    again = transfer(config(), sources, target, (3,), seeds=1, recipe=recipe, say=said.append)
    assert [each.accuracies[0] for each in found.figures if each.shots == 3] == [
        *map(attrgetter("mean"), again.figures)
    ]
    report = json.loads(json.dumps(found.as_dict()))
    assert report["recipe"]["target_weight"] == 0.5
    assert len(report["figures"]) == 2 * (4 + 3)
    assert report["figures"][0]["accuracies"] == list(found.figures[0].accuracies)
    assert report["config"]["model"]["ways"] == 4


def test_a_recipe_of_meta_training_is_of_no_matter_to_other_ways():
    sources, target = {"one": clusters(6)}, clusters(4, 30, noise=2)
    plain = {"seeds": 1, "say": lambda text: None}
    found = [
        {each.way: each.accuracies for each in transfer(config(), sources, target, recipe=recipe, **plain).figures}
        for recipe in (Recipe(**QUICK), Recipe(**QUICK, easy=True), Recipe(**QUICK, target_weight=3.0))
    ]
    for way in ("scratch", "head alone", "fine-tuned"):
        assert found[0][way] == found[1][way] == found[2][way]


def test_a_training_that_was_stopped_gives_no_figures(monkeypatch):
    stopped = mf.History(stopped_by="SIGINT")
    monkeypatch.setattr("metaaug_fast.runs.transfer.train", lambda *_, **__: stopped)
    with pytest.raises(KeyboardInterrupt):
        transfer(config(), {"one": clusters(6)}, clusters(4), (2,), seeds=1, recipe=Recipe(**QUICK))


def test_what_is_held_out():
    """Never a label; half of a class, or what the number allows, or what the labels leave."""
    data = mf.data.ClassSamples.from_arrays(torch.arange(60.0)[:, None], torch.arange(60) % 3)
    for shots, test, expected in ((5, 1000, 10), (5, 12, 4), (15, 1000, 5), (19, 1000, 1), (1, 1, 1)):
        pool, (x, y) = divided(data, shots, test)
        assert [len(each) for each in pool] == [20 - expected] * 3
        assert torch.equal(x[:, 0].long() % 3, y)
        held_out = set(x.flatten().tolist())
        for seed in range(5):
            chosen, labels = few(pool, shots, seed)
            assert torch.equal(chosen[:, 0].long() % 3, labels)
            assert labels.bincount().tolist() == [shots] * 3
            assert len(set(chosen.flatten().tolist())) == 3 * shots
            assert not held_out & set(chosen.flatten().tolist())
            fewer, _ = few(pool, 1, seed)
            assert set(fewer.flatten().tolist()) <= set(chosen.flatten().tolist())
    assert not torch.equal(few(pool, 5, 0)[0], few(pool, 5, 1)[0])


def test_accuracy_is_a_share():
    class First(nn.Linear):
        def forward(self, x):
            return nn.functional.one_hot(x[:, 0].long(), 3).float()

    x = torch.randint(3, (1234, 2)).float()
    y = x[:, 0].long()
    y[:100] = (y[:100] + 1) % 3
    assert classifier_accuracy(First(2, 3), (x, y)) == pytest.approx(1134 / 1234)


def test_intervals_are_students():
    values = (0.5, 0.6, 0.55, 0.7, 0.65)
    mean = sum(values) / 5
    deviation = math.sqrt(sum((each - mean) ** 2 for each in values) / 4)
    found = Figures(1, "scratch", values)
    assert found.interval == pytest.approx(2.776445 * deviation / math.sqrt(5), rel=1e-5)
    assert str(found) == f"60.0 % +- {100 * found.interval:.1f} %"
    assert Figures(1, "scratch", (0.5,)).interval is None
    assert str(Figures(1, "scratch", (0.5,))) == "50.0 %"


def test_gains_are_of_pairs():
    figures = [Figures(count, way, (0.5, 0.75 + 0.125 * index)) for count in (1, 5) for index, way in enumerate(WAYS)]
    gains = Transferred(config(), Recipe(), ("one",), "other", tuple(figures), 9, 2, {}).gains()
    assert [(each.shots, each.way) for each in gains] == [
        (count, f"meta-transfer - {way}") for count in (1, 5) for way in WAYS if way != "meta-transfer"
    ]
    assert gains[0].accuracies == (0, 0.375)
    assert gains[2].accuracies == (0, 0.125)


def pictures(*shape, classes=3, each=4):
    count = classes * each
    return mf.data.ClassSamples.from_arrays(
        torch.randint(0, 256, (count, *shape), dtype=torch.uint8), torch.arange(count) % classes
    )


@pytest.mark.parametrize("given", [(1, 8, 8), (3, 16, 16), (1, 28, 20), (3, 8, 8)])
@pytest.mark.parametrize("wanted", [(1, 8, 8), (3, 12, 10)])
def test_pictures_are_brought_to_a_shape(given, wanted):
    said = []
    data = pictures(*given)
    found = brought("mine", data, pictures(*wanted), True, said.append)
    assert found.sample_shape == wanted
    assert found.samples.dtype == torch.uint8
    assert found.names == data.names
    assert said == ([] if given == wanted else [f"mine: pictures {given} are brought to {wanted}"])
    if given == (1, 8, 8) and wanted == given:
        assert found is data
    means = found.samples.float().mean((1, 2, 3)), data.samples.float().mean((1, 2, 3))
    assert (means[0] - means[1]).abs().max() < 30
    even = mf.data.ClassSamples.from_arrays(torch.full((4, *given), 100, dtype=torch.uint8), [0, 0, 1, 1])
    assert brought("mine", even, pictures(*wanted), True, said.append).samples.eq(100).all()


def test_sources_are_joined():
    one, other = pictures(1, 8, 8), pictures(1, 8, 8, classes=2, each=5)
    found = joined({"a": one.subset([2, 0]), "b": other})
    assert found.names == ("a: 2", "a: 0", "b: 0", "b: 1")
    for index, (data, place) in enumerate([(one, 2), (one, 0), (other, 0), (other, 1)]):
        assert torch.equal(found.class_samples(index), data.class_samples(place))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": ()}, r"shots must be one number or more \(got none\)"),
        ({"shots": (0,)}, r"shots must be >= 1 \(got 0\)"),
        ({"seeds": 0}, r"seeds must be >= 1 \(got 0\)"),
        ({"shots": (12,)}, r"shots must leave samples of every class to judge on \(got 12; class '0' has 12\)"),
        ({"sources": {}}, r"sources must be one data set or more \(got none\)"),
        ({"sources": {"few": clusters(3)}}, r"ways must be at most the data set's 3 classes \(got 4\)"),
        ({"sources": {"wide": clusters(9, features=7)}}, r"sources must have .* shape, \(6,\) \(got \(7,\) of wide\)"),
        ({"sources": {"grey": pictures(1, 8, 8)}}, r"sources must have .* type, torch.float32 \(got torch.uint8 of gr"),
        (
            {"sources": {"grey": pictures(1, 8, 8)}, "target": pictures(3, 8, 8, each=9)},
            r"target's shape, \(3, 8, 8\) \(got \(1, 8, 8\) of grey; convert brings pictures to it\)",
        ),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    given = {"sources": {"one": clusters(6)}, "target": clusters(4), "shots": (2,), **change}
    with pytest.raises(ValueError, match=message) as caught:
        transfer(config(), recipe=Recipe(**QUICK), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_weight": -1.0}, r"target_weight must be >= 0 \(got -1.0\)"),
        ({"learns": "body"}, "learns must be one of scale_shift, head, weights, all"),
        ({"tasks": 0}, r"tasks must be >= 1 \(got 0\)"),
        ({"easy": 1}, r"easy must be True or False \(got 1\)"),
    ],
)
def test_bad_recipes(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe(**fields)
