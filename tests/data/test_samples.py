import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metaaug_fast.data import ClassSamples, Episodes
from metaaug_fast.errors import FileWriteError


def ragged(rng, classes=7, styles=None):
    """Images `[N, 3, 3]` in random order whose pixels are the class, the style and the number within the class."""
    labels = np.repeat(np.arange(classes), rng.integers(1, 9, classes))
    rng.shuffle(labels)
    style = rng.integers(0, styles or 1, len(labels))
    images = torch.zeros(len(labels), 3, 3, dtype=torch.uint8)
    images[:, 0, 0], images[:, 0, 1] = torch.from_numpy(labels), torch.from_numpy(style)
    images[:, 0, 2] = torch.arange(len(labels))
    return images, labels, style


@pytest.mark.parametrize("styles", [None, 3])
def test_from_arrays_groups_by_class_and_style(rng, styles):
    images, labels, style = ragged(rng, styles=styles)
    data = ClassSamples.from_arrays(images, labels, style if styles else None)
    assert len(data) == 7
    assert data.sample_shape == (1, 3, 3)
    for index in range(7):
        own = data.class_samples(index)
        assert set(own[:, 0, 0, 2].tolist()) == set(images[labels == index, 0, 2].tolist())
        assert own[:, 0, 0, 1].tolist() == sorted(style[labels == index])
        assert data.counts[index].sum() == (labels == index).sum()
    if styles:
        assert data.styles == tuple(map(str, np.unique(style)))


def test_names_are_the_labels(rng):
    data = ClassSamples.from_arrays(rng.random((6, 2)), ["b", "a", "c", "a", "b", "c"])
    assert data.names == ("a", "b", "c")
    assert data.samples.dtype == torch.float64
    assert data.sample_shape == (2,)


def test_subset_shares_the_images(rng):
    images, labels, _ = ragged(rng)
    data = ClassSamples.from_arrays(images, labels)
    part = data.subset([4, 0])
    assert part.samples.data_ptr() == data.samples.data_ptr()
    assert part.names == ("4", "0")
    assert (part.class_samples(0)[:, 0, 0, 0] == 4).all()


def test_split_is_seeded_and_disjoint(rng):
    images, labels, _ = ragged(rng, classes=30)
    data, seed = ClassSamples.from_arrays(images, labels), int(rng.integers(2**30))
    parts = data.split([20, 0, 7], seed)
    assert [len(part) for part in parts] == [20, 0, 7]
    assert len({name for part in parts for name in part.names}) == 27
    again = data.split([20, 0, 7], seed)
    assert [part.names for part in parts] == [part.names for part in again]
    assert parts[0].names != data.split([20, 0, 7], seed + 1)[0].names
    with pytest.raises(ValueError, match=r"sizes must be >= 0 and add up to at most 30 classes \(got \[20, 11\]\)"):
        data.split([20, 11])
    with pytest.raises(ValueError, match="sizes must be >= 0"):
        data.split([-1, 5])


def test_split_by_shares(rng):
    images, labels, _ = ragged(rng, classes=31)
    parts = ClassSamples.from_arrays(images, labels).split_shares({"a": 100, "b": 50, "c": 50})
    assert sum(len(part) for part in parts.values()) == 31
    assert {name: len(part) for name, part in parts.items()} in ({"a": 16, "b": 7, "c": 8}, {"a": 16, "b": 8, "c": 7})


