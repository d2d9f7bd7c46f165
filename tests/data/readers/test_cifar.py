import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from metaaug_fast.data import Cifar10, Cifar100
from metaaug_fast.data.readers import cifar

# The archives that are made here bear the official names and hold less.
pytestmark = pytest.mark.filterwarnings("ignore:.*published pictures")

READER = {10: Cifar10, 100: Cifar100}
BINARY = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}
PYTHON = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
BATCHES = {10: [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"], 100: ["train", "test"]}
FINE = sorted(name for names in cifar.cifar100_classes("cifar_fs").values() for name in names)
NAMES = {10: [f"class_{label}" for label in "jihgfedcba"], 100: FINE}


@pytest.fixture(params=[10, 100])
def classes(request):
    return request.param


@pytest.fixture
def batches(classes, rng):
    """Pictures and labels of each batch, every class twice in each."""
    return {
        name: (
            rng.integers(0, 256, (2 * classes, 3072), dtype=np.uint8),
            rng.permutation(np.tile(np.arange(classes), 2)),
        )
        for name in BATCHES[classes]
    }


def binary(classes, batches):
    """The files of the binary form."""
    files = {}
    for name, (pictures, labels) in batches.items():
        columns = [labels[:, None].astype(np.uint8), pictures]
        coarse = [np.full_like(columns[0], 7)] if classes == 100 else []
        files[f"{name}.bin"] = np.concatenate(coarse + columns, 1).tobytes()
    meta = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
    return {**files, meta: ("\n".join(NAMES[classes]) + "\n\n").encode()}


def python(classes, batches, protocol=2):
    """The files of the Python form."""
    key = b"labels" if classes == 10 else b"fine_labels"
    files = {
        name: pickle.dumps({b"data": pictures, key: labels.tolist(), b"batch_label": b"a batch"}, protocol)
        for name, (pictures, labels) in batches.items()
    }
    meta = ("batches.meta", b"label_names") if classes == 10 else ("meta", b"fine_label_names")
    return {**files, meta[0]: pickle.dumps({meta[1]: [name.encode() for name in NAMES[classes]]}, protocol)}


def unpacked(root, folder, files):
    (root / folder).mkdir(parents=True)
    for name, content in files.items():
        (root / folder / name).write_bytes(content)
    return root


def packed(root, archive, folder, files):
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / archive, "w:gz") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return root


@pytest.fixture
def root(tmp_path, classes, batches):
    return unpacked(tmp_path / "plain", BINARY[classes], binary(classes, batches))


def test_pictures_are_joined_by_class(root, classes, batches):
    data = READER[classes](root, "all")
    assert data.names == tuple(NAMES[classes])
    assert data.sample_shape == (3, 32, 32)
    for label in range(classes):
        expected = np.concatenate([pictures[labels == label] for pictures, labels in batches.values()])
        assert (data.class_samples(label).flatten(1).numpy() == expected).all()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_all_forms_give_the_same_samples(root, tmp_path, classes, batches, protocol):
    data = READER[classes](root, "all")
    stem = f"cifar-{classes}"
    forms = [
        packed(tmp_path / "a", f"{stem}-binary.tar.gz", BINARY[classes], binary(classes, batches)),
        packed(tmp_path / "b", f"{stem}-python.tar.gz", f"./{PYTHON[classes]}", python(classes, batches, protocol)),
        unpacked(tmp_path / "c", PYTHON[classes], python(classes, batches, protocol)),
    ]
    for form in forms:
        other = READER[classes](form, "all")
        assert other.names == data.names
        assert torch.equal(other.samples, data.samples)


def test_pickles_of_python_2(tmp_path, rng):
    """Opcodes as the published files have them: byte strings for keys, and the names of numpy then."""
    pictures = rng.integers(0, 256, (2, 3072), dtype=np.uint8)

    def text(content):
        return b"T" + len(content).to_bytes(4, "little") + content

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01K\x02M\x00\x0c\x86" + b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89"
        + text(pictures.tobytes())
        + b"tb"
    )
    batch = b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"](K\x06K\x03eu."
    data = Cifar10(unpacked(tmp_path, PYTHON[10], {"data_batch_1": batch}), "all")
    assert data.names == ("3", "6")
    assert (data.samples.flatten(1).numpy() == pictures[::-1]).all()


def test_without_names_classes_are_numbers(root, classes):
    for meta in ("batches.meta.txt", "fine_label_names.txt"):
        (root / BINARY[classes] / meta).unlink(missing_ok=True)
    assert READER[classes](root, "all").names == tuple(map(str, range(classes)))
    if classes == 100:
        with pytest.raises(ValueError, match=r"cifar-100-binary lacks 64 of 64 classes of splits='cifar_fs'"):
            Cifar100(root)


