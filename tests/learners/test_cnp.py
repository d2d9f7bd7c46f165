"""Conditional Neural Processes against their papers, sample by sample and query by query."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Independent, Normal

import metaaug_fast as mf
from metaaug_fast.data import ClassSamples, Episodes, Pixels
from metaaug_fast.models import conv4, perceptron
from tests.exactness import relative_error
from tests.learners.comparing import assert_exact, class_tasks

plain_and_attentive = pytest.mark.parametrize("attention", [False, True], ids=["mean", "attention"])


def encoder(inputs=5, features=6):
    return perceptron(None, (inputs,), (7, features), "tanh").double()


def regression_tasks(inputs=2, outputs=3, tasks=3, shots=5, queries=4):
    def drawn(count, size):
        return torch.randn(tasks, count, size, dtype=torch.float64)

    return mf.TaskBatch(drawn(shots, inputs), drawn(shots, outputs), drawn(queries, inputs), drawn(queries, outputs))


def regressor(**options):
    options = {"outputs": 3, "width": 8, "vary_context": False} | options
    return mf.CNP(encoder(2), **options).double()


def attended(representations, features, query, attention):
    """Their mean, or what the likeness of features to the query's makes of them; and the weights."""
    count = len(representations)
    likeness = [torch.exp(query @ each / math.sqrt(len(query))) for each in features]
    weights = [each / sum(likeness) if attention else torch.ones(()).double() / count for each in likeness]
    return sum(weight * each for weight, each in zip(weights, representations, strict=True)), float(
        sum(weights).detach()
    )


@plain_and_attentive
@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_is_the_papers(outputs, attention):
    learner = regressor(outputs=outputs, attention=attention, min_std=0.05)

    def unbatched(x, y, query_x, query_y):
        features, total = learner.model(x), 0.0
        said = [learner.h(torch.cat([feature, target])) for feature, target in zip(features, y, strict=True)]
        for query, target in zip(learner.model(query_x), query_y, strict=True):
            r, weight = attended(said, features, query, attention)
            assert abs(weight - 1) < 1e-12
            decoded = learner.g(torch.cat([query, r]))
            for number in range(outputs):
                std = 0.05 + 0.95 * torch.log1p(torch.exp(decoded[outputs + number]))
                apart = (target[number] - decoded[number]) / std
                total = total + 0.5 * apart**2 + torch.log(std) + 0.5 * math.log(2 * math.pi)
        return total / query_y.numel()

    assert_exact(learner, regression_tasks(outputs=outputs), unbatched)


@plain_and_attentive
def test_classification_is_a_score_of_each_class(attention):
    learner = mf.CNP(encoder(), attention=attention, width=8).double()

    def unbatched(x, y, query_x, query_y):
        features, total = learner.model(x), 0.0
        for query, label in zip(learner.model(query_x), query_y, strict=True):
            classes = []
            for way in range(3):
                own = features[y == way]
                r, weight = attended([learner.h(each) for each in own], own, query, attention)
                assert abs(weight - 1) < 1e-12
                classes.append(r)
            overall = sum(classes) / 3
            logits = torch.cat([learner.g(torch.cat([query, r, overall])) for r in classes])
            total = total + F.cross_entropy(logits, label)
        return total / len(query_y)

    assert_exact(learner, class_tasks(5, shots=4), unbatched)


@plain_and_attentive
def test_weights_add_up_to_one_in_each_class(attention):
    learner = mf.CNP(encoder(), attention=attention)
    queries, features = 9 * torch.randn(2, 4, 6), 9 * torch.randn(2, 5, 6)
    members = F.one_hot(torch.tensor([[0, 1, 1, 2, 0], [2, 2, 0, 1, 2]]), 3).float().mT
    weights = learner._weights(queries, features, members)
    assert weights.shape == (2, 4 if attention else 1, 3, 5)
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-6)
    assert float((weights * (1 - members.unsqueeze(1))).abs().max()) == 0
    assert float(weights.min()) >= 0


@plain_and_attentive
def test_regression_does_not_see_the_order_of_its_context(attention):
    learner, tasks = regressor(attention=attention), regression_tasks()
    order = torch.randperm(5)
    one = learner.adapt(tasks.support_x, tasks.support_y)(tasks.query_x)
    other = learner.adapt(tasks.support_x[:, order], tasks.support_y[:, order])(tasks.query_x)
    assert relative_error(one, other) < 1e-12
    unpaired = learner.adapt(tasks.support_x[:, order], tasks.support_y)(tasks.query_x)
    assert relative_error(one, unpaired) > 1e-6