def test_rotations_are_classes_of_their_own(rng):
    images = torch.from_numpy(rng.integers(0, 256, (40, 5, 5), dtype=np.uint8))
    part = ClassSamples.from_arrays(images, rng.permutation(np.arange(40) % 8)).subset([5, 2, 3])
    turned = part.with_rotations()
    assert len(turned) == 12
    assert len(turned.samples) == 4 * 15
    assert turned.names[:4] == ("5", "2", "3", "5 turned by 90")
    for index in range(12):
        expected = torch.from_numpy(np.rot90(part.class_samples(index % 3).numpy(), index // 3, (2, 3)).copy())
        assert torch.equal(turned.class_samples(index), expected)


def test_rotations_need_squares():
    with pytest.raises(ValueError, match="with_rotations needs square pictures"):
        ClassSamples.from_arrays(torch.zeros(4, 1, 3, 5), [0, 0, 1, 1]).with_rotations()


class Folder:
    """A torch data set of `[H, W, C]` arrays."""

    def __init__(self, images, labels, method):
        self.images, self.labels = images, labels
        if method:
            self.get_labels = lambda: labels
        else:
            self.targets = torch.as_tensor(labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


@pytest.mark.parametrize("method", [True, False])
def test_from_dataset(rng, method):
    images, labels = rng.integers(0, 256, (10, 4, 5, 3), dtype=np.uint8), rng.permutation(np.arange(10) % 3).tolist()
    data = ClassSamples.from_dataset(Folder(images, labels, method))
    assert data.sample_shape == (3, 4, 5)
    expected = images[np.asarray(labels) == 1].transpose(0, 3, 1, 2)
    assert (data.class_samples(1).numpy() == expected).all()


def test_from_dataset_of_tensors_and_pictures(rng):
    from PIL import Image

    grey = rng.integers(0, 256, (4, 6, 6), dtype=np.uint8)
    for items in (torch.from_numpy(grey), [Image.fromarray(image) for image in grey]):
        data = ClassSamples.from_dataset(Folder(items, [0, 0, 1, 1], True))
        assert (data.samples[:, 0].numpy() == grey).all()


def test_from_dataset_with_labels_as_svhn_has_them(rng):
    images, labels = rng.random((9, 2, 3)).astype(np.float32), rng.permutation(np.arange(9) % 3)

    class Labelled(list):
        pass

    dataset = Labelled(zip(images, labels, strict=True))
    dataset.labels = labels
    data = ClassSamples.from_dataset(dataset)
    assert data.names == ("0", "1", "2")
    assert (data.class_samples(2).numpy() == images[labels == 2]).all()


class Columns:
    """A data set as those of Hugging Face: columns by their names, rows as mappings by their numbers."""

    def __init__(self, columns, names=None):
        self.columns = columns
        self.features = {name: SimpleNamespace(names=names if name == "label" else None) for name in columns}

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}


@pytest.mark.parametrize("column", ["image", "img", "text", "tokens"])
@pytest.mark.parametrize("names", [None, ["zebra", "ant", "cat"]])
def test_from_dataset_with_columns(rng, column, names):
    samples, labels = rng.integers(0, 99, (10, 4)), rng.permutation(np.arange(10) % 3).tolist()
    columns = {"id": list(range(10)), column: samples.tolist(), "label": labels}
    data = ClassSamples.from_dataset(Columns(columns, names), **({"sample": column} if column == "tokens" else {}))
    assert data.samples.dtype == torch.int64
    assert data.names == (tuple(sorted(names)) if names else ("0", "1", "2"))
    of_class = names.index(data.names[0]) if names else 0
    assert (data.class_samples(0).numpy() == samples[np.asarray(labels) == of_class]).all()


def test_from_dataset_with_pictures_and_a_column_of_another_name(rng):
    from PIL import Image

    pixels = rng.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    columns = {"image": [*map(Image.fromarray, pixels)], "fine": [*"abcabc"], "label": [0] * 6}
    data = ClassSamples.from_dataset(Columns(columns), label="fine")
    assert data.names == ("a", "b", "c")
    assert (data.class_samples(1).numpy() == pixels[[1, 4]].transpose(0, 3, 1, 2)).all()


def test_datasets_without_the_columns(rng):
    columns = {"id": [0, 1], "picture": rng.random((2, 3)), "label": [0, 1]}
    with pytest.raises(ValueError, match=r"sample must be one of the columns id, picture, label \(got None\)"):
        ClassSamples.from_dataset(Columns(columns))
    with pytest.raises(ValueError, match=r"sample must be one of the columns id, picture, label \(got 'pixels'\)"):
        ClassSamples.from_dataset(Columns(columns), "pixels")
    with pytest.raises(ValueError, match=r"label must be one of the columns id, picture, label \(got 'kind'\)"):
        ClassSamples.from_dataset(Columns(columns), "picture", "kind")
    with pytest.raises(ValueError, match=r"labels must be 0 to 1, for which there are names \(got -1\)"):
        ClassSamples.from_dataset(Columns(columns | {"label": [0, -1]}, ["a", "b"]), "picture")
    with pytest.raises(TypeError, match=r"samples must be numbers \(got str 'hello'\); data.Text reads sentences"):
        ClassSamples.from_dataset(Columns({"text": ["hello", "bye"], "label": [0, 1]}))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, None, 1], r"\(got None at 2; 1 of 4\)"),
        (["a", float("nan"), "b", None], r"\(got nan at 1; 2 of 4\)"),
        (np.array([0, 1, 1, np.nan], dtype=np.float32), r"\(got nan at 3; 1 of 4\)"),
        (torch.tensor([0, np.nan, 1, 1]), r"\(got nan at 1; 1 of 4\)"),
        (np.array(["a", "b", None, "a"], dtype=object), r"\(got None at 2; 1 of 4\)"),
        ([np.float32("nan"), 1.0, 2.0, 1.0], r"\(got nan at 0; 1 of 4\)"),
    ],
)
def test_labels_that_are_missing(labels, message):
    with pytest.raises(ValueError, match=f"labels must not be missing {message}"):
        ClassSamples.from_arrays(torch.zeros(4, 2), labels)
    with pytest.raises(ValueError, match=f"styles must not be missing {message}"):
        ClassSamples.from_arrays(torch.zeros(4, 2), [0, 1, 0, 1], labels)
    with pytest.raises(ValueError, match=f"labels must not be missing {message}"):
        ClassSamples.from_dataset(Folder(np.zeros((4, 2)), labels, True))
    with pytest.raises(ValueError, match=f"labels must not be missing {message}"):
        ClassSamples.from_table({"x": [1, 2, 3, 4], "label": labels})


