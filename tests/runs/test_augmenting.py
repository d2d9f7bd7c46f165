"""More of a few pictures a class: what is drawn, written, compared and kept."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import metaaug_fast as mf
from metaaug_fast.errors import CheckpointError
from metaaug_fast.learners.supervised import classifier_accuracy, train_classifier
from metaaug_fast.runs import checkpoint
from metaaug_fast.runs.augmenting import (
    Judge,
    compared,
    enlarge,
    folder_names,
    learned_method,
    write_pictures,
)
from metaaug_fast.runs.config import Part
from metaaug_fast.runs.methods import METHODS, Distil, Generate, Hallucinate, Policy, Retrieve

pytestmark = pytest.mark.usefixtures("fresh_numbers")

GLYPHS = Part("glyphs", {})
TINY = {"steps": 2, "shots": 2, "hidden": 4, "tasks": 2, "queries": 2}
POLICY = Policy(**TINY, ways=3, inner_steps=2, transforms="noise, rotation")
BRIEF = {"per_class": 2, "judge": Judge(1, 1), "say": lambda text: None}


def pictures(*counts, shape=(1, 8, 8)):
    return mf.data.ClassSamples.from_classes(
        {f"kind {index}": torch.randint(256, (count, *shape), dtype=torch.uint8) for index, count in enumerate(counts)}
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read(tmp_path, channels):
    few, new = pictures(2, 3, shape=(channels, 8, 9)), pictures(12, 1, shape=(channels, 8, 9))
    write_pictures(tmp_path / "out", few, new)
    read = mf.data.Folder(tmp_path / "out", "all", channels=channels)
    both = few + new
    assert read.names == both.names
    for index in range(2):
        assert torch.equal(read.class_samples(index), both.class_samples(index))
    assert sorted(each.name for each in (tmp_path / "out" / "kind 1").iterdir()) == [
        f"{number}.png" for number in range(4)
    ]
    assert (tmp_path / "out" / "kind 0" / "00.png").exists()


def test_names_of_folders():
    names = ["a/b", "a\\b", "", "..", "x" * 300, "x" * 300, "\u00e9" * 200, "tab\t", "A/B"]
    found = folder_names(names)
    assert len({each.casefold() for each in found}) == len(names)
    assert all(len(each.encode()) < 120 and each[0] != "." and not set(each) & set("/\\\t\0") for each in found)
    assert folder_names(["cat", "dog"]) == ["cat", "dog"]


def test_new_classes_are_of_the_test_split_and_judged_on_their_other_samples(tmp_path):
    found = enlarge(POLICY, GLYPHS, tmp_path, classes=4, **BRIEF)
    test = mf.data.Glyphs(split="test")
    assert len(found.few) == len(found.test) == 4
    for index, name in enumerate(found.few.names):
        own = test.class_samples(test.names.index(name))
        parts = torch.cat([found.few.class_samples(index), found.test.class_samples(index)])
        assert found.few.counts[index].sum() == 2
        assert sorted(each.numpy().tobytes() for each in parts) == sorted(each.numpy().tobytes() for each in own)
    assert found.few.names == found.test.names == found.new.names
    assert found.new.counts.sum(1).tolist() == [2] * 4


def test_both_classifiers_take_equal_steps():
    few, new, test = (
        pictures(3, 3, shape=(1, 16, 16)),
        pictures(5, 5, shape=(1, 16, 16)),
        pictures(9, 9, shape=(1, 16, 16)),
    )
    before, after, gain = compared(few, new, test, Judge(2, 7))
    for figure, data in ((before, few), (after, few + new)):
        expected = [classifier_accuracy(train_classifier(data, steps=7, seed=seed), test) for seed in range(2)]
        assert figure.accuracies == tuple(expected)
    assert gain.accuracies == tuple(b - a for a, b in zip(before.accuracies, after.accuracies, strict=True))


def test_a_report_says_what_was_done(tmp_path):
    found = enlarge(POLICY, GLYPHS, tmp_path / "one", seed=3, **BRIEF)
    report = json.loads(json.dumps(found.as_dict()))
    assert report["seed"] == 3
    assert report["data"] == {"name": "glyphs"}
    assert report["settings"] == dataclasses.asdict(POLICY)
    assert [each["originals"] for each in report["classes"]] == [2] * 5
    later = enlarge(
        learned_method(tmp_path / "one" / "learned.safetensors", "policy", {"shots": 3}),
        GLYPHS,
        tmp_path / "two",
        learned=tmp_path / "one" / "learned.safetensors",
        **BRIEF,
    )
    report = later.as_dict()
    assert report["learned"]["data"] == {"name": "glyphs"}
    assert report["learned"]["seed"] == 3
    assert report["settings"]["shots"] == 3
    assert report["settings"]["transforms"] == "noise, rotation"
    assert [each["originals"] for each in report["classes"]] == [3] * 5


def test_minutes_end_the_learning_and_not_the_making(tmp_path):
    found = enlarge(dataclasses.replace(POLICY, steps=10_000), GLYPHS, tmp_path, minutes=0.001, **BRIEF)
    assert found.history.stopped_by == "minutes"
    assert found.history.training[-1].step < 10_000
    assert found.new is not None


def test_its_checkpoint_is_no_other_runs(tmp_path):
    enlarge(POLICY, GLYPHS, tmp_path, **BRIEF)
    path = tmp_path / "learned.safetensors"
    with pytest.raises(CheckpointError):
        mf.load(path)
    learner = POLICY.learner((1, 28, 28), None)
    mf.load(path, learner)
    assert torch.equal(
        learner.policy.strength_logit["noise"], checkpoint.load(path)["learner"]["policy.strength_logit.noise"]
    )


def test_a_start_near_one_draws_what_is_given(tmp_path):
    """A setting of the drawing alone serves what has learned."""
    own = Generate(**TINY, blocks=1, repeats=1)
    enlarge(own, GLYPHS, tmp_path, **BRIEF)
    path = tmp_path / "learned.safetensors"
    apart = {}
    for start in (0.0, 0.99):
        method = learned_method(path, "generate", {"start": start, "draw_steps": 4})
        found = enlarge(method, GLYPHS, tmp_path / str(start), learned=path, **BRIEF)
        pairs = [(found.few.class_samples(row), found.new.class_samples(row)) for row in range(5)]
        apart[start] = np.mean([float((a.float() - b.float()).abs().mean()) for a, b in pairs])
    assert apart[0.99] < 10 < apart[0.0]


def test_a_pool_of_the_data_itself_is_its_validation_split(tmp_path):
    method = Retrieve(**TINY, ways=3, inner_steps=2, found=1)
    found = enlarge(method, GLYPHS, tmp_path, pool=GLYPHS, **BRIEF)
    expected = mf.data.Glyphs(split="validation")
    assert len(found.learner.pool) == expected.counts.sum()


def test_retrieval_of_nothing_is_an_error_that_says_so(tmp_path):
    method = Retrieve(**TINY, ways=3, inner_steps=2, found=1)
    enlarge(method, GLYPHS, tmp_path / "one", pool=GLYPHS, **BRIEF)
    path = tmp_path / "one" / "learned.safetensors"
    state = checkpoint.load(path)
    state["learner"]["worth.bias"].fill_(-1e4)
    checkpoint.save(path, state)
    with pytest.raises(ValueError, match="augmenter must give new samples"):
        enlarge(method, GLYPHS, tmp_path / "two", pool=GLYPHS, learned=path, **BRIEF)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Policy(steps=0), ValueError, "steps must be >= 1"),
        (lambda: Policy(transforms=3), TypeError, r"transforms must be text \(got 3\)"),
        (lambda: Policy(transforms=""), ValueError, "transforms must be among"),
        (lambda: Policy(probability=2), ValueError, r"probability must be in 0..1 \(got 2\)"),
        (lambda: Hallucinate(noise=0), ValueError, "noise must be >= 1"),
        (lambda: Generate(start=1.0), ValueError, "start must be below 1"),
        (lambda: Retrieve(join="features"), ValueError, "join must be one of samples, mixed"),
        (lambda: Retrieve(mix=1.5), ValueError, "mix must be in 0..1"),
        (lambda: Distil(inner_steps=0), ValueError, "inner_steps must be >= 1"),
        (lambda: Judge(seeds=0), ValueError, "seeds must be >= 1"),
        (lambda: Judge(steps=True), TypeError, "judge_steps must be an integer"),
        (lambda: enlarge(POLICY, GLYPHS, "x", per_class=0), ValueError, "per_class must be >= 1"),
        (lambda: enlarge(Distil(), GLYPHS, "x", resume=True), ValueError, "must not be given for distill"),
        (lambda: enlarge(Retrieve(), GLYPHS, "x"), ValueError, r"pool must be given for retrieve \(got none\)"),
    ],
)
def test_bad_settings(make, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        make()
    assert not list(tmp_path.iterdir())


def test_every_method_has_its_name_and_help():
    assert list(METHODS) == ["policy", "hallucinate", "generate", "retrieve", "distill"]
    for method in METHODS.values():
        assert all(each.metadata["help"] for each in dataclasses.fields(method))
        method()


def test_pictures_are_written_beside_their_place(tmp_path, monkeypatch):
    """Into a hidden folder, which is then renamed."""
    seen = []
    real = Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda image, path, *rest: (seen.append(path), real(image, path, *rest))[1]
    )
    write_pictures(tmp_path / "out", pictures(2, 2), pictures(1, 1))
    assert len(seen) == 6
    assert all(each.parents[1].name.startswith(".out.") for each in seen)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
