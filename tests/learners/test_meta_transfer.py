"""Meta-transfer learning against its paper: scales and shifts of frozen weights, hard tasks, fine-tuning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.learners import HardTasks
from metaaug_fast.learners.scaling import scaled, scaled_layers
from metaaug_fast.learners.supervised import fit, labelled
from metaaug_fast.models import conv4, strided_conv4
from tests.building import backends, perceptron, same
from tests.exactness import assert_close, relative_error
from tests.learners.comparing import assert_exact, class_tasks, descended


def network():
    """Convolutions with and without groups and bias, a norm that has learned, a linear layer, and a head."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 2, groups=2),
        nn.Flatten(), nn.Linear(18, 5), nn.Tanh(), nn.Linear(5, 3),
    ).double()  # fmt: skip
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net


def steered(learner):
    """With scales and shifts that do something."""
    with torch.no_grad():
        for name, value in learner.model.named_parameters():
            if name.endswith(("scale", "shift")):
                value.add_(0.3 * torch.randn_like(value))
    return learner


@backends
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_it_is_the_papers(steps, backend, batch_norm):
    """A filter of k x k weights has one scale, an output one shift; steps of the head alone."""
    learner = mf.MetaTransfer(network(), 0.3, steps, learn_inner_lr=True, batch_norm=batch_norm, backend=backend)
    conv, norm, _, groups, _, linear, _, head = steered(learner).model

    def body(x):
        x = F.conv2d(x, conv.layer.weight * conv.scale.view(4, 2, 1, 1), conv.shift, padding=1)
        if batch_norm == "frozen":
            mean, variance = norm.running_mean.view(1, -1, 1, 1), norm.running_var.view(1, -1, 1, 1)
        else:
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + norm.eps).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        old = groups.layer
        x = F.conv2d(x.tanh(), old.weight * groups.scale.view(2, 2, 1, 1), old.bias + groups.shift, groups=2)
        old = linear.layer
        return (x.flatten(1) @ (old.weight * linear.scale.view(-1, 1)).T + old.bias + linear.shift).tanh()

    def unbatched(x, y, query_x, query_y):
        start, rates = dict(head.named_parameters()), dict.fromkeys(("weight", "bias"), learner.inner_lr)
        adapted = descended(head, start, rates, body(x), y, steps)
        return F.cross_entropy(functional_call(head, adapted, (body(query_x),)), query_y)

    assert_exact(learner, class_tasks(2, 4, 4), unbatched)
    learns = {name.rpartition(".")[2] for name, value in learner.named_parameters() if value.requires_grad}
    assert learns == {"scale", "shift", "inner_lr", "weight", "bias"}
    assert not any(value.requires_grad for name, value in learner.named_parameters() if ".layer." in name)


def test_ones_and_zeros_leave_the_network_as_it_was():
    for net, shape in ((network(), (2, 4, 4)), (conv4(5, (1, 16, 16), hidden=4).double(), (1, 16, 16))):
        x, before = torch.randn(6, *shape, dtype=torch.float64), copy.deepcopy(net)
        ours = scaled(net, "7" if len(net) == 8 else "head")
        assert relative_error(ours(x), before(x)) < 1e-15
        net.eval(), ours.eval(), before.eval()
        assert relative_error(ours(x), before(x)) < 1e-15