SIZES = {
    (10, None): [6, 2, 2],
    (100, "cifar_fs"): [64, 16, 20],
    (100, "fc100"): [60, 20, 20],
    (100, "shuffled"): [64, 16, 20],
}


@pytest.mark.parametrize(("classes", "splits"), SIZES, indirect=["classes"])
def test_parts_share_no_class(root, classes, splits):
    given = {} if splits is None else {"splits": splits}
    parts = [READER[classes](root, split, **given) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == SIZES[classes, splits]
    assert len({name for part in parts for name in part.names}) == classes
    whole = READER[classes](root, "all")
    assert sum(len(part.samples) for part in parts) == len(whole.samples)  # nothing is held twice
    for part in parts:
        for index, name in enumerate(part.names):
            assert torch.equal(part.class_samples(index), whole.class_samples(whole.names.index(name)))
    others = {READER[classes](root, "test", **given, seed=seed).names for seed in range(4)}
    assert (len(others) > 1) == (splits in (None, "shuffled"))


def test_what_is_missing_is_counted(root, classes, batches):
    name = f"{BATCHES[classes][-1]}.bin"
    (root / BINARY[classes] / name).unlink()
    pictures = 2 * classes * (len(batches) - 1)
    with pytest.warns(UserWarning, match=rf"holds {pictures} of 60,000 published pictures; it lacks {name}"):
        READER[classes](root)


def test_bad_arguments(root, classes):
    with pytest.raises(ValueError, match=r"split must be one of train, validation, test, all \(got 'valid'\)"):
        READER[classes](root, "valid")
    if classes == 100:
        with pytest.raises(ValueError, match=r"splits must be one of cifar_fs, fc100, shuffled \(got 'fs'\)"):
            Cifar100(root, splits="fs")


def test_missing_archive(tmp_path, classes):
    with pytest.raises(
        FileNotFoundError, match=rf"cifar-{classes}-binary.tar.gz is missing, .*{PYTHON[classes]}; download=True"
    ):
        READER[classes](tmp_path)


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "checksum", "no tar"])
def test_damaged_archive(tmp_path, classes, batches, damage):
    path = packed(tmp_path, "a.tar.gz", BINARY[classes], binary(classes, batches)) / "a.tar.gz"
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "empty": b"",
        "truncated": content[:middle],
        "flipped": content[:middle]
        + bytes(each ^ 0xFF for each in content[middle : middle + 50])
        + content[middle + 50 :],
        "checksum": content[:-6] + bytes([content[-6] ^ 1]) + content[-5:],
        "no tar": gzip.compress(b"hello" * 1000),
    }[damage]
    path.with_name(f"cifar-{classes}-binary.tar.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"cifar-{classes}-binary\.tar\.gz cannot be read \(.+\); put a good copy"):
        READER[classes](tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../evil"}, r"its member '\.\./evil' leaves the folder"),
        ({"name": "/etc/evil"}, r"its member '/etc/evil' leaves the folder"),
        ({"name": "{folder}/{file}", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is no plain file"),
        ({"name": "{folder}/{file}", "type": tarfile.LNKTYPE, "linkname": "x"}, "is no plain file"),
        ({"name": "{folder}/{file}", "size": 1 << 32}, "has 4294967296 bytes, more than any published file"),
        ({"name": "{folder}/{file}", "size": 1 << 20}, r"unexpected end of data|cut off"),
    ],
)
def test_members_that_no_archive_has(tmp_path, classes, change, message):
    member = tarfile.TarInfo()
    for name, value in change.items():
        value = value.format(folder=BINARY[classes], file=f"{BATCHES[classes][0]}.bin") if name == "name" else value
        setattr(member, name, value)
    (tmp_path / f"cifar-{classes}-binary.tar.gz").write_bytes(gzip.compress(member.tobuf() + bytes(1024)))
    with pytest.raises(ValueError, match=rf"cifar-{classes}-binary\.tar\.gz cannot be read \(.*({message}).*\); put"):
        READER[classes](tmp_path)


@pytest.mark.parametrize("content", [b"", bytes(3072), bytes(3073 * 3074 + 1)])
def test_files_that_are_no_records(root, classes, content):
    name = f"{BATCHES[classes][0]}.bin"
    (root / BINARY[classes] / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(it must be records of 307[34] bytes \(got"):
        READER[classes](root)


def test_labels_and_names_that_are_none(root, classes):
    name = root / BINARY[classes] / f"{BATCHES[classes][0]}.bin"
    name.write_bytes(b"\xc8" * (3073 if classes == 10 else 3074))
    with pytest.raises(ValueError, match=rf"must have {classes} classes \(got {classes} names, labels up to 200\)"):
        READER[classes](root)
    meta = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
    (root / BINARY[classes] / meta).write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=rf"must have {classes} classes \(got 2 names"):
        READER[classes](root)


class Runs:
    """Pickled, a call."""

    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["data", "labels", "beside"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_of_a_pickle_runs(tmp_path, place, protocol):
    mark = tmp_path / "ran"
    batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [3]}
    batch[place.encode()] = Runs(os.mkdir, str(mark))
    root = unpacked(tmp_path, PYTHON[10], {"data_batch_1": pickle.dumps(batch, protocol)})
    with pytest.raises(
        ValueError, match=rf"data_batch_1 cannot be read \(it names {os.mkdir.__module__}.mkdir, and only"
    ):
        Cifar10(root)
    assert not mark.exists()


@pytest.mark.parametrize("call", [(getattr, [], "append"), (eval, "1"), (np.load, "x"), (np.dtype, "O")])
def test_other_functions_are_refused(tmp_path, call):
    batch = {b"data": Runs(*call), b"labels": [3]}
    root = unpacked(tmp_path, PYTHON[10], {"data_batch_1": pickle.dumps(batch)})
    with pytest.raises(
        ValueError, match=r"data_batch_1 cannot be read \((it names .*, and only|its data must be an array)"
    ):
        Cifar10(root)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1], "it must be a dict with data and labels"),
        ({b"data": np.zeros((1, 3072), np.uint8)}, "it must be a dict with data and labels"),
        ({b"data": np.zeros((1, 3072), np.float32), b"labels": [1]}, "its data must be an array of uint8"),
        ({b"data": np.zeros((1, 3072), object), b"labels": [1]}, "its data must be an array of uint8"),
        ({b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]}, r"its data must be \[N, 3072\]"),
        ({b"data": np.zeros((2, 3072), np.uint8, order="F"), b"labels": [1, 2]}, "its data must be an array in rows"),
        ({b"data": [0] * 3072, b"labels": [1]}, "its data must be an array"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, "it has 1 labels for 2 pictures"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1.5]}, "its labels must be a list of labels"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, "its labels must be a list of labels"),
    ],
)
def test_pickles_of_something_else(tmp_path, batch, message):
    root = unpacked(tmp_path, PYTHON[10], {"data_batch_1": pickle.dumps(batch)})
    with pytest.raises(ValueError, match=rf"data_batch_1 cannot be read \({message}.*\); put a good copy"):
        Cifar10(root)


