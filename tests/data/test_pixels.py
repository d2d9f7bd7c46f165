import numpy as np
import pytest
import torch

from metaaug_fast.data import ClassSamples, Draws, Episodes, Pixels


def pictures(channels=3, height=5, width=4, dtype=torch.uint8):
    """Of three classes, 2, 3 and 4 pictures, in another order than that of the classes."""
    labels = np.array([2, 0, 1, 2, 1, 0, 1, 2, 2])
    samples = torch.randint(0, 256, (9, channels, height, width), dtype=torch.uint8)
    return ClassSamples.from_arrays(samples if dtype == torch.uint8 else samples.to(dtype) / 100, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_a_task_is_all_pixels_of_one_picture(rng, dtype):
    """Put back at their places they are one of the pictures, and each pixel is in one of the sets."""
    data, seed = pictures(dtype=dtype), int(rng.integers(2**40))
    known = data.samples.double() / (255 if dtype == torch.uint8 else 1)
    episodes = Episodes(Pixels(data), shots=7, queries=13, tasks=200, seed=seed, dtype=torch.float64)
    tasks, seen = episodes.batch(1), torch.zeros(9)
    assert (tasks.support_x.shape, tasks.query_y.shape) == ((200, 7, 2), (200, 13, 3))
    for support_x, support_y, query_x, query_y in zip(*tasks.tensors, strict=True):
        x, y = torch.cat([support_x, query_x]), torch.cat([support_y, query_y])
        rows = ((x[:, 0] + 1) / 2 * 4).round().long()
        columns = ((x[:, 1] + 1) / 2 * 3).round().long()
        assert torch.allclose(x, torch.stack([rows / 4, columns / 3], 1).double() * 2 - 1)
        assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == 20
        picture = torch.full((3, 5, 4), -1.0, dtype=torch.float64)
        picture[:, rows, columns] = y.T
        same = torch.tensor([torch.allclose(picture, each, rtol=0, atol=1e-15) for each in known])
        assert int(same.sum()) == 1
        seen += same
    assert float(seen.min()) > 0  # of 200 / 9 each


def test_contexts_are_random_subsets(rng):
    """Every pixel is as often in the context, and so is every picture."""
    draws, seed = 4000, int(rng.integers(2**40))
    grey = ClassSamples.from_arrays(torch.arange(9.0).view(9, 1, 1, 1).expand(9, 1, 3, 2), [0, 0, 1, 1, 1, 2, 2, 2, 2])
    tasks = Episodes(Pixels(grey), shots=2, queries=1, tasks=draws, seed=seed).batch(0)
    owners = tasks.support_y[:, 0, 0].long().bincount(minlength=9)
    assert float(((owners - draws / 9) ** 2 / (draws / 9)).sum()) < 8 + 7 * 4
    places = (
        (2 * tasks.support_x[..., 0] + 2 + (tasks.support_x[..., 1] + 1) / 2).long().flatten().bincount(minlength=6)
    )
    assert len(places) == 6
    assert float(((places - draws / 3) ** 2 / (draws / 3)).sum()) < 5 + 7 * 3.2


def test_corners_are_plus_and_minus_one():
    tasks = Episodes(Pixels(pictures()), shots=1, queries=19, tasks=1).batch(0)
    x = torch.cat([tasks.support_x, tasks.query_x], 1)[0]
    for corner in ([-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]):
        assert corner in x.tolist()


def test_a_batch_depends_on_seed_and_index_alone():
    data = pictures()
    one, other = (Episodes(Pixels(data), shots=3, queries=3, tasks=4, seed=5) for _ in range(2))
    next(one)
    assert one.batch(7) == other.batch(7) != other.batch(8)
    assert one.shard(1, 2).batch(7) == other.batch(7)[2:]
    single = one.dataset.sampler(one.spec)(Draws(5, 7, 4))
    assert single == one.batch(7)


def test_what_is_no_picture_or_too_large_is_refused():
    data = ClassSamples.from_arrays(torch.zeros(4, 28, 28, dtype=torch.uint8), [0, 0, 1, 1])
    with pytest.raises(
        ValueError, match=r"shots \+ queries must be at most 784, the pixels of a picture \(got 700 \+ 85\)"
    ):
        Episodes(Pixels(data), shots=700, queries=85)
    assert Episodes(Pixels(data), shots=700, queries=84, tasks=1).batch(0).query_y.shape == (1, 84, 1)
    with pytest.raises(ValueError, match="split_styles must be False for Pixels"):
        Episodes(Pixels(data), split_styles=True)
    with pytest.raises(ValueError, match=r"data must hold pictures \[C, H, W\] \(got samples of shape \(3,\)\)"):
        Pixels(ClassSamples.from_arrays(torch.zeros(2, 3), [0, 1]))
    with pytest.raises(TypeError, match="dataset must have"):
        Pixels(None)
