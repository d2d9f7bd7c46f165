"""PLATIPUS against its paper, one task and one draw at a time, and against the MAML that it is without variance."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.learners.platipus import average, gaussian_divergence
from metaaug_fast.models import conv4, perceptron
from tests.building import backends
from tests.exactness import assert_close, gradients, randn, relative_error
from tests.learners.comparing import class_tasks

LR = 0.3


def model():
    return perceptron(3, (5,), (7,), "tanh").double()


def regressor():
    return perceptron(2, (5,), (7,), "tanh").double()


def number_tasks(tasks=3, support=4, queries=6):
    return mf.TaskBatch(*(randn(tasks, each, size) for each in (support, queries) for size in (5, 2)))


def spread(learner):
    """The learner in float64, with standard deviations and step sizes all of its own."""
    learner = learner.double()
    with torch.no_grad():
        for value in (learner.log_prior_std, learner.log_posterior_std):
            value.copy_(torch.empty_like(value).uniform_(-2, -1))
        for value in (learner.gamma_p, learner.gamma_q):
            value.copy_(torch.rand(()) / 2)
    return learner


def unpacked(net, flat):
    values, begin = {}, 0
    for name, value in net.named_parameters():
        values[name] = flat[begin : begin + value.numel()].view(value.shape)
        begin += value.numel()
    return values


def packed(net):
    return torch.cat([value.flatten() for value in net.parameters()])


def loss_at(net, flat, x, y, loss):
    return loss(functional_call(net, unpacked(net, flat), (x,)), y)


def slope(net, flat, x, y, loss):
    return torch.autograd.grad(loss_at(net, flat, x, y, loss), flat, create_graph=True)[0]


def descended(net, flat, x, y, loss, steps):
    for _ in range(steps):
        flat = flat - LR * slope(net, flat, x, y, loss)
    return flat


def unbatched(learner, batch, noise, loss, steps, weight):
    """Losses of algorithm 1's objective, for noise `[T, P]`."""
    net, losses = learner.model, []
    mu = packed(net)
    for x, y, query_x, query_y, epsilon in zip(*batch.tensors, noise, strict=True):
        on_support, on_query = slope(net, mu, x, y, loss), slope(net, mu, query_x, query_y, loss)
        p = torch.distributions.Normal(mu - learner.gamma_p * on_support, learner.log_prior_std.exp())
        q = torch.distributions.Normal(mu - learner.gamma_q * (on_support + on_query), learner.log_posterior_std.exp())
        phi = descended(net, q.mean + q.stddev * epsilon, x, y, loss, steps)
        divergence = torch.distributions.kl_divergence(q, p).sum()
        losses.append(loss_at(net, phi, query_x, query_y, loss) + weight * divergence)
    return torch.stack(losses)


def noise_of_training(learner, tasks):
    """What `forward` draws from torch's generator as it stands."""
    with torch.random.fork_rng(devices=[]):
        return learner._noise(learner.problem(), tasks)


CASES = {"classes": (model, class_tasks, "cross_entropy", F.cross_entropy)}
CASES["numbers"] = (regressor, lambda *_: number_tasks(), "mse", F.mse_loss)


@backends
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [1, 3])
def test_training_is_the_papers(case, steps, backend):
    net, draw, name, loss = CASES[case]
    options = {"inner_lr": LR, "inner_steps": steps, "kl_weight": 0.05, "loss": name, "backend": backend}
    learner, batch = spread(mf.PLATIPUS(net(), **options)), draw(5)
    noise = noise_of_training(learner, 3)
    assert noise.std() > 0.5
    out = learner(batch)
    expected = unbatched(learner, batch, noise, loss, steps, 0.05)
    named = dict(learner.named_parameters())
    assert len(named) == 4 + 4
    assert relative_error(out.task_losses, expected) < 1e-10
    assert torch.allclose(out.loss, expected.mean(), rtol=1e-10)
    assert_close(gradients(out.loss, named), gradients(expected.mean(), named), 1e-9)
    assert (out.accuracy is None) == (case == "numbers")
    other = learner(batch)
    assert relative_error(other.task_losses, out.task_losses) > 1e-5  # of other noise