def test_damaged_pickles(tmp_path, rng):
    good = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [3]}, 2)
    path = unpacked(tmp_path, PYTHON[10], {"data_batch_1": b""}) / PYTHON[10] / "data_batch_1"
    for _ in range(200):
        content = bytearray(good[: rng.integers(len(good))])
        for at in rng.integers(0, max(len(content), 1), 3) if content else ():
            content[min(at, len(content) - 1)] = rng.integers(256)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"data_batch_1 cannot be read"):
            Cifar10(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # put into place 2**31 - 1 of the memo
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"short.",  # a byte array of 2**40 bytes
        b"\x80\x05\x8e" + (1 << 40).to_bytes(8, "little") + b"short.",  # bytes
        b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b"N.",  # a frame
        b"\x80\x02\x82\x01.",  # an extension
    ],
)
def test_pickles_that_ask_for_too_much(tmp_path, content):
    root = unpacked(tmp_path, PYTHON[10], {"data_batch_1": content})
    with pytest.raises(ValueError, match=r"data_batch_1 cannot be read \(.+\); put a good copy"):
        Cifar10(root)


@pytest.mark.parametrize("real", ["real_cifar10", "real_cifar100"])
def test_real_archives(request, real):
    root = request.getfixturevalue(real)
    classes, reader = (10, Cifar10) if real == "real_cifar10" else (100, Cifar100)
    data = reader(root, "all")
    with tarfile.open(root / f"cifar-{classes}-binary.tar.gz") as archive:
        contents = {member.name.rpartition("/")[2]: archive.extractfile(member).read() for member in archive}
    size = 3073 if classes == 10 else 3074
    first = next(content for name, content in sorted(contents.items()) if name.endswith(".bin"))
    names = contents["batches.meta.txt" if classes == 10 else "fine_label_names.txt"].decode().split()
    assert data.names == tuple(names)
    labels = b"".join(each[size - 3073 :: size] for name, each in contents.items() if name.endswith(".bin"))
    assert data.counts[:, 0].tolist() == [labels.count(label) for label in range(classes)]
    picture = torch.frombuffer(bytearray(first[size - 3072 : size]), dtype=torch.uint8).view(3, 32, 32)
    assert torch.equal(data.class_samples(first[size - 3073])[0], picture)
    parts = {split: reader(root, split) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == ([6, 2, 2] if classes == 10 else [64, 16, 20])
    assert sorted(name for part in parts.values() for name in part.names) == sorted(names)
