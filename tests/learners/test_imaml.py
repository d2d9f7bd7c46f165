"""iMAML against its paper: the exact implicit gradient, by dense algebra, and its own algorithm without batches."""

import copy
import gc
import math
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.engine.implicit import conjugate_gradients
from tests.building import backends, perceptron
from tests.exactness import assert_close, gradients, relative_error
from tests.learners.comparing import class_tasks

LR, PULL = 0.2, 2.0


def small(*middle):
    """Few weights, so that a Hessian can be written down."""
    return nn.Sequential(nn.Linear(4, 3), *(middle or [nn.Tanh()]), nn.Linear(3, 3)).double()


def pictures():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)).double()


def loss(net, flat, x, y):
    """Of one task's weights `[P]`."""
    values, begin = {}, 0
    for name, value in net.named_parameters():
        values[name] = flat[begin : begin + value.numel()].view(value.shape)
        begin += value.numel()
    return F.cross_entropy(functional_call(net, values, (x,)), y)


def packed(values):
    return torch.cat([value.flatten() for value in values])


def theta_of(net):
    return packed(net.parameters()).detach()


def adapting(learner):
    """1 for weights that adapt, else 0."""
    rates = learner.problem().rates
    return packed([torch.full_like(each, name in rates) for name, each in learner.model.named_parameters()]).detach()


def solved(learner, x, y, start=None):
    """A task's weights after the learner's steps down the loss and the pull."""
    theta = theta_of(learner.model) if start is None else start
    phi, adapts = theta.clone(), adapting(learner)
    for _ in range(learner.inner_steps):
        phi.requires_grad_()
        objective = loss(learner.model, phi, x, y) + learner.proximal / 2 * (phi - theta).square().sum()
        phi = (phi - learner.inner_lr * adapts * torch.autograd.grad(objective, phi)[0]).detach()
    return phi


def by_task(learner, tasks, of_task):
    return torch.stack([of_task(*(each[task] for each in tasks.tensors)) for task in range(tasks.tasks)])


def query_gradient(net, phi, x, y):
    return torch.autograd.grad(loss(net, phi.requires_grad_(), x, y), phi)[0]


def dense(learner, tasks):
    """The exact implicit gradient `[P]`: Hessians of all weights, linear equations in those that adapt."""
    adapts = adapting(learner).bool()

    def of_task(x, y, query_x, query_y):
        phi = solved(learner, x, y)
        hessian = torch.autograd.functional.hessian(partial(loss, learner.model, x=x, y=y), phi)
        g = query_gradient(learner.model, phi, query_x, query_y)
        inner = hessian[adapts][:, adapts] + learner.proximal * torch.eye(int(adapts.sum()), dtype=g.dtype)
        found = g.clone()
        found[adapts] = torch.linalg.solve(inner, learner.proximal * g[adapts])
        found[~adapts] -= hessian[~adapts][:, adapts] @ torch.linalg.solve(inner, g[adapts])
        return found

    return by_task(learner, tasks, of_task).mean(0)


def papers(learner, tasks):
    """Algorithm 2, one task at a time, with so many steps of textbook conjugate gradients."""

    def of_task(x, y, query_x, query_y):
        phi = solved(learner, x, y).requires_grad_()
        g = query_gradient(learner.model, phi, query_x, query_y)
        (slope,) = torch.autograd.grad(loss(learner.model, phi, x, y), phi, create_graph=True)
        solution, r, p = torch.zeros_like(g), g, g
        for _ in range(learner.cg_steps):
            (hp,) = torch.autograd.grad(slope, phi, p, retain_graph=True)
            image = p + hp / (learner.proximal + learner.cg_damping)
            alpha = (r @ r) / (p @ image)
            solution = solution + alpha * p
            rest = r - alpha * image
            p = rest + (rest @ rest) / (r @ r) * p
            r = rest
        return solution

    return by_task(learner, tasks, of_task).mean(0)


