"""Sentences of csv files, their words, tokenizers of one's own, and what is wrong in them."""

import binascii
import csv
import json
import re
import warnings
from collections import UserDict

import numpy as np
import pytest
import torch

from metaaug_fast.data import Text
from metaaug_fast.runs import configure
from metaaug_fast.runs.build import make_sources
from tests.building import python

SPLITS = ("train", "validation", "test")


@pytest.fixture
def said(rng):
    """Pairs of a sentence and one of 25 labels, some of them with words of their own, in random order."""
    pairs = [
        (" ".join(f"w{word}" for word in rng.integers(0, 40, rng.integers(1, 9))) + f" own{label}", f"label {label:02}")
        for label in range(25)
        for _ in range(rng.integers(2, 6))
    ]
    rng.shuffle(pairs)
    return [tuple(map(str, pair)) for pair in pairs]


def write(path, rows, header=("text", "label"), encoding="utf-8"):
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def path(tmp_path, said):
    return write(tmp_path / "said.csv", said)


def ids_of(words, vocabulary=32768):
    return [1 + binascii.crc32(word.encode()) % (vocabulary - 1) for word in words]


def padded(ids, length):
    return [*ids, *[0] * (length - len(ids))]


def test_every_sentence_is_in_its_class(path, said, rng):
    vocabulary = int(rng.integers(2, 10**6))
    for data in (Text(path, "all", length=9), Text(path, "all", length=9, vocabulary=vocabulary)):
        assert data.samples.dtype == torch.int64
        assert data.sample_shape == (9,)
        assert data.names == tuple(f"label {label:02}" for label in range(25))
        for index, name in enumerate(data.names):
            expected = [padded(ids_of(text.split(), data.vocabulary), 9) for text, label in said if label == name]
            assert data.class_samples(index).tolist() == expected
    assert data.vocabulary == vocabulary
    assert data.samples.max() < vocabulary


def test_parts_are_of_other_classes_but_have_the_same_words(path, said, rng):
    seed = int(rng.integers(2**30))
    parts = {split: Text(path, split, seed=seed, length=9) for split in SPLITS}
    assert [len(part) for part in parts.values()] == [16, 4, 5]
    assert sorted(name for part in parts.values() for name in part.names) == [
        f"label {label:02}" for label in range(25)
    ]
    for part in parts.values():
        expected = [padded(ids_of(text.split()), 9) for name in part.names for text, label in said if label == name]
        assert part.samples.tolist() == expected
    assert Text(path, seed=seed + 1).names != parts["train"].names


def test_a_word_has_one_id_in_every_file_and_process(path, said, tmp_path):
    kept = [(text, label) for text, label in said if label < "label 10"]
    shorter = Text(write(tmp_path / "other.csv", kept[::-1]), "all", length=9)
    whole = Text(path, "all", length=9)
    for index in range(10):
        assert sorted(shorter.class_samples(index).tolist()) == sorted(whole.class_samples(index).tolist())
    program = f"from metaaug_fast.data import Text; print(Text({str(path)!r}, 'all', length=9).samples.tolist())"
    assert json.loads(python(program)) == whole.samples.tolist()


def test_words_and_punctuation(tmp_path):
    path = write(tmp_path / "x.csv", [('What\'s up, "Jo"?', "a"), ("jo is UP! Ärger’s up", "b")])
    said = [["what's", "up", ",", '"', "jo", '"', "?"], ["jo", "is", "up", "!", "ärger’s", "up"]]
    assert Text(path, "all", length=12).samples.tolist() == [padded(ids_of(words), 12) for words in said]


