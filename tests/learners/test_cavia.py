"""CAVIA against its paper: context joined to an input, or as FiLM, and weights that do not adapt."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metaaug_fast as mf
from metaaug_fast.learners.cavia import Contextual
from metaaug_fast.models import conv4
from tests.building import backends, perceptron
from tests.exactness import relative_error
from tests.learners.comparing import assert_exact, class_tasks

C = 5


def pictures():
    """Convolution, norm and pooling, as the paper has them, and a head."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 3)
    ).double()


def papers(learner, predict, loss=F.cross_entropy):
    """A task's loss: steps of a context that starts at 0. `predict(x, context)` is the network."""

    def unbatched(x, y, query_x, query_y):
        context = torch.zeros(C, dtype=torch.float64, requires_grad=True)
        for _ in range(learner.inner_steps):
            (gradient,) = torch.autograd.grad(loss(predict(x, context), y), context, create_graph=True)
            context = context - learner.inner_lr * gradient
        return loss(predict(query_x, context), query_y)

    return unbatched


@backends
@pytest.mark.parametrize("steps", [1, 3])
def test_a_context_joined_to_the_input(steps, backend):
    """The regression network: one linear layer of samples and context."""
    learner = mf.CAVIA(perceptron(), 0.7, steps, C, learn_inner_lr=True, backend=backend)
    first, rest = learner.model.network[0], learner.model.network[1:]

    def predict(x, context):
        joined = torch.cat([x, context.expand(len(x), -1)], 1)
        return rest(F.linear(joined, torch.cat([first.layer.weight, first.joined], 1), first.layer.bias))

    assert_exact(learner, class_tasks(4), papers(learner, predict))


@backends
@pytest.mark.parametrize("layers", [None, ["0", "3"]], ids=["norms", "convolutions"])
def test_film(layers, backend):
    """gamma h + beta after the norm, or after the convolutions."""
    learner = mf.CAVIA(pictures(), 0.7, 2, C, layers, learn_inner_lr=True, backend=backend)
    assert learner.layers == (("1",) if layers is None else ("0", "3"))

    def predict(x, context):
        for path, layer in learner.model.network.named_children():
            if path not in learner.layers:
                x = layer(x)
                continue
            x = layer.layer(x)
            gamma, beta = (weight @ context for weight in (layer.scale, layer.shift))
            x = torch.stack([(1 + gamma[c]) * x[:, c] + beta[c] for c in range(x.shape[1])], 1)
        return x

    assert_exact(learner, class_tasks(1, 5, 5), papers(learner, predict))


def test_film_behind_norms_of_features():
    """Values of one dimension have no places to multiply over."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    learner = mf.CAVIA(model, 0.7, 2, C, ["1"], backend="fused")
    film = learner.model.network[1]

    def predict(x, context):
        normal = F.batch_norm(model[0](x), None, None, film.layer.weight, film.layer.bias, True)
        return model[3](torch.tanh((1 + film.scale @ context) * normal + film.shift @ context))

    assert_exact(learner, class_tasks(4), papers(learner, predict))


def test_all_of_it_is_fused():
    assert mf.explain(mf.CAVIA(perceptron()).model.float(), torch.zeros(2, 4)).fused
    assert mf.explain(Contextual(pictures().float(), C), torch.zeros(2, 1, 5, 5)).fused


@backends
def test_weights_do_not_adapt(backend):
    learner, batch = mf.CAVIA(perceptron(), 0.7, 3, C, backend=backend), class_tasks(4)
    weights = learner.adapt(*batch.tensors[:2]).as_dict()
    for name, value in learner.model.named_parameters():
        assert all(torch.equal(each, value) for each in weights[name]) == (name != "context")


@pytest.mark.parametrize("build", [perceptron, pictures])
def test_the_users_model_stays_as_it_is(build):
    model = build()
    before, shape = copy.deepcopy(model), (4,) if build is perceptron else (1, 5, 5)
    learner = mf.CAVIA(model, context=C, backend="fallback")
    x = torch.randn(6, *shape).double()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    model.eval(), before.eval(), learner.eval()
    assert torch.equal(model(x), before(x))
    assert torch.equal(learner.model(x), model(x))
    assert {id(value) for value in model.parameters()} < {id(value) for value in learner.parameters()}


def test_training_leaves_the_context_at_zero():
    learner = mf.CAVIA(perceptron().float(), context=C)
    batch, optimizers = class_tasks(4).to(torch.float32), learner.optimizers(0.1)
    before = learner(batch).loss
    for _ in range(20):
        out = learner.meta_step(batch, optimizers)
    assert out.loss < before
    assert not learner.model.context.any()
    assert not learner.model.network[0].nothing.any()


def test_copies_and_stored_states_share_one_context():
    learner, batch = mf.CAVIA(perceptron(), context=C, layers=["0", "2"]), class_tasks(4)
    twin = copy.deepcopy(learner)
    assert twin.model.network[0].context is twin.model.network[2].context is twin.model.context
    other = mf.CAVIA(perceptron(), context=C, layers=["0", "2"])
    other.load_state_dict(learner.state_dict())
    for each in (twin, other, learner.double()):
        assert relative_error(each(batch).loss, learner(batch).loss) < 1e-12


def test_layers_that_see_the_context_by_default():
    assert Contextual(conv4(ways=5)).layers == ("block1.1", "block2.1", "block3.1", "block4.1")
    assert Contextual(conv4(ways=5, norm="none")).layers == ("block1.0", "block2.0", "block3.0", "block4.0")
    assert Contextual(mf.models.mlp([1, 40, 40, 1])).layers == ("linear1",)


def test_it_keeps_the_contract():
    mf.check_learner(mf.CAVIA(perceptron(), context=C), class_tasks(4))
    assert mf.check_gradients(mf.CAVIA(perceptron(), context=C), class_tasks(4)).order == "second order"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": 0}, ValueError, r"context must be >= 1 \(got 0\)"),
        ({"context": 2.5}, TypeError, r"context must be an integer \(got 2.5\)"),
        (
            {"layers": ["0", "body"]},
            ValueError,
            r"layers must name linear layers, convolutions or norms \(got \['0', 'body'\]; there are 0, 2\)",
        ),
        ({"layers": []}, ValueError, r"layers must name .* \(got \[\]; there are 0, 2\)"),
        ({"layers": "0"}, TypeError, r"layers must be names of layers \(got '0'\)"),
        ({"model": nn.PReLU()}, ValueError, r"model must have linear layers or convolutions \(got none in PReLU\)"),
        ({"model": nn.Flatten()}, ValueError, r"model must have parameters to adapt"),
        ({"inner_lr": -1.0}, ValueError, r"inner_lr must be >= 0 and finite \(got -1\)"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        mf.CAVIA(**{"model": perceptron(), **options})