def test_labels_of_two_kinds():
    with pytest.raises(ValueError, match=r"labels must be all text or all numbers \(got 1 and 3\)"):
        ClassSamples.from_arrays(torch.zeros(4, 2), [0, "1", 1, 1])


class Changing(list):
    """A data set that loses its last item, or gets another one, when the second is read."""

    targets = (0, 1, 0, 1)
    change = staticmethod(list.pop)

    def __getitem__(self, index):
        if index == 1:
            self.change(self)
        return super().__getitem__(index)


def test_a_data_set_that_changes_while_it_is_read():
    items = [(torch.zeros(2), 0)] * 4
    with pytest.raises(ValueError, match=r"must keep its length while it is read \(got 4, and nothing at 3\)"):
        ClassSamples.from_dataset(Changing(items))
    growing = Changing(items)
    growing.change = lambda dataset: dataset.append(items[0])
    with pytest.raises(ValueError, match=r"must keep its length while it is read \(got 4, and 5 at the end\)"):
        ClassSamples.from_dataset(growing)
    with pytest.raises(ValueError, match=r"a label for each of one sample or more \(got 4 labels and 3 samples\)"):
        ClassSamples.from_dataset(Changing(items[1:]))


def test_data_sets_that_are_no_samples():
    with pytest.raises(ValueError, match=r"one sample or more \(got 0 labels\)"):
        ClassSamples.from_dataset(Folder([], [], True))
    images = [torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4, 3)]
    with pytest.raises(ValueError, match=r"one shape and dtype \(got \(3, 4\) float32 at 0 and \(4, 3\) float32 at 2"):
        ClassSamples.from_dataset(Folder(images, [0, 1, 0], True))