def test_long_sentences_are_cut_and_counted(path, said):
    whole = Text(path, "all", length=9)
    longer = sum(len(text.split()) > 3 for text, _ in said)
    with pytest.warns(UserWarning, match=rf"said\.csv: {longer} of {len(said)} sentences have more than 3 tokens and"):
        cut = Text(path, "all", length=3)
    assert torch.equal(cut.samples, whole.samples[:, :3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(Text(path, "all", length=20).samples[:, :9], whole.samples)


def test_columns_by_name(tmp_path, said, path):
    rows = [(label, number, text) for number, (text, label) in enumerate(said)]
    other = write(tmp_path / "other.csv", rows, ("intent", "id", "utterance"), encoding="utf-8-sig")
    data = Text(other, "all", text="utterance", label="intent")
    assert torch.equal(data.samples, Text(path, "all").samples)
    write(tmp_path / "marked.csv", rows, ("label", "id", "text"), encoding="utf-8-sig")
    assert torch.equal(Text(tmp_path / "marked.csv", "all").samples, data.samples)
    with pytest.raises(
        ValueError, match=r"text must be one of the columns of .*other\.csv, intent, id, utterance \(got"
    ):
        Text(other)
    with pytest.raises(
        ValueError, match=r"label must be one of the columns of .*, intent, id, utterance \(got 'topic'"
    ):
        Text(other, text="utterance", label="topic")
    with pytest.raises(ValueError, match="label must be another column than text"):
        Text(other, text="intent", label="intent")


def hashed(texts):
    return [[len(word) + 7 for word in text.split()] for text in texts]


@pytest.mark.parametrize(
    "form",
    [
        list,
        lambda ids: {"input_ids": ids, "attention_mask": None},
        lambda ids: UserDict(input_ids=ids),
        lambda ids: [np.array(each, dtype=np.int32) for each in ids],
        lambda ids: [torch.tensor(each) for each in ids],
        lambda ids: map_to_square(ids),
    ],
)
def test_a_tokenizer_of_ones_own(path, said, form):
    asked = []

    def tokenizer(texts):
        asked.append(texts)
        return form(hashed(texts))

    data = Text(path, "test", tokenizer, length=9)
    ((texts),) = asked
    assert type(texts) is list
    assert sorted(texts) == sorted(text for text, label in said if label in data.names)
    assert data.samples.tolist() == [padded(ids, 9) for ids in hashed(texts)]


def map_to_square(ids):
    return torch.tensor([padded(each, 9) for each in ids])


def test_a_tokenizer_has_a_vocabulary_of_its_own(path, rng):
    largest = int(rng.integers(32768, 10**6))
    given = {"tokenizer": lambda texts: [[7, largest] for _ in texts]}
    for size in (32768, largest):
        with pytest.raises(
            ValueError, match=rf"below vocabulary, {size} \(got {largest} for 'w.*'\); vocabulary=\.\.\."
        ):
            Text(path, **given, vocabulary=size)
    assert Text(path, **given, vocabulary=largest + 1).vocabulary == largest + 1


@pytest.mark.parametrize(
    ("gives", "error", "message"),
    [
        (lambda texts: None, TypeError, r"a list of ids for each sentence, .* \(got NoneType\)"),
        (lambda texts: "ids", TypeError, r"\(got str\)"),
        (lambda texts: [], ValueError, r"\(got 0 for \d+ sentences\)"),
        (lambda texts: hashed(texts)[1:], ValueError, r"\(got \d+ for \d+ sentences\)"),
        (lambda texts: {"ids": hashed(texts)}, ValueError, r"\(got a mapping with ids\)"),
        (lambda texts: [*hashed(texts)[1:], []], ValueError, r"\(got '\[\]' for '.*'\)"),
        (lambda texts: [*hashed(texts)[1:], None], ValueError, r"\(got 'None' for '.*'\)"),
        (lambda texts: [*hashed(texts)[1:], 7], ValueError, r"\(got '7' for '.*'\)"),
        (lambda texts: [*hashed(texts)[1:], [[1], [2, 3]]], ValueError, r"\(got '\[\[1\], \[2, 3\]\]' for '.*'\)"),
        (lambda texts: [text.split() for text in texts], ValueError, r"integers >= 0 \(got \['w"),
        (lambda texts: [[0.5] for _ in texts], ValueError, r"integers >= 0 \(got \[0.5\]"),
        (lambda texts: [[True] for _ in texts], ValueError, r"integers >= 0 \(got \[True\]"),
        (lambda texts: [[3, -1] for _ in texts], ValueError, r"integers >= 0 \(got \[3, -1\]"),
        (lambda texts: [[2**63] for _ in texts], ValueError, r"integers >= 0 \(got \[9223372036854775808\]"),
    ],
)
def test_tokenizers_that_give_something_else(path, gives, error, message):
    with pytest.raises(error, match=f"tokenizer must give {'.*' if message[0] != 'a' else ''}{message}"):
        Text(path, tokenizer=gives)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"must begin with a line that names its columns \(got an empty one\)"),
        ("\n\ntext,label\n", r"must begin with a line that names its columns"),
        ("text,label\n", r"x\.csv must have sentences \(got none\)"),
        ("text,label\nhi,a\n  ,b\n", r"line 3 of .*x\.csv must have a sentence \(got '  '\)"),
        ("text,label\nhi,a\nho,\n", r"line 3 of .*x\.csv must have a label \(got ''\)"),
        ("text,label\nhi,NaN\n", r"line 2 of .*x\.csv must have a label \(got 'NaN'\)"),
        ("text,label\nhi, you,a\n", r"line 2 of .* must have 2 columns as the first \(got 3\); put quotes around"),
        ("text,label\nhi\n", r"line 2 of .* must have 2 columns as the first \(got 1\)"),
        ('text,label\nhi,a\n"ho,b\n', r"x\.csv cannot be read .* it must be csv in UTF-8 \(unexpected end of data\)"),
        ("text,label\nhi,\udcff\n", r"x\.csv cannot be read .* it must be csv in UTF-8 \(.*can't decode byte 0xff"),
        ("text,text,label\nhi,hi,a\n", r"text must be one of the columns of .*, text, text, label \(got 'text'\)"),
    ],
)
def test_csv_files_that_are_none(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        Text(tmp_path / "x.csv")
    assert "\n" not in str(caught.value)


def test_blank_lines_and_quotes(tmp_path):
    (tmp_path / "x.csv").write_text('text,label\n\n"hi, ""you""",a\n\nbye,b\n"hi\nthere", b \n')
    data = Text(tmp_path / "x.csv", "all", lambda texts: [[len(text)] for text in texts])
    assert data.names == ("a", "b")
    assert data.samples[:, 0].tolist() == [len('hi, "you"'), len("bye"), len("hi\nthere")]


def test_no_file(tmp_path):
    for root in (tmp_path, tmp_path / "x.csv"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"root must be a csv file (there is none at {root})")):
            Text(root)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"split": "dev"}, ValueError, "split must be one of train, validation, test, all"),
        ({"length": 0}, ValueError, "length must be >= 1"),
        ({"vocabulary": 1}, ValueError, "vocabulary must be >= 2"),
        ({"vocabulary": 9.0}, TypeError, "vocabulary must be an integer"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        (
            {"tokenizer": "letters"},
            ValueError,
            r'tokenizer must be "words", "wordpiece" or a function from .* \(got \'letters\'\)',
        ),
        ({"tokenizer": None}, ValueError, r"tokenizer must be .* \(got None\)"),
    ],
)
def test_arguments(path, given, error, message):
    with pytest.raises(error, match=message):
        Text(path, **given)


def test_too_few_classes_to_divide(tmp_path):
    path = write(tmp_path / "x.csv", [("hi", "a"), ("bye", "b")])
    with pytest.raises(ValueError, match=r"of 2, divided 64 : 16 : 20, none is for test \(got 'test'\)"):
        Text(path, "test")


def test_a_run_reads_it(path):
    content = {"learner": {"name": "protonet"}, "data": {"name": "csv"}, "model": {"name": "mlp"}}
    sources = make_sources(configure(content, ["--root", str(path), "--length=11"]).data)
    assert [(len(part), part.sample_shape) for part in sources.values()] == [(n, (11,)) for n in (16, 4, 5)]


def test_on_a_device_it_is_the_same(path):
    data = Text(path, "all", length=9, vocabulary=77)
    moved = data.to("cpu")
    assert (type(moved), moved.vocabulary, moved.names) == (Text, 77, data.names)
    assert torch.equal(moved.samples, data.samples)
    assert data.to("meta").samples.device.type == "meta"
    assert data.samples.device.type == "cpu"
