import contextlib
import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from metaaug_fast.data import ClassSamples, Episodes, Loader, Sinusoids
from metaaug_fast.tasks import TaskBatch


def coded(rng, classes, least, styles=1):
    """A data set whose samples `[2]` are their class and their number, at least `least` a class and style."""
    counts = rng.integers(least, least + 6, (classes, styles))
    labels = np.repeat(np.arange(classes), counts.sum(1))
    style = np.concatenate([np.repeat(np.arange(styles), row) for row in counts])
    samples = torch.from_numpy(np.stack([labels, np.arange(len(labels))], 1)).float()
    return ClassSamples.from_arrays(samples, labels, style if styles > 1 else None), style


def equal(left: TaskBatch, right: TaskBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(left).values(), vars(right).values(), strict=True))


def test_an_episode_is_what_it_should_be(rng):
    for _ in range(10):
        ways, shots, queries, tasks = (int(n) for n in rng.integers(1, 7, 4))
        data, _ = coded(rng, ways + int(rng.integers(0, 9)), shots + queries)
        batch = next(Episodes(data, ways, shots, queries, tasks, seed=int(rng.integers(2**40))))
        assert batch.support_x.shape == (tasks, ways * shots, 2)
        assert batch.query_x.shape == (tasks, ways * queries, 2)
        assert batch.support_y.tolist() == [np.repeat(np.arange(ways), shots).tolist()] * tasks
        assert batch.query_y.tolist() == [np.repeat(np.arange(ways), queries).tolist()] * tasks
        support = batch.support_x.view(tasks, ways, shots, 2)
        query = batch.query_x.view(tasks, ways, queries, 2)
        classes = support[:, :, :1, 0]
        assert (support[..., 0] == classes).all()
        assert (query[..., 0] == classes).all()
        for task in range(tasks):
            assert len(classes[task].unique()) == ways
            numbers = torch.cat([support[task, ..., 1], query[task, ..., 1]], 1)
            assert len(numbers.unique()) == ways * (shots + queries)


