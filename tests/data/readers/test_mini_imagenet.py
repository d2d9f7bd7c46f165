"""Small sets in the form of mini-ImageNet, and what is wrong in them: a sentence, or a warning that counts."""

import csv
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from metaaug_fast.data import Episodes, MiniImageNet
from metaaug_fast.data.readers import mini_imagenet
from metaaug_fast.runs import configure
from metaaug_fast.runs.build import make_sources

# The sets that are made here hold less than the published one.
pytestmark = pytest.mark.filterwarnings("ignore:.*published pictures")

FILES = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
CLASSES = {"train": ["n07", "n02", "n05", "n01"], "validation": ["n03", "n09"], "test": ["n08", "n04", "n06"]}
EACH = 4
PLACES = ["images/{filename}", "images/{label}/{filename}", "{label}/{filename}"]


def write(root, pixels, place=PLACES[0]):
    """A set of `{part: {(filename, label): pixels}}`, in the order of the mapping."""
    root.mkdir(parents=True, exist_ok=True)
    for part, rows in pixels.items():
        with open(root / FILES[part], "w", newline="") as file:
            csv.writer(file).writerows([("filename", "label"), *rows])
        for (filename, label), picture in rows.items():
            path = root / place.format(filename=filename, label=label)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    return root


@pytest.fixture
def pixels(rng):
    """Pictures of 12 x 12 in colour; the rows of a file are in no order."""
    found = {}
    for part, labels in CLASSES.items():
        rows = [(f"{label}{number:08}.png", label) for label in labels for number in range(EACH)]
        found[part] = {rows[at]: rng.integers(0, 256, (12, 12, 3), dtype=np.uint8) for at in rng.permutation(len(rows))}
    return found


@pytest.fixture
def root(tmp_path, pixels):
    return write(tmp_path / "root", pixels)


def read(root, split="train", **given):
    return MiniImageNet(root, split, **{"size": 12, **given})


def expected(rows, label):
    """Of a class, in the order of the file."""
    return np.stack([picture.transpose(2, 0, 1) for (_, each), picture in rows.items() if each == label])


def replace_line(path, number, line):
    """Line `number`, counted from 1, becomes `line`; what it was."""
    lines = path.read_text().splitlines()
    before, lines[number - 1] = lines[number - 1], line
    path.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    return before


@pytest.mark.parametrize("place", PLACES)
def test_every_picture_is_in_its_class_and_part(tmp_path, pixels, place):
    root = write(tmp_path, pixels, place)
    for part, rows in pixels.items():
        data = read(root, part)
        assert data.names == tuple(sorted(CLASSES[part]))
        assert (data.samples.dtype, data.samples.shape) == (torch.uint8, (EACH * len(data), 3, 12, 12))
        for index, label in enumerate(data.names):
            assert (data.class_samples(index).numpy() == expected(rows, label)).all()
    whole = read(root, "all")
    assert sorted(whole.names) == sorted(label for labels in CLASSES.values() for label in labels)
    for index, label in enumerate(whole.names):
        (rows,) = (rows for part, rows in pixels.items() if label in CLASSES[part])
        assert (whole.class_samples(index).numpy() == expected(rows, label)).all()


def test_files_in_the_folder_split(root):
    before = read(root)
    (root / "split").mkdir()
    for name in FILES.values():
        (root / name).rename(root / "split" / name)
    assert torch.equal(read(root).samples, before.samples)


@pytest.mark.parametrize(("side", "method"), [(7, "BILINEAR"), (6, "BOX"), (30, "BILINEAR"), (None, "BILINEAR")])
def test_pictures_are_brought_to_one_size(tmp_path, pixels, rng, side, method):
    rows = pixels["train"]
    grey, wide = list(rows)[:2]
    rows[grey] = rng.integers(0, 256, (12, 12), dtype=np.uint8)
    rows[wide] = rng.integers(0, 256, (12, 19, 3), dtype=np.uint8)
    root = write(tmp_path, {"train": rows})
    data = MiniImageNet(root) if side is None else MiniImageNet(root, size=side)
    side = side or 84
    assert data.sample_shape == (3, side, side)
    for filename, label in (grey, wide):
        at = [name for name, each in rows if each == label].index(filename)
        image = Image.fromarray(rows[filename, label]).convert("RGB").resize((side, side), Image.Resampling[method])
        sample = data.class_samples(data.names.index(label))[at]
        assert (sample.permute(1, 2, 0).numpy() == np.asarray(image)).all()