def test_layers_of_ones_own_stay():
    """They may compute something else; a layer that is used twice has one scale."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    twice = nn.Linear(4, 4)
    net = nn.Sequential(twice, Doubled(4, 4), twice, nn.Linear(4, 3))
    ours = mf.MetaTransfer(net).model
    assert isinstance(ours[1], Doubled)
    assert ours[0] is ours[2]
    assert ours[0].layer is twice
    x = torch.randn(5, 4)
    assert torch.equal(ours(x), net(x))
    assert torch.equal(ours[0].weight, twice.weight)  # as a module that reads them would


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_frozen_weights_do_not_move(batch_norm, tmp_path):
    """Nor do running statistics, in meta-training with hard tasks and a target; a resumed run is the same."""

    def parts():
        torch.manual_seed(3)
        dataset = mf.data.ClassSamples.from_arrays(torch.randn(80, 1, 8, 8), torch.arange(80) % 8)
        learner = mf.MetaTransfer(strided_conv4(4, (1, 8, 8), hidden=4), inner_steps=2, batch_norm=batch_norm)
        learner.pretrain(dataset, steps=4)
        learner.join_target(torch.randn(9, 1, 8, 8), torch.arange(9) % 4, 0.5)
        episodes = HardTasks(learner, mf.data.Episodes(dataset, ways=4, shots=2, queries=2, tasks=3), every=2)
        return learner, episodes

    learner, episodes = parts()
    before = copy.deepcopy(learner.state_dict())
    mf.train(learner, episodes, 7, meta_lr=0.05, progress=False)
    moved = {name for name, value in learner.state_dict().items() if not torch.equal(value, before[name])}
    steers = ("scale", "shift") if batch_norm == "frozen" else ("scale",)  # a norm by its batch undoes a shift
    assert moved == {name for name in before if name.endswith(steers) or "head" in name}

    path = tmp_path / "part.safetensors"
    part, episodes = parts()
    mf.train(part, episodes, 4, meta_lr=0.05, checkpoint=path, progress=False)
    again, episodes = parts()
    mf.train(again, episodes, 7, meta_lr=0.05, resume=path, progress=False)
    assert same(dict(again.state_dict()), dict(learner.state_dict()))


def test_pretraining_learns_the_body_alone():
    x = torch.randn(200, 4, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    learner = steered(mf.MetaTransfer(perceptron()))
    before = copy.deepcopy(learner.state_dict())
    losses = [learner.pretrain((x, y), steps=5), learner.pretrain((x, y), epochs=60, lr=0.03)]
    assert losses[1] < 0.3 < losses[0]
    assert all(value.grad is None for value in learner.parameters())
    assert learner.model[0].scale.eq(1).all()
    assert learner.model[0].shift.eq(0).all()
    for name, value in learner.state_dict().items():
        assert torch.equal(value, before[name]) == (".2." in name), name
    assert [value.requires_grad for value in learner.model[0].layer.parameters()] == [False, False]


def test_an_epoch_is_a_pass():
    """Of as many whole batches as there are."""
    x, y = torch.randn(50, 4, dtype=torch.float64), torch.arange(50) % 5
    found = []
    for options in ({"epochs": 3, "batch": 16}, {"steps": 9, "batch": 16}, {"epochs": 4}, {"steps": 4}):
        torch.manual_seed(0)
        found.append(mf.MetaTransfer(perceptron()))
        found[-1].pretrain((x, y), **options)
    assert same(dict(found[0].state_dict()), dict(found[1].state_dict()))
    assert same(dict(found[2].state_dict()), dict(found[3].state_dict()))


def test_a_pretrained_network_is_as_a_classifiers_own():
    """The same steps, written out: Adam along a cosine, batches from a shuffle, the rest of an epoch left."""
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.arange(10) % 2
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    ours = copy.deepcopy(net)
    fit(ours, x, y, 6, lr=0.1, batch=4, seed=5)
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    for step in range(6):
        if step % 2 == 0:
            order = torch.randperm(10, generator=generator)
        rows = order[:4] if step % 2 == 0 else order[4:8]
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + torch.tensor(torch.pi * step / 6).cos().item())
        optimizer.step()
    for one, other in zip(ours.parameters(), net.parameters(), strict=True):
        assert relative_error(one, other) < 1e-6


def test_the_target_joins_the_sum():
    """(sum_i L(T_i) + lambda L(T_target)) / T, for a target of one sample a class."""
    batch, weight, size = class_tasks(4, tasks=3), 2.5, 0.1
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([2, 0, 1])
    learner = steered(mf.MetaTransfer(perceptron(), 0.3, 2))
    plain = copy.deepcopy(learner)
    named = {name: value for name, value in plain.named_parameters() if value.requires_grad}
    target = mf.TaskBatch(x[None], y[None], x[None], y[None])
    total = (plain(batch).task_losses.sum() + weight * plain(target).loss) / 3
    expected = dict(zip(named, torch.autograd.grad(total, [*named.values()]), strict=True))

    learner.join_target(x, y, weight)
    before = {name: value.detach().clone() for name, value in learner.named_parameters()}
    out = learner.meta_step(batch, [torch.optim.SGD(learner.parameters(), size)])
    assert torch.equal(out.loss, plain(batch).loss)
    found = {name: (before[name] - learner.get_parameter(name).detach()) / size for name in named}
    assert_close(found, expected, 1e-9)

    learner.join_target(x, y, 0)
    again = copy.deepcopy(learner)
    again.target = None
    for each in (learner, again):
        each.meta_step(batch, [torch.optim.SGD(each.parameters(), size)])
    assert same(dict(learner.state_dict()), dict(again.state_dict()))


def test_a_target_task_learns_from_half():
    learner = mf.MetaTransfer(perceptron())
    y = torch.tensor([0] * 5 + [1] * 2 + [2])
    x = torch.arange(8.0, dtype=torch.float64)[:, None].expand(-1, 4)
    learner.join_target(x, y)
    tasks = [learner._target_task(torch.device("cpu")) for _ in range(20)]
    for task in tasks:
        assert task.support_y[0].tolist() == [0, 0, 1, 2]
        assert task.query_y[0].tolist() == [0, 0, 0, 1, 2]
        seen = [*task.support_x[0, :, 0].tolist(), *task.query_x[0, :, 0].tolist()]
        assert sorted(seen) == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert len({tuple(task.support_x[0, :, 0].tolist()) for task in tasks}) > 1


class Fails(nn.Module):
    """Knows each sample's class, its first number, and says something else for the classes on which it fails."""

    def __init__(self, on):
        super().__init__()
        self.on = torch.tensor(sorted(on))
        self.weight = nn.Parameter(torch.zeros(()))

    def adapt(self, support_x, support_y):
        def predict(x):
            label = (x[..., :1] == support_x[..., 0].unsqueeze(1)).int().argmax(-1)
            label = support_y.gather(1, label)
            label = torch.where(torch.isin(x[..., 0].long(), self.on), (label + 1) % 4, label)
            return F.one_hot(label, 4).float()

        return predict


