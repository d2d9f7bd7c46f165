"""`inner_loop`, `FastWeights` and the choice of an executor."""

import copy
import gc
import io
import itertools
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from metaaug_fast.engine import reference
from metaaug_fast.engine.choice import choose_executor
from metaaug_fast.engine.fast_weights import FastWeights
from metaaug_fast.engine.loop import inner_loop, judge_steps, meta_loss
from metaaug_fast.engine.problem import Query, Support, inner_problem, with_steps
from metaaug_fast.engine.remembered import fingerprint
from metaaug_fast.errors import FallbackWarning, NonFiniteError, NotFusedError
from tests.building import C, F, Q, S, T, backends, perceptron, tasks
from tests.exactness import relative_error


class Sorted(nn.Module):
    """An op that no engine of ours knows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(x, dim=1).values


def data(classes: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Support x and y, query x."""
    return tasks(soft=not classes).tensors[:3]


OPTIONS = {
    "plain": {},
    "first order": {"first_order": True},
    "momentum and decay": {"momentum": 0.7, "weight_decay": 0.1},
    "head only": {"adapt": "3.*"},
    "smoothed": {"label_smoothing": 0.2},
    "chunks": {"task_chunk": 2},
    "per step": {"lr": torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)},
}


@backends
@pytest.mark.parametrize("name", OPTIONS)
def test_weights_and_gradients_are_the_references(name: str, backend: str) -> None:
    options = {"lr": 0.3, "steps": 3, "batch_norm": "batch", **OPTIONS[name]}
    model, (x, y, _) = perceptron(nn.BatchNorm1d(7), nn.Tanh()), data(classes="smoothed" in name)
    if isinstance(options["lr"], Tensor):
        options["lr"] = options["lr"].clone().requires_grad_()
    leaves = [x, 2 * torch.rand(T, S).double() - 0.5, torch.randn(T, 7 * (F + 1 + 2 + C) + C).double()]
    if y.is_floating_point():
        leaves.append(y)
    for leaf in leaves:
        leaf.requires_grad_()
    weight, initial = leaves[1:3]
    rows = torch.randint(S, (T, 3, 4))
    variables = [*leaves, *([options["lr"]] if isinstance(options["lr"], Tensor) else [])]
    fast = inner_loop(model, x, y, sample_weight=weight, initial=initial, rows=rows, backend=backend, **options)
    expected = reference.adapt(inner_problem(model, **options), Support(x, y, weight, rows, initial))
    assert relative_error(fast.flat, expected) < 1e-12
    direction = torch.randn_like(expected)
    found, wanted = (
        torch.autograd.grad((flat * direction).sum(), variables, allow_unused=True, materialize_grads=True)
        for flat in (fast.flat, expected)
    )
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other) if not other.any() else relative_error(one, other) < 1e-9


@backends
def test_predictions_are_differentiable_down_to_the_model(backend: str) -> None:
    model, (x, y, query) = perceptron(), data()
    query.requires_grad_()
    variables = [*model.parameters(), query]
    found = torch.autograd.grad(inner_loop(model, x, y, 0.2, 2, backend=backend)(query).square().sum(), variables)
    problem = inner_problem(model, 0.2, 2)
    theta = reference.unpack(problem, reference.adapt(problem, Support(x, y)))
    outputs = [
        torch.func.functional_call(model, {name: value[task] for name, value in theta.items()}, (query[task],))
        for task in range(T)
    ]
    for one, other in zip(found, torch.autograd.grad(torch.stack(outputs).square().sum(), variables), strict=True):
        assert relative_error(one, other) < 1e-9


@backends
def test_no_steps_leave_the_start(backend: str) -> None:
    model, (x, y, _) = perceptron(), data()
    fast = inner_loop(model, x, y, steps=0, backend=backend)
    assert torch.equal(fast.flat, reference.pack(dict(model.named_parameters())).expand(T, -1))