@backends
@pytest.mark.parametrize("case", CASES)
def test_testing_is_the_papers(case, backend):
    net, make, name, loss = CASES[case]
    options = {"inner_lr": LR, "inner_steps": 2, "draws": 4, "loss": name, "backend": backend}
    learner, batch = spread(mf.PLATIPUS(net(), **options)).eval(), make(5)
    named = dict(learner.named_parameters())
    noise = torch.randn(4, len(learner.log_prior_std), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mu, losses, each = packed(learner.model), [], []
    for x, y, query_x, query_y in zip(*batch.tensors, strict=True):
        mean = mu - learner.gamma_p * slope(learner.model, mu, x, y, loss)
        outputs = []
        for epsilon in noise:
            phi = descended(learner.model, mean + learner.log_prior_std.exp() * epsilon, x, y, loss, 2)
            outputs.append(functional_call(learner.model, unpacked(learner.model, phi), (query_x,)))
        outputs = torch.stack(outputs)
        classes = case == "classes"
        mean = outputs.softmax(-1).mean(0).log() if classes else outputs.mean(0)
        losses.append(F.nll_loss(mean, query_y) if classes else loss(mean, query_y))
        each.append(outputs)
    expected = torch.stack(losses)
    slopes = gradients(expected.mean(), named)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    assert relative_error(adapted.each(batch.query_x), torch.stack(each)) < 1e-10
    for out in (learner(batch), adapted.evaluate(batch.query_x, batch.query_y)):
        assert relative_error(out.task_losses, expected) < 1e-10
        assert_close(gradients(out.loss, named), slopes, 1e-9)
    if classes:
        predictions = adapted(batch.query_x)
        assert torch.allclose(predictions.exp().sum(-1), torch.ones(()).double())
        right = (predictions.argmax(-1) == batch.query_y).double().mean(-1)
        assert torch.equal(learner(batch).accuracy, right)


def without_variance(net, **options):
    return mf.PLATIPUS(net, init_std=1e-30, gamma_p=0.0, gamma_q=0.0, **options).double()


@backends
@pytest.mark.parametrize("case", CASES)
def test_without_variance_it_is_maml(case, backend):
    net, make, name, _ = CASES[case]
    net, batch = net(), make(5)
    options = {"inner_lr": LR, "inner_steps": 2, "loss": name, "backend": backend}
    platipus, maml = without_variance(net, kl_weight=1.0, **options), mf.MAML(net, **options)
    named = dict(net.named_parameters())
    expected = maml(batch)
    for mode in (True, False):
        out = platipus.train(mode)(batch)
        assert relative_error(out.task_losses, expected.task_losses) < 1e-12
        assert_close(gradients(out.loss, named), gradients(maml(batch).loss, named), 1e-9)
        assert (out.accuracy is None and expected.accuracy is None) or torch.equal(out.accuracy, expected.accuracy)


def test_without_variance_pictures_are_mamls_too():
    """With batch norms, which the loop over support and the one over queries each apply to its own."""
    net, batch = conv4(3, (1, 16, 16), hidden=3).double(), class_tasks(1, 16, 16)
    platipus, maml = without_variance(net, inner_lr=LR), mf.MAML(net, inner_lr=LR)
    named = dict(net.named_parameters())
    out, expected = platipus(batch), maml(batch)
    assert platipus.transductive
    assert relative_error(out.task_losses, expected.task_losses) < 1e-10
    assert_close(gradients(out.loss, named), gradients(expected.loss, named), 1e-9)


def test_the_first_order_takes_gradients_for_constants():
    learner, batch = spread(mf.PLATIPUS(model(), LR, 2, first_order=True)), class_tasks(5)
    report = mf.check_gradients(learner, batch)
    assert report.order == "first order"
    assert report.ok
    learner.first_order = False
    assert mf.check_gradients(learner, batch).order == "second order"
    assert mf.check_gradients(learner.eval(), batch).order == "exact"


def test_dropout_is_the_specifications():
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 3)).double()
    assert mf.check_gradients(spread(mf.PLATIPUS(net, LR)), class_tasks(5)).order == "second order"


@pytest.mark.parametrize("loss", ["bce", F.smooth_l1_loss])
def test_other_losses(loss):
    options = {"backend": "fallback"} if callable(loss) else {}
    learner = spread(mf.PLATIPUS(regressor(), LR, loss=loss, **options))
    batch = mf.TaskBatch(*(randn(2, 3, 5) if x else torch.rand(2, 3, 2).double() for x in (1, 0, 1, 0)))
    assert mf.check_gradients(learner, batch).order == "second order"
    drawn = learner.adapt(*batch.tensors[:2])
    each = drawn.each(batch.query_x)
    mean = each.mean(1) if callable(loss) else torch.logit(each.sigmoid().mean(1))
    assert relative_error(drawn(batch.query_x), mean) < 1e-12


def test_the_divergence_is_torchs():
    mean, other_mean = randn(2, 3, 9)
    log_std, other_log_std = randn(2, 9)
    p, q = (torch.distributions.Normal(*each) for each in ((other_mean, other_log_std.exp()), (mean, log_std.exp())))
    expected = torch.distributions.kl_divergence(q, p).sum(-1)
    assert relative_error(gaussian_divergence(mean, log_std, other_mean, other_log_std), expected) < 1e-12
    assert gaussian_divergence(mean, log_std, mean, log_std).abs().max() == 0


