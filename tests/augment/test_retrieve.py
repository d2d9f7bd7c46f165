"""Retrieval against an unroll of one task at a time; what is found, what it is worth, what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.augment import Retrieval
from metaaug_fast.augment.retrieve import JOINS
from tests.building import backends, perceptron
from tests.exactness import gradients, randn, relative_error
from tests.learners.comparing import class_tasks, descended

pytestmark = pytest.mark.usefixtures("fresh_numbers")

RAW, F, POOL, EACH, RATE, STEPS, MIX = 6, 4, 20, 3, 0.4, 2, 0.3  # F: what `perceptron` takes


def encoder():
    return nn.Sequential(nn.Linear(RAW, F), nn.Tanh()).double()


def retrieval(join="samples", backend="auto", features=True, **options):
    """One that tells worth by distance, of samples that are its encoder's features or as they are."""
    model = perceptron() if join == "features" else nn.Sequential(nn.Linear(RAW, F), nn.Tanh(), *perceptron()).double()
    maml = mf.MAML(model, inner_lr=RATE, inner_steps=STEPS, backend=backend)
    learner = Retrieval(maml, randn(POOL, RAW), encoder() if features else None, EACH, join, MIX, **options)
    with torch.no_grad():
        for value in learner.worth.parameters():
            value.uniform_(-1, 1)
    return learner


def nearest(learner, x, y):
    """Rows of the pool, classes and worths for one task, pair by pair."""
    encoded = learner.features(x), learner.features(learner.pool)
    ways = int(y.max()) + 1
    means = [encoded[0][y == label].mean(0) for label in range(ways)]
    away = [
        (one - means[label]).norm() for one, own in zip(encoded[0], y.tolist(), strict=True) for label in range(ways)
        if label != own
    ]  # fmt: skip
    scale, found = sum(away) / len(away), []
    for label in range(ways):
        order = sorted(range(POOL), key=lambda row: float((encoded[1][row] - means[label]).norm().detach()))
        for row in order[:EACH]:
            own = (encoded[1][row] - means[label]).norm()
            other = min((encoded[1][row] - means[each]).norm() for each in range(ways) if each != label)
            slopes, bias = learner.worth.weight[0], learner.worth.bias[0]
            logit = slopes[0] * own / scale + slopes[1] * (other - own) / scale + bias
            found.append((row, label, 1 / (1 + torch.exp(-logit))))
    return found


def larger(learner, x, y):
    """One task's support set with what joins it, and the weights of all."""
    samples, labels = list(learner.features(x) if learner.join == "features" else x), y.tolist()
    weights = [torch.ones(()).double()] * len(labels)
    for row, label, worth in nearest(learner, x, y):
        joining = learner.pool[row]
        if learner.join == "features":
            joining = learner.features(joining[None])[0]
        elif learner.join == "mixed":
            own = x[y == label]
            apart = (learner.features(own) - learner.features(joining[None])).norm(dim=1)
            joining = MIX * joining + (1 - MIX) * own[int(apart.argmin())]
        samples.append(joining)
        labels.append(label)
        weights.append(worth)
    return torch.stack(samples), torch.tensor(labels), torch.stack(weights)


def unrolled(learner, x, y, query_x, query_y):
    """A task's loss in plain autograd."""
    x, y, weights = larger(learner, x, y)
    query_x = learner.features(query_x) if learner.join == "features" else query_x

    def loss(logits, labels):
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
        return (weights * each).sum() / weights.sum()

    model = learner.learner.model
    start = dict(model.named_parameters())
    theta = descended(model, start, dict.fromkeys(start, RATE), x, y, STEPS, loss)
    return nn.functional.cross_entropy(functional_call(model, theta, (query_x,)), query_y)


@backends
@pytest.mark.parametrize("join", JOINS)
def test_losses_and_gradients(join, backend):
    """Of weights, of what says how much samples are worth, and of the support samples that decide what is found."""
    learner, batch = retrieval(join, backend), class_tasks(RAW)
    batch.support_x.requires_grad_()
    named = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    named["support_x"] = batch.support_x
    assert {"worth.weight", "worth.bias"} < set(named)
    out = learner(batch)
    expected = torch.stack([unrolled(learner, *task) for task in zip(*batch.tensors, strict=True)])
    assert relative_error(out.task_losses, expected) < 1e-10
    got = gradients(out.loss, named)
    for name, value in gradients(expected.mean(), named).items():
        assert relative_error(got[name], value) < 1e-8, name


