"""What comes in the place of a plain tensor: views that negate, other kinds, other things, and changes in place."""

import copy
import itertools

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.engine import reference
from metaaug_fast.engine.choice import choose_executor
from metaaug_fast.engine.problem import Query, Support, inner_problem
from metaaug_fast.engine.remembered import fingerprint
from tests.building import VIEWS, C, F, Q, S, T, backends, negated, perceptron
from tests.exactness import assert_close, gradients, leaves, rand, randn

pytestmark = pytest.mark.usefixtures("fresh_numbers")

K = 2


def network() -> nn.Module:
    return perceptron(nn.BatchNorm1d(7), nn.Tanh())


@backends
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_as_what_they_stand_for(view, backend):
    as_view = VIEWS[view]
    model = network()
    model[1].running_mean, model[1].running_var = as_view(rand(7)), as_view(1 + rand(7))
    size = sum(value.numel() for value in model.parameters())

    def problem_and_sets(change):
        lr = change(0.1 + rand(K)).requires_grad_()
        problem = inner_problem(model, lr, K, loss="mse", batch_norm="frozen")
        support = Support(
            change(randn(T, S, F)).requires_grad_(),
            change(randn(T, S, C)).requires_grad_(),
            change(rand(T, S)).requires_grad_(),
            initial=change(randn(T, size)).requires_grad_(),
        )
        query = Query(
            change(randn(T, Q, F)).requires_grad_(),
            change(randn(T, Q, C)).requires_grad_(),
            change(rand(K)).requires_grad_(),
        )
        return problem, support, query

    problem, support, query = problem_and_sets(as_view)
    inputs = leaves(problem, support, query)
    executor = choose_executor(problem, (F,), backend)
    weight = as_view(randn(T))  # an adjoint that comes as a view
    expected = gradients((reference.meta_loss(problem, support, query).task_losses * weight).sum(), inputs)
    assert_close(gradients((executor.meta_loss(problem, support, query).task_losses * weight).sum(), inputs), expected)
    inputs = leaves(problem, support)
    adjoint = as_view(randn(T, size))
    expected = gradients((reference.adapt(problem, support) * adjoint).sum(), inputs)
    assert_close(gradients((executor.adapt(problem, support) * adjoint).sum(), inputs), expected)


@backends
def test_parameters_may_be_views(backend):
    model, plain = network(), network()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        parameter.data = negated(other)
    x, y, query = randn(T, S, F), torch.randint(C, (T, S)), randn(T, Q, F)
    results = [mf.inner_loop(each, x, y, backend=backend)(query) for each in (model, plain)]
    assert torch.equal(*results)


def test_zeros_without_memory():
    x, y = torch._efficientzerotensor(T, S, F, dtype=torch.float64), torch.randint(C, (T, S))
    model = network()
    found = mf.inner_loop(model, x, y, backend="fused").flat
    assert torch.equal(found, mf.inner_loop(model, torch.zeros(T, S, F).double(), y, backend="fused").flat)


ARGUMENTS = ("support_x", "support_y", "sample_weight", "rows", "initial", "lr")
KINDS = {
    "sparse": (lambda value: value.to_sparse(), ValueError, "a dense tensor"),
    "nested": (lambda value: torch.nested.nested_tensor([*value]), ValueError, "a dense tensor"),
    "quantised": (lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8), ValueError, "a dense"),
    "list": (lambda value: value.tolist(), TypeError, "a tensor"),
    "string": (lambda value: "1", TypeError, "a tensor|a number"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("backend", ["auto", "fallback"])
@pytest.mark.parametrize(("argument", "kind"), sorted({*itertools.product(ARGUMENTS, KINDS)} - {("lr", "list")}))
def test_other_kinds_are_refused_by_name(argument, kind, backend):
    model = network()
    given = {
        "support_x": randn(T, S, F),
        "support_y": torch.randint(C, (T, S)),
        "sample_weight": rand(T, S),
        "rows": torch.randint(S, (T, K, 3)),
        "initial": randn(T, sum(value.numel() for value in model.parameters())),
        "lr": rand(K),
    }
    change, error, what = KINDS[kind]
    given[argument] = change(given[argument])
    with pytest.raises(error, match=rf"^{argument} must be ({what})"):
        mf.inner_loop(model, steps=K, backend=backend, **given)
    if argument in ("support_x", "support_y") and kind != "list":  # which a batch makes tensors of
        x, y = given["support_x"], given["support_y"]
        with pytest.raises(error, match=f"^{argument} must be ({what})"):
            mf.TaskBatch(x, y, randn(T, Q, F), torch.randint(C, (T, Q)))
        with pytest.raises(error, match=f"^{argument.replace('support', 'query')} must be ({what})"):
            mf.TaskBatch(randn(T, Q, F), torch.randint(C, (T, Q)), x, y)


def test_what_holds_no_values_is_refused():
    x, y = torch.zeros(T, S, F, device="meta"), torch.zeros(T, S, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"^support_x must hold values \(got a tensor on the meta device\)"):
        mf.inner_loop(network().float().to("meta"), x, y)
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"^model must have been called once, which gives '0.weight' its shape"):
        mf.inner_loop(model, torch.zeros(T, S, F), y)