def test_an_average_of_one_is_the_one():
    logits = randn(2, 1, 5, 3)
    assert relative_error(average("cross_entropy", logits), logits[:, 0].log_softmax(-1)) < 1e-12
    assert relative_error(average("bce", logits), logits[:, 0]) < 1e-12
    assert torch.equal(average("mse", logits), logits[:, 0])


def test_a_task_is_always_learned_in_the_same_way():
    learner, batch = spread(mf.PLATIPUS(model(), LR, draws=3)), class_tasks(5)
    state = torch.random.get_rng_state()
    first = learner.adapt(*batch.tensors[:2]).each(batch.query_x)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(learner.eval().adapt(*batch.tensors[:2]).each(batch.query_x), first)
    alone = learner.adapt(*batch[1].tensors[:2]).each(batch[1].query_x)
    assert relative_error(alone[0], first[1]) < 1e-12
    order = torch.randperm(6)
    turned = learner.adapt(batch.support_x[:, order], batch.support_y[:, order]).each(batch.query_x)
    assert relative_error(turned, first) < 1e-12
    single = copy.deepcopy(learner).float()  # the same draws
    close = single.adapt(batch.support_x.float(), batch.support_y).each(batch.query_x.float())
    assert relative_error(close.double(), first) < 1e-4
    learner.seed = 1
    assert relative_error(learner.adapt(*batch.tensors[:2]).each(batch.query_x), first) > 1e-3


def test_other_draws_can_be_asked_for():
    learner, batch = spread(mf.PLATIPUS(model(), LR, 2, draws=3)), class_tasks(5)
    support, x = batch.tensors[:2], batch.query_x
    assert learner.adapt(*support).each(x).shape == (3, 3, 9, 3)
    assert learner.adapt(*support, draws=5).each(x).shape == (3, 5, 9, 3)
    one, same, next_one = (
        learner.adapt(*support, generator=generator).each(x)
        for generator in (torch.Generator().manual_seed(7), *[torch.Generator().manual_seed(7)] * 2)
    )
    assert torch.equal(one, same)
    assert relative_error(next_one, one) > 1e-3
    unmoved = learner.adapt(*support, steps=0)
    assert relative_error(unmoved.fast.flat.std(0), learner.log_prior_std.exp()) < 1.0
    by_step = learner.by_step(batch)
    assert len(by_step) == 3
    assert torch.equal(by_step[0].task_losses, unmoved.evaluate(x, batch.query_y).task_losses)
    assert torch.equal(by_step[2].task_losses, learner.eval()(batch).task_losses)
    assert not by_step[2].loss.requires_grad


def test_one_task():
    learner, batch = spread(mf.PLATIPUS(model(), LR, draws=4)), class_tasks(5)
    many, one = learner.adapt(*batch[:1].tensors[:2]), learner.adapt(batch.support_x[0], batch.support_y[0])
    assert len(one) == 1
    assert one.each(batch.query_x[0]).shape == (4, 9, 3)
    assert torch.equal(one.each(batch.query_x[0]), many.each(batch.query_x[:1])[0])
    assert torch.equal(one(batch.query_x[0]), many(batch.query_x[:1])[0])


def test_sample_weights_weigh_in_every_gradient_of_support():
    learner, batch = spread(mf.PLATIPUS(model(), LR)), class_tasks(5)
    weight = torch.tensor([2.0, 0, 1, 0, 1, 2]).double().repeat(3, 1)
    rows = torch.tensor([0, 0, 2, 4, 5, 5])
    repeated = mf.TaskBatch(batch.support_x[:, rows], batch.support_y[:, rows], *batch.tensors[2:])
    for mode in (True, False):
        losses = []
        for tasks, options in ((batch, {"sample_weight": weight}), (repeated, {})):
            torch.manual_seed(3)
            losses.append(learner.train(mode)(tasks, **options).task_losses)
        assert relative_error(*losses) < 1e-12


def test_what_does_not_adapt_is_not_drawn():
    learner, batch = mf.PLATIPUS(model(), LR, draws=3, init_std=1.0, adapt="head.*").double(), class_tasks(5)
    flat = learner.adapt(*batch.tensors[:2]).fast.flat
    still = sum(value.numel() for name, value in learner.model.named_parameters() if not name.startswith("head"))
    assert torch.equal(flat[:, :still], packed(learner.model)[:still].expand(9, -1))
    assert flat[:, still:].std(0).min() > 0
    named = dict(learner.named_parameters())
    found = gradients(learner(batch).loss, named)
    assert found["log_prior_std"][:still].abs().max() == 0
    assert found["log_prior_std"][still:].abs().min() > 0
    assert mf.check_gradients(learner, batch).order == "second order"