def test_only_the_part_that_is_asked_must_be_there(root):
    before = read(root, "test")
    for part in ("train", "validation"):
        (root / FILES[part]).unlink()
    assert torch.equal(read(root, "test").samples, before.samples)
    for split, name in (("train", "train"), ("validation", "val"), ("all", "train")):
        with pytest.raises(
            FileNotFoundError, match=rf"root.{name}\.csv is missing; root must hold train\.csv, val\.csv an"
        ):
            read(root, split)


def test_a_second_start_decodes_nothing(root, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    first = {split: read(root, split, cache_dir=cache) for split in FILES}
    monkeypatch.setattr(mini_imagenet, "decoded", lambda *_: pytest.fail("decoded again"))
    for split, data in first.items():
        assert torch.equal(read(root, split, cache_dir=cache).samples, data.samples)
    assert len(list(cache.glob("*.npy"))) == len(FILES)


@pytest.mark.parametrize("change", ["picture", "label", "size"])
def test_what_changed_is_read_again(root, rng, change):
    before = read(root)
    if change == "picture":
        picture = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / "images" / "n0200000001.png")
        assert (read(root).class_samples(1).permute(0, 2, 3, 1).numpy() == picture).all((1, 2, 3)).any()
    elif change == "label":
        path = root / "train.csv"
        path.write_text(path.read_text().replace("n0200000001.png,n02", "n0200000001.png,n01"))
        assert read(root).counts[:2, 0].tolist() == [EACH + 1, EACH - 1]
    else:
        assert read(root, size=11).sample_shape == (3, 11, 11)
    assert before.counts[:2, 0].tolist() == [EACH, EACH]


def test_fewer_than_the_published_pictures_are_counted(root):
    with pytest.warns(UserWarning, match="published") as caught:
        read(root, "all")
    assert [str(each.message) for each in caught] == [
        f"{root / name} names {EACH * len(CLASSES[part])} of {count} published pictures"
        for (part, name), count in zip(FILES.items(), ("38,400", "9,600", "12,000"), strict=True)
    ]


def test_the_published_number_warns_of_nothing(root, monkeypatch):
    monkeypatch.setattr(mini_imagenet, "PUBLISHED", {part: EACH * len(labels) for part, labels in CLASSES.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(root, "all")


@pytest.mark.parametrize("count", [1, 3])
def test_pictures_that_are_not_there(root, pixels, count):
    rows = list(pixels["train"])
    chosen = rows[5 : 5 + count]
    for filename, _ in chosen:
        (root / "images" / filename).unlink()
    with pytest.raises(
        FileNotFoundError,
        match=rf"root lacks {count} of 16 pictures, '{chosen[0][0]}' on line 7 of .*root.train\.csv the first; they",
    ):
        read(root)
    read(root, "test")


def test_a_picture_of_a_name_that_no_system_has(root):
    replace_line(root / "train.csv", 3, "x" * 5000 + ",n01")
    with pytest.raises(FileNotFoundError, match=r"root lacks 1 of 16 pictures, 'x+' on line 3 of"):
        read(root)


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "images/../../x.png", "C:x.png", "..\\x.png", "\\x.png", ".."]
)
@pytest.mark.parametrize("column", ["filename", "label"])
def test_what_leaves_the_folder(root, name, column):
    Image.new("RGB", (12, 12)).save(root.parent / "x.png")
    replace_line(root / "train.csv", 4, f"{name},n01" if column == "filename" else f"x.png,{name}")
    with pytest.raises(
        ValueError, match=rf"^line 4 of .*train\.csv must have a {column} within the folder \(got '"
    ) as caught:
        read(root)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (1, "file,label", r"line 1 of {path} must name the columns filename,label \(got 'file,label'\)"),
        (
            1,
            "filename,label,label",
            r"line 1 of {path} must name the columns filename,label \(got 'filename,label,label'\)",
        ),
        (1, "", r"line 1 of {path} must name the columns filename,label \(got ''\)"),
        (5, "x.png", r"line 5 of {path} must have 2 columns as the first \(got 1\)"),
        (5, "x.png,n01,n02", r"line 5 of {path} must have 2 columns as the first \(got 3\)"),
        (5, ",n01", r"line 5 of {path} must have a filename within the folder \(got ''\)"),
        (5, "x.png, ", r"line 5 of {path} must have a label within the folder \(got ''\)"),
        (5, "x.png,nan", r"line 5 of {path} must have a label within the folder \(got 'nan'\)"),
        (5, "x.png,new", r"line 5 of {path} must not name the only picture of its class \(got 'new'\)"),
        (5, '"x.png,n01', r"{path} cannot be read after line \d+: it must be csv in UTF-8 \(unexpected end of data\)"),
        (
            5,
            "x.png,\udcff",
            r"{path} cannot be read after line \d+: it must be csv in UTF-8 \(.*can't decode byte 0xff",
        ),
    ],
)
def test_csv_files_that_are_none(root, number, line, message):
    replace_line(root / "train.csv", number, line)
    with pytest.raises(ValueError, match=f"^{message.format(path=f'{root}.train.csv')}") as caught:
        read(root)
    assert "\n" not in str(caught.value)