@pytest.mark.parametrize(
    "bad", [None, "x", [[[0.0, 1.0], [0.0]]], {"x": 1}, object()], ids=["nothing", "text", "ragged", "dict", "object"]
)
@pytest.mark.parametrize("place", range(4))
def test_a_task_batch_of_other_things(place, bad):
    parts = [randn(T, S, F), torch.randint(C, (T, S)), randn(T, Q, F), torch.randint(C, (T, Q))]
    name = ("support_x", "support_y", "query_x", "query_y")[place]
    parts[place] = bad
    message = (
        rf"^{name} must be a tensor, or an array or lists of equal lengths that make one \(got {type(bad).__name__}\)"
    )
    with pytest.raises(TypeError, match=message):
        mf.TaskBatch(*parts)


# --- what has changed since the last call ---


def conversions():
    def data_of_last(model):
        model[3].weight.data = model[3].weight.data.float()

    def shape_of_first(model):
        model[0].weight.data = model[0].weight.data.t()

    def buffer(model):
        model[1].running_var.data = model[1].running_var.data.float()

    return {"the last parameter's dtype": data_of_last, "a shape": shape_of_first, "a buffer's dtype": buffer}


@pytest.mark.parametrize("change", conversions())
def test_a_fingerprint_sees_what_is_changed_in_place(change):
    model = network()
    before, _ = fingerprint(model)
    conversions()[change](model)
    assert fingerprint(model)[0] != before


def test_a_tensor_of_another_kind_in_place_is_noticed():
    x, y = randn(T, S, F), torch.randint(C, (T, S))
    for learner in (mf.MAML(network()), mf.Reptile(network())):
        learner.adapt(x, y)
        learner.model[3].bias.data = learner.model[3].bias.data.float()
        with pytest.raises(ValueError, match="model must have parameters of one dtype"):
            learner.adapt(x, y)


@pytest.mark.parametrize(
    ("start", "edit"),
    [
        ([0.3, 0.1], lambda lr: lr.__setitem__(1, 0.2)),
        ({"0.weight": 0.3, "0.bias": [0.1, 0.2]}, lambda lr: lr.update({"0.weight": 0.7})),
        ({"0.weight": 0.3, "0.bias": [0.1, 0.2]}, lambda lr: lr["0.bias"].__setitem__(0, 0.4)),
        (torch.tensor([0.3, 0.1]), lambda lr: lr.mul_(2)),  # of which the problem holds a copy in float64
        ({"0.weight": torch.tensor(0.3), "0.bias": 0.1}, lambda lr: lr["0.weight"].fill_(0.2)),
    ],
)
@pytest.mark.parametrize("kind", [mf.MAML, mf.Reptile])
def test_rates_edited_in_place_are_noticed(kind, start, edit):
    model, (x, y) = nn.Sequential(nn.Linear(F, C)).double(), (randn(T, S, F), torch.randint(C, (T, S)))
    start = copy.deepcopy(start)
    learner = kind(model, inner_lr=start, inner_steps=2)
    before = learner.adapt(x, y).flat
    edit(start)
    after = learner.adapt(x, y).flat
    assert not torch.equal(after, before)
    assert torch.equal(after, kind(model, inner_lr=start, inner_steps=2).adapt(x, y).flat)