@backends
def test_the_model_and_the_random_state_stay_as_they_were(backend: str) -> None:
    model, (x, y, query) = perceptron(nn.BatchNorm1d(7), nn.ReLU()), data()
    before, mode = copy.deepcopy(model.state_dict()), model.training
    inner_loop(model, x, y, backend=backend)(query)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training == mode
    assert all(parameter.grad is None for parameter in model.parameters())


@backends
def test_no_graph_under_no_grad(backend: str) -> None:
    model, (x, y, query) = perceptron(), data()
    with torch.no_grad():
        fast = inner_loop(model, x, y, backend=backend)
    assert not fast.flat.requires_grad
    assert not fast(query).requires_grad


@backends
def test_dropout_draws_a_mask_for_each_call_from_the_generator(backend: str) -> None:
    model, (x, y, _) = perceptron(nn.Tanh(), nn.Dropout(0.5)), data()
    state = torch.get_rng_state()
    first, second = (inner_loop(model, x, y, backend=backend).flat for _ in range(2))
    torch.set_rng_state(state)
    again = inner_loop(model, x, y, backend=backend).flat
    model.eval()
    off = inner_loop(model, x, y, backend=backend).flat
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, off)


# --- FastWeights ---


@backends
def test_fast_weights_are_views_by_name(backend: str) -> None:
    model, (x, y, _) = perceptron(), data()
    fast = inner_loop(model, x, y, backend=backend)
    views = fast.as_dict()
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        name: (T, *value.shape) for name, value in model.named_parameters()
    }
    assert len(fast) == T
    assert "3 tasks" in repr(fast)
    assert all(view.untyped_storage().data_ptr() == fast.flat.untyped_storage().data_ptr() for view in views.values())
    detached = fast.detach()
    detached.as_dict()["0.bias"][1] = 7.0
    assert (detached.flat[1, 7 * F : 7 * F + 7] == 7).all()
    assert not detached.flat.requires_grad


@backends
@pytest.mark.parametrize("policy", ["batch", "running", "frozen"])
def test_a_task_becomes_a_plain_module(policy: str, backend: str) -> None:
    model, (x, y, query) = perceptron(nn.BatchNorm1d(7), nn.ReLU()), data()
    model(torch.randn(50, F).double() * 2 + 1)
    if policy == "running":
        model.eval()
    fast = inner_loop(model, x, y, batch_norm=policy, backend=backend)
    module = fast.module(1)
    assert all(value.is_leaf and value.requires_grad for value in module.parameters())
    assert relative_error(module(query[1]), fast(query)[1]) < 1e-12
    assert relative_error(module.eval()(query[1]), fast(query)[1]) < 1e-12
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = fast.module(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.eval()(query[1]), module(query[1]))
    with torch.no_grad():
        next(module.parameters()).zero_()
    assert fast.flat[1, : 7 * F].all()


def test_module_of_no_task() -> None:
    with pytest.raises(IndexError, match="3"):
        inner_loop(perceptron(), *data()[:2], backend="fallback").module(3)


@backends
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_evaluate_is_the_references_query_loss(loss: str, backend: str) -> None:
    model, (x, y, query) = perceptron(), data(classes=loss == "cross_entropy")
    target = torch.randint(C, (T, Q)) if loss == "cross_entropy" else torch.rand(T, Q, C).double()
    out = inner_loop(model, x, y, loss=loss, backend=backend).evaluate(query, target)
    expected = reference.meta_loss(inner_problem(model, 0.01, 5, loss=loss), Support(x, y), Query(query, target))
    assert relative_error(out.task_losses, expected.task_losses) < 1e-12
    assert relative_error(out.loss, expected.loss) < 1e-12
    assert out.loss.requires_grad
    assert (out.accuracy is None) == (expected.accuracy is None)
    assert out.accuracy is None or torch.equal(out.accuracy, expected.accuracy)