@pytest.mark.parametrize("on", [{3, 5}, {0, 2, 4, 6, 8, 10, 12, 14}])
@pytest.mark.parametrize("every", [1, 3])
def test_hard_tasks_hold_the_hardest_classes(on, every):
    """New samples of the classes with the lowest accuracy in each of the tasks before, and others where these are few.

    A sample is its class and its number.
    """
    classes = torch.arange(16).repeat_interleave(30)
    dataset = mf.data.ClassSamples.from_arrays(
        torch.stack([classes, torch.arange(480) % 30], 1).float(), [f"{each:02}" for each in classes.tolist()]
    )
    episodes = mf.data.Episodes(dataset, ways=4, shots=1, queries=3, tasks=5, seed=7)
    tasks = HardTasks(Fails(on), episodes, every)
    seen = set()
    for round_ in range(4):
        found = set()
        for index in range(every):
            batch = next(tasks)
            assert batch == episodes.batch(round_ * every + index)
            for task in range(5):
                present = set(batch.support_x[task, :, 0].int().tolist())
                failure = tasks.failures(round_ * every + index)[task]
                assert failure in present
                assert failure in on or not present & on
                found.add(failure)
        hard = next(tasks)
        assert set(tasks.classes) == found
        for x, y, query_x, query_y in zip(*hard.tensors, strict=True):
            inside = x[:, 0].int().tolist()
            assert len(set(inside)) == 4
            assert len(set(inside) & found) == min(4, len(found))
            assert y.tolist() == [0, 1, 2, 3]
            assert [inside[label] for label in query_y.tolist()] == query_x[:, 0].int().tolist()
            seen |= {tuple(each) for each in query_x.tolist()}
    assert len({number for _, number in seen}) > 10  # not the samples of one task