def test_a_rate_edited_out_of_range_is_refused():
    rates = [0.3, 0.1]
    maml = mf.MAML(network(), inner_lr=rates, inner_steps=2)
    rates[0] = -1.0
    with pytest.raises(ValueError, match=r"^inner_lr must be >= 0 and finite \(got -1\)"):
        maml.adapt(randn(T, S, F), torch.randint(C, (T, S)))


# --- names of arguments ---

X, Y = torch.zeros(T, S, F).double(), torch.zeros(T, S, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mf.inner_loop(network(), X, Y, lr=-0.1), ValueError, r"lr must be >= 0 and finite \(got -0.1\)"),
        (lambda: mf.inner_loop(network(), X, Y, lr=None), TypeError, r"lr must be a number, .*\(got None\)"),
        (lambda: mf.inner_loop(network(), X, Y, lr="0.1"), TypeError, r"lr must be a number, .*\(got '0.1'\)"),
        (lambda: mf.inner_loop(network(), X, Y, steps=-1), ValueError, r"steps must be >= 0 \(got -1\)"),
        (lambda: mf.inner_loop(network(), X, Y, steps=2.0), TypeError, r"steps must be an integer \(got 2.0\)"),
        (lambda: mf.inner_loop(network(), X, Y, first_order="no"), TypeError, "first_order must be True or False"),
        (lambda: mf.inner_loop(network(), X, Y, adapt=3), TypeError, r"adapt must be a name, .*\(got 3\)"),
        (lambda: mf.inner_loop(network(), X, Y, adapt=[3]), TypeError, r"adapt must be a name, .*\(got \[3\]\)"),
        (lambda: mf.inner_loop("net", X, Y), TypeError, r"model must be an nn.Module \(got str\)"),
        (lambda: mf.inner_loop(network(), X, Y)(None), TypeError, r"x must be a tensor \(got NoneType\)"),
        (lambda: mf.inner_loop(network(), X, Y).evaluate(X, None), TypeError, r"y must be a tensor \(got NoneType\)"),
        (lambda: mf.inner_loop(network(), X, Y).evaluate(X, Y[:, :2]), ValueError, "y must have the tasks and samples"),
        (lambda: mf.MAML(network(), inner_lr=-0.1), ValueError, r"inner_lr must be >= 0 and finite \(got -0.1\)"),
        (lambda: mf.MAML(network(), inner_steps=-1), ValueError, r"inner_steps must be >= 0 \(got -1\)"),
        (lambda: mf.MAML(network(), inner_steps=2.0), TypeError, r"inner_steps must be an integer \(got 2.0\)"),
        (
            lambda: mf.MAML(network(), inner_steps=2.0, batch_norm="per_step"),
            TypeError,
            r"inner_steps must be an integer \(got 2.0\)",
        ),
        (lambda: mf.MAML(None, batch_norm="per_step"), TypeError, r"model must be an nn.Module \(got NoneType\)"),
        (lambda: mf.MAML(network(), learn_inner_lr=1), TypeError, r"learn_inner_lr must be True or False \(got 1\)"),
        (lambda: mf.MAML(network())((X, Y, X)), TypeError, r"tasks must be a TaskBatch, .* \(got tuple of 3\)"),
        (lambda: mf.MAML(network())({"train": (X, Y)}), TypeError, r"tasks must be a TaskBatch, .* \(got dict\)"),
        (lambda: mf.Reptile(network(), inner_steps=-1), ValueError, r"inner_steps must be >= 0 \(got -1\)"),
        (lambda: mf.Reptile(network(), inner_lr=-0.1), ValueError, r"inner_lr must be >= 0 and finite \(got -0.1\)"),
        (lambda: mf.Reptile(network(), inner_optimizer="lion"), ValueError, "inner_optimizer must be one of sgd, adam"),
        (lambda: mf.Reptile(network(), inner_batch=2.5), TypeError, r"inner_batch must be an integer \(got 2.5\)"),
        (lambda: mf.Reptile(network(), inner_batch=True), TypeError, r"inner_batch must be an integer \(got True\)"),
        (
            lambda: mf.Reptile(network(), meta_lr=True).step(mf.TaskBatch(X, Y, X, Y)),
            TypeError,
            r"meta_lr must be a number \(got True\)",
        ),
        (lambda: mf.Reptile(network()).step(X), TypeError, r"tasks must be a TaskBatch, .* \(got Tensor\)"),
    ],
)
def test_errors_name_the_callers_argument(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