def test_the_nearest_of_all_are_found():
    learner, (x, y, *_) = retrieval(), class_tasks(RAW, ways=4).tensors
    found = learner.found(x, y)
    for task in range(len(x)):
        rows, labels, worth = zip(*nearest(learner, x[task], y[task]), strict=True)
        assert found.rows[task].tolist() == list(rows)
        assert found.labels[task].tolist() == list(labels)
        assert relative_error(found.worth[task], torch.stack(worth)) < 1e-10


def test_a_pool_that_holds_the_support_samples_gives_them_back():
    x, y = randn(1, 3, RAW), torch.arange(3)[None]
    learner = Retrieval(mf.MAML(nn.Linear(RAW, 3).double()), torch.cat([randn(5, RAW) + 9, x[0]]), per_class=1)
    assert learner.found(x, y).rows.tolist() == [[5, 6, 7]]


def test_what_is_worth_nothing_leaves_the_learner_as_it_is_alone():
    learner, batch = retrieval(), class_tasks(RAW)
    with torch.no_grad():
        learner.worth.bias.fill_(-800)
    assert relative_error(learner(batch).task_losses, learner.learner(batch).task_losses) < 1e-12


@pytest.mark.parametrize("join", JOINS)
def test_permuting_labels_permutes_predictions(join):
    learner, batch, order = retrieval(join), class_tasks(RAW), torch.randperm(3)
    found, moved = (learner.found(batch.support_x, y) for y in (batch.support_y, order[batch.support_y]))
    assert torch.equal(found.rows.unflatten(1, (3, -1)), moved.rows.unflatten(1, (3, -1))[:, order])
    named = dict(learner.learner.model.named_parameters())
    plain = learner.adapt(batch.support_x, batch.support_y)(batch.query_x)
    last = list(named)[-2:]  # the head's
    with torch.no_grad():
        for name in last:
            named[name].copy_(named[name].clone()[order.argsort()])
    turned = learner.adapt(batch.support_x, order[batch.support_y])(batch.query_x)
    assert relative_error(turned[..., order], plain) < 1e-10


@pytest.mark.parametrize("join", JOINS)
def test_it_keeps_the_contract(join):
    learner, batch = retrieval(join), class_tasks(RAW)
    assert set(mf.check_learner(learner, batch).clauses.values()) == {"kept"}
    report = mf.check_gradients(learner, batch)
    assert report.order == "second order"
    assert report.executor == "fused"


@pytest.mark.parametrize("make", [mf.ANIL, mf.BOIL, mf.MetaSGD, mf.ProtoMAML, mf.CAVIA])
def test_relatives_of_maml(make):
    learner = Retrieval(make(nn.Sequential(nn.Linear(RAW, 7), nn.Tanh(), nn.Linear(7, 3))), torch.randn(POOL, RAW))
    nn.init.normal_(learner.worth.weight)
    batch = class_tasks(RAW)
    assert mf.check_gradients(learner, batch).ok
    learner(batch.to(torch.float32)).loss.backward()
    assert bool(learner.worth.weight.grad.all())


def blobs(centres, count, spread=0.7):
    return torch.cat([centre + spread * torch.randn(count, 4) for centre in centres])


def test_strangers_are_left_alone_and_the_same_classes_are_kept():
    """In one pool others of a class are nearest to it; the other one is all over the place."""
    torch.manual_seed(0)
    centres = 3 * torch.randn(60, 4)
    x, labels = blobs(centres, 20), torch.arange(60).repeat_interleave(20)
    train = mf.data.Episodes(mf.data.ClassSamples.from_arrays(x, labels), ways=4, shots=1, queries=5, tasks=16)
    worths = {}
    for name, pool in {"same": blobs(centres, 20), "strangers": 6 * torch.randn(40, 4)}.items():
        learner = Retrieval(mf.MAML(mf.models.mlp([4, 32, 4]), inner_lr=0.5, inner_steps=3), pool)
        mf.train(learner, train, 200, meta_lr=0.003, progress=False)
        batch = train.batch(1000)
        worths[name] = float(learner.found(batch.support_x, batch.support_y).worth.detach().mean())
    assert worths["same"] > 0.6
    assert worths["strangers"] < 0.3


# --- more ---


