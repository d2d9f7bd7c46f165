"""Models whose body does not adapt and cannot be fused: it runs once, and everything is still the specification's."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaaug_fast as mf
from metaaug_fast.engine import loop, reference
from metaaug_fast.engine.choice import choose_executor
from metaaug_fast.engine.problem import inner_problem
from metaaug_fast.engine.split import SplitExecutor
from metaaug_fast.errors import NotFusedError
from tests.building import sets
from tests.exactness import RATE_FORMS, assert_close, gradients, learned_rates, leaves, predictions, rand, randn

TASKS, CLASSES, STEPS = 3, 3, 3
KEEP = {"retain_graph": True}

pytestmark = pytest.mark.usefixtures("fresh_numbers")


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout, batch_first=True)
        self.embed, self.encoder, self.head = nn.Linear(2, 4), nn.TransformerEncoder(layer, 1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def convolutions() -> nn.Module:
    """With batch norms, of which every set has its own statistics, and a head of several layers, which drops."""
    body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 3, 3), nn.SELU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3))
    return nn.Sequential(body, nn.Sequential(head, nn.Linear(5, CLASSES)))


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, CLASSES))


MODELS = {
    "transformer": (Transformer, (5, 2), "head.*"),
    "convolutions": (convolutions, (2, 6, 6), "1.*"),
    "its last layer": (convolutions, (2, 6, 6), "1.1.*"),
    "one tensor of two": (convolutions, (2, 6, 6), "1.1.weight"),
    "words": (words, None, "4.*"),
}


def build(name: str, **options):
    """A problem and its executor, which must be a split one, and sets."""
    make, shape, adapt = MODELS[name]
    model = make().double()
    problem = inner_problem(model, 0.3, STEPS, adapt=adapt, **options)
    support, query = sets(shape or (3,), TASKS, 6)
    if shape is None:
        support, query = (replace(each, x=torch.randint(9, each.x.shape)) for each in (support, query))
    return problem, support, query


def executor_of(problem, support) -> SplitExecutor:
    ids = support.x.dtype == torch.int64
    executor = choose_executor(problem, tuple(support.x.shape[2:]), ids=ids)
    assert isinstance(executor, SplitExecutor)
    return executor


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradients_are_the_specification_s(name, first_order):
    problem, support, query = build(name, first_order=first_order, momentum=0.4, weight_decay=0.1)
    query = replace(query, step_weights=rand(STEPS).requires_grad_())
    executor = executor_of(problem, support)
    got, expected = executor.meta_loss(problem, support, query), reference.meta_loss(problem, support, query)
    inputs = leaves(problem, support, query)
    assert_close({"losses": got.task_losses}, {"losses": expected.task_losses})
    assert got.accuracy.equal(expected.accuracy)
    assert_close(gradients(got.loss, inputs, **KEEP), gradients(expected.loss, inputs, **KEEP))
    weights = rand(TASKS)
    got, expected = executor.meta_loss(problem, support, query), reference.meta_loss(problem, support, query)
    assert_close(gradients(got.task_losses @ weights, inputs), gradients(expected.task_losses @ weights, inputs))


@pytest.mark.parametrize("form", RATE_FORMS)
def test_rates_of_every_form(form):
    problem, support, query = build("convolutions")
    rates = learned_rates(form, {name: problem.parameters[name] for name in problem.rates}, STEPS)
    problem = inner_problem(problem.model, rates, STEPS, adapt="1.*")
    got, expected = (
        each(problem, support, query) for each in (executor_of(problem, support).meta_loss, reference.meta_loss)
    )
    inputs = leaves(problem, support, query)
    assert_close(gradients(got.loss, inputs, **KEEP), gradients(expected.loss, inputs, **KEEP))


@pytest.mark.parametrize("name", MODELS)
def test_adapted_weights_and_what_they_predict(name):
    problem, support, query = build(name)
    fast = loop.adapt_tasks(problem, support)
    executor_of(problem, support)
    expected = reference.adapt(fast.problem, support)
    assert_close({"flat": fast.flat}, {"flat": expected})
    inputs, along = leaves(problem, support), randn(*expected.shape)
    assert_close(
        gradients((fast.flat * along).sum(), inputs, **KEEP), gradients((expected * along).sum(), inputs, **KEEP)
    )
    wanted = predictions(fast.problem, expected, query.x)
    with torch.no_grad():
        assert_close({"outputs": fast(query.x)}, {"outputs": wanted})
        moved = loop.FastWeights(fast.problem, fast.flat + 0.1)  # the body, too
        assert_close({"outputs": moved(query.x)}, {"outputs": predictions(fast.problem, moved.flat, query.x)})
    along = randn(*wanted.shape)
    assert_close(
        gradients((fast(query.x) * along).sum(), inputs, **KEEP), gradients((wanted * along).sum(), inputs, **KEEP)
    )


@pytest.mark.parametrize("name", MODELS)
def test_steps_and_means(name):
    problem, support, query = build(name)
    problem.model.eval()
    executor = executor_of(problem, support)
    got, expected = (each(problem, support, query) for each in (executor.judge_steps, reference.judge_steps))
    assert len(got) == STEPS + 1
    for one, other in zip(got, expected, strict=True):
        assert_close({"losses": one.task_losses}, {"losses": other.task_losses})
    mean, output = executor.adapt_mean(problem, support, query)
    adapted = reference.adapt(problem, support)
    assert_close({"mean": mean}, {"mean": (adapted - reference.pack(problem.parameters)).mean(0)})
    assert_close({"losses": output.task_losses}, {"losses": expected[-1].task_losses})


@pytest.mark.parametrize("given", ["rows", "initial"])
def test_what_a_body_cannot_be_taken_out_of(given):
    problem, support, query = build("convolutions")
    if given == "rows":
        support = replace(
            support, rows=torch.stack([torch.randperm(6)[:4] for _ in range(TASKS * STEPS)]).view(TASKS, STEPS, 4)
        )
    else:
        start = reference.pack(problem.parameters).detach().expand(TASKS, -1)
        support = replace(support, initial=(start + 0.1 * randn(*start.shape)).requires_grad_())
    executor, inputs = executor_of(problem, support), leaves(problem, support, query)
    got, expected = executor.meta_loss(problem, support, query), reference.meta_loss(problem, support, query)
    assert_close(gradients(got.loss, inputs, **KEEP), gradients(expected.loss, inputs, **KEEP))
    assert_close({"flat": executor.adapt(problem, support)}, {"flat": reference.adapt(problem, support)})


class Tied(nn.Module):
    """The head's weight is used in the body, too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.how = how
        if how == "shared":
            self.first.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        if self.how == "read":
            x = x @ self.head.weight
        if self.how == "twice":
            x = self.head(x)
        x = self.head(x)
        return x.clone() if self.how == "goes on" else x


