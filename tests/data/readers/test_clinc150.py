"""CLINC150's JSON, and what is wrong in it."""

import json
import re
from collections import Counter

import pytest
import torch

from metaaug_fast.data import Clinc150, Text
from metaaug_fast.data.sentences import word_id, words
from metaaug_fast.runs import configure
from metaaug_fast.runs.build import make_sources


@pytest.fixture
def said(rng):
    """Pairs of a sentence and one of 25 labels, in random order."""
    pairs = [
        [" ".join(f"w{word}" for word in rng.integers(0, 40, rng.integers(1, 9))), f"label {label:02}"]
        for label in range(25)
        for _ in range(rng.integers(2, 6))
    ]
    rng.shuffle(pairs)
    return [list(map(str, pair)) for pair in pairs]


@pytest.fixture
def root(tmp_path, said):
    """A folder with the file."""
    nonsense = [["what is out of scope", "oos"]] * 3
    content = {"oos_val": nonsense, "train": said[:20], "oos_test": nonsense, "val": said[20:30], "test": said[30:]}
    (tmp_path / "data_full.json").write_text(json.dumps(content))
    return tmp_path


def test_it_has_all_its_parts_but_what_is_out_of_scope(root, said):
    for place in (root, root / "data_full.json"):
        data = Clinc150(place, "all", length=9)
        assert data.names == tuple(f"label {label:02}" for label in range(25))
        for index, name in enumerate(data.names):
            expected = [[word_id(word, 32768) for word in text.split()] for text, label in said if label == name]
            assert [[each for each in row if each] for row in data.class_samples(index).tolist()] == expected


def test_arguments_are_those_of_text(root, said, tmp_path, rng):
    with open(tmp_path / "x.csv", "w") as file:
        file.writelines(f"{text},{label}\n" for text, label in [("text", "label"), *said])
    given = {"length": 8, "vocabulary": int(rng.integers(2, 99)), "seed": int(rng.integers(99))}
    ones_own = {"tokenizer": lambda texts: [[len(text) % given["vocabulary"]] for text in texts]}
    for split in ("train", "validation", "test", "all"):
        for options in (given, given | ones_own):
            ours, theirs = Clinc150(root, split, **options), Text(tmp_path / "x.csv", split, **options)
            assert (ours.names, ours.vocabulary) == (theirs.names, given["vocabulary"])
            assert torch.equal(ours.samples, theirs.samples)
    with pytest.raises(ValueError, match="length must be >= 1"):
        Clinc150(root / "absent", length=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"data_full\.json is no JSON \(.*\); it must be \{\"train\": \[\[text, label\], \.\.\.\]"),
        ('{"train": [', r"is no JSON \("),
        ("\udcff", r"is no JSON \("),
        ("[" * 100_000, r"is no JSON \("),
        ("[]", r"must be .* as CLINC150 is \(got a list\)"),
        ("{}", r"must have sentences \(got none\)"),
        ('{"train": [], "oos_val": [["x", "oos"]]}', r"must have sentences \(got none\)"),
        ('{"train": {}}', r"must be .* \(got a dict in 'train'\)"),
        ('{"train": [["x", "a"], "y"]}', r"must be .* \(got y as train\[1\]\)"),
        ('{"train": [["x"]]}', r"must be .* \(got \['x'\] as train\[0\]\)"),
        ('{"train": [["x", null]]}', r"must be .* \(got \['x', None\] as train\[0\]\)"),
        ('{"val": [["x", " "]]}', r"val\[0\] of .* must have a label \(got ''\)"),
        ('{"val": [["", "a"]]}', r"val\[0\] of .* must have a sentence \(got ''\)"),
    ],
)
def test_json_that_is_none(tmp_path, content, message):
    (tmp_path / "data_full.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        Clinc150(tmp_path)


def test_words_that_are_no_utf_8(tmp_path):
    (tmp_path / "data_full.json").write_text(r'{"train": [["so \ud800 it is", "a"], ["\ud801", "b"]]}')
    first, second = Clinc150(tmp_path, "all", length=4).samples
    assert (first > 0).all()
    assert (second > 0).tolist() == [True, False, False, False]


def test_no_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"{tmp_path / 'data_full.json'} is missing; download=True fetches it")
    ):
        Clinc150(tmp_path)


def test_a_run_reads_it(root):
    content = {"learner": {"name": "protonet"}, "data": {"name": "clinc150"}, "model": {"name": "mlp"}}
    sources = make_sources(configure(content, ["--root", str(root), "--length=11"]).data)
    assert [(len(part), part.sample_shape) for part in sources.values()] == [(n, (11,)) for n in (16, 4, 5)]


def test_the_real_sentences(real_clinc150):
    parts = [Clinc150(real_clinc150, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [96, 24, 30]
    assert all((part.counts == 150).all() for part in parts)
    assert not any(name.startswith("oos") for part in parts for name in part.names)
    content = json.loads((real_clinc150 / "data_full.json").read_text())
    said = [text for part, pairs in content.items() if not part.startswith("oos") for text, _ in pairs]
    known = {word for text in said for word in words(text)}
    sharing = Counter(word_id(word, 32768) for word in known)
    assert {each for part in parts for each in part.samples.unique().tolist()} - {0} == set(sharing)
    # As the docstring says.
    shared = sum(count for count in sharing.values() if count > 1)
    assert f"{shared:,} of CLINC150's {len(known):,}" in Text.__doc__