@pytest.mark.parametrize("join", ["samples", "mixed"])
def test_more_are_those_of_the_pool_that_chance_takes(join):
    learner, (x, y, *_) = retrieval(join), (each[0] for each in class_tasks(RAW).tensors)
    made_x, made_y, weights = (each[len(x) :].detach() for each in larger(learner, x, y))
    counts, draws = torch.zeros(3 * EACH), 400
    for seed in range(draws):
        more_x, more_y = learner.more(x, y, EACH, torch.Generator().manual_seed(seed))
        assert not more_x.requires_grad
        pairs = [torch.cat([each, 100 * ids[:, None]], 1) for each, ids in ((more_x, more_y), (made_x, made_y))]
        places = torch.cdist(*pairs, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        assert torch.allclose(more_x, made_x[places])
        assert torch.equal(more_y, made_y[places])
        assert bool((places.diff() > 0).all())
        counts[places] += 1
    assert float((counts / draws - weights).abs().max()) < 0.15  # six deviations


def test_more_by_torch_s_own_numbers_and_as_many_as_there_are():
    learner, (x, y, *_) = retrieval(), (each[0] for each in class_tasks(RAW).tensors)
    torch.manual_seed(1)
    first = learner.more(x, y, 5)
    torch.manual_seed(1)
    assert all(torch.equal(one, other) for one, other in zip(first, learner.more(x, y.int(), 5), strict=True))
    with torch.no_grad():
        learner.worth.bias.fill_(800)
    assert [len(each) for each in learner.more(x, y, 100)] == [3 * POOL, 3 * POOL]


# --- samples and features ---


def test_pools_of_bytes_of_classes_and_of_token_ids():
    pictures = mf.data.Glyphs(split="test")
    maml = mf.MAML(mf.models.strided_conv4(5, hidden=4))
    learner = Retrieval(maml, pictures.subset(range(10)), maml.model[:-1])
    y = torch.arange(5)[None]
    assert float(learner.pool.max()) <= 1
    assert torch.equal(learner.pool[:3], pictures.class_samples(0)[:3].float() / 255)
    learner(mf.TaskBatch(torch.rand(1, 5, 1, 28, 28), y, torch.rand(1, 5, 1, 28, 28), y)).loss.backward()
    assert bool(learner.worth.bias.grad)

    words, of_words = torch.randint(1, 50, (POOL, 7)), mf.models.deep_averaging(None, (7,), 50)
    x = torch.randint(1, 50, (2, 6, 7))
    for join in ("samples", "features"):
        model = mf.models.deep_averaging(3, (7,), 50) if join == "samples" else nn.Linear(of_words(x[0]).shape[1], 3)
        backend = "fallback" if join == "samples" else "auto"  # where an embedding is
        learner = Retrieval(mf.MAML(model, backend=backend), words, of_words, 2, join)
        y = torch.arange(3).repeat(2, 2)
        learner(mf.TaskBatch(x, y, x, y)).loss.backward()
        assert bool(learner.worth.bias.grad)
    assert learner.adapt(x[0], y[0])(x[0]).shape == (6, 3)


def test_features_are_a_copy():
    """What learns does not move them, and what they are a copy of stays as it is."""
    maml = mf.MAML(mf.models.strided_conv4(3, hidden=4).double())
    before = copy.deepcopy(maml.model)
    learner = Retrieval(maml, torch.rand(POOL, 1, 28, 28).double(), maml.model[:-1]).train()
    assert all(value.requires_grad for value in maml.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before.buffers(), maml.model.buffers(), strict=True))
    assert not any(part.training for part in learner.features.modules())
    again = learner._features(learner.pool[None])[0]
    assert relative_error(again, learner.pool_features) < 1e-12
    with torch.no_grad():
        for value in maml.parameters():
            value.add_(1)
    assert torch.equal(learner._features(learner.pool[None])[0], again)


def test_batch_norms_without_statistics_take_the_pool_s():
    maml, pool = mf.MAML(nn.Linear(RAW, 3).double()), 3 + randn(512, RAW)
    fresh = nn.BatchNorm1d(RAW).double()
    variances = torch.stack([pool[:256].var(0), pool[256:].var(0)]).mean(0)
    expected = (pool - pool.mean(0)) / (variances + fresh.eps).sqrt()
    assert relative_error(Retrieval(maml, pool, fresh).pool_features, expected) < 1e-12
    Retrieval(maml, randn(257, RAW), fresh)
    assert fresh.momentum == 0.1
    assert not fresh.num_batches_tracked
    fresh(pool)
    kept = Retrieval(maml, pool, fresh).features
    assert torch.equal(kept.running_mean, fresh.running_mean)


