"""`Reptile` against loops over `torch.optim`, its shuffled batches, and its state."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaaug_fast as mf
from metaaug_fast.errors import NonFiniteError
from metaaug_fast.learners.reptile import Reptile
from metaaug_fast.tasks import TaskBatch
from tests.building import C, F, S, T, backends, tasks
from tests.building import perceptron as model


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def adapted(start: nn.Module, x: Tensor, y: Tensor, optimizer: str, steps: int, lr: float) -> nn.Module:
    """What torch's own optimizer makes of a copy of the model on one task."""
    net = copy.deepcopy(start)
    kinds = {"sgd": lambda: torch.optim.SGD(net.parameters(), lr)}
    kinds["adam"] = lambda: torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.999))
    inner = kinds[optimizer]()
    for _ in range(steps):
        inner.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        inner.step()
    return net


@backends
@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_batched_is_algorithm_2(optimizer: str, measure: bool, backend: str) -> None:
    net, batch = model(), tasks()
    ends = [adapted(net, batch.support_x[i], batch.support_y[i], optimizer, 4, 0.05) for i in range(T)]
    mean = torch.stack([weights(end) for end in ends]).mean(0)
    expected = weights(net) + 0.3 * (mean - weights(net))
    out = Reptile(net, 0.05, 4, optimizer, meta_lr=0.3, backend=backend).step(batch, measure)
    assert (weights(net) - expected).norm() < 1e-9 * expected.norm()
    if measure:
        losses = [nn.functional.cross_entropy(ends[i](batch.query_x[i]), batch.query_y[i]) for i in range(T)]
        hits = [(ends[i](batch.query_x[i]).argmax(-1) == batch.query_y[i]).double().mean() for i in range(T)]
        assert torch.allclose(out.task_losses, torch.stack(losses).detach(), rtol=1e-9)
        assert torch.equal(out.accuracy, torch.stack(hits))
        assert torch.equal(out.loss, out.task_losses.mean())
        assert not out.loss.requires_grad
    else:
        assert out is None


@backends
@pytest.mark.parametrize("measure", [True, False])
def test_serial_is_algorithm_1(measure: bool, backend: str) -> None:
    net, batch = model(), tasks()
    expected, losses = copy.deepcopy(net), []
    for i in range(T):
        end = adapted(expected, batch.support_x[i], batch.support_y[i], "adam", 4, 0.05)
        losses.append(nn.functional.cross_entropy(end(batch.query_x[i]), batch.query_y[i]).detach())
        with torch.no_grad():
            for value, goal in zip(expected.parameters(), end.parameters(), strict=True):
                value += 0.3 * (goal - value)
    out = Reptile(net, 0.05, 4, meta_lr=0.3, batched=False, backend=backend).step(batch, measure)
    assert (weights(net) - weights(expected)).norm() < 1e-9 * weights(expected).norm()
    assert out is None or torch.allclose(out.task_losses, torch.stack(losses), rtol=1e-9)


@backends
def test_only_adapted_parameters_move(backend: str) -> None:
    net = model()
    before = copy.deepcopy(net)
    reptile = Reptile(net, 0.05, adapt="2.*", backend=backend)
    reptile.step(tasks())
    assert torch.equal(net[0].weight, before[0].weight)
    assert not torch.equal(net[2].weight, before[2].weight)
    reptile.meta_lr, moved = 0.0, weights(net)
    reptile.step(tasks())
    assert torch.equal(weights(net), moved)


def test_it_moves_alike_where_torch_adds_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, nets = tasks(), [model()]
    nets.append(copy.deepcopy(nets[0]))
    Reptile(nets[0], 0.05).step(batch)
    monkeypatch.delattr(torch, "_foreach_add_")
    Reptile(nets[1], 0.05).step(batch)
    assert torch.equal(weights(nets[0]), weights(nets[1]))


@backends
def test_it_learns_and_the_forward_pass_measures(backend: str) -> None:
    x = torch.randn(T, 20, F).double()
    batch = TaskBatch(x, x[..., :C].argmax(-1), x, x[..., :C].argmax(-1))
    reptile = Reptile(model(), 0.02, 3, backend=backend)
    before, state = reptile(batch), weights(reptile)
    assert torch.equal(weights(reptile), state)
    assert not before.loss.requires_grad
    assert torch.allclose(reptile.step(batch).task_losses, before.task_losses, rtol=1e-9)
    for _ in range(60):
        reptile.step(batch, measure=False)
    assert reptile(batch).loss < 0.5 * before.loss
    assert reptile(batch, steps=20).loss != reptile(batch).loss


# --- what the inner steps are combined to ---