def test_other_columns_in_any_order_are_read(root):
    before = read(root)
    path = root / "train.csv"
    rows = list(csv.reader(path.open()))
    path.write_bytes(
        b"\xef\xbb\xbf" + "".join(f"{label},{n}, {name}\r\n" for n, (name, label) in enumerate(rows)).encode()
    )
    replace_line(path, 1, "label,number,filename")
    assert torch.equal(read(root).samples, before.samples)


def test_a_picture_that_is_named_twice(root):
    before = replace_line(root / "train.csv", 4, "x.png,n01")
    replace_line(root / "train.csv", 4, before)
    replace_line(root / "train.csv", 9, before)
    name = before.partition(",")[0]
    with pytest.raises(
        ValueError, match=rf"line 9 of .*train\.csv must name another picture than line 4 \(got '{name}'\)"
    ):
        read(root)


@pytest.mark.parametrize("rows", ["", "n0100000000.png,n01\nn0100000001.png,n01\n"])
def test_too_few_classes(root, rows):
    (root / "train.csv").write_text(f"filename,label\n{rows}")
    got = "'n01'" if rows else "none"
    with pytest.raises(ValueError, match=rf"train\.csv must name two classes or more \(got {got}\)"):
        read(root)


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_a_class_in_two_parts(root, split):
    path = root / "test.csv"
    path.write_text(path.read_text().replace(",n06", ",n05"))
    message = r"line \d+ of .*test\.csv must name a class of no other part \(got 'n05', as line \d+ of .*train\.csv\)"
    with pytest.raises(ValueError, match=message):
        read(root, split)


@pytest.mark.parametrize("damage", ["truncated", "empty", "no picture"])
def test_a_damaged_picture(root, pixels, damage):
    filename, label = list(pixels["train"])[2]
    path = root / "images" / filename
    path.write_bytes({"truncated": path.read_bytes()[:200], "empty": b"", "no picture": b"hello"}[damage])
    where = rf"{filename}, on line 4 of .*train\.csv, cannot be read \(.+\)"
    with pytest.raises(ValueError, match=rf'{where}; replace it, or give damaged="skip"'):
        read(root)
    for _ in range(2):  # decoded, then from the cache
        with pytest.warns(UserWarning, match=rf"1 of 16 pictures are skipped; the first: .*{where}"):
            data = read(root, damaged="skip")
    assert data.counts.sum() == len(data.samples) == 15
    rest = {row: picture for row, picture in pixels["train"].items() if row[0] != filename}
    for index, name in enumerate(data.names):
        assert (data.class_samples(index).numpy() == expected(rest, name)).all()
    assert data.counts[data.names.index(label), 0] == EACH - 1


def test_a_class_needs_two_pictures_that_can_be_read(root):
    for number in range(EACH - 1):
        (root / "images" / f"n02{number:08}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"two pictures or more that can be read \(got 1 of 'n02' in .*train\.csv\)"):
        read(root, damaged="skip")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"split": "val"}, ValueError, "split must be one of train, validation, test, all"),
        ({"size": 0}, ValueError, "size must be >= 1"),
        ({"size": None}, TypeError, "size must be an integer"),
        ({"damaged": "ignore"}, ValueError, "damaged must be one of refuse, skip"),
    ],
)
def test_arguments(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        MiniImageNet(tmp_path, **given)


def test_a_run_reads_it(root):
    config = configure(
        {"learner": {"name": "protonet"}, "data": {"name": "mini_imagenet"}}, ["--root", str(root), "--data.size=14"]
    )
    sources = make_sources(config.data)
    assert [(len(part), part.sample_shape) for part in sources.values()] == [(n, (3, 14, 14)) for n in (4, 2, 3)]
    assert Episodes(sources["test"], ways=2, queries=2, tasks=3).batch(0).query_x.shape == (3, 4, 3, 14, 14)
