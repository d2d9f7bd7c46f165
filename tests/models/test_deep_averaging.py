"""The network of token ids: its mean, its weights, exact gradients through the embedding, and what is no sentence."""

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.engine import reference
from metaaug_fast.engine.fallback import FallbackExecutor
from metaaug_fast.engine.problem import Query, Support, inner_problem
from metaaug_fast.inspect.contract import check_learner
from metaaug_fast.models import MODELS, MeanEmbedding, deep_averaging
from tests.exactness import assert_close, gradients, relative_error

VOCABULARY = 30


def sentences(*shape, length=6):
    """Ids with padding behind them, at least one id each."""
    ids = torch.randint(1, VOCABULARY, (*shape, length))
    return ids * (torch.arange(length) < torch.randint(1, length + 1, (*shape, 1)))


def small(ways=3, **options):
    return deep_averaging(ways, (6,), VOCABULARY, features=5, hidden=(12,), **options).double()


def tasks():
    """Of three classes, each with two sentences to learn from."""
    y = torch.arange(3).repeat_interleave(2).repeat(4, 1)
    return mf.TaskBatch(sentences(4, 6), y, sentences(4, 6), y)


def test_it_is_the_mean_of_words_then_linear_layers():
    model, ids = small(dropout=0.0), sentences(9)
    for found, row in zip(model(ids), ids, strict=True):
        x = torch.stack([model.mean.weight[each] for each in row if each]).mean(0)
        torch.testing.assert_close(found, model.head(model.linear1(x).relu()))
    assert [name for name, _ in model.named_children()] == ["mean", "linear1", "relu1", "head"]
    assert deep_averaging(None, (6,), VOCABULARY, 5, (7, 4))(ids).shape == (9, 4)
    assert deep_averaging(None, (6,), VOCABULARY, 5, ())(ids).shape == (9, 5)
    assert MODELS["deep_averaging"] is deep_averaging is mf.models.deep_averaging


@pytest.mark.parametrize("dropout", [0.0, 0.9])
def test_padding_changes_nothing_and_alone_gives_zeros(dropout):
    mean, ids = MeanEmbedding(VOCABULARY, 5, dropout).double(), sentences(9)
    with torch.no_grad():
        mean.weight[0] = 1e9  # no mean may see it
    padded = torch.cat([ids, torch.zeros(9, 3, dtype=torch.int64)], 1)
    torch.testing.assert_close(mean.eval()(padded), mean(ids))
    for training in (True, False):
        assert not mean.train(training)(torch.zeros(2, 6, dtype=torch.int64)).any()
        (gradient,) = torch.autograd.grad(mean(ids).square().sum(), mean.parameters())
        assert not gradient[0].any()
        assert gradient.isfinite().all()


def test_dropout_is_a_mean_of_fewer_words():
    mean = MeanEmbedding(4, 3, 0.5).double()
    first, second, third = mean.weight[1:].detach()
    found = mean(torch.tensor([[1, 2, 3]]).repeat(4000, 1))
    subsets = [first * 0, first, second, third, (first + second) / 2, (first + third) / 2, (second + third) / 2]
    subsets.append((first + second + third) / 3)
    distances = torch.cdist(found, torch.stack(subsets), compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(1).values.max() < 1e-9
    assert distances.argmin(1).bincount(minlength=8).min() > 300  # each is one of eight
    assert mean.eval()(torch.tensor([[1, 2, 3]])).allclose(subsets[-1])


def test_words_start_with_a_spread_of_their_own():
    weight = deep_averaging().mean.weight
    assert weight.std().item() == pytest.approx(0.3, rel=0.01)
    assert not weight[0].any()


@pytest.mark.parametrize("options", [{}, {"adapt": "mean.weight"}, {"first_order": True}, {"momentum": 0.5}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_through_the_embedding_are_exact(options, dropout):
    model, batch = small(dropout=dropout), tasks()
    batch.support_x[1, 2] = 0  # a sentence of nothing
    problem = inner_problem(model, 0.3, 3, seed=int(torch.randint(2**30, ())), **options)
    support, query = Support(batch.support_x, batch.support_y), Query(batch.query_x, batch.query_y)
    out, expected = (each.meta_loss(problem, support, query) for each in (FallbackExecutor(model, (3,)), reference))
    assert relative_error(out.loss, expected.loss) < 1e-9
    if not dropout:  # whose masks the learner draws anew
        learner = mf.MAML(model, inner_lr=0.3, inner_steps=3, backend="fallback", **options)
        assert relative_error(learner(batch).loss, expected.loss) < 1e-9
    named = dict(model.named_parameters())
    expected = gradients(expected.loss, named)
    assert_close(gradients(out.loss, named), expected)
    assert expected["mean.weight"][1:].any()


@pytest.mark.filterwarnings("ignore::metaaug_fast.FallbackWarning")
@pytest.mark.parametrize(
    "make", [lambda: mf.ProtoNet(small(None)), lambda: mf.MAML(small()), lambda: mf.Reptile(small())]
)
def test_every_learner_takes_it(make):
    learner = make()
    assert check_learner(learner, tasks()) is not None
    before = learner.model.mean.weight.clone()
    learner.meta_step(tasks(), learner.optimizers())
    changed = (learner.model.mean.weight != before).any(1)
    assert changed.any()
    assert not changed[0]


def test_ids_that_are_none():
    model = small()
    with pytest.raises(TypeError, match=r"x must be token ids, int64 \[N, L\] \(got torch.float64 \(2, 6\)\)"):
        model(torch.zeros(2, 6, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x must be token ids, int64 \[N, L\] \(got torch.int64 \(6,\)\)"):
        model(torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"ways": 0}, ValueError, r"ways must be >= 1 \(got 0\)"),
        ({"sample_shape": (1, 28, 28)}, ValueError, r"sample_shape must be \(length,\) .*\(got \(1, 28, 28\)\)"),
        ({"vocabulary": 1}, ValueError, r"vocabulary must be >= 2 \(got 1\)"),
        ({"vocabulary": None}, TypeError, r"vocabulary must be an integer \(got None\)"),
        ({"features": 0}, ValueError, r"features must be >= 1 \(got 0\)"),
        ({"hidden": (3, 0)}, ValueError, r"hidden must be >= 1 \(got 0\)"),
        ({"dropout": 1.0}, ValueError, r"dropout must be below 1 \(got 1.0\)"),
        ({"dropout": -0.1}, ValueError, r"dropout must be >= 0 \(got -0.1\)"),
    ],
)
def test_arguments(given, error, message):
    with pytest.raises(error, match=message):
        deep_averaging(**given)


def test_the_head_is_linear():
    assert isinstance(deep_averaging().head, nn.Linear)