@backends
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("combine", ["sum", "mean", "last"])
def test_gradients_are_combined(combine: str, size: int | None, backend: str) -> None:
    """Of SGD: g1 + g2 + g3, a third of it, or g3 (first-order MAML)."""
    net, batch = model(), tasks()
    reptile = Reptile(net, 0.1, 3, "sgd", 0.7, size, combine=combine, seed=2, backend=backend)
    rows = reptile._rows(batch.support_x, batch.support_y, 3, torch.Generator().manual_seed(2))
    moves = []
    for task in range(T):
        end, found = copy.deepcopy(net), []
        for step in range(3):
            seen = slice(None) if rows is None else rows[task, step]
            loss = nn.functional.cross_entropy(end(batch.support_x[task, seen]), batch.support_y[task, seen])
            found.append(nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(end.parameters()))))
            end = adapted(end, batch.support_x[task, seen], batch.support_y[task, seen], "sgd", 1, 0.1)
        moves.append({"sum": sum(found), "mean": sum(found) / 3, "last": found[-1]}[combine])
    expected = weights(net) - 0.7 * 0.1 * torch.stack(moves).mean(0)
    before = weights(net)
    reptile.step(batch)
    assert (weights(net) - expected).norm() < 1e-9 * (expected - before).norm()


@pytest.mark.parametrize("batched", [True, False])
def test_the_last_step_of_adam(batched: bool) -> None:
    """Whose moments come from all steps before."""
    net, batch = model(), tasks()
    expected = copy.deepcopy(net)
    for chunk in [batch] if batched else batch.split(1):
        ends = [
            [adapted(expected, x, y, "adam", steps, 0.05) for steps in (3, 4)]
            for x, y in zip(chunk.support_x, chunk.support_y, strict=True)
        ]
        move = torch.stack([weights(last) - weights(before) for before, last in ends]).mean(0)
        nn.utils.vector_to_parameters(weights(expected) + 0.3 * move, expected.parameters())
    Reptile(net, 0.05, 4, meta_lr=0.3, batched=batched, combine="last").step(batch)
    assert (weights(net) - weights(expected)).norm() < 1e-9 * weights(expected).norm()


@backends
def test_the_last_step_is_that_of_the_same_dropout(backend: str) -> None:
    net, batch, ends = model(nn.Tanh(), nn.Dropout(0.5)), tasks(), []
    for steps, combine in ((2, "sum"), (3, "sum"), (3, "last")):
        twin = copy.deepcopy(net)
        torch.manual_seed(7)
        Reptile(twin, 0.1, steps, "sgd", combine=combine, backend=backend).step(batch)
        ends.append(weights(twin) - weights(net))
    assert (ends[1] - ends[0] - ends[2]).norm() < 1e-9 * ends[2].norm()


@pytest.mark.parametrize("combine", ["sum", "mean", "last"])
def test_no_steps_are_nothing_to_combine(combine: str) -> None:
    net, batch = model(), tasks()
    before = weights(net)
    Reptile(net, inner_steps=0, combine=combine).step(batch)
    assert torch.equal(weights(net), before)


# --- each query alone ---


def normed() -> nn.Sequential:
    return model(nn.BatchNorm1d(7), nn.Tanh())


@backends
def test_each_query_is_predicted_alone_behind_the_support_set(backend: str) -> None:
    net, batch = normed(), tasks()
    reptile = Reptile(net, 0.05, 3, together=False, backend=backend)
    assert not reptile.transductive
    rows = []
    for task in range(T):
        x, y = batch.support_x[task], batch.support_y[task]
        end = adapted(net, x, y, "adam", 3, 0.05)
        rows.append(torch.stack([end(torch.cat([x, query[None]]))[-1] for query in batch.query_x[task]]).detach())
    expected = torch.stack(rows)
    fast = reptile.adapt(batch.support_x, batch.support_y)
    assert (fast(batch.query_x) - expected).norm() < 1e-9 * expected.norm()
    assert (fast.detach()(batch.query_x) - expected).norm() < 1e-9 * expected.norm()
    one = reptile.adapt(batch.support_x[1], batch.support_y[1])
    assert (one(batch.query_x[1]) - expected[1]).norm() < 1e-9 * expected.norm()
    out = reptile(batch)
    losses = torch.stack([nn.functional.cross_entropy(*each) for each in zip(expected, batch.query_y, strict=True)])
    assert torch.allclose(out.task_losses, losses, rtol=1e-9)
    assert torch.equal(out.accuracy, (expected.argmax(-1) == batch.query_y).double().mean(-1))
    assert torch.allclose(reptile.by_step(batch)[-1].task_losses, losses, rtol=1e-9)
    together = Reptile(net, 0.05, 3, backend=backend)
    assert together.transductive
    assert not torch.allclose(together(batch).task_losses, losses, rtol=1e-3)


def test_alone_it_keeps_the_contract() -> None:
    report = mf.check_learner(Reptile(normed(), together=False), tasks())
    assert report.clauses["transductive says whether queries see each other"] == "kept"


def test_without_batch_norms_queries_are_predicted_at_once() -> None:
    reptile, batch = Reptile(model(), together=False), tasks()
    assert type(reptile.adapt(batch.support_x, batch.support_y)) is mf.FastWeights


