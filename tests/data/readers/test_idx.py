import gzip
import struct
import warnings

import numpy as np
import pytest
import torch

from metaaug_fast.data import FashionMnist, Idx, Kmnist, Mnist
from metaaug_fast.data.readers import idx as reader

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


def idx(values):
    """An array of bytes in MNIST's format."""
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def labels_of(name):
    return name.replace("images-idx3", "labels-idx1")


@pytest.fixture
def digits(rng):
    """Pictures and labels of two pairs of files; every class in both."""
    classes = np.repeat(np.arange(10), 5), np.repeat(np.arange(10), 2)
    return {
        name: (rng.integers(0, 256, (len(labels), 5, 7), dtype=np.uint8), rng.permutation(labels).astype(np.uint8))
        for name, labels in zip((TRAIN, TEST), classes, strict=True)
    }


@pytest.fixture
def root(digits, tmp_path):
    write(tmp_path, digits)
    return tmp_path


def write(root, digits, packed=False, prefix=""):
    for name, (images, labels) in digits.items():
        for each, values in ((name, images), (labels_of(name), labels)):
            content = gzip.compress(idx(values)) if packed else idx(values)
            (root / f"{prefix}{each}{'.gz' if packed else ''}").write_bytes(content)


def test_all_pictures_are_joined_by_class(root, digits):
    data = Idx(root, "all")
    assert data.names == tuple("0123456789")
    assert (data.counts == 7).all()
    assert data.sample_shape == (1, 5, 7)
    for label in range(10):
        expected = {
            images[row].tobytes() for images, labels in digits.values() for row in np.flatnonzero(labels == label)
        }
        assert {picture.numpy().tobytes() for picture in data.class_samples(label)} == expected


def test_gzipped_or_not_they_are_the_same(root, digits, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    write(packed, digits, packed=True)
    assert torch.equal(Idx(root, "all").samples, Idx(packed, "all").samples)
    write(root, digits, packed=True)  # both forms side by side count once
    assert (Idx(root, "all").counts == 7).all()


@pytest.mark.parametrize("splits", ["shuffled", "ordered"])
def test_parts_share_no_class(root, splits):
    parts = [Idx(root, split, splits) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [6, 2, 2]
    assert sum(len(part.samples) for part in parts) == len(Idx(root, "all").samples)  # nothing is held twice
    names = [name for part in parts for name in part.names]
    assert sorted(names) == list("0123456789")
    assert (names == sorted(names)) == (splits == "ordered")
    if splits == "shuffled":
        assert len({Idx(root, "test", seed=seed).names for seed in range(5)}) > 1


@pytest.mark.parametrize("prefix", ["emnist-balanced-", "kmnist_"])
def test_one_of_several_data_sets(root, digits, prefix):
    write(root, {TRAIN: digits[TRAIN]}, prefix=prefix)
    with pytest.raises(ValueError, match=rf"holds several data sets, , {prefix}; prefix=\.\.\. picks one"):
        Idx(root)
    assert (Idx(root, "all", prefix=prefix).counts == 5).all()


def test_too_few_classes_to_divide(root, digits):
    for name, (images, labels) in digits.items():
        write(root, {name: (images, labels % 5)})
    assert len(Idx(root, "all")) == 5
    with pytest.raises(ValueError, match=r"split must be all where there are fewer than 6 classes .*\(got 5\)"):
        Idx(root)


def test_bad_arguments(root):
    with pytest.raises(ValueError, match=r"split must be one of train, validation, test, all \(got 'valid'\)"):
        Idx(root, "valid")
    with pytest.raises(ValueError, match=r"splits must be one of shuffled, ordered \(got 'files'\)"):
        Idx(root, splits="files")


def test_missing_files(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/\*images-idx3-ubyte, gzipped or not, is missing"):
        Idx(tmp_path / "nowhere")
    (root / labels_of(TEST)).unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte, gzipped or not, is missing; put it beside"):
        Idx(root)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], r"promises 50 x 5 x 7 bytes, it holds 1749"),
        (lambda content: content + b"\0", r"promises 50 x 5 x 7 bytes, it holds more"),
        (lambda content: content[:11], "its header is not that of bytes in 3 dimensions"),
        (lambda content: b"", "its header is not that of bytes in 3 dimensions"),
        (lambda content: content[:2] + b"\x0d" + content[3:], "its header is not that of bytes in 3 dimensions"),
        (lambda content: content[:4] + b"\xff" * 12 + content[16:], r"4294967295 x 4294967295 x 4294967295"),
        (lambda content: content[:4] + bytes(12), r"it is empty"),
    ],
)
def test_files_that_are_not_what_they_promise(root, digits, packed, damage, message):
    content = damage((root / TRAIN).read_bytes())
    (root / TRAIN).unlink()
    (root / f"{TRAIN}{'.gz' if packed else ''}").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(
        ValueError, match=rf"train-images-idx3-ubyte.* cannot be read \(.*{message}.*\); put a good copy"
    ):
        Idx(root)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not packed"])