def test_from_dataset_into_a_file(rng, tmp_path):
    images, labels = rng.integers(0, 256, (30, 4, 5, 3), dtype=np.uint8), rng.permutation(np.arange(30) % 3).tolist()
    dataset, file = Folder(images, labels, True), tmp_path / "below" / "pictures.npy"
    data, expected = ClassSamples.from_dataset(dataset, file=file), ClassSamples.from_dataset(dataset)
    assert same_samples(data, expected)
    assert np.load(file).shape == (30, 3, 4, 5)
    state = file.stat()
    assert same_samples(ClassSamples.from_dataset(dataset, file=file), expected)
    assert file.stat() == state
    images[-1] ^= 1
    with pytest.raises(
        ValueError, match=r"file must be a new one, or hold the samples of this data set \(got .*npy with"
    ):
        ClassSamples.from_dataset(dataset, file=file)
    with pytest.raises(ValueError, match="one shape and dtype"):
        ClassSamples.from_dataset(Folder([*images, images[0, 1:]], [*labels, 0], True), file=tmp_path / "other.npy")
    assert not (tmp_path / "other.npy").exists()
    (tmp_path / "block").write_text("in the way")
    with pytest.raises(FileWriteError, match=r"block/pictures.npy cannot be written \("):
        ClassSamples.from_dataset(dataset, file=tmp_path / "block" / "pictures.npy")


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "int64"])
def test_samples_in_a_file_are_those_in_memory(rng, tmp_path, dtype):
    """In the order of the file, whatever that is, with styles, in parts, turned, and in another process."""
    samples = rng.integers(0, 256, (60, 5, 5) if dtype == "uint8" else (60, 1, 5, 5)).astype(dtype)
    labels, styles = rng.permutation(np.arange(60) % 5), rng.integers(0, 2, 60)
    np.save(tmp_path / "s.npy", samples)
    mapped, held = (ClassSamples.from_arrays(each, labels, styles) for each in (tmp_path / "s.npy", samples))
    pairs = [(mapped, held), *zip(mapped.split([2, 3], 1), held.split([2, 3], 1), strict=True)]
    pairs += [(mapped.with_rotations(), held.with_rotations()), (mapped.to("cpu"), held)]
    pairs += [
        (pickle.loads(pickle.dumps(mapped)), held),
        (pickle.loads(pickle.dumps(mapped.split([3])[0])), held.split([3])[0]),
    ]
    for left, right in pairs:
        assert same_samples(left, right)
        batches = [Episodes(each, ways=2, shots=2, queries=2, tasks=4, seed=3).batch(1) for each in (left, right)]
        assert batches[0] == batches[1]
    assert len(pickle.dumps(mapped)) < 5000


def same_samples(left, right):
    same = all(left.class_samples(index).equal(right.class_samples(index)) for index in range(len(right)))
    return same and left.names == right.names and (left.counts == right.counts).all()


