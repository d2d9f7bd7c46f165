"""Labels that stay: whatever is drawn, a class has the label that its number says."""

import pickle

import pytest
import torch

from metaaug_fast.data import ClassSamples, Episodes, FixedLabels
from metaaug_fast.data.source import TaskSource

EACH = 4


def numbered(classes: int, styles: bool = False) -> ClassSamples:
    """Samples whose first feature is their class, and the second their number within it."""
    x = torch.arange(classes * EACH)
    families = [number % 2 for number in range(len(x))] if styles else None
    return ClassSamples.from_arrays(torch.stack([x // EACH, x % EACH], 1).double(), x // EACH, families)


@pytest.mark.parametrize("styles", [False, True])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("more", [0, 2])
def test_each_class_always_has_its_label(groups, styles, more):
    ways, each = 3, int(torch.randint(2, 5, ()))
    data = FixedLabels(numbered(ways * each + more, styles), groups)
    episodes = Episodes(data, ways, 2, 2, tasks=300, seed=int(torch.randint(2**30, ())), split_styles=styles)
    tasks = episodes.batch(int(torch.randint(9, ())))
    seen = set()
    for task in tasks.split(1):
        support, query = (sorted(x[0, :, 0].int().tolist()) for x in (task.support_x, task.query_x))
        assert support == query
        assert sorted(number % ways for number in support[::2]) == list(range(ways))
        drawn = torch.cat([task.support_x, task.query_x], 1)[0]
        assert len(drawn.unique(dim=0)) == len(drawn)
        seen.add(tuple(support[::2]))
        for x, y in ((task.support_x, task.support_y), (task.query_x, task.query_y)):
            assert y[0].tolist() == [int(number) % ways for number in x[0, :, 0]]
    expected = {tuple(range(g * ways, g * ways + ways)) for g in range(each)}
    assert seen == expected if groups else len(seen) > each
    assert {number for task in seen for number in task} == set(range(ways * each))


@pytest.mark.parametrize("groups", [False, True])
def test_drawn_as_by_every_sampler(groups):
    episodes = Episodes(FixedLabels(numbered(11), groups), ways=2, tasks=6, queries=2, seed=3)
    torch.manual_seed(0)
    first = episodes.batch(4)
    assert torch.rand(2).equal(torch.rand(2, generator=torch.Generator().manual_seed(0)))
    assert first == episodes.batch(4) == pickle.loads(pickle.dumps(episodes)).batch(4)
    assert first != episodes.batch(5)
    assert episodes.shard(1, 2).batch(4) == first[3:]


def test_what_a_run_asks_of_it():
    data = FixedLabels(numbered(5))
    assert isinstance(data, TaskSource)
    assert (data.sample_shape, data.default_model, data.ids, data.vocabulary) == ((2,), "conv4", False, None)
    assert data.target_shape is None


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"groups must be True or False \(got 1\)"):
        FixedLabels(numbered(5), 1)
    with pytest.raises(TypeError, match=r"dataset must have .*labels.*\(got int\)"):
        FixedLabels(3)
    with pytest.raises(ValueError, match=r"ways must be at most the data set's 5 classes \(got 6\)"):
        Episodes(FixedLabels(numbered(5)), ways=6)
    with pytest.raises(ValueError, match=r"shots \+ queries must be at most the samples of every class"):
        Episodes(FixedLabels(numbered(5)), ways=2, shots=4)