def test_damaged_gzip(root, digits, damage):
    content = bytearray(gzip.compress((root / TRAIN).read_bytes()))
    (root / TRAIN).unlink()
    flipped = content[:-6] + bytes([content[-6] ^ 1]) + content[-5:]  # in the checksum
    damaged = {"truncated": content[: len(content) // 2], "flipped": flipped, "not packed": b"hello" * 9}[damage]
    (root / f"{TRAIN}.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be read \(.*\); put a good copy"):
        Idx(root)


def test_pairs_that_do_not_belong_together(root, digits):
    images, labels = digits[TRAIN]
    (root / labels_of(TRAIN)).write_bytes(idx(labels[:-1]))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte has 49 labels for the 50 pictures of train-images"):
        Idx(root)
    write(root, {TRAIN: (images[:, :3], labels)})
    with pytest.raises(ValueError, match=r"holds pictures of several sizes, \[\(3, 7\), \(5, 7\)\]"):
        Idx(root)


PUBLISHED = pytest.mark.parametrize("published", [Mnist, FashionMnist, Kmnist])
SMALL = pytest.mark.filterwarnings("ignore:.*published pictures")


@SMALL
@PUBLISHED
@pytest.mark.parametrize("splits", ["shuffled", "ordered"])
def test_what_is_published_is_read_as_any_is(root, published, splits):
    for split in ("train", "validation", "test", "all"):
        data, expected = published(root, split, splits, seed=3), Idx(root, split, splits, seed=3)
        assert data.names == expected.names
        for index in range(len(data)):
            assert torch.equal(data.class_samples(index), expected.class_samples(index))


@SMALL
@PUBLISHED
def test_what_is_published_has_no_prefix(root, digits, published):
    data = published(root, "all")
    write(root, digits, prefix="emnist-balanced-")
    assert torch.equal(published(root, "all").samples, data.samples)
    for name in (TRAIN, TEST):
        (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte, gzipped or not, is missing; download=True"):
        published(root)


@PUBLISHED
def test_a_missing_half_is_named(root, published):
    with pytest.warns(UserWarning, match=rf"^{root} holds 70 of 70,000 published pictures$"):
        published(root)
    (root / TEST).rename(root / TEST.replace("t10k", "test"))
    (root / labels_of(TEST)).rename(root / labels_of(TEST).replace("t10k", "test"))
    with pytest.warns(UserWarning, match=rf"^{root} holds 70 of 70,000 published pictures$"):
        published(root)
    (root / TRAIN).unlink()
    with pytest.warns(UserWarning, match=rf"^{root} holds 20 of 70,000 .* pictures; it lacks train-images-idx3-ubyte$"):
        published(root)


def test_the_other_half_is_named_and_a_whole_set_warns_of_nothing(root, monkeypatch):
    monkeypatch.setattr(reader, "PICTURES", 70)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Mnist(root)
    (root / TEST).unlink()
    with pytest.warns(UserWarning, match=r"holds 50 of 70 published pictures; it lacks t10k-images-idx3-ubyte$"):
        Mnist(root)


@PUBLISHED
def test_arguments_of_the_published(root, published):
    with pytest.raises(ValueError, match=r"split must be one of train, validation, test, all \(got 'valid'\)"):
        published(root, "valid", download=True)
    with pytest.raises(ValueError, match=r"splits must be one of shuffled, ordered \(got 'files'\)"):
        published(root, splits="files", download=True)


def test_real_digits(real_mnist):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = Mnist(real_mnist, "all")
    assert len(data) == 10
    assert data.counts.sum() == 70_000
    images, labels = (
        gzip.decompress((real_mnist / f"train-{name}-ubyte.gz").read_bytes()) for name in ("images-idx3", "labels-idx1")
    )
    assert data.counts[labels[8], 0] == sum(
        gzip.decompress((real_mnist / f"{half}-labels-idx1-ubyte.gz").read_bytes())[8:].count(labels[8])
        for half in ("train", "t10k")
    )
    first = torch.frombuffer(bytearray(images[16 : 16 + 784]), dtype=torch.uint8).view(1, 28, 28)
    assert (data.class_samples(labels[8]) == first).flatten(1).all(1).any()
    parts = [Mnist(real_mnist, split) for split in ("train", "validation", "test")]
    assert sorted(name for part in parts for name in part.names) == list("0123456789")