def meta_gradient(learner, tasks):
    return packed(gradients(learner(tasks).loss, dict(learner.named_parameters())).values())


@backends
def test_conjugate_gradients_tend_to_the_exact_implicit_gradient(backend):
    net, tasks = small(), class_tasks(4)
    exact = dense(mf.IMAML(net, LR, 80, PULL), tasks)
    steps = (1, 3, 6, len(exact))
    found = [meta_gradient(mf.IMAML(net, LR, 80, PULL, each, backend=backend), tasks) for each in steps]
    errors = [relative_error(each, exact) for each in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9
    assert errors[0] > 1e-4


@backends
@pytest.mark.parametrize("damping", [0.0, 3.0])
@pytest.mark.parametrize(("steps", "cg_steps"), [(0, 2), (1, 1), (4, 3), (7, 5)])
def test_it_is_the_papers(steps, cg_steps, damping, backend):
    learner, tasks = mf.IMAML(small(), LR, steps, PULL, cg_steps, damping, backend=backend), class_tasks(4)
    out = learner(tasks)

    def of_task(x, y, query_x, query_y):
        return loss(learner.model, solved(learner, x, y), query_x, query_y)

    assert relative_error(out.task_losses, by_task(learner, tasks, of_task)) < 1e-10
    assert relative_error(meta_gradient(learner, tasks), papers(learner, tasks)) < 1e-9


@backends
def test_pictures_and_batch_norms(backend):
    learner, tasks = mf.IMAML(pictures(), LR, 3, 30.0 / 4, 3, 20.0, backend=backend), class_tasks(1, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mf.ConvergenceWarning)
        assert relative_error(meta_gradient(learner, tasks), papers(learner, tasks)) < 1e-9


@backends
@pytest.mark.parametrize("adapt", ["2.*", "*.bias", "0.weight"])
def test_weights_that_do_not_adapt_get_their_gradient(adapt, backend):
    learner, tasks = mf.IMAML(small(), LR, 80, PULL, 30, adapt=adapt, backend=backend), class_tasks(4)
    assert relative_error(meta_gradient(learner, tasks), dense(learner, tasks)) < 1e-9


@backends
def test_gradients_are_slopes_of_the_meta_loss(backend):
    """Where both are solved: those of the parameters, and of the support samples."""
    report = mf.check_gradients(mf.IMAML(small(), LR, 80, PULL, 30, backend=backend), class_tasks(4))
    assert report.order == "exact", report
    assert report.ok
    assert set(report.errors) == {"parameters", "support_x"}
    assert mf.check_gradients(mf.IMAML(small(), LR, 3, PULL, 1), class_tasks(4)).order.startswith("neither: ")


@backends
def test_gradients_of_all_data_are_those_of_a_long_loop(backend):
    """One in plain autograd, which a solved inner problem makes equal."""
    net, tasks = small(), class_tasks(4)
    rate, steps, pull = 0.1, 160, 5.0  # solved, too, where the loss curves strongly, up or down
    learner = mf.IMAML(net, rate, steps, pull, 30, backend=backend)
    x, y, weight = tasks.support_x, torch.rand(3, 6, 3).double().softmax(-1), torch.rand(3, 6).double() + 0.5
    start = torch.randn(3, len(theta_of(net))).double() / 2
    leaves = {"x": x, "y": y, "sample_weight": weight, "initial": start}
    for each in leaves.values():
        each.requires_grad_()
    fast = learner.adapt(x, y, sample_weight=weight, initial=start)
    found = gradients(fast.evaluate(tasks.query_x, tasks.query_y).loss, leaves)

    def of_task(task):
        phi = start[task]
        for _ in range(steps):
            values, begin = {}, 0
            for name, value in net.named_parameters():
                values[name] = phi[begin : begin + value.numel()].view(value.shape)
                begin += value.numel()
            each = F.cross_entropy(functional_call(net, values, (x[task],)), y[task], reduction="none")
            (slope,) = torch.autograd.grad((weight[task] * each).mean(), phi, create_graph=True)
            phi = phi - rate * (slope + pull * (phi - start[task]))
        return loss(net, phi, tasks.query_x[task], tasks.query_y[task])

    assert_close(found, gradients(torch.stack([of_task(task) for task in range(3)]).mean(), leaves), 1e-9)


def test_tasks_may_weigh_unequally():
    learner, tasks = mf.IMAML(small(), LR, 5, PULL, 20), class_tasks(4)
    weights = torch.rand(3).double()
    named = dict(learner.named_parameters())
    found = gradients(learner(tasks).task_losses @ weights, named)
    alone = [gradients(learner(tasks[task]).loss, named) for task in range(3)]
    expected = {name: sum(w * each[name] for w, each in zip(weights, alone, strict=True)) for name in named}
    assert_close(found, expected)


class Kept:
    """A tensor that a graph holds on to."""

    def __init__(self, value):
        self.value = value


def kept_tensors(learner, tasks):
    """How many tensors, and numbers in them, the graph of a loss holds."""
    held = weakref.WeakSet()

    def hold(value):
        kept = Kept(value)
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda kept: kept.value):
        loss = learner(tasks).loss
    gc.collect()
    assert loss.requires_grad
    return len(held), sum(kept.value.numel() for kept in held)


