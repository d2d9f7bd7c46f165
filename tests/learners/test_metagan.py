"""MetaGAN against its paper, for a learner with an inner loop and for one without."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.learners.metagan import FakeGenerator
from metaaug_fast.models import conv4, perceptron
from tests.exactness import assert_close, gradients, relative_error
from tests.learners.comparing import class_tasks, descended

WAYS, FAKES, NOISE, ENCODING = 3, 4, 2, 5


def network(ways=WAYS):
    return perceptron(ways, (5,), (7, 6), "tanh").double()


def metagan(model, **options):
    return mf.MetaGAN(model, fakes=FAKES, noise=NOISE, encoding=ENCODING, **options).double()


def of_maml(**options):
    return metagan(mf.MAML(network(), inner_lr=0.3, inner_steps=2), **options)


def of_relations(loss="cross_entropy", **options):
    return metagan(mf.RelationNet(network(None), loss=loss).double(), **options)


both = pytest.mark.parametrize("made", [of_maml, of_relations], ids=["maml", "relations"])


def with_fake_class(logits):
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], 1).log_softmax(1)


def adversarial(real, fake):
    """-log p(y <= N) of real samples and -log p(N + 1) of fakes."""
    return -with_fake_class(real)[:, :WAYS].exp().sum(1).log().mean() - with_fake_class(fake)[:, WAYS].mean()


def to_fool(fake):
    return -with_fake_class(fake)[:, :WAYS].exp().sum(1).log().mean()


def fakes_of(learner, support_x, noise):
    """Of one task."""
    linear = learner.task_encoder[1]
    encoding = (support_x @ linear.weight.T + linear.bias).relu().mean(0)
    return learner.generator(encoding.expand(FAKES, -1), noise)


def assert_the_papers(learner, logits, supervised):
    """logits: `(support_x, support_y, query_x, fakes, support_fakes)` of one task to those of queries and of fakes."""
    batch = class_tasks(5)
    noise = torch.randn(2, batch.tasks, FAKES, NOISE, dtype=torch.float64)
    drawn = iter(noise.flatten(1, 2))
    learner.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda z: next(drawn))
        fakes, support_fakes = learner.make(batch.support_x), learner.make(batch.support_x)
    out, losses = learner.discriminator_losses(batch, fakes.detach(), support_fakes.detach())
    to_generator = learner.generator_losses(batch, fakes, support_fakes.detach())
    supposed, fooled, classified = [], [], []
    for task, (x, y, query_x, query_y) in enumerate(zip(*batch.tensors, strict=True)):
        made = [fakes_of(learner, x, each[task]) for each in noise]
        real, fake = logits(x, y, query_x, *(each.detach() for each in made))
        classified.append(supervised(real, query_y))
        supposed.append(classified[-1] + learner.weight * adversarial(real, fake))
        fooled.append(to_fool(logits(x, y, query_x, made[0], made[1].detach(), constant=True)[1]))
    assert relative_error(out.task_losses, torch.stack(classified)) < 1e-10
    assert relative_error(losses, torch.stack(supposed)) < 1e-10
    assert relative_error(to_generator, torch.stack(fooled)) < 1e-10
    named = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    players = {name for name in named if name.startswith("learner.")}
    for loss, expected, of in ((losses, supposed, players), (to_generator, fooled, named.keys() - players)):
        chosen = {name: named[name] for name in of}
        assert_close(gradients(loss.mean(), chosen), gradients(torch.stack(expected).mean(), chosen), 1e-9)


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("backend", ["fused", "fallback"])
def test_with_an_inner_loop_it_is_the_papers(weight, backend):
    model = network()
    learner = metagan(mf.MAML(model, inner_lr=0.3, inner_steps=2, backend=backend), weight=weight)

    def logits(x, y, query_x, fakes, support_fakes, constant=False):
        def inner(prediction, _):
            real, fake = with_fake_class(prediction).split([len(x), FAKES])
            return -real.gather(1, y[:, None]).mean() - weight * fake[:, WAYS].mean()

        start = dict(model.named_parameters())
        weights = descended(model, start, dict.fromkeys(start, 0.3), torch.cat([x, support_fakes]), y, 2, inner)
        if constant:
            weights = {name: value.detach() for name, value in weights.items()}
        return functional_call(model, weights, (query_x,)), functional_call(model, weights, (fakes,))

    assert_the_papers(learner, logits, F.cross_entropy)


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_without_one_it_is_the_papers(weight, loss):
    learner = of_relations(loss, weight=weight)
    encoder, g = learner.learner.model, learner.learner.relation

    def logits(x, y, query_x, fakes, support_fakes, constant=False):
        classes = torch.stack([encoder(x[y == way]).sum(0) for way in range(WAYS)])

        def relations(queries):
            pairs = torch.stack([torch.cat([classes, each.expand(WAYS, -1)], 1) for each in encoder(queries)])
            return g.last(g.second(g.first(pairs).relu()).relu()).squeeze(-1)

        return relations(query_x), relations(fakes)

    def squares(prediction, y):
        return (prediction.sigmoid() - F.one_hot(y, WAYS)).square().mean()

    assert_the_papers(learner, logits, F.cross_entropy if loss == "cross_entropy" else squares)


@both
def test_a_meta_step_moves_the_discriminator_and_then_the_generator_against_the_new_one(made):
    learner, batch = made(), class_tasks(5)
    other = copy.deepcopy(learner)
    of_discriminator = [value for value in learner.learner.parameters() if value.requires_grad]
    of_generator = [*learner.generator.parameters(), *learner.task_encoder.parameters()]
    torch.manual_seed(0)
    found = learner.meta_step(batch, [torch.optim.SGD(of_discriminator, 0.1), torch.optim.SGD(of_generator, 0.2)])

    def descend(loss, modules, rate):
        values = [value for module in modules for value in module.parameters() if value.requires_grad]
        with torch.no_grad():
            for value, gradient in zip(values, torch.autograd.grad(loss, values), strict=True):
                value -= rate * gradient

    torch.manual_seed(0)
    fakes = other.make(batch.support_x)
    others = other.make(batch.support_x).detach() if made is of_maml else None
    out, losses = other.discriminator_losses(batch, fakes.detach(), others)
    descend(losses.mean(), [other.learner], 0.1)
    descend(other.generator_losses(batch, fakes, others).mean(), [other.generator, other.task_encoder], 0.2)
    for (name, value), expected in zip(learner.named_parameters(), other.parameters(), strict=True):
        assert relative_error(value, expected) < 1e-12, name
    assert torch.equal(found.task_losses, out.task_losses)
    assert torch.equal(found.accuracy, out.accuracy)


@both
def test_each_step_leaves_the_other_players_parameters_alone(made):
    batch = class_tasks(5)
    for still in ("learner.", "generator."):
        learner = made()
        before = copy.deepcopy(learner.state_dict())
        optimizers = learner.optimizers()
        optimizers[0 if still == "learner." else 1].param_groups[0]["lr"] = 0.0
        learner.meta_step(batch, optimizers)
        moved = {name for name, value in learner.state_dict().items() if not torch.equal(value, before[name])}
        assert moved
        assert not [name for name in moved if name.startswith(still)]


@pytest.mark.parametrize(
    "base", [lambda: mf.MAML(network(), 0.3), lambda: mf.RelationNet(network(None)).double()], ids=["maml", "relations"]
)
def test_of_weight_0_it_trains_as_its_base_does(base):
    torch.manual_seed(1)
    alone = base()
    learner = metagan(copy.deepcopy(alone), weight=0.0)
    batches = [class_tasks(5) for _ in range(3)]
    for each in (alone, learner):
        optimizers = each.optimizers(0.01)
        for batch in batches:
            each.meta_step(batch, optimizers)
    for value, expected in zip(learner.learner.parameters(), alone.parameters(), strict=True):
        assert torch.equal(value, expected)
    assert torch.equal(learner(batches[0]).task_losses, alone(batches[0]).task_losses)


@both
def test_a_task_is_always_learned_in_the_same_way(made):
    """In evaluation: nothing is drawn."""
    learner, batch = made().eval(), class_tasks(5)
    state = torch.get_rng_state()
    predictions = [learner.adapt(batch.support_x, batch.support_y)(batch.query_x) for _ in range(2)]
    assert torch.equal(*predictions)
    assert torch.equal(torch.get_rng_state(), state)
    assert predictions[0].shape == (3, 9, WAYS)
    assert mf.check_gradients(learner, batch).order == "exact"


def test_fakes_are_of_their_task():
    learner, batch = of_maml().eval(), class_tasks(5)
    fakes = learner.make(batch.support_x)
    assert fakes.shape == (3, FAKES, 5)
    for task in range(3):
        assert relative_error(fakes[task], fakes_of(learner, batch.support_x[task], learner.turns)) < 1e-12
    pictures = mf.MetaGAN(conv4(WAYS, (1, 16, 16), hidden=4)).make(torch.rand(2, 3, 1, 16, 16))
    assert pictures.shape == (2, 5, 1, 16, 16)
    assert 0 < float(pictures.detach().min()) < float(pictures.detach().max()) < 1


@both
def test_it_learns_what_is_real(made):
    """Queries are thought real, and fakes of a generator that stands still are not."""
    torch.manual_seed(0)
    learner = made()
    learner.generator.layers[-2].bias.data += 2.0
    optimizers = learner.optimizers(0.01)
    optimizers[1].param_groups[0]["lr"] = 0.0
    for _ in range(150):
        learner.meta_step(class_tasks(5, tasks=8), optimizers)
    learner.eval()
    batch = class_tasks(5, tasks=20)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    real, fake = (adapted(x).logsumexp(-1).sigmoid() for x in (batch.query_x, learner.make(batch.support_x)))
    assert float(real.detach().mean()) > 0.8
    assert float(fake.detach().mean()) < 0.2


def test_a_network_becomes_a_maml_that_stays_in_the_fused_engine():
    learner = mf.MetaGAN(conv4(WAYS, (1, 16, 16), hidden=4), inner_lr=0.1, inner_steps=3)
    assert (type(learner.learner), learner.learner.inner_lr, learner.inner_steps) == (mf.MAML, 0.1, 3)
    assert learner.runs_on((1, 16, 16)) == "fused"
    assert learner.transductive
    assert not mf.MetaGAN(mf.RelationNet(conv4(None, (1, 16, 16), hidden=4))).transductive
    assert (mf.MetaGAN(network()).learner.inner_lr, mf.MetaGAN(network()).inner_steps) == (0.4, 1)


@pytest.mark.parametrize("adapt", ["head.*", "*", ["linear1.weight", "head.bias"]])
def test_what_adapts_is_what_the_maml_says(adapt):
    """By name, and never the map that gives fakes their logit of 0."""
    maml = mf.MAML(network(), adapt=adapt, learn_inner_lr=True)
    learner = metagan(maml)
    found = learner.learner.problem().rates
    assert [name.replace("head.layer", "head") for name in found] == list(maml.problem().rates)
    batch = class_tasks(5)
    logits = learner.learner.adapt(batch.support_x, batch.support_y)(batch.query_x)
    assert not logits[..., WAYS].any()
    learner.meta_step(batch, learner.optimizers())
    assert not torch.equal(learner.learner.inner_lr, torch.tensor(0.4).double())
    alone = mf.MetaGAN(nn.Linear(5, WAYS).double(), inner_steps=2)
    assert alone.adapt(batch.support_x, batch.support_y)(batch.query_x).shape == (3, 9, WAYS)


def test_parameters_are_the_users():
    model = network()
    learner = metagan(model)
    learner.meta_step(class_tasks(5), learner.optimizers(0.1))
    names = {id(value): name for name, value in learner.named_parameters()}
    assert all(id(value) in names for value in model.parameters())
    assert model(torch.randn(2, 5).double()).shape == (2, WAYS)  # it has no class of fakes itself


@pytest.mark.parametrize(
    "base", [lambda: mf.RelationNet(network(None)), lambda: mf.ProtoNet(network(None)), lambda: mf.MAML(network())]
)
def test_it_keeps_the_contract_around_any_base(base):
    mf.check_learner(metagan(base()), class_tasks(5))


def test_a_generator_of_ones_own():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(ENCODING, 5)

        def forward(self, encoding, noise):
            return self.linear(encoding) + noise.sum(1, keepdim=True)

    learner, batch = of_maml(generator=Mine()), class_tasks(5)
    before = learner.generator.linear.weight.clone()
    learner.meta_step(batch, learner.optimizers())
    assert not torch.equal(learner.generator.linear.weight, before)
    with pytest.raises(ValueError, match=r"generator must give samples \[N, 5\] \(got \(12, 3\)\)"):
        of_maml(generator=FakeGenerator((3,), NOISE, ENCODING)).make(batch.support_x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": None}, TypeError, r"model must be an nn.Module \(got NoneType\)"),
        (
            {"model": mf.Reptile(network())},
            TypeError,
            r"a MAML or an EncoderLearner \(got Reptile",
        ),
        ({"model": mf.MAML(network(), loss="mse")}, ValueError, r"model must minimise 'cross_entropy', without smooth"),
        ({"model": mf.MAML(network()), "inner_lr": 0.1}, ValueError, r"inner_lr must be None where model is a learner"),
        (
            {"model": mf.MAML(network(), inner_lr=dict.fromkeys(dict(network().named_parameters()), 0.1))},
            ValueError,
            r"model must have the same inner_lr for all parameters \(got a mapping\)",
        ),
        ({"weight": -1.0}, ValueError, r"weight must be >= 0 \(got -1.0\)"),
        ({"fakes": 0}, ValueError, r"fakes must be >= 1 \(got 0\)"),
        ({"noise": 1.5}, TypeError, r"noise must be an integer \(got 1.5\)"),
        ({"encoding": 0}, ValueError, r"encoding must be >= 1 \(got 0\)"),
        ({"generator": 3}, TypeError, r"generator must be an nn.Module or None \(got int\)"),
        ({"seed": None}, TypeError, r"seed must be an integer \(got None\)"),
        ({"head": "nothing"}, ValueError, r"head must name a layer with parameters \(got 'nothing'"),
        ({"inner_lr": -0.1}, ValueError, r"inner_lr must be >= 0"),
        ({"sample_shape": (5, 0)}, ValueError, r"sample_shape must be >= 1 \(got 0\)"),
        (
            {"model": nn.Sequential(nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))},
            ValueError,
            r"sample_shape must be given: Sequential takes any size \(got None\)",
        ),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        mf.MetaGAN(**{"model": network(), **options})


def test_bad_tasks():
    learner, batch = of_maml(), class_tasks(5)
    with pytest.raises(ValueError, match=r"support_y must hold class ids 0..2 \(got 3\)"):
        learner.adapt(batch.support_x, batch.support_y + 1)
    with pytest.raises(ValueError, match=r"support_y must be class ids \(got torch.float64\)"):
        learner.adapt(batch.support_x, F.one_hot(batch.support_y).double())
    with pytest.raises(ValueError, match=r"support_x must hold samples \(5,\) \(got \(4,\)\)"):
        learner.make(batch.support_x[..., :4])
    with pytest.raises(ValueError, match=r"steps must be None for RelationNet, which has no inner loop \(got 2\)"):
        of_relations()(batch, steps=2)