def test_all_samples_alike_are_no_reason_for_nan():
    learner, batch = retrieval(), class_tasks(RAW)
    same = torch.zeros_like(batch.support_x)
    assert bool(learner(mf.TaskBatch(same, batch.support_y, *batch.tensors[2:])).loss.isfinite())


# --- what is refused ---


@backends
def test_first_order_is_refused_for_what_samples_are_worth_would_not_learn(backend):
    learner = retrieval(backend=backend)
    learner.learner.first_order = True
    with pytest.raises(ValueError, match="sample_weight must not require a gradient in first order"):
        learner(class_tasks(RAW))
    with pytest.raises(
        ValueError, match=r"learner must be of second order, for what samples are worth .*\(got first_order=True\)"
    ):
        Retrieval(mf.MAML(perceptron(), first_order=True), randn(POOL, F))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"learner": mf.ProtoNet(nn.Identity())}, TypeError, "learner must be one of the MAML family"),
        ({"learner": mf.MAMLpp(nn.Linear(F, 3))}, TypeError, r"learner must take plain meta-steps \(got MAMLpp"),
        ({"learner": mf.MAML(nn.Linear(F, 3), loss=lambda a, b: a.sum())}, ValueError, "must have a named loss"),
        ({"pool": [1.0]}, TypeError, r"pool must be a tensor \(got list\)"),
        ({"pool": torch.zeros(0, F)}, ValueError, r"pool must hold samples \[M, ...\], M > 0 \(got shape \(0, 4\)\)"),
        ({"pool": torch.zeros(9)}, ValueError, r"pool must hold samples \[M, ...\], M > 0 \(got shape \(9,\)\)"),
        ({"pool": mf.data.ClassSamples.from_arrays(torch.rand(4, F), torch.arange(4)).subset([])}, ValueError,
            r"pool must hold samples \[M, ...\], M > 0 \(got shape \(0, 4\)\)"),
        ({"pool": torch.zeros(9, F).bool()}, ValueError, r"pool must be bytes, numbers or token ids, int64 \(got"),
        ({"pool": torch.zeros(2, F)}, ValueError, r"pool must have at least per_class, 3, samples \(got 2\)"),
        ({"pool": torch.ones(9, F).long()}, ValueError, r"features must be a module for token ids \(got None\)"),
        ({"pool": torch.ones(9, F).long(), "join": "mixed"}, ValueError, "join must be 'samples' or 'features' for"),
        ({"features": abs}, TypeError, r"features must be an nn.Module \(got builtin_function_or_method\)"),
        ({"features": nn.Unflatten(1, (2, 2))}, ValueError, r"features must give \[N, D\] \(got shape \(9, 2, 2\)\)"),
        ({"per_class": 0}, ValueError, r"per_class must be >= 1 \(got 0\)"),
        ({"join": "glue"}, ValueError, r"join must be one of samples, mixed, features \(got 'glue'\)"),
        ({"mix": 1.5}, ValueError, r"mix must be at most 1 \(got 1.5\)"),
        ({"mix": -1}, ValueError, r"mix must be >= 0 \(got -1\)"),
    ],
)  # fmt: skip
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        Retrieval(**{"learner": mf.MAML(nn.Linear(F, 3)), "pool": torch.randn(9, F), **options})


def test_bad_tasks():
    learner, batch = retrieval(), class_tasks(RAW)
    x, y, *query = batch.tensors
    with pytest.raises(
        ValueError, match=r"x must hold samples such as the pool's, torch.float64 \[6\] .*float32 \[6\]"
    ):
        learner(batch.to(torch.float32))
    with pytest.raises(ValueError, match=r"torch.float64 \[6\] on cpu \(got torch.float64 \[5\] on cpu\)"):
        learner.found(x[..., :5], y)
    with pytest.raises(ValueError, match="support_y must be class ids"):
        learner(mf.TaskBatch(x, x, *query))
    with pytest.raises(ValueError, match=r"support_y must have at least two classes \(got 1\)"):
        learner.found(x, torch.zeros_like(y))
    with pytest.raises(ValueError, match=r"join must be 'samples' or 'mixed' for more samples \(got 'features'\)"):
        retrieval("features").more(x[0], y[0], 2)
    with pytest.raises(ValueError, match=r"per_class must be >= 1 \(got -1\)"):
        learner.more(x[0], y[0], -1)
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None \(got 3\)"):
        learner.more(x[0], y[0], 2, 3)
    with pytest.raises(ValueError, match="y must have the tasks and samples of x"):
        learner.more(x[0], y[0, 1:], 2)
