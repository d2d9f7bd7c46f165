"""Task augmentation: what it did is read off samples that say where they come from, and written again one by one."""

import math
import pickle

import pytest
import torch
from torch import Tensor

import metaaug_fast as mf
from metaaug_fast.augment import (
    AugmentationPolicy,
    Compose,
    InterpolateTasks,
    MoreShots,
    OnQueries,
    OnSupport,
    QuarterTurns,
    ShuffleLabels,
)
from metaaug_fast.data import ClassSamples, Episodes, FixedLabels
from metaaug_fast.tasks import TaskBatch
from tests.exactness import randn
from tests.learners.comparing import class_tasks

SHUFFLES = pytest.mark.parametrize("across", [False, True])
BOTH = ("support", "query")


def sizes() -> dict[str, int]:
    names = ("tasks", "ways", "shots", "queries")
    return dict(zip(names, torch.randint(2, 5, (4,)).tolist(), strict=True))


def coded(**options: int) -> TaskBatch:
    """Tasks whose samples are their task, label and number within the class."""
    tasks = class_tasks(3, **options)
    for name in BOTH:
        x, y = sets_of(tasks, name)
        for task in range(len(tasks)):
            for label in y[task].unique():
                places = (y[task] == label).nonzero().flatten()
                for number, place in enumerate(places):
                    x[task, place] = torch.tensor([task, label, number])
    return tasks


def sets_of(tasks: TaskBatch, name: str) -> tuple[Tensor, Tensor]:
    return getattr(tasks, f"{name}_x"), getattr(tasks, f"{name}_y")


def codes_of(x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(each) for each in x.int().tolist()]


def by_label(task: TaskBatch, name: str) -> dict[int, list[tuple[int, ...]]]:
    """The codes of one task's samples, by the label that they have now, in their order."""
    x, y = sets_of(task, name)
    found: dict[int, list[tuple[int, ...]]] = {}
    for code, label in zip(codes_of(x[0]), y[0].tolist(), strict=True):
        found.setdefault(label, []).append(code)
    return found


# --- classes that are turned ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_pictures_of_a_class_are_turned_alike(dtype):
    tasks = class_tasks(2, 5, 5, **sizes()).to(dtype)
    before = [each.clone() for each in tasks.tensors]
    turned = QuarterTurns()(tasks)
    for task in range(len(tasks)):
        turns: dict[int, set[int]] = {}
        for name in BOTH:
            (x, y), (found, labels) = sets_of(tasks, name), sets_of(turned, name)
            assert labels.equal(y)
            assert found.dtype == dtype
            for picture, new, label in zip(x[task], found[task], y[task].tolist(), strict=True):
                (turn,) = (k for k in range(4) if torch.rot90(picture, k, (1, 2)).equal(new))
                turns.setdefault(label, set()).add(turn)
        assert all(len(each) == 1 for each in turns.values())
    assert all(map(torch.equal, before, tasks.tensors))


@pytest.mark.parametrize("p", [0, 0.3, 0.75, 1.0])
def test_a_class_is_turned_as_often_as_it_should(p):
    tasks = class_tasks(1, 2, 2, tasks=4000, ways=2, shots=1, queries=1)
    turned = QuarterTurns(p)(tasks)
    kept = [torch.rot90(tasks.support_x, k, (3, 4)).eq(turned.support_x).flatten(2).all(2) for k in range(4)]
    for share, expected in zip(torch.stack(kept).double().mean((1, 2)), [1 - p, *[p / 3] * 3], strict=True):
        assert abs(share - expected) <= 6 * math.sqrt(expected * (1 - expected) / 8000)


# --- labels and classes that are shuffled ---