def test_fine_tuning_learns_what_can_be_told_apart():
    centres = 3 * torch.randn(3, 4, dtype=torch.float64)
    y = torch.arange(300) % 3
    x = centres[y] + 0.1 * torch.randn(300, 4, dtype=torch.float64)
    learner = mf.MetaTransfer(perceptron(), inner_steps=1)
    before = copy.deepcopy(learner.state_dict())
    for learns in ("scale_shift", "head", "weights", "all"):
        classifier = learner.fine_tune(x[:15], y[:15], 300, learns=learns, lr=0.05)
        assert (classifier(x).argmax(1) == y).all()
        assert same(dict(learner.state_dict()), dict(before))
        moved = {
            name for name, value in classifier.state_dict().items() if not torch.equal(value, before[f"model.{name}"])
        }
        assert moved == {
            "scale_shift": {"0.scale", "0.shift", "2.weight", "2.bias"}, "head": {"2.weight", "2.bias"},
            "weights": {"0.layer.weight", "0.layer.bias", "2.weight", "2.bias"},
            "all": {"0.scale", "0.shift", "0.layer.weight", "0.layer.bias", "2.weight", "2.bias"},
        }[learns]  # fmt: skip


def test_norms_while_fine_tuning():
    x, y = torch.randn(9, 2, 4, 4, dtype=torch.float64), torch.arange(9) % 3
    for batch_norm, moves in (("frozen", False), ("batch", True)):
        learner = mf.MetaTransfer(network(), batch_norm=batch_norm)
        classifier = learner.fine_tune(x, y, 3)
        assert torch.equal(classifier[1].running_mean, learner.model[1].running_mean) != moves
        assert not classifier.training
        assert learner.training
        assert torch.allclose(classifier(x)[:2], classifier(x[:2]))


def test_it_keeps_the_contract():
    for backend in ("fused", "fallback"):
        learner = steered(mf.MetaTransfer(network(), 0.1, 3, backend=backend))
        mf.check_learner(learner, class_tasks(2, 4, 4))
        assert mf.check_gradients(learner, class_tasks(2, 4, 4)).order == "second order"
    assert learner.transductive is False
    assert "inner_steps=3" in repr(learner)


def test_samples_of_a_data_set():
    x, y = torch.randint(0, 256, (6, 4, 4), dtype=torch.uint8), torch.tensor([1, 0, 1, 0, 2, 2])
    found = labelled(mf.data.ClassSamples.from_arrays(x, y))
    assert found[1].tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(found[0][:, 0], x[[1, 3, 0, 2, 4, 5]])


