"""Sentences of a csv file, from the command line: trained, judged on other files, and what other ids are."""

import csv
import json
import random

import pytest
import torch
import yaml

from metaaug_fast import CheckpointError, load
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


def test_other_ids_are_refused(capsys):
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


TOKENIZER = """
import zlib
def tokenize(texts):
    return {"input_ids": [[1 + zlib.crc32(word.encode()) % 99 for word in text.split()] for text in texts]}
number = 3
"""


def test_a_tokenizer_goes_by_its_name(own_code, capsys):
    own_code("my_words", TOKENIZER)
    own_code("their_words", TOKENIZER)
    tokenizer = ["--tokenizer", "my_words:tokenize", "--data.vocabulary", "100"]
    assert main([*TRAIN, *tokenizer, "--out", "c.safetensors"]) == 0
    config = checkpoint.load("c.safetensors")["config"]
    assert config["data"]["tokenizer"] == "my_words:tokenize"
    with open("run.yaml", "w") as file:
        yaml.safe_dump(config, file)
    assert main(["train", "--config", "run.yaml", "--out", "d.safetensors", "--quiet"]) == 0
    loaded = [load(path, allow=["my_words"]).state_dict() for path in ("c.safetensors", "d.safetensors")]
    assert all(torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])

    again = ["evaluate", "c.safetensors", "--root", "other.csv", "--episodes", "20"]
    assert "data.tokenizer my_words:tokenize is code outside this package" in failed(capsys, *again)
    assert main([*again, "--allow", "my_words"]) == 0
    wanted = "data.tokenizer must be what the learner was trained with, my_words:tokenize (got their_words:tokenize)"
    assert wanted in failed(capsys, *again, "--allow", "my_words", "--tokenizer", "their_words:tokenize")
    with pytest.raises(CheckpointError, match=r"data\.tokenizer my_words:tokenize is code outside this package"):
        load("c.safetensors")
    resumed = ["train", "--resume", "c.safetensors", "--steps", "4", "--quiet"]
    assert "data.tokenizer my_words:tokenize is code outside this package" in failed(capsys, *resumed)
    assert main([*resumed, "--allow", "my_words"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_words:number", "data.tokenizer must name what can be called (got 'my_words:number', int)"),
        ("my_words:absent", "data.tokenizer 'my_words:absent' cannot be imported (AttributeError: "),
        ("nowhere:tokenize", "data.tokenizer 'nowhere:tokenize' cannot be imported (ModuleNotFoundError: "),
        (
            "letters",
            'tokenizer must be "words", "wordpiece" or a function from sentences to lists of ids (got \'letters\')',
        ),
    ],
)
def test_functions_that_are_none(own_code, capsys, name, message):
    own_code("my_words", TOKENIZER)
    assert message in failed(capsys, *TRAIN, "--tokenizer", name)
