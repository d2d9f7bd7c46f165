"""Sentences of a csv file, from the command line: trained, judged on other files, and what other ids are."""

import csv
import json
import random

import pytest

from metaaug_fast.cli.main import main
from metaaug_fast.runs import checkpoint

QUICK = ["--tasks", "2", "--episodes", "20", "--validation-episodes", "10", "--quiet"]
TRAIN = ["train", "protonet", "--data", "csv", "--root", "said.csv", "--steps", "3", "--features", "8", *QUICK]


def write(path, classes):
    """Sentences of classes that each have words of their own."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["text", "label"])
        for label in classes:
            for _ in range(12):
                out.writerow(
                    [f"please do {' '.join(f'w{label}{each}' for each in random.choices(range(4), k=3))}", label]
                )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("said.csv", range(40))
    write("other.csv", range(30, 70))


def failed(capsys, *arguments):
    """The one line that the program fails with."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_run_needs_no_more_than_the_file(capsys):
    assert main([*TRAIN, "--out", "c.safetensors"]) == 0
    config = checkpoint.load("c.safetensors")["config"]
    assert config["model"]["name"] == "deep_averaging"
    assert (config["model"]["vocabulary"], config["model"]["sample_shape"]) == (32768, [32])
    assert main(["evaluate", "c.safetensors", "--root", "other.csv", "--episodes", "20"]) == 0
    assert "new classes: accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("learner", ["maml", "reptile"])
@pytest.mark.filterwarnings("ignore::metaaug_fast.FallbackWarning")
def test_learners_with_an_inner_loop(learner):
    options = [*TRAIN[2:], "--data.vocabulary", "500", "--inner-lr", "0.1", "--inner-steps", "2"]
    assert main(["train", learner, *options, "--out", "c.safetensors"]) == 0
    assert checkpoint.load("c.safetensors")["config"]["model"]["vocabulary"] == 500


def test_other_ids_are_refused(own_code, capsys):
    own_code("mine", "def tokenize(texts):\n    return [[len(text)] for text in texts]\n")
    assert main([*TRAIN, "--data.vocabulary", "500", "--out", "c.safetensors"]) == 0
    again = ["evaluate", "c.safetensors", "--root", "other.csv"]
    assert main([*again, "--data.vocabulary", "500", "--episodes", "20"]) == 0
    wanted = "data.vocabulary must be what the learner was trained with, 500 (got 501)"
    assert wanted in failed(capsys, *again, "--data.vocabulary", "501")
    with open("data_full.json", "w") as file:
        json.dump({"train": [[f"w{label} {each}", f"{label}"] for label in range(30) for each in range(12)]}, file)
    other = ["evaluate", "c.safetensors", "--data", "clinc150", "--root", "."]
    assert "data.vocabulary must be what the learner was trained with, 500 (got 32768)" in failed(capsys, *other)
    assert main([*other, "--data.vocabulary", "500", "--episodes", "20"]) == 0


def test_a_model_has_room_for_every_id(capsys):
    wanted = "model.vocabulary must be at least that of the data, 500 (got 499)"
    assert wanted in failed(capsys, *TRAIN, "--data.vocabulary", "500", "--model.vocabulary", "499")