def test_bytes_are_pictures():
    x, y = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8), torch.arange(6) % 3
    learner = mf.MetaTransfer(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)))
    as_bytes, as_numbers = (learner.fine_tune(each, y, 2) for each in (x, x.float() / 255))
    assert same(dict(as_bytes.state_dict()), dict(as_numbers.state_dict()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: mf.MetaTransfer(nn.Linear(4, 3)), "model must have a linear layer or a convolution before its head"),
        (lambda: mf.MetaTransfer(perceptron(), head="3"), r"head must name a layer with parameters \(got '3'"),
        (lambda: mf.MetaTransfer(network(), batch_norm="per_step"), r"batch_norm must be one of frozen, batch \(got"),
        (lambda: mf.MetaTransfer(perceptron()).fine_tune(*few(), learns="body"), "learns must be one of scale_shift, "),
        (lambda: mf.MetaTransfer(perceptron()).fine_tune(*few(5)), r"y must be class ids below 3, .* \(got 4\)"),
        (lambda: mf.MetaTransfer(perceptron()).fine_tune(*few(), 0), r"steps must be >= 1 \(got 0\)"),
        (lambda: mf.MetaTransfer(perceptron()).fine_tune(few()[0], few()[0]), r"x and y must be samples \[N, "),
        (lambda: mf.MetaTransfer(perceptron()).pretrain(few(1)), r"data must have at least two classes \(got 1\)"),
        (lambda: mf.MetaTransfer(perceptron()).pretrain(few(), epochs=0), r"epochs must be >= 1 \(got 0\)"),
        (lambda: mf.MetaTransfer(perceptron()).join_target(*few(), -1), r"weight must be >= 0 \(got -1\)"),
        (lambda: HardTasks(None, mf.data.Episodes(mf.data.Sinusoids())), "episodes must be Episodes of labelled "),
        (lambda: HardTasks(None, letters(transform=lambda tasks: tasks)), "episodes must have no transform"),
        (lambda: HardTasks(None, letters(), 0), r"every must be >= 1 \(got 0\)"),
    ],
)  # fmt: skip
def test_bad_settings(change, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        change()
    assert "\n" not in str(caught.value)


def few(classes=3):
    return torch.randn(10, 4, dtype=torch.float64), torch.arange(10) % classes


def letters(**options):
    dataset = mf.data.ClassSamples.from_arrays(torch.randn(40, 4), torch.arange(40) % 8)
    return mf.data.Episodes(dataset, ways=3, shots=1, queries=1, tasks=2, **options)


def test_what_is_not_finite_is_refused():
    x, y = few()
    with pytest.raises(mf.NonFiniteError, match="the loss is nan within 3 steps"):
        mf.MetaTransfer(perceptron()).fine_tune(x * float("nan"), y, 3)


def test_meta_training_is_fused_whatever_mode_its_parts_are_in():
    """As the network of plain layers, whose adapted weights have the user's own names."""
    model = strided_conv4(3, (1, 8, 8), hidden=12)
    learner = mf.MetaTransfer(model, inner_steps=2, backend="fused")
    batch = class_tasks(1, 8, 8).to(torch.float32)
    learner.eval()(batch)
    assert not any(module.training for module in learner.problem().model.modules())
    learner.train()
    assert all(module.training for module in learner.problem().model.modules())
    learner(batch).loss.backward()
    assert all(float(layer.scale.grad.norm()) > 0 for layer in scaled_layers(learner.model))
    fast = learner.adapt(*batch.tensors[:2])
    assert set(fast.as_dict()) >= {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        scaled_layers(learner.model)[0].scale.mul_(2)
    first = next(iter(learner.problem().parameters))
    torch.testing.assert_close(learner.problem().parameters[first], 2 * fast.as_dict()[first][0])


def test_a_run_begins_with_pretraining_unless_it_goes_on():
    data = mf.data.ClassSamples.from_arrays(torch.randn(40, 4), torch.arange(40) % 8)
    episodes = mf.data.Episodes(data, ways=3, shots=1, queries=2, tasks=2, seed=3)
    for steps, resumed in ((0, False), (5, True), (5, False)):
        learner = mf.MetaTransfer(perceptron().float(), pretrain_steps=steps)
        before = copy.deepcopy(learner.state_dict())
        torch.manual_seed(5)  # of the head that is dropped
        tasks = learner.prepare(episodes, resumed=resumed)
        assert isinstance(tasks, HardTasks)
        assert tasks.episodes is episodes
        assert same(dict(learner.state_dict()), dict(before)) == (steps == 0 or resumed)
    twin = mf.MetaTransfer(perceptron().float())
    twin.load_state_dict(before)
    torch.manual_seed(5)
    twin.pretrain(data, 5, seed=3)
    assert same(dict(learner.state_dict()), dict(twin.state_dict()))


def test_meta_training_is_what_a_loop_of_steps_does():
    data = mf.data.ClassSamples.from_arrays(torch.randn(40, 4), torch.arange(40) % 8)
    learner = mf.MetaTransfer(perceptron().float())
    twin, losses = copy.deepcopy(learner), []
    tasks, optimizers = (
        HardTasks(twin, mf.data.Episodes(data, ways=3, queries=2, tasks=2, seed=3)),
        twin.optimizers(0.01),
    )
    for _ in range(20):
        losses.append(float(twin.meta_step(next(tasks), optimizers).loss))
    found = learner.meta_train(mf.data.Episodes(data, ways=3, queries=2, tasks=2, seed=3), 20, meta_lr=0.01)
    assert found == pytest.approx(sum(losses[-2:]) / 2)
    assert same(dict(learner.state_dict()), dict(twin.state_dict()))
    with pytest.raises(ValueError, match=r"steps must be >= 1 \(got 0\)"):
        learner.meta_train(mf.data.Episodes(data, ways=3, queries=2), 0)
    with pytest.raises(ValueError, match=r"pretrain_steps must be >= 0 \(got -1\)"):
        mf.MetaTransfer(perceptron(), pretrain_steps=-1)