@plain_and_attentive
def test_classes_with_different_numbers_of_samples_and_any_ways(attention):
    learner = mf.CNP(encoder(), attention=attention, width=8).double()
    assert learner(class_tasks(5, ways=7)).task_losses.shape == (3,)
    x, y = torch.randn(1, 6, 5).double(), torch.tensor([[0, 0, 0, 1, 1, 2]])
    query = torch.randn(1, 2, 5).double()
    logits = learner.adapt(x, y)(query)
    assert logits.shape == (1, 2, 3)
    swapped = learner.adapt(x, 2 - y)(query)
    assert relative_error(swapped.flip(-1), logits) < 1e-12


@plain_and_attentive
def test_distributions_are_torchs(attention):
    learner, tasks = regressor(attention=attention, min_std=0.3).eval(), regression_tasks()
    adapted = learner.adapt(tasks.support_x, tasks.support_y)
    found = adapted.distribution(tasks.query_x)
    assert isinstance(found, Independent)
    assert isinstance(found.base_dist, Normal)
    assert (found.batch_shape, found.event_shape) == ((3, 4), (3,))
    assert torch.equal(found.mean, adapted(tasks.query_x))
    assert float(found.stddev.detach().min()) > 0.3
    losses = -found.log_prob(tasks.query_y).mean(1) / 3
    assert relative_error(adapted.evaluate(tasks.query_x, tasks.query_y).task_losses, losses) < 1e-12
    assert torch.equal(learner(tasks).prediction, found.mean)
    one = learner.adapt(tasks.support_x[1], tasks.support_y[1])
    assert one.distribution(tasks.query_x[1]).batch_shape == (4,)
    assert relative_error(one.distribution(tasks.query_x[1]).stddev, found.stddev[1]) < 1e-12
    assert relative_error(one(tasks.query_x[1]), found.mean[1]) < 1e-12
    assert (len(adapted), len(one)) == (3, 1)

    classes, learner = class_tasks(5), mf.CNP(encoder(), attention=attention).double()
    adapted = learner.adapt(classes.support_x, classes.support_y)
    found = adapted.distribution(classes.query_x)
    assert isinstance(found, Categorical)
    assert relative_error(found.probs, adapted(classes.query_x).softmax(-1)) < 1e-12
    one = learner.adapt(classes.support_x[0], classes.support_y[0])
    assert one.distribution(classes.query_x[0]).log_prob(classes.query_y[0]).shape == (9,)


@torch.no_grad()
def test_training_varies_the_number_of_context_points():
    """The first n of each task, n as torch's generator gives it; evaluation takes all."""
    learner, tasks = regressor(vary_context=True), regression_tasks()
    first = [
        float(
            regressor_like(learner)(mf.TaskBatch(*(each[:, :n] for each in tasks.tensors[:2]), *tasks.tensors[2:])).loss
        )
        for n in range(1, 6)
    ]
    counts = [0] * 5
    for _ in range(300):
        loss = float(learner(tasks).loss)
        counts[min(range(5), key=lambda n: abs(first[n] - loss))] += 1
        assert min(abs(each - loss) for each in first) < 1e-12
    assert min(counts) > 20  # of 60 each
    with torch.random.fork_rng():
        torch.manual_seed(3)
        one = [float(learner(tasks).loss) for _ in range(5)]
        torch.manual_seed(3)
        assert one == [float(learner(tasks).loss) for _ in range(5)]
    learner.eval()
    assert abs(float(learner(tasks).loss) - first[-1]) < 1e-12
    assert float(learner(tasks).loss) == float(learner(tasks).loss)


def regressor_like(learner):
    twin = regressor()
    twin.load_state_dict(learner.state_dict())
    return twin


@torch.no_grad()
def test_classes_keep_all_their_samples_in_training():
    learner, tasks = mf.CNP(encoder(), vary_context=True).double(), class_tasks(5)
    assert len({float(learner(tasks).loss) for _ in range(20)}) == 1


@plain_and_attentive
@pytest.mark.parametrize("vary_context", [False, True])
def test_it_keeps_the_contract(attention, vary_context):
    # So wide that no sample leaves all units of a layer at 0, where those behind it, without bias, have a kink.
    learner = regressor(attention=attention, vary_context=vary_context, width=32)
    clauses = mf.check_learner(learner, regression_tasks()).clauses
    assert [clause for clause, outcome in clauses.items() if outcome != "kept"] == [
        "predictions permute with the labels"  # there are none
    ]
    assert mf.check_gradients(learner, regression_tasks()).order == "exact"
    classes = mf.CNP(encoder(), attention=attention).double()
    assert set(mf.check_learner(classes, class_tasks(5)).clauses.values()) == {"kept"}


