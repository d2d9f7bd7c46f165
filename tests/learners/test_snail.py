"""SNAIL against its paper, written as convolutions and attention over one whole sequence at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

import metaaug_fast as mf
from metaaug_fast.learners.snail import _Attention
from metaaug_fast.models import perceptron
from tests.exactness import relative_error
from tests.learners.comparing import assert_exact, class_tasks

WAYS = 3


def snail(**options):
    return mf.SNAIL(perceptron(None, (5,), (7, 6), "tanh"), **{"ways": WAYS, "filters": 8, **options}).double()


def whole(learner, elements):
    """What the layers make of one sequence `[S + 1, D]`, by masks and padding."""
    length = len(elements)
    for layer in learner.layers:
        if isinstance(layer, _Attention):
            keys, queries, values = (each(elements) for each in (layer.keys, layer.queries, layer.values))
            scores = queries @ keys.T / math.sqrt(keys.shape[1])
            mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
            weights = (scores + mask).softmax(1)
            assert torch.allclose(weights.sum(1), torch.ones(length).double(), rtol=1e-12)
            elements = torch.cat([elements, weights @ values], 1)
            continue
        for index, (now, before) in enumerate(zip(layer.now, layer.before, strict=True)):
            kernel = torch.stack([before.weight, now.weight], 2)
            padded = F.pad(elements.T, (2**index, 0))
            both = F.conv1d(padded[None], kernel, now.bias, dilation=2**index)[0].T
            value, gate = both.chunk(2, 1)
            elements = torch.cat([elements, value.tanh() * gate.sigmoid()], 1)
    return elements


def sequence(learner, x, y, query_x, query_label=None):
    """Embedded samples beside their labels, the query last; its label is 0 unless it is given."""
    labels = F.one_hot(y, learner.ways).double()
    last = torch.zeros(1, learner.ways).double() if query_label is None else F.one_hot(query_label[None], learner.ways)
    embedded = learner.embed(learner.model(torch.cat([x, query_x[None]])))
    return torch.cat([embedded, torch.cat([labels, last])], 1)


def unbatched(learner):
    def loss(x, y, query_x, query_y):
        total = 0.0
        for query, label in zip(query_x, query_y, strict=True):
            logits = learner.head(whole(learner, sequence(learner, x, y, query))[-1])
            total = total - logits.log_softmax(0)[label]
        return total / len(query_x)

    return loss


@pytest.mark.parametrize(("shots", "spanned"), [(1, 1), (2, 2), (3, 1), (1, 9)])
def test_it_is_the_papers(shots, spanned):
    """Also where there are more samples, or fewer, than the dilations span."""
    learner = snail(shots=spanned)
    assert_exact(learner, class_tasks(5, shots=shots), unbatched(learner))


def test_dilations_span_the_sequence():
    """From the last element the first one is seen by one layer of convolutions alone."""
    for shots in (1, 2, 5):
        layer = snail(shots=shots).layers[1]
        assert sum(2**index for index in range(len(layer.now))) >= WAYS * shots


def test_a_later_element_never_changes_an_earlier_output():
    learner = snail(shots=2)
    support, queries = torch.randn(2, 6, 67).double(), torch.randn(2, 4, 67).double()
    known, read = learner.read(support, queries)
    for place in range(6):
        other = support.clone()
        other[:, place] += torch.randn(67)
        changed, changed_read = learner.read(other, queries)
        assert torch.equal(changed[:, :place], known[:, :place])
        assert bool((changed[:, place:] != known[:, place:]).any(-1).all())
        assert bool((changed_read != read).any(-1).all())
    others = queries.clone()
    others[:, 1:] += 1
    assert torch.equal(learner.read(support, others)[0], known)
    assert torch.allclose(learner.read(support, others)[1][:, 0], read[:, 0], rtol=1e-12)


def test_it_is_blind_to_the_querys_label():
    learner, batch = snail(), class_tasks(5, shots=1)
    renamed = mf.TaskBatch(*batch.tensors[:3], (batch.query_y + 1) % WAYS)
    assert torch.equal(learner(batch).prediction, learner(renamed).prediction)
    x, y, query_x, query_y = (each[0] for each in batch.tensors)
    seen = learner.head(whole(learner, sequence(learner, x, y, query_x[0], query_y[0]))[-1])
    blind = learner.head(whole(learner, sequence(learner, x, y, query_x[0]))[-1])
    assert relative_error(learner(batch).prediction[0, 0], blind) < 1e-12
    assert relative_error(seen, blind) > 1e-6  # it would have mattered


def test_what_it_says_of_itself():
    learner = snail()
    assert not learner.transductive
    clauses = mf.check_learner(learner, class_tasks(5)).clauses
    assert [clause for clause, outcome in clauses.items() if outcome != "kept"] == [
        "the order of support samples does not matter",
        "predictions permute with the labels",
    ]
    assert mf.check_gradients(learner, class_tasks(5)).order == "exact"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 0}, r"ways must be >= 1 \(got 0\)"),
        ({"shots": -1}, r"shots must be >= 1 \(got -1\)"),
        ({"filters": 0}, r"filters must be >= 1 \(got 0\)"),
        ({"features": 0}, r"features must be >= 1 \(got 0\)"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        snail(**options)


def test_bad_tasks():
    learner, batch = snail(), class_tasks(5, ways=4)
    with pytest.raises(ValueError, match=r"support_y must hold class ids 0..2 \(got 3\)"):
        learner(batch)
    few = class_tasks(5)
    unknown = mf.TaskBatch(*few.tensors[:3], few.query_y + 3)
    with pytest.raises(ValueError, match=r"query_y must hold class ids 0..2 \(got 5\)"):
        learner(unknown)
