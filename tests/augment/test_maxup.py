"""Meta-MaxUp: of each task the version with the largest loss, found again one task and one version at a time."""

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.augment import AugmentationPolicy, MaxUp, MoreShots, OnQueries, OnSupport, QuarterTurns
from metaaug_fast.data import ClassSamples, Episodes
from metaaug_fast.tasks import TaskBatch
from tests.building import assert_same

WAYS = 3


def episodes(seed: int | None = None, tasks: int = 5, **options) -> Episodes:
    generator = torch.Generator().manual_seed(0)  # the same pictures for a run and the one that goes on
    pictures = ClassSamples.from_arrays(torch.rand(48, 1, 4, 4, generator=generator), torch.arange(48) % 8)
    seed = int(torch.randint(2**30, ())) if seed is None else seed
    return Episodes(pictures, WAYS, 2, 2, tasks=tasks, seed=seed, dtype=torch.float64, **options)


def learner(*middle: nn.Module) -> mf.MAML:
    return mf.MAML(nn.Sequential(nn.Flatten(), nn.Linear(16, 5), *middle, nn.Linear(5, WAYS)).double(), inner_lr=0.2)


def mixing():
    return AugmentationPolicy(["noise", "mixup"], ways=WAYS).double().transform(batched=True)


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("make", [learner, lambda: mf.ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double())])
def test_each_task_is_its_hardest_version(make, m):
    model, versions = make(), []

    def kept(transform):
        return lambda tasks: versions.append(transform(tasks)) or versions[-1]

    pool = [kept(each) for each in (QuarterTurns(), OnSupport(lambda x, y: (x + torch.rand_like(x), y)), lambda t: t)]
    tasks = next(MaxUp(model, episodes(), pool, m))
    assert len(versions) == m
    for number in range(len(tasks)):
        losses = [float(model(each[number]).loss.detach()) for each in versions]
        assert tasks[number] == versions[max(range(m), key=losses.__getitem__)][number]
        assert float(model(tasks[number]).loss.detach()) == pytest.approx(max(losses), rel=1e-12)


def test_class_ids_become_probabilities_beside_such():
    given = []
    pool = [OnQueries(mixing()), QuarterTurns()]

    def recorded(each):
        return lambda tasks: given.append(each(tasks)) or given[-1]

    for _ in range(20):
        given.clear()
        tasks = next(MaxUp(learner(), episodes(), [recorded(each) for each in pool], m=3))
        kinds = {each.query_y.is_floating_point() for each in given}
        assert tasks.query_y.is_floating_point() == (True in kinds)
        assert not tasks.support_y.is_floating_point()
        if kinds == {True, False}:
            hard = next(each for each in given if not each.query_y.is_floating_point())
            of_it = (tasks.query_x == hard.query_x).flatten(1).all(1)
            assert tasks.query_y[of_it].equal(nn.functional.one_hot(hard.query_y, WAYS).double()[of_it])


def test_what_is_drawn_is_given_by_the_episodes():
    model, seed = learner(nn.Dropout(0.3)), int(torch.randint(2**30, ()))
    pool = [QuarterTurns(), OnSupport(mixing()), OnQueries(mixing())]
    state = torch.get_rng_state()
    one = MaxUp(model, episodes(seed), pool)
    first, second = next(one), next(one)
    assert torch.get_rng_state().equal(state)
    other, threads = MaxUp(model, episodes(seed), pool), torch.get_num_threads()
    torch.manual_seed(5)
    torch.set_num_threads(2)
    try:
        assert next(other) == first
        other.load_state_dict(one.state_dict() | {"position": 1})
        assert next(other) == second
    finally:
        torch.set_num_threads(threads)
    assert first != second
    shards = [next(MaxUp(model, episodes(seed, tasks=6).shard(rank, 2), [QuarterTurns(1.0)])) for rank in (0, 1)]
    assert [len(each) for each in shards] == [3, 3]


def test_each_batch_draws_anew():
    drawn = []
    tasks = MaxUp(learner(), episodes(), [lambda tasks: drawn.append(float(torch.rand(()))) or tasks], m=3)
    next(tasks), next(tasks)
    assert len(set(drawn)) == 6


def test_the_learner_stays_as_it_is():
    model = mf.ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4)).double())
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tasks = next(MaxUp(model, episodes(), [QuarterTurns()], 3))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(each.requires_grad for each in tasks.tensors)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    def parts(seed):
        torch.manual_seed(seed)
        model = learner(nn.Tanh(), nn.Dropout(0.2))
        return model, MaxUp(model, episodes(7), [QuarterTurns(), OnSupport(mixing()), OnQueries(mixing())], m=2)

    whole, tasks = parts(1)
    mf.train(whole, tasks, 9, progress=False)
    model, tasks = parts(1)
    mf.train(model, tasks, 4, checkpoint=tmp_path / "c", progress=False)
    model, tasks = parts(2)
    torch.manual_seed(77)
    mf.train(model, tasks, 9, resume=tmp_path / "c", progress=False)
    assert_same(whole, model)


def test_one_version_of_nothing_is_the_episodes():
    plain = episodes()
    assert next(MaxUp(learner(), episodes(plain.seed), [lambda tasks: tasks], m=1)) == plain.batch(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 0}, r"m must be >= 1 \(got 0\)"),
        ({"m": 1.5}, r"m must be an integer \(got 1.5\)"),
        ({"pool": []}, r"pool must hold at least one transform \(got none\)"),
        ({"pool": QuarterTurns()}, r"pool must be a list of functions of a TaskBatch \(got <"),
        ({"pool": [3]}, r"pool must be a list of functions of a TaskBatch \(got \[3\]\)"),
        ({"learner": 3}, r"learner must be a Learner \(got 3\)"),
        ({"episodes": []}, r"episodes must be Episodes \(got \[\]\)"),
    ],
)
def test_bad_arguments(change, message):
    given = {"learner": learner(), "episodes": episodes(), "pool": [QuarterTurns()]} | change
    with pytest.raises((TypeError, ValueError), match=message):
        MaxUp(**given)


def test_versions_must_have_the_same_shapes():
    def longer(tasks: TaskBatch) -> TaskBatch:
        return MoreShots(lambda x, y: (x, y), copies=len(given) + 1)(given.append(tasks) or tasks)

    given: list[TaskBatch] = []
    with pytest.raises(ValueError, match=r"pool must give support_x of the same shape and dtype in all versions \(got"):
        next(MaxUp(learner(), episodes(), [longer], m=2))


def test_labels_beside_probabilities_must_be_among_them():
    wrong = OnQueries(lambda x, y: (x, torch.full((*y.shape, 2), 0.5, dtype=x.dtype)))
    turns = [wrong, lambda tasks: tasks]
    with pytest.raises(
        ValueError, match=r"query_y must hold class ids below 2, for others are probabilities \(got 2\)"
    ):
        next(MaxUp(learner(), episodes(), [lambda tasks: turns.pop()(tasks)], m=2))