@SHUFFLES
def test_support_and_query_of_a_label_stay_one_class(across):
    tasks = coded(**sizes())
    ways = int(tasks.support_y.max()) + 1
    shuffled, used = ShuffleLabels(across)(tasks), []
    for number, task in enumerate(shuffled.split(1)):
        support, query = by_label(task, "support"), by_label(task, "query")
        assert set(support) == set(query) == set(range(ways))
        before = set()
        for label in range(ways):
            (source,) = {code[:2] for code in support[label] + query[label]}
            used.append(source)
            before.add(source[1])
            assert across or source[0] == number
            for codes, name in ((support[label], "support"), (query[label], "query")):
                old = by_label(tasks[source[0]], name)[source[1]]
                assert codes == old  # the same samples, in the same order
        assert before == set(range(ways))
    assert len(set(used)) == len(used) == len(tasks) * ways
    if not across:
        assert shuffled.support_x.equal(tasks.support_x)
        assert shuffled.query_x.equal(tasks.query_x)


@SHUFFLES
def test_every_order_of_labels_is_as_likely(across):
    tasks = coded(tasks=3000, ways=3, shots=1, queries=1)
    shuffled = ShuffleLabels(across)(tasks)
    order = shuffled.support_y.argsort(1)
    before = shuffled.support_x[..., 1].gather(1, order)  # what the labels 0, 1, 2 were
    counts = (before @ torch.tensor([9.0, 3.0, 1.0]).double()).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert (counts - 500).abs().max() < 6 * math.sqrt(3000 * 5 / 36)


def test_classes_of_different_tasks_come_together():
    tasks = coded(tasks=50, ways=4, shots=1, queries=1)
    sources = ShuffleLabels(across=True)(tasks).support_x[..., 0]
    assert (sources != torch.arange(50)[:, None]).double().mean() > 0.8
    assert sum(len(each.unique()) == 4 for each in sources) > 25