def test_files_that_hold_no_samples(rng, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a file of NumPy's .npy format \(there is none at .*none.npy\)"):
        ClassSamples.from_arrays(tmp_path / "none.npy", [0, 1])
    np.save(tmp_path / "whole.npy", rng.random((40, 3)))
    (tmp_path / "half.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-8])
    np.savez(tmp_path / "several.npz", a=rng.random(3))
    np.save(tmp_path / "objects.npy", np.array([{}, 1]), allow_pickle=True)
    np.save(tmp_path / "other.npy", np.zeros((2, 3), ">f4"))
    (tmp_path / "text.npy").write_text("x")
    for name in ("half.npy", "several.npz", "objects.npy", "other.npy", "text.npy"):
        with pytest.raises(ValueError, match=rf"{name} is no whole array in NumPy's .npy format"):
            ClassSamples.from_arrays(tmp_path / name, [0, 1])
    with pytest.raises(ValueError, match=r"labels must have one entry for each of 40 samples \(got \(2,\)\)"):
        ClassSamples.from_arrays(tmp_path / "whole.npy", [0, 1])
    np.save(tmp_path / "short.npy", np.zeros((2, 3), np.int16))
    with pytest.raises(ValueError, match=r"samples must be uint8, float32, float64 or int64 \(got torch.int16\)"):
        ClassSamples.from_arrays(tmp_path / "short.npy", [0, 1])
    data = ClassSamples.from_arrays(tmp_path / "whole.npy", [0, 1] * 20)
    (tmp_path / "whole.npy").rename(tmp_path / "moved.npy")
    with pytest.raises(FileNotFoundError, match=r"whole\.npy"):
        pickle.loads(pickle.dumps(data))


def table(rng, rows=12):
    """Columns of several types, and species."""
    species = rng.permutation([*"abc"] * (rows // 3)).tolist()
    return {
        "width": rng.random(rows),
        "species": species,
        "count": rng.integers(0, 9, rows),
        "grown": rng.random(rows) < 0.5,
        "height": rng.random(rows).astype(np.float32),
    }


def check_table(frame, columns):
    data = ClassSamples.from_table(frame, label="species")
    assert data.names == ("a", "b", "c")
    assert data.samples.dtype == torch.float32
    features = np.stack([columns[name] for name in ("width", "count", "grown", "height")], 1).astype(np.float32)
    for index, name in enumerate("abc"):
        assert (data.class_samples(index).numpy() == features[np.array(columns["species"]) == name]).all()


def test_from_table(rng):
    columns = table(rng)
    check_table(columns, columns)


def test_from_a_data_frame(rng):
    pandas = pytest.importorskip("pandas")
    columns = table(rng)
    frame = pandas.DataFrame(columns).sample(frac=1)
    check_table(frame, {name: frame[name].to_numpy() for name in columns})


def test_tables_that_are_none(rng):
    columns = table(rng)
    with pytest.raises(ValueError, match=r"columns width, species, count, grown, height \(got 'label'\)"):
        ClassSamples.from_table(columns)
    with pytest.raises(ValueError, match=r"frame must have a column besides 'species' \(got none\)"):
        ClassSamples.from_table({"species": [*"ab"]}, "species")
    with pytest.raises(ValueError, match=r"frame must have rows \(got none\)"):
        ClassSamples.from_table({"species": [], "x": []}, "species")
    place, day = [*"xyz"] * 4, np.arange(12).astype("datetime64[D]")
    with pytest.raises(ValueError, match=r"features must be numbers \(got columns 'place', 'day' of other things\)"):
        ClassSamples.from_table(columns | {"place": place, "day": day}, "species")
    with pytest.raises(ValueError, match=r"one length \(got \(12,\) for 'species', \(11,\) for 'x'\)"):
        ClassSamples.from_table(columns | {"x": np.zeros(11)}, "species")
    for value in (np.nan, np.inf, 1e300):
        columns["width"][rng.integers(12)] = value
        with pytest.raises(ValueError, match=r"must be finite numbers of float32 \(got columns 'width' with others\)"):
            ClassSamples.from_table(columns, "species")


def test_errors(rng):
    with pytest.raises(
        TypeError, match=r"dataset must have sampler\(spec\), get_labels\(\), targets, labels, .*got list\)"
    ):
        ClassSamples.from_dataset([])
    with pytest.raises(ValueError, match="labels must have one entry for each of 4 samples"):
        ClassSamples.from_arrays(torch.zeros(4, 2), [0, 1])
    with pytest.raises(ValueError, match="styles must have one entry for each of 4 samples"):
        ClassSamples.from_arrays(torch.zeros(4, 2), [0, 1, 0, 1], styles=[1])
    with pytest.raises(ValueError, match=r"samples must be uint8, float32, float64 or int64 \(got torch.int32\)"):
        ClassSamples.from_arrays(torch.zeros(4, 2, dtype=torch.int32), [0, 1, 0, 1])
    with pytest.raises(ValueError, match="stay within the 4 samples"):
        ClassSamples(torch.zeros(4, 2), [0, 2], [[2], [3]], ["a", "b"])
    with pytest.raises(ValueError, match="a column for each of 1 styles"):
        ClassSamples(torch.zeros(4, 2), [0, 2], [[2, 0], [1, 1]], ["a", "b"])