def test_evaluate_with_a_callable() -> None:
    def distance(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs().sum()

    model, (x, y, query) = perceptron(), data(classes=False)
    target = torch.randn(T, Q, C).double()
    fast = inner_loop(model, x, y, loss=distance, backend="fallback")
    expected = (fast(query) - target).abs().sum((1, 2))
    assert relative_error(fast.evaluate(query, target).task_losses, expected) < 1e-12


def test_inputs_that_do_not_fit_fast_weights() -> None:
    fast = inner_loop(perceptron(), *data()[:2], backend="fallback")
    with pytest.raises(ValueError, match=r"x must be \[3, samples, ...\] .* \(got shape \(2, 5, 4\)\)"):
        fast(torch.zeros(2, Q, F).double())
    with pytest.raises(ValueError, match=r"\(got shape \(3, 0, 4\)\)"):
        fast(torch.zeros(T, 0, F).double())
    with pytest.raises(ValueError, match="x must have the dtype of the model's parameters"):
        fast(torch.zeros(T, Q, F))
    with pytest.raises(ValueError, match=r"^y must hold class ids 0..2"):
        fast.evaluate(torch.zeros(T, Q, F).double(), torch.full((T, Q), C))


# --- judging every step ---


@backends
@pytest.mark.parametrize("name", OPTIONS)
def test_judging_every_step_is_judging_after_each_number_of_steps(name: str, backend: str) -> None:
    """With the same masks of a dropout, for the same state of the generator."""
    model, (x, y, query) = perceptron(nn.BatchNorm1d(7), nn.Sequential(nn.Tanh(), nn.Dropout(0.3))), data()
    problem = inner_problem(model, **{"lr": 0.3, "steps": 3, **OPTIONS[name]})
    support, rows = Support(x, y, torch.rand(T, S).double()), torch.randint(S, (T, 3, 4))
    asked, state = Query(query, torch.randint(C, (T, Q))), torch.get_rng_state()
    for seen in (support, replace(support, rows=rows)):
        torch.set_rng_state(state)
        judged = judge_steps(problem, seen, asked, backend)
        assert len(judged) == 4
        for steps, out in enumerate(judged):
            cut = seen if seen.rows is None else replace(seen, rows=rows[:, :steps])
            torch.set_rng_state(state)
            expected = meta_loss(with_steps(problem, steps), cut, asked, backend)
            assert relative_error(out.task_losses, expected.task_losses) < 1e-12
            assert relative_error(out.loss, expected.loss) < 1e-12
            assert torch.equal(out.accuracy, expected.accuracy)
            assert not out.loss.requires_grad


@backends
def test_judging_every_step_moves_no_running_statistics(backend: str) -> None:
    model, (x, y, query) = perceptron(nn.BatchNorm1d(7), nn.Tanh()), data()
    problem = inner_problem(model, 0.3, 2, batch_norm="running")
    support, asked = Support(x, y), Query(query, torch.randint(C, (T, Q)))
    before = copy.deepcopy(model.state_dict())
    judged = judge_steps(problem, support, asked, backend)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = meta_loss(problem, support, asked, backend)
    assert relative_error(judged[-1].task_losses, expected.task_losses) < 1e-12
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


@backends
def test_judging_every_step_in_inference_mode(backend: str) -> None:
    model, (x, y, query) = perceptron(), data()
    problem, target = inner_problem(model, 0.3, 2), torch.randint(C, (T, Q))
    expected = judge_steps(problem, Support(x, y), Query(query, target), backend)
    with torch.inference_mode():
        got = judge_steps(problem, Support(x + 0, y + 0), Query(query + 0, target + 0), backend)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.task_losses, other.task_losses)


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        ("support_y must hold class ids 0..2 (got 3)", {"y": torch.full((T, S), C)}),
        ("query_x must have as many tasks as support_x (got 2, 3)", {"query": torch.zeros(2, Q, F).double()}),
        ("query_x must have the dtype of the model's parameters", {"query": torch.zeros(T, Q, F)}),
        ("query_y must hold class ids 0..2 (got 3)", {"target": torch.full((T, Q), C)}),
        ("step_weights must be None where every step is judged by itself (got a Tensor)", {"weights": torch.ones(2)}),
        ("backend must be one of auto, fused, fallback (got 'gpu')", {"backend": "gpu"}),
    ],
)
def test_bad_input_to_judging_every_step_is_refused(message: str, bad: dict[str, object]) -> None:
    x, y, query = data()
    given = {"y": y, "query": query, "target": torch.zeros(T, Q).long(), "weights": None, "backend": "auto", **bad}
    asked = Query(given["query"], given["target"], given["weights"])
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        judge_steps(inner_problem(perceptron(), 0.1, 2), Support(x, given["y"]), asked, given["backend"])
    assert message in str(caught.value)