def test_shuffles_undo_fixed_labels():
    """Classes that always come together, under labels that never change, no longer do."""
    ways, x = 3, torch.arange(60.0)
    data = ClassSamples.from_arrays(x[:, None], (x / 2).long())  # 30 classes of two
    seed = int(torch.randint(2**30, ()))

    def seen(transform):
        tasks = Episodes(FixedLabels(data, groups=True), ways, 1, 1, 200, seed, transform=transform).batch(0)
        classes = (tasks.support_x[..., 0] / 2).long()
        assert classes.gather(1, tasks.support_y.argsort(1)).equal(
            (tasks.query_x[..., 0] / 2).long().gather(1, tasks.query_y.argsort(1))
        )
        assert all(len(each.unique()) == ways for each in classes)
        together = (classes // ways == classes[:, :1] // ways).all(1)
        return together.double().mean(), (classes % ways == tasks.support_y).double().mean()

    assert seen(None) == (1, 1)
    together, known = seen(ShuffleLabels())
    assert together == 1
    assert known < 0.6
    together, known = seen(ShuffleLabels(across=True))
    assert together < 0.2
    assert known < 0.6


# --- tasks between tasks ---


def basis(tasks: TaskBatch) -> TaskBatch:
    """One direction for each sample of a set, so that a mixture shows of whom it is made, and how much of each."""

    def directions(y: Tensor) -> Tensor:
        return torch.eye(y.numel(), dtype=torch.float64).view(*y.shape, -1)

    longest = max(tasks.support_y.numel(), tasks.query_y.numel())
    x = [torch.nn.functional.pad(directions(y), (0, longest - y.numel())) for y in (tasks.support_y, tasks.query_y)]
    return TaskBatch(x[0], tasks.support_y, x[1], tasks.query_y)


def number_in_class(y: Tensor, place: int) -> int:
    return int((y[:place] == y[place]).sum())


def test_tasks_are_mixed_class_by_class_and_sample_by_sample():
    plain = basis(class_tasks(1, **sizes()))
    mixed = InterpolateTasks(alpha=1.5)(plain)
    for task in range(len(plain)):
        shares, others, pairs = [], set(), set()
        for name in BOTH:
            (x, y), samples = sets_of(mixed, name), sets_of(plain, name)[1].shape[1]
            assert y.equal(sets_of(plain, name)[1])
            for place in range(samples):
                parts = x[task, place].nonzero().flatten().tolist()
                own = task * samples + place
                assert own in parts
                assert float(x[task, place].sum()) == pytest.approx(1, abs=1e-12)
                if parts == [own]:  # it was paired with itself, which tells nothing of shares
                    other = own
                else:
                    (other,) = (part for part in parts if part != own)
                    shares.append(float(x[task, place, own]))
                other_task, other_place = divmod(other, samples)
                others.add(other_task)
                pairs.add((int(y[task, place]), int(y[other_task, other_place])))
                assert number_in_class(y[task], place) == number_in_class(y[other_task], other_place)
        assert len(others) == 1
        assert len({round(share, 12) for share in shares}) <= 1
        assert len(pairs) == len({one for one, _ in pairs}) == len({two for _, two in pairs})


def test_shares_are_of_the_beta_distribution():
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)), and any task of the batch is the other one."""
    count = 3000
    x = torch.arange(count).double().view(-1, 1, 1)
    first, second = torch.cat([x, x], 1), torch.tensor([0.0, 1.0]).double().view(1, 2, 1).expand(count, -1, -1)
    for alpha in (0.5, 3.0):
        # Of mixed task numbers i and j and of constants, which stay: regression, where samples pair in their order.
        mixed = InterpolateTasks(alpha)(TaskBatch(first, second, first**2, second))
        assert mixed.support_y.allclose(second)
        i = x[:, 0, 0]
        # l i + (1 - l) j = a and l i^2 + (1 - l) j^2 = b give j = (b - i a) / (a - i).
        a, b = mixed.support_x[:, 0, 0], mixed.query_x[:, 0, 0]
        moved = (a - i).abs() > 1e-3
        j = ((b - i * a) / (a - i))[moved]
        assert (j - j.round()).abs().max() < 1e-3
        assert len(j.round().unique()) > count / 2
        share = ((a[moved] - j) / (i[moved] - j)).clamp(0, 1)
        assert moved.sum() > 0.9 * count
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(share.mean() - 0.5) < 7 * math.sqrt(variance / count) + 0.5 * float((~moved).double().mean())
        assert abs(share.var() / variance - 1) < 0.3


def test_regression_targets_are_mixed_as_inputs():
    tasks = TaskBatch(randn(5, 4, 2), randn(5, 4, 1), randn(5, 3, 2), randn(5, 3, 1))
    linear = TaskBatch(tasks.support_x, 3 * tasks.support_x[..., :1], tasks.query_x, 3 * tasks.query_x[..., :1])
    mixed = InterpolateTasks()(linear)
    assert mixed.support_y.allclose(3 * mixed.support_x[..., :1])
    assert mixed.query_y.allclose(3 * mixed.query_x[..., :1])
    assert not mixed.support_x.allclose(linear.support_x)


# --- what is changed, by a function or a policy ---


def louder(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * (y[..., None] + 2), y


def test_functions_change_the_set_that_they_are_for():
    tasks = class_tasks(3, **sizes())
    for transform, changed, same in ((OnSupport(louder), *BOTH), (OnQueries(louder), "query", "support")):
        found = transform(tasks)
        assert all(map(torch.equal, sets_of(found, same), sets_of(tasks, same)))
        (x, y), (new, labels) = sets_of(tasks, changed), sets_of(found, changed)
        assert labels.equal(y)
        for task in range(len(tasks)):
            for place in range(x.shape[1]):
                assert new[task, place].equal(x[task, place] * (int(y[task, place]) + 2))


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (["noise"], "policy"), (["noise"], "transform"), (["noise"], "batched"),
        (["noise", "mixup"], "policy"), (["noise", "mixup"], "batched"),
    ],
)  # fmt: skip
def test_policies_change_it_as_by_themselves(names, form):
    tasks = class_tasks(3, **sizes())
    policy = AugmentationPolicy(names, ways=4).double()
    if form != "policy":
        policy.eval()
    change = policy if form == "policy" else policy.transform(batched=form == "batched")
    seed = int(torch.randint(2**40, ()))
    for transform, name in ((OnSupport(change), "support"), (OnQueries(change), "query")):
        torch.manual_seed(seed)
        expected = policy.augment(*sets_of(tasks, name))
        torch.manual_seed(seed)
        found = sets_of(transform(tasks), name)
        assert all(map(torch.equal, found, expected))
        assert not found[0].equal(sets_of(tasks, name)[0])


@pytest.mark.parametrize("copies", [1, 3])
def test_more_shots_are_copies_behind_the_samples(copies):
    tasks = class_tasks(3, **sizes())
    x, y = sets_of(tasks, "support")
    found = MoreShots(louder, copies)(tasks)
    assert found.support_y.equal(torch.cat([y] * (copies + 1), 1))
    assert found.support_x.equal(torch.cat([x] + [louder(x, y)[0]] * copies, 1))
    assert found.query_x.equal(tasks.query_x)


def test_each_copy_is_changed_anew_and_soft_labels_make_all_soft():
    tasks = class_tasks(3, tasks=2, ways=3)
    found = MoreShots(AugmentationPolicy(["noise"], 1.0).double(), 2)(tasks)
    original, *copies = found.support_x.split(tasks.support_x.shape[1], 1)
    assert original.equal(tasks.support_x)
    assert not copies[0].allclose(copies[1])
    mixed = MoreShots(AugmentationPolicy(["mixup"]).double())(tasks).support_y
    assert mixed.shape == (2, 12, 3)
    assert mixed[:, :6].equal(torch.nn.functional.one_hot(tasks.support_y, 3).double())


def test_transforms_follow_each_other():
    def added(tasks):
        return tasks.support_x + 1, tasks.support_y, tasks.query_x, tasks.query_y

    tasks = class_tasks(3)
    one = Compose(added, OnSupport(louder))(tasks)
    other = Compose(OnSupport(louder), added)(tasks)
    assert one.support_x.equal(louder(tasks.support_x + 1, tasks.support_y)[0])
    assert other.support_x.equal(louder(*tasks.tensors[:2])[0] + 1)


# --- as a transform of episodes ---

ALL = {
    "turns": QuarterTurns(),
    "intra": ShuffleLabels(),
    "inter": ShuffleLabels(across=True),
    "between": InterpolateTasks(),
    "support": OnSupport(AugmentationPolicy(["noise", "mixup"]).transform(batched=True)),
    "queries": OnQueries(AugmentationPolicy(["noise", "mixup"]).transform(batched=True)),
    "shots": MoreShots(AugmentationPolicy(["noise"]).transform()),
    "several": Compose(QuarterTurns(), ShuffleLabels(), InterpolateTasks()),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_what_is_drawn_is_given_by_the_episodes(name):
    pictures = ClassSamples.from_arrays(torch.rand(80, 1, 6, 6), torch.arange(80) % 16)
    seed = int(torch.randint(2**30, ()))
    episodes = Episodes(pictures, 3, 2, 3, tasks=20, seed=seed, transform=ALL[name])
    plain = Episodes(pictures, 3, 2, 3, tasks=20, seed=seed)
    state = torch.get_rng_state()
    first, second = episodes.batch(2), episodes.batch(3)
    assert torch.get_rng_state().equal(state)
    assert first != plain.batch(2)
    torch.manual_seed(1)
    default, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert episodes.batch(2) == first
        if name not in ("support", "queries", "shots"):  # a policy's parameters are of the default dtype
            torch.set_default_dtype(torch.float64)
            assert episodes.batch(2) == first
    finally:
        torch.set_default_dtype(default)
        torch.set_num_threads(threads)
    again = pickle.loads(pickle.dumps(episodes))
    again.load_state_dict({"seed": seed, "position": 2})
    assert next(again) == first
    assert next(again) == second
    changes = [not torch.equal(one, two) for one, two in zip(first.tensors, second.tensors, strict=True)]
    assert any(changes)


def test_learners_take_the_tasks():
    pictures = ClassSamples.from_arrays(torch.rand(40, 1, 6, 6), torch.arange(40) % 8)
    mixing = AugmentationPolicy(["mixup"], ways=3).transform(batched=True)
    transform = Compose(QuarterTurns(), ShuffleLabels(across=True), OnSupport(mixing), OnQueries(mixing))
    episodes = Episodes(pictures, 3, 1, 2, tasks=4, transform=transform)
    learner = mf.MAML(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3)), inner_lr=0.1)
    mf.train(learner, episodes, 3, progress=False)


def test_gradients_reach_a_policy():
    policy = AugmentationPolicy(["noise"]).double()
    OnSupport(policy)(class_tasks(3)).support_x.square().sum().backward()
    assert policy.strength_logit["noise"].grad.abs() > 0


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuarterTurns(1.5), r"p must be in 0..1 \(got 1.5\)"),
        (lambda: QuarterTurns(-0.1), r"p must be >= 0 \(got -0.1\)"),
        (lambda: QuarterTurns(math.nan), r"p must be >= 0 \(got nan\)"),
        (lambda: QuarterTurns("often"), r"p must be a number \(got 'often'\)"),
        (lambda: ShuffleLabels("inter"), r"across must be True or False \(got 'inter'\)"),
        (lambda: InterpolateTasks(0), r"alpha must be > 0 \(got 0\)"),
        (lambda: InterpolateTasks(math.inf), r"alpha must be finite \(got inf\)"),
        (lambda: OnSupport("noise"), r"change must be an AugmentationPolicy or a function of \(x, y\) \(got 'noise'\)"),
        (lambda: MoreShots(louder, 0), r"copies must be >= 1 \(got 0\)"),
        (lambda: Compose(), r"transforms must be at least one \(got none\)"),
        (lambda: Compose(louder, 3), r"transforms must be functions of a TaskBatch \(got 3\)"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def of(x: Tensor, y: list, query_y: list | None = None) -> TaskBatch:
    labels = torch.tensor(y)
    return TaskBatch(x, labels, x, labels if query_y is None else torch.tensor(query_y))


PICTURES, VECTORS = torch.rand(2, 3, 1, 4, 4), torch.rand(2, 3, 4)
GOOD, RAGGED = [[0, 1, 2]] * 2, [[0, 1, 1], [0, 1, 0]]
TARGETS = [[[0.5]] * 3] * 2


@pytest.mark.parametrize(
    ("transform", "tasks", "message"),
    [
        (QuarterTurns(), of(VECTORS, GOOD), r"support_x must be square pictures .*\(got shape \(2, 3, 4\)\)"),
        (QuarterTurns(), of(PICTURES[..., :3], GOOD), r"support_x must be square pictures .*\(2, 3, 1, 4, 3\)"),
        (QuarterTurns(), of(PICTURES, TARGETS), r"support_y must be class ids.*\(got torch.float32 \(2, 3, 1\)\)"),
        (ShuffleLabels(), of(VECTORS, GOOD, TARGETS), r"query_y must be class ids, int64 \[T, N\]"),
        (ShuffleLabels(), of(VECTORS, [[-1, 0, 1]] * 2), r"support_y must hold class ids >= 0 \(got -1\)"),
        (ShuffleLabels(True), of(VECTORS, RAGGED), r"support_y must have as many .*\(got 1 of class 0 .*\[1, 2\] in"),
        (ShuffleLabels(True), of(VECTORS, GOOD, RAGGED), r"query_y must have as many samples of each class 0..2"),
        (InterpolateTasks(), of(VECTORS, GOOD, RAGGED), r"query_y must have as many samples of each class"),
        (InterpolateTasks(), of(VECTORS, GOOD, TARGETS), r"query_y must be targets as support_y \(got torch.float32"),
        (InterpolateTasks(), of(VECTORS.long(), GOOD), r"support_x must be floating point to be mixed"),
        (OnSupport(lambda x, y: x), of(VECTORS, GOOD), r"change must return tensors \(x, y\) \(got Tensor\)"),
        (OnQueries(AugmentationPolicy(["rotation"])), of(VECTORS, GOOD), r"query_x must be pictures .* for rotation"),
        (MoreShots(lambda x, y: (x[:, 1:], y[:, 1:])), of(VECTORS, GOOD), r"change must keep the shape of x"),
    ],
)  # fmt: skip
def test_bad_tasks(transform, tasks, message):
    with pytest.raises((TypeError, ValueError), match=message):
        transform(tasks)
