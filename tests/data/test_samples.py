import numpy as np
import pytest
import torch

from metaaug_fast.data import ClassSamples


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


def test_errors(rng):
    with pytest.raises(TypeError, match=r"dataset must have sampler\(spec\), get_labels\(\) or targets \(got list\)"):
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