@backends
def test_what_is_kept_does_not_grow_with_the_steps(backend):
    net, tasks = small(), class_tasks(4)
    kept = [kept_tensors(mf.IMAML(net, LR, steps, backend=backend), tasks) for steps in (1, 40)]
    assert kept[0] == kept[1]
    assert kept[0][0] > 0


def test_the_cost_of_a_gradient_does_not_grow_with_the_steps(monkeypatch):
    from metaaug_fast.engine.fused import _Call

    net, tasks = small(), class_tasks(4)
    calls = []
    run = _Call.run
    monkeypatch.setattr(_Call, "run", lambda *args, **options: (calls.append(1), run(*args, **options))[1])
    counts = []
    for steps in (1, 40):
        out = mf.IMAML(net, LR, steps, PULL, 5, backend="fused")(tasks)
        calls.clear()
        out.loss.backward()
        counts.append(len(calls))
    assert counts[0] == counts[1]
    assert counts[0] <= 5 + 2  # a product each, one step to make products of, and the query


def test_by_step_is_forward_for_each():
    learner, tasks = mf.IMAML(small(), LR, 3), class_tasks(4)
    found = learner.by_step(tasks)
    assert len(found) == 4
    for each, wanted in zip(found, mf.Learner.by_step(learner, tasks), strict=True):
        assert relative_error(each.task_losses, wanted.task_losses) < 1e-12
        assert not each.loss.requires_grad


def test_dropout_is_the_same_throughout_an_inner_problem():
    """So that it has a minimum, and its Hessian is symmetric."""
    net = small(nn.Tanh(), nn.Dropout(0.5))
    learner, tasks = mf.IMAML(net, LR, 80, PULL, 40), class_tasks(4)
    assert not torch.equal(learner(tasks).loss, learner(tasks).loss)
    assert mf.check_gradients(learner, tasks).ok


