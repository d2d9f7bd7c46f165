"""Matching Networks against the paper, written for one query and one support sample at a time."""

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.models import conv4, perceptron
from tests.exactness import relative_error
from tests.learners.comparing import assert_exact, class_tasks

D = 6


def network():
    return perceptron(None, (5,), (7, D), "tanh")


def states(lstm, inputs, reverse):
    """Hidden states of one direction of an LSTM, by its equations."""
    end = "_l0_reverse" if reverse else "_l0"
    weights = [getattr(lstm, f"{name}{end}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    h = c = torch.zeros(D, dtype=torch.float64)
    found = []
    for x in inputs.flip(0) if reverse else inputs:
        h, c = step(*weights, x, h, c)
        found.append(h)
    return torch.stack(found[::-1] if reverse else found)


def step(weight_ih, weight_hh, bias_ih, bias_hh, x, h, c):
    i, f, g, o = (weight_ih @ x + bias_ih + weight_hh @ h + bias_hh).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def embedded(learner, x, query_x):
    """g of all support samples and f of one query, without and with the support set for context."""
    support, query = learner.model(x), learner.model(query_x[None])[0]
    if not learner.full_context:
        return support, query
    lstm, cell = learner.of_support, learner.of_query
    support = support + states(lstm, support, False) + states(lstm, support, True)
    h = c = torch.zeros(D).double()
    for _ in range(learner.reads):
        attention = torch.stack([(h * each).sum() for each in support]).softmax(0)
        read = sum(weight * each for weight, each in zip(attention, support, strict=True))
        weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        h, c = step(*weights, torch.cat([query, read]), h, c)
        h = h + query
    return support, h


def unbatched(learner):
    def loss(x, y, query_x, query_y):
        total = 0.0
        for one, label in zip(query_x, query_y, strict=True):
            support, query = embedded(learner, x, one)
            close = [
                nn.functional.cosine_similarity(query, each, dim=0)
                if learner.closeness.distance == "cosine"
                else -((query - each) ** 2).sum()
                for each in support
            ]
            attention = (torch.stack(close) / learner.closeness.temperature).softmax(0)
            assert float(attention.detach().sum()) == pytest.approx(1, abs=1e-12)
            total = total - attention[y == label].sum().log()
        return total / len(query_x)

    return loss


@pytest.mark.parametrize("full_context", [False, True])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_it_is_the_papers(distance, full_context):
    learner = mf.MatchingNet(network(), full_context, reads=3, distance=distance).double()
    assert_exact(learner, class_tasks(5), unbatched(learner))


def test_predictions_are_log_probabilities():
    learner, batch = mf.MatchingNet(network(), full_context=True).double(), class_tasks(5)
    prediction = learner.adapt(*batch.tensors[:2])(batch.query_x)
    assert torch.allclose(prediction.exp().sum(-1), torch.ones(3, 9).double(), rtol=1e-12)


def test_a_permuted_support_set_is_the_same_without_full_context_only():
    batch, order = class_tasks(5), torch.tensor([3, 0, 5, 1, 4, 2])
    for full_context in (False, True):
        learner = mf.MatchingNet(network(), full_context).double()
        one = learner.adapt(*batch.tensors[:2])(batch.query_x)
        other = learner.adapt(batch.support_x[:, order], batch.support_y[:, order])(batch.query_x)
        assert (relative_error(other, one) < 1e-12) != full_context
        assert learner.order_matters == full_context


def test_renamed_classes_are_predicted_under_their_new_names():
    batch, names = class_tasks(5), torch.tensor([2, 0, 1])
    learner = mf.MatchingNet(network(), full_context=True).double()
    one = learner.adapt(*batch.tensors[:2])(batch.query_x)
    other = learner.adapt(batch.support_x, names[batch.support_y])(batch.query_x)
    assert relative_error(other[..., names], one) < 1e-12


def test_far_support_samples_do_not_make_it_infinite():
    """A probability that is 0 in float32 has a finite logarithm."""
    learner = mf.MatchingNet(nn.Identity(), temperature=1e-3)
    x = torch.eye(3)[None]
    out = learner.adapt(x, torch.arange(3)[None]).evaluate(x, torch.tensor([[1, 2, 0]]))
    assert out.loss.item() == pytest.approx(1000, rel=1e-4)


def test_the_temperature_is_learned():
    learner = mf.MatchingNet(network(), temperature=0.5)
    assert float(learner.closeness.temperature) == pytest.approx(0.5)
    learner(class_tasks(5).to(torch.float32)).loss.backward()
    assert float(learner.closeness.log_temperature.grad) != 0
    assert mf.MatchingNet(network(), learn_temperature=False).closeness.temperature == 0.1


def test_it_keeps_the_contract_with_full_context():
    learner = mf.MatchingNet(network(), full_context=True).double()
    clauses = mf.check_learner(learner, class_tasks(5)).clauses
    assert [clause for clause, outcome in clauses.items() if outcome != "kept"] == [
        "the order of support samples does not matter",
    ]
    assert mf.check_gradients(learner, class_tasks(5)).order == "exact"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, r"temperature must be > 0 \(got 0.0\)"),
        ({"temperature": -0.1}, ValueError, r"temperature must be > 0 \(got -0.1\)"),
        ({"distance": "manhattan"}, ValueError, r"distance must be one of euclidean, cosine \(got 'manhattan'\)"),
        ({"reads": 0}, ValueError, r"reads must be >= 1 \(got 0\)"),
        ({"full_context": 1}, TypeError, r"full_context must be True or False \(got 1\)"),
        ({"model": 3}, TypeError, r"model must be an nn.Module \(got int\)"),
        ({"model": conv4(ways=None), "full_context": True, "features": -1}, ValueError, r"features must be >= 1"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        mf.MatchingNet(**{"model": network(), **options})


def test_a_mask_is_refused_where_it_would_not_be_read():
    learner, batch = mf.MatchingNet(network()).double(), class_tasks(5)
    mask = torch.ones(3, 6, dtype=torch.bool)
    for call in (lambda: learner(batch, mask=mask), lambda: learner.adapt(*batch.tensors[:2], mask=mask)):
        with pytest.raises(TypeError, match=r"mask must not be given: MatchingNet takes none \(got one\)"):
            call()