def test_classes_and_samples_are_drawn_evenly(rng):
    data = ClassSamples.from_arrays(torch.arange(48.0).view(48, 1), np.arange(48) // 6)
    batch = Episodes(data, ways=3, shots=1, queries=2, tasks=16_000, seed=int(rng.integers(2**40))).batch(0)
    for samples in (batch.support_x[:, 0], batch.query_x[:, 3]):
        counts = torch.bincount(samples.flatten().long(), minlength=48).double()
        expected = 16_000 / 48
        # Chi-square with 47 degrees of freedom: mean 47, deviation 9.7.
        assert ((counts - expected) ** 2 / expected).sum() < 47 + 7 * 9.7


def test_support_and_queries_come_from_different_styles(rng):
    for _ in range(10):
        ways, shots, queries, tasks, styles = (int(n) for n in rng.integers([1, 1, 1, 1, 2], [5, 4, 4, 9, 6]))
        data, style = coded(rng, ways + 3, max(shots, queries), styles)
        batch = next(Episodes(data, ways, shots, queries, tasks, seed=int(rng.integers(2**40)), split_styles=True))
        for task in range(tasks):
            support, query = batch.support_x[task].long().numpy(), batch.query_x[task].long().numpy()
            assert not set(style[support[:, 1]]) & set(style[query[:, 1]])
            assert (support[::shots, 0] == query[::queries, 0]).all()
            for samples, count in ((support, shots), (query, queries)):
                assert (samples[:, 0].reshape(ways, count) == samples[::count, :1]).all()
                assert len(np.unique(samples[:, 1])) == ways * count


def test_styles_are_divided_evenly_and_only_where_enough_remains(rng):
    # Class 1 lacks style 2, so that {0, 1} | {2} and its mirror cannot be asked of it.
    style = np.array([0, 0, 1, 1, 2, 2, 0, 0, 1, 1])
    data = ClassSamples.from_arrays(torch.arange(10.0).view(10, 1), [0] * 6 + [1] * 4, style)
    episodes = Episodes(data, 2, 1, 2, tasks=4000, seed=int(rng.integers(2**40)), split_styles=True)
    batch = episodes.batch(0)
    seen: dict[tuple, int] = {}
    for task in range(4000):
        of_class_1 = (batch.support_x[task, :, 0] >= 6).nonzero().item()
        key = tuple(style[batch.support_x[task, [1 - of_class_1, of_class_1], 0].long()])
        seen[key] = seen.get(key, 0) + 1
    # Divisions {0}|{1,2}, {1}|{0,2}, {0,2}|{1}, {1,2}|{0} with 1000 each; in the last two class 0 has two styles.
    assert seen.keys() == {(0, 0), (1, 1), (2, 0), (2, 1)}
    for key, share in {(0, 0): 1500, (1, 1): 1500, (2, 0): 500, (2, 1): 500}.items():
        assert abs(seen[key] - share) < 7 * share**0.5


def test_reproducible_and_resumable(rng):
    data, _ = coded(rng, 12, 6)
    seed = int(rng.integers(2**40))
    episodes = Episodes(data, seed=seed, tasks=3)
    run = list(itertools.islice(episodes, 6))
    assert all(equal(batch, Episodes(data, seed=seed, tasks=3).batch(i)) for i, batch in enumerate(run))
    assert not equal(run[0], run[1])
    assert not equal(run[0], Episodes(data, seed=seed + 1, tasks=3).batch(0))
    other = Episodes(data, seed=0, tasks=3)
    other.load_state_dict({"seed": seed, "position": 4})
    assert equal(next(other), run[4])
    assert other.state_dict() == {"seed": seed, "position": 5}
    episodes.batch(1)
    assert episodes.state_dict() == {"seed": seed, "position": 6}


def test_pictures_arrive_between_0_and_1(rng):
    images = torch.from_numpy(rng.integers(0, 256, (12, 4, 4), dtype=np.uint8))
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    data = ClassSamples.from_arrays(images, np.arange(12) // 6)
    for dtype in (torch.float32, torch.float64):
        batch = Episodes(data, ways=2, shots=3, queries=3, tasks=1, dtype=dtype).batch(0)
        got = torch.cat([batch.support_x, batch.query_x], 1)[0]
        assert got.shape == (12, 1, 4, 4)
        assert got.dtype == dtype
        expected = images[:, None].to(dtype) / 255
        assert {tuple(image.flatten().tolist()) for image in got} == {tuple(x.flatten().tolist()) for x in expected}


def test_user_s_dataset(rng):
    class Mine:
        targets = (0, 1, 0, 1, 0, 1)

        def __getitem__(self, index):
            return torch.full((1, 2, 2), float(index)), self.targets[index]

    batch = Episodes(Mine(), ways=2, shots=1, queries=2, tasks=4).batch(0)
    assert batch.query_x.shape == (4, 4, 1, 2, 2)
    parity = batch.support_x[:, :, 0, 0, 0] % 2
    assert (parity.sort(1).values == torch.tensor([0.0, 1.0])).all()


def test_tensors_are_contiguous(rng):
    data, _ = coded(rng, 6, 6)
    for dataset in (data, Sinusoids()):
        assert all(tensor.is_contiguous() for tensor in vars(next(Episodes(dataset))).values())


def test_sample_shape(rng):
    assert Episodes(Sinusoids()).sample_shape == (1,)
    assert Episodes(coded(rng, 5, 6)[0]).sample_shape == (2,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ways": 6}, ValueError, r"ways must be at most the data set's 5 classes \(got 6\)"),
        ({"ways": 0}, ValueError, r"ways must be >= 1 \(got 0\)"),
        ({"shots": 2.0}, TypeError, r"shots must be an integer \(got 2.0\)"),
        ({"queries": 0}, ValueError, r"queries must be >= 1 \(got 0\)"),
        ({"tasks": -3}, ValueError, r"tasks must be >= 1 \(got -3\)"),
        ({"tasks": True}, TypeError, r"tasks must be an integer \(got True\)"),
        ({"seed": None}, TypeError, r"seed must be an integer \(got None\)"),
        ({"dtype": torch.float16}, ValueError, r"dtype must be torch.float32 or torch.float64 \(got torch.float16\)"),
        (
            {"shots": 3, "queries": 4},
            ValueError,
            r"shots \+ queries must be at most the samples of every class "
            r"\(got 3 \+ 4; class 'd' has 4, 2 classes have too few\)",
        ),
        ({"split_styles": True}, ValueError, r"split_styles needs a data set with 2 to 12 styles \(got 0\)"),
    ],
)
def test_bad_arguments(arguments, error, message):
    labels = np.repeat(list("abcde"), [8, 7, 6, 4, 9])
    data = ClassSamples.from_arrays(torch.zeros(len(labels), 2), labels)
    with pytest.raises(error, match=message):
        Episodes(data, **{"queries": 3, **arguments})


def test_too_few_styles():
    data = ClassSamples.from_arrays(torch.zeros(8, 2), list("aaaabbbb"), list("xxyyxyyy"))
    with pytest.raises(ValueError, match=r"divided into 2 support and 2 query .*\(got class 'b' with x: 1, y: 3\)"):
        Episodes(data, ways=2, shots=2, queries=2, split_styles=True)
    Episodes(data, ways=2, shots=1, queries=2, split_styles=True)


def test_bad_positions(rng):
    episodes = Episodes(Sinusoids())
    with pytest.raises(ValueError, match=r"index must be >= 0 \(got -1\)"):
        episodes.batch(-1)
    with pytest.raises(ValueError, match=r"position must be >= 0 \(got -2\)"):
        episodes.load_state_dict({"seed": 0, "position": -2})
    with pytest.raises(TypeError, match="dataset must have sampler"):
        Episodes(object())


def test_pickled_episodes_go_on():
    episodes = Episodes(Sinusoids(), shots=3, queries=2, tasks=4, seed=5)
    next(episodes)
    other = pickle.loads(pickle.dumps(episodes))
    assert other.state_dict() == episodes.state_dict()
    assert next(other) == next(episodes)
    assert copy.deepcopy(episodes).batch(7) == episodes.batch(7)


def noisy(tasks):
    return TaskBatch(tasks.support_x + torch.rand_like(tasks.support_x), *tasks.tensors[1:])


def padded(tasks):
    x = [torch.nn.functional.pad(each, (1, 0)) for each in (tasks.support_x, tasks.query_x)]
    return {"train": (x[0], tasks.support_y), "test": (x[1], tasks.query_y)}


def test_transforms_see_whole_batches():
    plain = Episodes(Sinusoids(), shots=3, queries=2, tasks=4, seed=5)
    episodes = Episodes(Sinusoids(), shots=3, queries=2, tasks=4, seed=5, transform=padded)
    assert episodes.sample_shape == (2,)
    assert next(episodes).support_x[..., 1:].equal(next(plain).support_x)
    seen = []
    Episodes(Sinusoids(), tasks=4, transform=lambda tasks: seen.append(tasks) or tasks).batch(0)
    assert [len(tasks) for tasks in seen] == [4]


def test_what_a_transform_draws_is_given_by_the_batch():
    plain, episodes = (Episodes(Sinusoids(), tasks=4, seed=5, transform=each) for each in (None, noisy))
    torch.manual_seed(0)
    first, second = episodes.batch(1), episodes.batch(2)
    after = torch.rand(3)
    noise = [drawn.support_x - plain.batch(index).support_x for index, drawn in ((1, first), (2, second))]
    assert not torch.allclose(*noise, atol=1e-3)
    assert episodes.batch(1) == first == pickle.loads(pickle.dumps(episodes)).batch(1)
    torch.manual_seed(0)
    assert torch.rand(3).equal(after)


def test_bad_transforms():
    with pytest.raises(TypeError, match=r"transform must be a function of a TaskBatch \(got 'flip'\)"):
        Episodes(Sinusoids(), transform="flip")
    with pytest.raises(TypeError, match=r"transform must return tasks \(tasks must be a TaskBatch.*got NoneType"):
        Episodes(Sinusoids(), transform=lambda tasks: None).batch(0)
    with pytest.raises(ValueError, match=r"transform must return as many tasks as it was given, 32 \(got 31\)"):
        Episodes(Sinusoids(), transform=lambda tasks: tasks[1:]).batch(0)


@pytest.mark.slow
def test_workers_draw_the_same_sequence():
    """Spawned ones, two of them, from the middle of the sequence, and resumed."""
    labels = torch.arange(60) % 12
    episodes = Episodes(ClassSamples.from_arrays(torch.rand(60, 2), labels), tasks=3, queries=2, seed=1)
    episodes.load_state_dict({"seed": 1, "position": 2})
    loader = DataLoader(episodes, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    drawn = list(itertools.islice(loader, 5))
    assert drawn == [episodes.batch(index) for index in range(2, 7)]
    assert episodes.position == 2
    changed = Episodes(episodes.dataset, tasks=3, queries=2, seed=1, transform=noisy)
    with contextlib.closing(Loader(changed, workers=2)) as stream:
        assert next(stream) == changed.batch(0)
    stream = Loader(episodes, workers=2)
    assert [next(stream) for _ in range(3)] == drawn[:3]
    resumed = Loader(Episodes(episodes.dataset, tasks=3, queries=2), workers=1)
    resumed.load_state_dict(stream.state_dict())
    assert next(resumed) == drawn[3] == next(stream)
    stream.load_state_dict({"seed": 1, "position": 6})
    assert next(stream) == drawn[4]


@pytest.mark.parametrize("shards", [1, 2, 3, 6])
def test_shards_are_the_batches_cut(shards):
    labels = torch.arange(60) % 12
    for dataset in (Sinusoids(), ClassSamples.from_arrays(torch.rand(60, 2), labels)):
        episodes = Episodes(dataset, queries=2, tasks=6, seed=3)
        next(episodes)
        for index in (0, 4):
            parts = [episodes.shard(rank, shards).batch(index) for rank in range(shards)]
            assert parts == episodes.batch(index).split(6 // shards)
        again = episodes.shard(shards - 1, shards)
        assert next(again) == episodes.batch(1).split(6 // shards)[-1]


def test_bad_shards_and_workers():
    episodes = Episodes(Sinusoids(), tasks=6)
    with pytest.raises(ValueError, match=r"shards must divide tasks, 6 \(got 4\)"):
        episodes.shard(0, 4)
    with pytest.raises(ValueError, match=r"rank must be below shards, 2 \(got 2\)"):
        episodes.shard(2, 2)
    with pytest.raises(ValueError, match=r"workers must be >= 1 \(got 0\)"):
        Loader(episodes, workers=0)