def test_it_learns_with_any_optimizer():
    x = torch.randn(4, 12, 4).double()
    tasks = mf.TaskBatch(x, x[..., :3].argmax(-1), x, x[..., :3].argmax(-1))
    learner = mf.IMAML(perceptron(), LR, 5)
    before = float(learner(tasks).loss.detach())
    optimizer = torch.optim.SGD(learner.parameters(), 0.5, momentum=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        learner(tasks).loss.backward()
        optimizer.step()
    assert learner(tasks).loss < 0.5 * before


def test_it_keeps_the_contract():
    mf.check_learner(mf.IMAML(perceptron()), class_tasks(4))
    assert mf.IMAML(pictures()).transductive
    assert not mf.IMAML(pictures(), batch_norm="frozen").transductive


def test_it_shows_its_settings():
    assert "proximal=3.0" in repr(mf.IMAML(small(), proximal=3.0, cg_tolerance=1e-3))


# --- the equations ---


def systems(eigenvalues):
    """Symmetric matrices of these eigenvalues, `[T, N, N]`."""
    basis = torch.linalg.qr(torch.randn(*eigenvalues.shape, eigenvalues.shape[-1]).double())[0]
    return basis @ torch.diag_embed(eigenvalues) @ basis.mT


def times(matrices):
    return lambda p: (matrices @ p[..., None])[..., 0]


def test_tasks_are_solved_each_for_itself():
    """Some after one step, some after all, one with nothing to solve."""
    eigenvalues = torch.stack([torch.ones(8), torch.linspace(1, 30, 8), torch.linspace(1, 2, 8)]).double()
    a, b = systems(eigenvalues), torch.randn(3, 8).double()
    b[2] = 0
    for tolerance in (0.0, 1e-11):
        solved = conjugate_gradients(times(a), b, 12, tolerance)
        assert relative_error(solved.solution, torch.linalg.solve(a, b)) < 1e-10
        assert solved.residuals.max() < 1e-10
        assert not solved.indefinite.any()


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_residuals_are_those_of_the_equations(steps):
    a, b = systems(torch.rand(4, 8).double() + 0.1), torch.randn(4, 8).double()
    solved = conjugate_gradients(times(a), b, steps)
    residuals = (b - times(a)(solved.solution)).norm(dim=1) / b.norm(dim=1)
    assert relative_error(solved.residuals, residuals) < 1e-9


def test_a_tolerance_ends_the_steps():
    a, b, calls = systems(torch.rand(2, 8).double() + 0.5), torch.randn(2, 8).double(), []

    def product(p):
        calls.append(p)
        return times(a)(p)

    solved = conjugate_gradients(product, b, 100, 1e-3)
    assert len(calls) < 9
    assert solved.residuals.max() <= 1e-3


def test_negative_curvature_ends_a_task_and_no_other():
    eigenvalues = torch.rand(3, 6).double() + 0.5
    eigenvalues[0] = -1.0
    eigenvalues[1, 0] = -0.2
    a, b = systems(eigenvalues), torch.randn(3, 6).double()
    solved = conjugate_gradients(times(a), b, 6)
    assert solved.indefinite.tolist() == [True, True, False]
    assert torch.equal(solved.solution[0], b[0])
    assert float(solved.residuals[0]) == pytest.approx(2)  # |b + b| / |b|
    assert relative_error(solved.solution[2], torch.linalg.solve(a[2], b[2])) < 1e-9
    assert solved.solution.isfinite().all()


# --- what is said ---


def quick(**options):
    return mf.IMAML(**{"model": small(), "inner_lr": LR, "inner_steps": 3, **options})


def test_an_unsolved_gradient_is_said_once_with_its_residual():
    learner, tasks = quick(cg_steps=1, cg_tolerance=1e-6), class_tasks(4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learner(tasks).loss.backward()
        learner(tasks).loss.backward()
    (message,) = (str(each.message) for each in said if each.category is mf.ConvergenceWarning)
    assert f"after cg_steps=1 with a relative residual of {float(learner.residuals.max()):.1e}" in message
    assert "above cg_tolerance=1e-06" in message


def test_a_solved_gradient_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner = quick(cg_steps=30, cg_tolerance=1e-6)
        assert learner.residuals is None
        learner(class_tasks(4)).loss.backward()
        assert learner.residuals.max() <= 1e-6
        quick(cg_steps=1)(class_tasks(4)).loss.backward()  # as many as were asked for


def test_negative_curvature_is_said():
    """Of a loss that bends down everywhere."""

    def hill(prediction, target):
        return -4 * prediction.square().mean()

    learner = mf.IMAML(nn.Linear(4, 3).double(), 0.01, 1, 0.5, loss=hill, backend="fallback")
    message = r"negative curvature in 3 of 3 tasks, .*: proximal or cg_damping must be larger \(got 0.5 and 0\)"
    with pytest.warns(mf.ConvergenceWarning, match=message):
        learner(class_tasks(4)).loss.backward()
    assert all(value.grad.isfinite().all() for value in learner.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(class_tasks(4)).loss.backward()  # it is said once
        other = mf.IMAML(learner.model, 0.01, 1, 0.5, cg_damping=500.0, loss=hill, backend="fallback")
        other(class_tasks(4)).loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proximal": -1.0}, r"proximal must be >= 0 \(got -1.0\)"),
        ({"proximal": 0.0}, r"proximal must be > 0, .* \(got 0.0\)"),
        ({"proximal": math.nan}, r"proximal must be >= 0 \(got nan\)"),
        ({"proximal": 10.0}, r"inner_lr \* proximal must be below 2, .* \(got 2\)"),
        ({"inner_lr": -0.1}, r"inner_lr must be >= 0 \(got -0.1\)"),
        ({"inner_steps": -1}, r"inner_steps must be >= 0 \(got -1\)"),
        ({"cg_steps": 0}, r"cg_steps must be >= 1 \(got 0\)"),
        ({"cg_damping": -1.0}, r"cg_damping must be >= 0 \(got -1.0\)"),
        ({"cg_tolerance": -1e-3}, r"cg_tolerance must be >= 0 \(got -0.001\)"),
        ({"batch_norm": "running"}, r"batch_norm must be one of batch, frozen \(got 'running'\)"),
        ({"adapt": "3.*"}, r"adapt must name parameters of the model \(got '3.\*'"),
        ({"model": nn.ReLU()}, "model must have parameters to adapt"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        quick(**options)


@pytest.mark.parametrize("name", ["proximal", "inner_lr", "cg_damping", "cg_tolerance"])
def test_settings_are_numbers(name):
    with pytest.raises(TypeError, match=rf"^{name} must be a number \(got '1'\)$"):
        quick(**{name: "1"})


def test_a_setting_that_becomes_bad_is_refused():
    learner = quick()
    learner.proximal = -2.0
    with pytest.raises(ValueError, match=r"proximal must be >= 0 \(got -2.0\)"):
        learner(class_tasks(4))


def test_bad_tasks():
    learner, tasks = quick(), class_tasks(4)
    with pytest.raises(ValueError, match="rows must be None: the inner problem is one of all support samples"):
        learner.adapt(*tasks.tensors[:2], rows=torch.zeros(3, 3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"initial must have shape \(3, 27\) \(got \(3, 2\)\)"):
        learner.adapt(*tasks.tensors[:2], initial=torch.zeros(3, 2).double())


@backends
def test_a_nan_names_task_and_step(backend):
    learner, tasks = quick(inner_lr=1e200, proximal=1e-200, backend=backend, inner_steps=5), class_tasks(4)
    with pytest.raises(mf.NonFiniteError, match=r"task \d, step [1-5]"):
        learner(tasks)
    tasks.support_x[1, 0, 0] = math.nan
    with pytest.raises(mf.NonFiniteError, match="task 1, step 0"):
        quick(backend=backend)(tasks)


def test_a_gradient_of_the_gradient_is_refused():
    learner, tasks = quick(), class_tasks(4)
    found = torch.autograd.grad(learner(tasks).loss, list(learner.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        sum(each.square().sum() for each in found).backward()


def test_a_copy_is_its_own():
    learner = quick(cg_steps=1, cg_tolerance=1e-9)
    with pytest.warns(mf.ConvergenceWarning):
        copy.deepcopy(learner)(class_tasks(4)).loss.backward()
    assert learner.residuals is None