def test_queries_that_do_not_fit_the_support_set() -> None:
    reptile, batch = Reptile(normed(), together=False), tasks()
    fast = reptile.adapt(batch.support_x, batch.support_y)
    with pytest.raises(ValueError, match=r"x must hold samples of the support set's shape \(4,\) \(got \(3,\)\)"):
        fast(batch.query_x[..., :3])
    with pytest.raises(
        ValueError, match=r"x must be as the support samples, torch.float64 on cpu \(got torch.float32 on"
    ):
        fast(batch.query_x.float())


# --- minibatches ---


@pytest.mark.parametrize(("steps", "size"), [(6, 4), (3, 6), (5, 7), (4, 1), (0, 2)])
def test_every_sample_is_seen_before_one_comes_again(steps: int, size: int) -> None:
    reptile, batch = Reptile(model(), inner_batch=size), tasks()
    rows = reptile._rows(batch.support_x, batch.support_y, steps, torch.Generator().manual_seed(1))
    assert rows.shape == (T, steps, size)
    for task in rows.flatten(1).tolist():
        rounds = [sorted(task[first : first + S]) for first in range(0, len(task), S)]
        assert all(each == list(range(S)) for each in rounds[:-1])
        assert not rounds or len(set(rounds[-1])) == len(rounds[-1])
    if steps > 1:
        assert not torch.equal(rows[0], rows[1])
        assert rows[0].flatten().tolist() != sorted(rows[0].flatten().tolist())


@backends
def test_minibatches_are_what_the_inner_steps_see(backend: str) -> None:
    net, batch = model(), tasks()
    reptile = Reptile(net, 0.05, 4, "sgd", inner_batch=4, seed=3, backend=backend)
    rows = reptile._rows(batch.support_x, batch.support_y, 4, torch.Generator().manual_seed(3))
    ends = []
    for x, y, seen in zip(batch.support_x, batch.support_y, rows, strict=True):
        end = net
        for row in seen:
            end = adapted(end, x[row], y[row], "sgd", 1, 0.05)
        ends.append(weights(end))
    fast = reptile.adapt(batch.support_x, batch.support_y)
    assert (fast.flat - torch.stack(ends)).norm() < 1e-9 * fast.flat.norm()
    reptile.step(batch)  # a fresh learner's first step draws the same batches
    assert (weights(net) - torch.stack(ends).mean(0)).norm() < 1e-9 * weights(net).norm()


@backends
@pytest.mark.parametrize("batched", [True, False])
def test_a_seed_and_a_state_dict_fix_everything_that_follows(batched: bool, backend: str) -> None:
    options = {"inner_lr": 0.05, "inner_batch": 4, "batched": batched, "backend": backend}
    net, batch = model(), tasks()
    first, second = (Reptile(copy.deepcopy(net), **options, seed=5) for _ in range(2))
    other = Reptile(copy.deepcopy(net), **options, seed=6)
    for reptile in (first, second, other):
        reptile.step(batch)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    twin = copy.deepcopy(first)
    first.adapt(batch.support_x, batch.support_y)  # draws from a stream of its own
    for reptile in (first, twin, other):
        reptile.step(batch)
    assert torch.equal(weights(first), weights(twin))
    assert torch.equal(weights(first), weights(other))
    assert not torch.equal(weights(first), weights(second))


@backends
def test_adapting_again_gives_the_same(backend: str) -> None:
    reptile, batch = Reptile(model(), 0.05, inner_batch=2, backend=backend), tasks()
    first, second = (reptile.adapt(batch.support_x, batch.support_y, steps=7).flat for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": -1e-3}, r"inner_lr must be >= 0 and finite \(got -0.001\)"),
        ({"inner_steps": -1}, r"steps must be >= 0 \(got -1\)"),
        ({"inner_optimizer": "lion"}, r"optimizer must be one of sgd, adam \(got 'lion'\)"),
        ({"inner_batch": 0}, r"inner_batch must be >= 1 \(got 0\)"),
        ({"betas": (0.0, 1.0)}, r"betas must be >= 0 and below 1 \(got \(0.0, 1.0\)\)"),
        ({"batch_norm": "running"}, r"batch_norm must be one of batch, frozen \(got 'running'\)"),
        ({"combine": "median"}, r"combine must be one of sum, mean, last \(got 'median'\)"),
        ({"model": nn.ReLU()}, "model must have parameters to adapt"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, "adapt must leave a parameter that moves"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reptile(**{"model": model(), **options})


@pytest.mark.parametrize(("meta_lr", "got"), [(-0.1, "-0.1"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_bad_meta_lr(meta_lr: float, got: str) -> None:
    reptile = Reptile(model())
    reptile.meta_lr = meta_lr
    with pytest.raises(ValueError, match=rf"^meta_lr must be (>= 0|finite) \(got {got}\)$"):
        reptile.step(tasks())


@backends
def test_a_nan_leaves_the_model_as_it_was(backend: str) -> None:
    net, batch = model(), tasks()
    before = weights(net)
    batch.support_x[1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="task 1, step 0"):
        Reptile(net, backend=backend).step(batch)
    assert torch.equal(weights(net), before)