# --- the choice of an executor ---


def test_the_executor_is_made_once_for_a_model_shape_and_mode() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
    problem = inner_problem(model, 0.1, 1)

    def chosen(shape: tuple[int, ...] = (1, 8, 8), backend: str = "auto") -> object:
        return choose_executor(problem, shape, backend)

    first = chosen()
    assert chosen() is first
    assert chosen((1, 9, 9)) is not first
    assert chosen(backend="fallback") is not first
    model.eval()
    assert chosen() is not first
    model.train()
    assert chosen() is first
    model[4].p = 0.1
    assert chosen() is not first
    model[4].p = 0.5
    assert chosen() is first
    model[1] = nn.Tanh()
    assert chosen() is not first


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.__setitem__(1, nn.Tanh()),
        lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(7, F))),
        lambda model: model[0].bias.requires_grad_(False),
        lambda model: model.float(),
        lambda model: setattr(model[2], "running_mean", torch.zeros(7)),
        lambda model: model.append(nn.Identity()),
    ],
)
def test_a_fingerprint_sees_every_replacement(change) -> None:
    model = nn.Sequential(nn.Linear(F, 7), nn.ReLU(), nn.BatchNorm1d(7)).double()
    mark, parts = fingerprint(model)
    assert fingerprint(model)[0] == mark
    assert parts == list(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert fingerprint(model)[0] == mark
    change(model)
    assert fingerprint(model)[0] != mark


@backends
def test_a_model_is_freed_with_its_last_name(backend: str) -> None:
    model = perceptron()
    gone = weakref.ref(model)
    inner_loop(model, *data()[:2], backend=backend)
    del model
    gc.collect()
    assert gone() is None


def test_the_fallback_warns_once_and_names_op_and_place() -> None:
    model, (x, y, _) = perceptron(Sorted()), data()
    with pytest.warns(FallbackWarning, match=r"(?s)sort.*backend=\"fused\"") as caught:
        inner_loop(model, x, y)
    assert len(caught) == 1
    assert "1" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner_loop(model, x, y)
        inner_loop(copy.deepcopy(model), x, y, backend="fallback")
        inner_loop(perceptron(), x, y)
    with pytest.warns(FallbackWarning, match="needs a named loss .*callable.*<lambda>"):
        inner_loop(model, x, y, loss=lambda prediction, target: nn.functional.cross_entropy(prediction, target))


def test_fused_or_nothing() -> None:
    x, y, _ = data()
    with pytest.raises(NotFusedError, match="sort"):
        inner_loop(perceptron(Sorted()), x, y, backend="fused")
    with pytest.raises(NotFusedError, match="named loss"):
        inner_loop(perceptron(), x, y, loss=lambda p, y: nn.functional.cross_entropy(p, y), backend="fused")


def test_both_backends_agree_to_rounding() -> None:
    model, (x, y, query) = perceptron(), data()
    fused, fallback = (inner_loop(model, x, y, backend=backend)(query) for backend in ("fused", "fallback"))
    assert relative_error(fused, fallback) < 1e-12


# --- bad input ---

X, Y = torch.zeros(T, S, F), torch.zeros(T, S, dtype=torch.int64)
BAD = {
    "support_x must be [tasks, samples, ...] (got shape (3,))": {"support_x": X[:, 0, 0]},
    "support_x must hold at least one task": {"support_x": X[:0], "support_y": Y[:0]},
    "support_x must hold at least one sample a task": {"support_x": X[:, :0], "support_y": Y[:, :0]},
    "support_y must have the tasks and samples of support_x (got (3, 5), (3, 6))": {"support_y": Y[:, :5]},
    "support_y must hold class ids 0..2 (got 3)": {"support_y": Y + C},
    "support_y must hold class ids 0..2 (got -1)": {"support_y": Y - 1},
    "support_x must be float32 or float64 on the CPU, or token ids in int64 (got torch.float16)": {
        "support_x": X.half()
    },
    "(got torch.uint8; pictures: support_x.float() / 255)": {"support_x": X.to(torch.uint8)},
    "support_x must have the dtype of the model's parameters": {"support_x": X.double()},
    "support_y must be on the device of support_x (got meta, cpu)": {"support_y": Y.to("meta")},
    "support_x must be on the device of the model's parameters": {"model": perceptron().float().to("meta")},
    "lr must be >= 0 and finite (got -0.1)": {"lr": -0.1},
    "lr must be >= 0 and finite (got nan)": {"lr": float("nan")},
    "lr must be a scalar, [5] or a mapping by name (got shape (2,))": {"lr": [0.1, 0.1]},
    "steps must be >= 0 (got -1)": {"steps": -1},
    "momentum must be >= 0 (got -0.5)": {"momentum": -0.5},
    "weight_decay must be >= 0 (got -1)": {"weight_decay": -1},
    "label_smoothing must be below 1 (got 1.0)": {"label_smoothing": 1.0},
    "loss must be callable or one of": {"loss": "hinge"},
    "adapt must name parameters of the model (got 'neck.*'": {"adapt": ["2.*", "neck.*"]},
    "model must have parameters to adapt": {"model": nn.Flatten()},
    "adapt must leave a parameter that moves (got None": {"model": perceptron().float().requires_grad_(False)},
    "batch_norm must be one of": {"batch_norm": "layer"},
    "batch_norm must be batch, running or frozen": {"batch_norm": "per_step"},
    "backend must be one of auto, fused, fallback (got 'gpu')": {"backend": "gpu"},
    "task_chunk must be >= 1 (got 0)": {"task_chunk": 0},
    "sample_weight must have shape (3, 6) (got (3, 5))": {"sample_weight": torch.ones(T, S - 1)},
    "sample_weight must have the dtype of support_x": {"sample_weight": torch.ones(T, S).double()},
    "initial must have shape (3, 59) (got (3, 2))": {"initial": torch.zeros(T, 2)},
    "rows must be int64 [3, 5, B]": {"rows": torch.zeros(T, 4, 2, dtype=torch.int64)},
    "rows must index the 6 support samples (got 6..6)": {"rows": torch.full((T, 5, 2), S)},
    "(5,)": {"support_x": torch.zeros(T, S, F + 1)},
}


@pytest.mark.parametrize(("message", "bad"), BAD.items(), ids=BAD)
@pytest.mark.filterwarnings("ignore::metaaug_fast.errors.FallbackWarning")
def test_bad_input_is_refused_before_any_work(message: str, bad: dict[str, object]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        inner_loop(**{"model": perceptron().float(), "support_x": X, "support_y": Y, **bad})
    assert message in str(caught.value)


@backends
def test_a_nan_is_reported_with_task_and_step(backend: str) -> None:
    x, y, _ = data()
    x[1, 2, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="task 1, step 0"):
        inner_loop(perceptron(), x, y, backend=backend)


@backends
def test_shapes_of_a_convolution(backend: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fast = inner_loop(model, torch.randn(T, S, 2, 6, 6), torch.randint(C, (T, S)), backend=backend)
    for height, width in itertools.product((6, 7), (6, 9)):
        assert fast(torch.randn(T, Q, 2, height, width)).shape == (T, Q, C)
    assert isinstance(fast, FastWeights)