def test_the_divergence_comes_in_gradually():
    learner, batch = spread(mf.PLATIPUS(model(), LR, kl_weight=2.0, kl_steps=4)), class_tasks(5)
    optimizers = [torch.optim.SGD(learner.parameters(), 0.0)]
    losses = []
    for _ in range(6):
        torch.manual_seed(5)
        losses.append(float(learner.meta_step(batch, optimizers).loss.detach()))
    rises = torch.tensor(losses).diff()
    assert torch.allclose(rises[:4], rises[0].expand(4), rtol=1e-4)
    assert rises[0] > 0
    assert rises[4] == 0
    resumed = mf.PLATIPUS(model(), LR, kl_weight=2.0, kl_steps=4).double()
    resumed.load_state_dict(learner.state_dict())
    torch.manual_seed(5)
    assert float(resumed(batch).loss.detach()) == losses[-1]
    at_once = mf.PLATIPUS(model(), LR, kl_weight=2.0).double()
    at_once.load_state_dict(learner.state_dict())
    torch.manual_seed(5)
    assert float(at_once(batch).loss.detach()) == losses[-1]


def test_it_keeps_the_contract():
    clauses = mf.check_learner(mf.PLATIPUS(model(), draws=3), class_tasks(5)).clauses
    assert {clause for clause, outcome in clauses.items() if outcome != "kept"} == {
        "predictions permute with the labels"
    }
    mf.check_learner(mf.PLATIPUS(regressor(), draws=3, loss="mse"), number_tasks())
    assert isinstance(pickle.loads(pickle.dumps(mf.PLATIPUS(model()))), mf.PLATIPUS)


@pytest.mark.slow
def test_draws_cover_what_a_point_leaves_open():
    """y is +2 or -2 everywhere, which a point at x = 0, where it is always 0, does not tell."""

    def ambiguous(tasks):
        sign = torch.randint(2, (tasks, 1, 1)) * 4.0 - 2.0
        x = torch.rand(tasks, 10, 1) + 1
        return mf.TaskBatch(torch.zeros(tasks, 1, 1), torch.zeros(tasks, 1, 1), x, sign.expand(-1, 10, -1))

    torch.manual_seed(0)
    learner = mf.PLATIPUS(perceptron(1, (1,), (20,), "tanh"), 0.01, kl_weight=0.02, gamma_q=0.05, loss="mse", draws=40)
    optimizers = learner.optimizers(0.003)
    for _ in range(1500):
        learner.meta_step(ambiguous(25), optimizers)
    batch = ambiguous(1)
    each = learner.adapt(*batch.tensors[:2]).each(batch.query_x).detach().mean((0, 2, 3))
    assert (each > 1).sum() >= 3
    assert (each < -1).sum() >= 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 0}, ValueError, r"draws must be >= 1 \(got 0\)"),
        ({"draws": 2.0}, TypeError, r"draws must be an integer \(got 2.0\)"),
        ({"kl_weight": -1.0}, ValueError, r"kl_weight must be >= 0 \(got -1.0\)"),
        ({"kl_steps": -1}, ValueError, r"kl_steps must be >= 0 \(got -1\)"),
        ({"init_std": 0.0}, ValueError, r"init_std must be > 0 \(got 0.0\)"),
        ({"gamma_p": -0.1}, ValueError, r"gamma_p must be >= 0 \(got -0.1\)"),
        ({"gamma_q": "big"}, TypeError, r"gamma_q must be a number \(got 'big'\)"),
        (
            {"batch_norm": "per_step"},
            ValueError,
            r"batch_norm must be one of batch, running, frozen \(got 'per_step'\)",
        ),
        ({"seed": -1}, ValueError, r"seed must be >= 0 \(got -1\)"),
        ({"inner_steps": -1}, ValueError, r"inner_steps must be >= 0 \(got -1\)"),
        ({"adapt": "tail.*"}, ValueError, r"adapt must name parameters of the model"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        mf.PLATIPUS(model(), **options)


def test_bad_calls():
    learner, batch = mf.PLATIPUS(model()).double(), class_tasks(5)
    with pytest.raises(ValueError, match=r"draws must be >= 1 \(got 0\)"):
        learner.adapt(*batch.tensors[:2], draws=0)
    wrong = mf.TaskBatch(*batch.tensors[:3], batch.query_y + 1)
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"query_y must hold class ids 0..2 \(got 3\)"):
            learner.train(mode)(wrong)
    drawn = learner.adapt(*batch.tensors[:2])
    with pytest.raises(ValueError, match=r"x must be \[3, samples, ...\] with samples > 0"):
        drawn.each(batch.query_x[:2])