def test_a_family_of_curves_is_learned():
    """Lines of slope -1 or 1: one point tells which, and the deviation says how sure it is."""

    class Lines:
        sample_shape = target_shape = (1,)

        def sampler(self, spec):
            def sample(draws):
                slope = (torch.from_numpy(draws.uniform(1)) > 0.5).float() * 2 - 1
                x = torch.from_numpy(draws.uniform(spec.shots + spec.queries)).float() + 0.5
                parts = x.split([spec.shots, spec.queries], 1)
                return mf.TaskBatch(*(each[..., None] for part in parts for each in (part, slope * part)))

            return sample

    torch.manual_seed(0)
    episodes = Episodes(Lines(), shots=2, queries=5, tasks=16)
    learner = mf.CNP(perceptron(None, (1,), (32,)), outputs=1, width=32, min_std=0.01)
    mf.train(learner, episodes, 600, meta_lr=3e-3, schedule="cosine", progress=False)
    judged = mf.evaluate(learner, episodes, 200)
    assert judged.metric == "negative log-likelihood"
    assert judged.mean < -2  # of the best single normal distribution: 1.5
    adapted = learner.adapt(torch.tensor([[1.0]]), torch.tensor([[-1.0]]))
    assert adapted(torch.tensor([[0.7]])).item() == pytest.approx(-0.7, abs=0.15)


def test_pixels_are_completed():
    """Pictures of one grey each: any pixel tells the others."""
    pictures = torch.linspace(0.1, 0.9, 20)[:, None, None, None].expand(20, 1, 6, 6)
    episodes = Episodes(Pixels(ClassSamples.from_arrays(pictures, [*range(20)])), shots=4, queries=30, tasks=8)
    torch.manual_seed(0)
    learner = mf.CNP(perceptron(None, (2,), (16,)), outputs=1, width=32, attention=True)
    mf.train(learner, episodes, 300, meta_lr=3e-3, progress=False)
    tasks = episodes.batch(0)
    found = learner.eval().adapt(tasks.support_x, tasks.support_y)(tasks.query_x)
    assert float((found - tasks.query_y).abs().mean()) < 0.08  # 0.2 from their mean


def test_batch_norm_is_the_modules_own():
    learner = mf.CNP(conv4(None, (1, 16, 16), hidden=3))
    assert not learner.transductive
    learner(class_tasks(1, 16, 16).to(torch.float32))
    assert int(learner.model.block1[1].num_batches_tracked) == 1


def test_any_module_may_encode():
    learner = mf.CNP(nn.Identity(), outputs=1, features=1)
    assert learner(mf.TaskBatch(*(torch.randn(2, 4, 1) for _ in range(4)))).task_losses.shape == (2,)
    assert mf.CNP(perceptron(None, (1,), (128, 128)), outputs=1).features == 128


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": None}, TypeError, r"model must be an nn.Module \(got NoneType\)"),
        ({"outputs": 0}, ValueError, r"outputs must be >= 1 \(got 0\)"),
        ({"outputs": "one"}, TypeError, r"outputs must be an integer \(got 'one'\)"),
        ({"outputs": True}, TypeError, r"outputs must be an integer \(got True\)"),
        ({"attention": 1}, TypeError, r"attention must be True or False \(got 1\)"),
        ({"width": 0}, ValueError, r"width must be >= 1 \(got 0\)"),
        ({"layers": 1.5}, TypeError, r"layers must be an integer \(got 1.5\)"),
        ({"min_std": 1.1}, ValueError, r"min_std must be in 0..1 \(got 1.1\)"),
        ({"vary_context": "yes"}, TypeError, r"vary_context must be True or False \(got 'yes'\)"),
        ({"model": nn.Identity()}, ValueError, r"features must be given: how many Identity gives"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        mf.CNP(**{"model": encoder(), **options})


def test_bad_tasks():
    tasks, learner = regression_tasks(), regressor()
    support_y = r"support_y must be numbers \[T, N, 3\], outputs \(got float64 \(3, 5, 2\)\)"
    with pytest.raises(ValueError, match=support_y):
        learner.adapt(tasks.support_x, tasks.support_y[..., :2])
    with pytest.raises(ValueError, match=r"query_y must be numbers \[T, N, 3\], outputs \(got float64 \(3, 4, 2\)\)"):
        learner(mf.TaskBatch(*tasks.tensors[:3], tasks.query_y[..., :2]))
    with pytest.raises(ValueError, match=r"support_y must be numbers \[T, N, 3\], outputs \(got int64 \(3, 5\)\)"):
        learner.adapt(tasks.support_x, torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"support_y must be class ids, int64 \[T, S\]"):
        mf.CNP(encoder(2)).double().adapt(tasks.support_x, tasks.support_y)
    maps = mf.CNP(nn.Conv2d(1, 4, 3))
    with pytest.raises(ValueError, match=r"model must give features \[N, D\] \(got shape \(6, 4, 6, 6\)\)"):
        maps.adapt(torch.randn(2, 3, 1, 8, 8), torch.arange(3).repeat(2, 1))
    with pytest.raises(ValueError, match=r"features must be 6, as model gives of such samples \(got 7\)"):
        mf.CNP(encoder(), features=7).double().adapt(*class_tasks(5).tensors[:2])
