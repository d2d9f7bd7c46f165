"""Relation Networks against the paper, written for one episode and one pair at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metaaug_fast as mf
from metaaug_fast.models import conv4, perceptron
from tests.learners.comparing import assert_exact, class_tasks


def of_vectors(**options):
    return mf.RelationNet(perceptron(None, (5,), (7, 6), "tanh"), **options).double()


def of_maps(**options):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())
    return mf.RelationNet(model, **options).double()


def compared(learner, class_embedding, query):
    """z of one class and one query, as the paper concatenates them."""
    pair, relation = torch.cat([class_embedding, query])[None], learner.relation
    if not learner.maps:
        return relation.last(relation.second(relation.first(pair).relu()).relu()).squeeze()
    rest = relation.rest
    h = F.max_pool2d(rest.norm1(relation.first(pair)).relu(), 2)
    h = F.max_pool2d(rest.norm2(rest.second(h)).relu(), 2)
    return rest.last(rest.third(h.mean((2, 3))).relu()).squeeze()


def unbatched(learner):
    """A task's loss, its pairs one after the other."""

    def loss(x, y, query_x, query_y):
        embedded, queries = learner.model(x), learner.model(query_x)
        total = 0.0
        for query, label in zip(queries, query_y, strict=True):
            z = torch.stack([compared(learner, embedded[y == way].sum(0), query) for way in range(3)])
            if learner.loss == "cross_entropy":
                total = total - z.log_softmax(0)[label]
            else:
                total = total + sum((z[way].sigmoid() - float(way == label)) ** 2 for way in range(3)) / 3
        return total / len(query_x)

    return loss


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize(("make", "shape"), [(of_vectors, (5,)), (of_maps, (2, 5, 6))], ids=["vectors", "maps"])
def test_it_is_the_papers(make, shape, loss):
    """With running statistics that are not those of a batch, so that pairs can be compared one at a time."""
    learner, batch = make(loss=loss).eval(), class_tasks(*shape)
    for value in learner.buffers():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    assert_exact(learner, batch, unbatched(learner))


def test_batch_norms_of_the_comparison_see_all_pairs_in_training():
    learner, batch = of_maps(), class_tasks(2, 5, 6)
    with torch.no_grad():
        embedded = learner.model.eval()(torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1))
        support, query = embedded.unflatten(0, (3, -1)).split([6, 9], 1)
        classes = torch.stack(
            [
                torch.stack([x[y == way].sum(0) for way in range(3)])
                for x, y in zip(support, batch.support_y, strict=True)
            ]
        )
        pairs = torch.cat(
            [classes[:, None].expand(-1, 9, -1, -1, -1, -1), query[:, :, None].expand(-1, -1, 3, -1, -1, -1)], 3
        )
        before = learner.relation.first(pairs.flatten(0, 2))
        learner.relation.train()
        learner.training = True
        learner(batch)
    assert torch.allclose(learner.relation.rest.norm1.running_mean, 0.1 * before.mean((0, 2, 3)), rtol=1e-9)
    assert not learner.transductive


def test_gradients_in_training_are_slopes():
    assert mf.check_gradients(of_maps(), class_tasks(2, 5, 6)).order == "exact"


def test_small_maps_and_other_ways():
    """Pooling stops where nothing would be left; training may have more classes than testing."""
    learner = mf.RelationNet(conv4(None, (1, 16, 16), hidden=4, maps=True))
    assert learner.maps
    assert learner(class_tasks(1, 16, 16, ways=7).to(torch.float32)).accuracy.shape == (3,)
    batch = class_tasks(1, 16, 16, ways=4, shots=5).to(torch.float32)
    assert learner.adapt(*batch.tensors[:2])(batch.query_x).shape == (3, 12, 4)


def test_predictions_are_logits_whose_sigmoid_is_the_relation():
    learner, batch = of_vectors(), class_tasks(5)
    out = learner(batch)
    wanted = F.one_hot(batch.query_y, 3)
    relation = learner.adapt(*batch.tensors[:2])(batch.query_x).sigmoid()
    assert torch.allclose(out.task_losses, (relation - wanted).square().mean((1, 2)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "bce"}, ValueError, r"loss must be one of mse, cross_entropy \(got 'bce'\)"),
        ({"hidden": 0}, ValueError, r"hidden must be >= 1 \(got 0\)"),
        ({"features": 0}, ValueError, r"features must be >= 1 \(got 0\)"),
        ({"model": "conv4"}, TypeError, r"model must be an nn.Module \(got str\)"),
        (
            {"model": nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten())},
            ValueError,
            r"features must be given: how many Sequential gives, for it gives .* by the size of its inputs",
        ),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        mf.RelationNet(**{"model": perceptron(None, (5,), (7,)), **options})


def test_bad_models():
    learner = mf.RelationNet(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), features=32).double()
    assert learner(class_tasks(1, 6, 6)).task_losses.shape == (3,)
    with pytest.raises(ValueError, match=r"model must give features \[N, D\] or feature maps .* \(got shape"):
        mf.RelationNet(nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3))), features=2).double()(class_tasks(5))