@pytest.mark.parametrize("how", ["shared", "read", "twice", "goes on"])
def test_models_that_cannot_be_split(how):
    problem = inner_problem(Tied(how).double(), 0.3, STEPS, adapt="head.*" if how != "shared" else ["head.bias"])
    with pytest.warns(mf.errors.FallbackWarning):
        assert choose_executor(problem, (4,)).name == "fallback"
    with pytest.raises(NotFusedError):
        choose_executor(problem, (4,), "fused")
    support, query = sets((4,), TASKS, 6, ways=4)
    inputs = leaves(problem, support, query)
    got, expected = loop.meta_loss(problem, support, query, "fallback"), reference.meta_loss(problem, support, query)
    assert_close(gradients(got.loss, inputs, **KEEP), gradients(expected.loss, inputs, **KEEP))


def test_a_body_that_drops_or_learns_statistics_is_not_split():
    for model, shape, adapt, options in (
        (Transformer(0.1), (5, 2), "head.*", {}),
        (convolutions(), (2, 6, 6), "1.*", {"batch_norm": "running"}),
    ):
        problem = inner_problem(model, 0.3, STEPS, adapt=adapt, **options)
        with pytest.warns(mf.errors.FallbackWarning):
            assert choose_executor(problem, shape).name == "fallback"
        model.eval()
        assert isinstance(choose_executor(problem, shape), SplitExecutor)


def test_it_is_neither_a_warning_nor_an_error():
    model, x, y = Transformer(), torch.randn(2, 6, 5, 2), torch.randint(CLASSES, (2, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in ("auto", "fused"):
            fast = mf.inner_loop(model, x, y, adapt="head.*", backend=backend)
            assert fast(x).shape == (2, 6, CLASSES)
    with pytest.raises(NotFusedError):
        mf.inner_loop(model, x, y, adapt=["head.*", "embed.*"], backend="fused")
    maml = mf.MAML(model, adapt="head.*")
    assert maml.runs_on((5, 2)) == "fused from head on, behind a body that runs once"


def test_a_tail_that_is_not_fused_runs_in_the_fallback():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.SiLU(), nn.Sequential(nn.Linear(4, 4), nn.SELU(), nn.Linear(4, 3))
    ).double()
    problem = inner_problem(model, 0.3, STEPS, adapt="2.*")
    support, query = sets((3,), TASKS, 6)
    with pytest.warns(mf.errors.FallbackWarning, match=r"Sequential runs in the fallback"):
        executor = choose_executor(problem, (3,))
    assert executor.name == "fallback from 2 on, behind a body that runs once"
    inputs = leaves(problem, support, query)
    got, expected = executor.meta_loss(problem, support, query), reference.meta_loss(problem, support, query)
    assert_close(gradients(got.loss, inputs, **KEEP), gradients(expected.loss, inputs, **KEEP))


class Mixing(nn.Module):
    """Of every sample it takes the mean over all that are with it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        return self.head(x - x.mean(0))


def test_a_body_that_mixes_samples_sees_each_task_s_own():
    problem = inner_problem(Mixing().double(), 0.3, STEPS, adapt="head.*")
    support, query = sets((3,), TASKS, 6)
    executor, inputs = executor_of(problem, support), leaves(problem, support, query)
    assert executor.mixes
    got, expected = executor.meta_loss(problem, support, query), reference.meta_loss(problem, support, query)
    assert_close(gradients(got.loss, inputs, **KEEP), gradients(expected.loss, inputs, **KEEP))


@pytest.mark.parametrize("name", ["transformer", "convolutions"])
@pytest.mark.parametrize("policy", ["batch", "running", "frozen"])
def test_a_large_body_in_chunks_and_every_policy(name, policy):
    problem, support, query = build(name, batch_norm=policy, task_chunk=2)
    problem.model.eval()
    for norm in problem.model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    executor, inputs = executor_of(problem, support), leaves(problem, support, query)
    assert not executor.mixes
    got, expected = executor.meta_loss(problem, support, query), reference.meta_loss(problem, support, query)
    assert_close(gradients(got.loss, inputs, **KEEP), gradients(expected.loss, inputs, **KEEP))


def test_the_model_and_torch_s_random_numbers_stay_as_they_were():
    problem, support, query = build("convolutions")
    before = [value.clone() for value in problem.model.state_dict().values()]
    state = torch.get_rng_state()
    executor_of(problem, support).meta_loss(problem, support, query).loss.backward()
    assert torch.get_rng_state().equal(state)
    assert all(map(torch.equal, before, problem.model.state_dict().values()))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in problem.model.modules())
