import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaaug_fast.engine.losses import task_loss
from metaaug_fast.engine.problem import InnerProblem, Query, Support, inner_problem
from metaaug_fast.engine.reference import adapt, judge_steps, meta_loss, pack, running_statistics, unpack
from tests.exactness import randn

pytestmark = pytest.mark.usefixtures("fresh_numbers")


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    assert got.shape == expected.shape
    return float((got - expected).detach().norm()) < tolerance * (1e-3 + float(expected.detach().norm()))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def by_hand(x, y, w, rows, theta, alphas, momentum, decay) -> Tensor:
    """Adapted weights `[T, 3]` of y = x @ a + b under mean squared error, the inner gradient by its formula."""
    adapted = []
    for task in range(len(x)):
        weights, moment = theta[task], torch.zeros(3, dtype=torch.float64)
        for step, alpha in enumerate(alphas):
            at = rows[task, step]
            design = torch.cat([x[task, at], torch.ones(len(at), 1, dtype=torch.float64)], 1)
            gradient = 2 * design.T @ (w[task, at] * (design @ weights - y[task, at, 0])) / len(at)
            moment = momentum * moment + gradient + decay * weights
            weights = weights - alpha * moment
        adapted.append(weights)
    return torch.stack(adapted)


def test_a_linear_model_written_out_by_hand():
    tasks, steps = 3, 4
    x, y, w = randn(tasks, 6, 2), randn(tasks, 6, 1), torch.rand(tasks, 6, dtype=torch.float64)
    rows, initial = torch.randint(6, (tasks, steps, 3)), randn(tasks, 3)
    alphas = (0.3 * torch.rand(steps, 3, dtype=torch.float64)).requires_grad_()
    inputs = [each.requires_grad_() for each in (x, y, w, initial)] + [alphas]
    rates = {"weight": alphas[:, None, :2], "bias": alphas[:, 2:]}
    problem = inner_problem(nn.Linear(2, 1).double(), rates, steps, loss="mse", momentum=0.7, weight_decay=0.2)
    got = adapt(problem, Support(x, y, w, rows, initial))
    expected = by_hand(x, y, w, rows, initial, alphas, 0.7, 0.2)
    assert close(got, expected)
    direction = randn(tasks, 3)
    for one, other in zip(
        torch.autograd.grad((got * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        assert close(one, other)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2),
        nn.BatchNorm2d(3, eps=0.1),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(27, 3),
        nn.LayerNorm(3, eps=0.5),
    ).double()


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        ("classes", {"steps": 3}),
        ("classes", {"steps": 2, "momentum": 0.8, "weight_decay": 0.1, "label_smoothing": 0.2}),
        ("probabilities", {"steps": 2, "adapt": ("0.*", "5.weight")}),
        ("probabilities", {"steps": 2, "loss": "bce"}),
        ("probabilities", {"steps": 2, "loss": lambda output, target: (output - target).cosh().log().mean()}),
    ],
)
def test_gradients_are_those_of_finite_differences(targets, options):
    tasks, steps = 2, options["steps"]
    model = convolutional()
    lr = (0.3 * torch.rand(steps, dtype=torch.float64)).requires_grad_()
    problem = inner_problem(model, lr, batch_norm="batch", seed=3, **options)
    shape = (tasks, 4)
    x, query_x = randn(*shape, 1, 4, 4).requires_grad_(), randn(*shape, 1, 4, 4).requires_grad_()
    inputs = [*problem.parameters.values(), lr, x, query_x]
    weight = None
    if targets == "classes":
        y, query_y = torch.randint(3, shape), torch.randint(3, shape)
    else:
        y, query_y = (randn(*shape, 3).softmax(-1).requires_grad_() for _ in range(2))
        inputs += [y, query_y]
    if not callable(problem.loss):
        weight = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        inputs.append(weight)
    step_weights = torch.rand(steps, dtype=torch.float64)

    def value() -> Tensor:
        return meta_loss(problem, Support(x, y, weight), Query(query_x, query_y, step_weights)).loss

    gradients = torch.autograd.grad(value(), inputs)
    for tensor, gradient in zip(inputs, gradients, strict=True):
        direction = torch.randn_like(tensor)
        values = []
        for size in (1e-4, -1e-4, 2e-4, -2e-4):
            with torch.no_grad():
                tensor += size * direction
                values.append(float(value()))
                tensor -= size * direction
        slope = (8 * (values[0] - values[1]) - (values[2] - values[3])) / 12e-4
        assert abs(slope - float((gradient * direction).sum())) < 1e-7 * (1 + abs(slope))


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.05)])
def test_it_takes_the_steps_of_torchs_sgd(momentum, decay):
    model = convolutional()[:-1]
    model[3].p = 0.0
    x, y = randn(2, 5, 1, 4, 4), torch.randint(3, (2, 5))
    problem = inner_problem(model, 0.2, 3, momentum=momentum, weight_decay=decay)
    assert_adapts_as(lambda p: torch.optim.SGD(p, 0.2, momentum, weight_decay=decay), problem, x, y)


@pytest.mark.parametrize(("betas", "decay"), [((0.0, 0.999), 0.0), ((0.9, 0.99), 0.1)])
def test_it_takes_the_steps_of_torchs_adam(betas, decay):
    problem = inner_problem(mlp(), 0.01, 4, optimizer="adam", betas=betas, weight_decay=decay)
    assert_adapts_as(
        lambda p: torch.optim.Adam(p, 0.01, betas, weight_decay=decay),
        problem,
        randn(2, 5, 3),
        torch.randint(2, (2, 5)),
    )


def assert_adapts_as(optimizer, problem: InnerProblem, x: Tensor, y: Tensor) -> None:
    got = adapt(problem, Support(x, y))
    for task in range(len(x)):
        model = copy.deepcopy(problem.model)
        descent = optimizer(list(model.parameters()))
        for _ in range(problem.steps):
            descent.zero_grad()
            F.cross_entropy(model(x[task]), y[task]).backward()
            descent.step()
        assert close(got[task].detach(), pack(dict(model.named_parameters())).detach())


def test_first_order_is_the_query_gradient_at_the_adapted_weights():
    model = mlp()
    x, y = randn(2, 4, 3).requires_grad_(), torch.randint(2, (2, 4))
    support, query = Support(x, y), Query(randn(2, 4, 3), torch.randint(2, (2, 4)))
    problem = inner_problem(model, 0.5, 3, first_order=True)
    parameters = list(problem.parameters.values())
    got = torch.autograd.grad(meta_loss(problem, support, query).loss, [*parameters, x], allow_unused=True)
    adapted = adapt(problem, support).detach().requires_grad_()
    after = inner_problem(model, 0.5, 0)
    expected = torch.autograd.grad(meta_loss(after, replace(support, initial=adapted), query).loss, adapted)[0].sum(0)
    assert close(torch.cat([each.flatten() for each in got[:-1]]), expected)
    assert got[-1] is None


def test_first_order_keeps_the_linear_terms():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    problem = inner_problem(mlp(), lr, 1, weight_decay=0.5, first_order=True)
    adapted = adapt(problem, Support(randn(1, 4, 3), torch.randint(2, (1, 4))))[0]
    theta = pack(problem.parameters)
    direction = randn(len(theta))
    by_bias, by_rate = torch.autograd.grad(adapted @ direction, [problem.parameters["0.bias"], lr])
    assert close(by_bias, (1 - 0.1 * 0.5) * direction[15:20])
    assert close(by_rate, (adapted - theta).detach() @ direction / 0.1)


def test_what_is_not_adapted_stays_and_still_has_a_meta_gradient():
    problem = inner_problem(mlp(), 0.5, 2, adapt="2.*", momentum=0.9, weight_decay=0.1)
    support = Support(randn(2, 4, 3), torch.randint(2, (2, 4)))
    adapted = unpack(problem, adapt(problem, support))
    first, last = problem.parameters["0.weight"], problem.parameters["2.weight"]
    assert torch.equal(adapted["0.weight"], first.expand(2, -1, -1))
    assert all(not torch.equal(each, last) for each in adapted["2.weight"])
    assert torch.autograd.grad(adapted["2.weight"].sum(), first)[0].norm() > 0


def test_a_frozen_parameter_may_adapt_and_an_unused_one_stays():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2).double(), nn.Linear(1, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Half().requires_grad_(False)
    problem = inner_problem(model, 0.5, 1, adapt="*")
    adapted = unpack(problem, adapt(problem, Support(randn(1, 4, 3), torch.randint(2, (1, 4)))))
    assert not torch.equal(adapted["used.weight"][0], model.used.weight)
    assert torch.equal(adapted["spare.weight"][0], model.spare.weight)


def test_step_weights_weigh_the_loss_after_each_step():
    model, weights = mlp(), torch.rand(3, dtype=torch.float64)
    support = Support(randn(2, 4, 3), torch.randint(2, (2, 4)))
    query = Query(randn(2, 5, 3), torch.randint(2, (2, 5)))
    together = meta_loss(inner_problem(model, 0.3, 3), support, replace(query, step_weights=weights))
    singly = [meta_loss(inner_problem(model, 0.3, steps), support, query) for steps in (1, 2, 3)]
    expected = sum(weight * each.task_losses for weight, each in zip(weights, singly, strict=True))
    assert close(together.task_losses, expected)
    assert close(together.loss, expected.mean())
    assert torch.equal(together.accuracy, singly[-1].accuracy)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "weight_decay": 0.1}, {"optimizer": "adam"}], ids=str)
def test_judging_by_step_is_judging_the_start_and_what_single_step_weights_pick(options, rows):
    problem = inner_problem(mlp(), torch.rand(3, dtype=torch.float64), 3, **options)
    support = Support(randn(2, 4, 3), torch.randint(2, (2, 4)), torch.rand(2, 4, dtype=torch.float64))
    if rows:
        support = replace(support, rows=torch.randint(4, (2, 3, 3)))
    query = Query(randn(2, 5, 3), torch.randint(2, (2, 5)))
    start, *judged = judge_steps(problem, support, query)
    output = problem.model(query.x)
    assert close(start.loss, F.cross_entropy(output.flatten(0, 1), query.y.flatten()))
    assert close(start.accuracy, (output.argmax(-1) == query.y).double().mean(1))
    for out, pick in zip(judged, torch.eye(3, dtype=torch.float64), strict=True):
        assert close(out.task_losses, meta_loss(problem, support, replace(query, step_weights=pick)).task_losses)
        assert not out.loss.requires_grad
    assert torch.equal(judged[-1].accuracy, meta_loss(problem, support, query).accuracy)


def test_no_steps_judge_the_start():
    model = mlp()
    x, y = randn(2, 5, 3), torch.randint(2, (2, 5))
    out = meta_loss(inner_problem(model, 0.1, 0), Support(x, y), Query(x, y))
    assert close(out.loss, F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
    assert close(out.accuracy, (model(x).argmax(-1) == y).double().mean(1))


def test_per_step_affines_are_read_by_the_row_of_their_step():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    rows = {"1.weight": randn(2, 4).requires_grad_(), "1.bias": randn(2, 4).requires_grad_()}
    problem = inner_problem(model, 0.4, 3, batch_norm="per_step", parameters=rows)
    x, y, query_x, query_y = randn(1, 6, 3), torch.randint(2, (1, 6)), randn(1, 6, 3), torch.randint(2, (1, 6))

    def loss(theta: dict[str, Tensor], row: int, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.batch_norm(
            F.linear(x, theta["0.weight"], theta["0.bias"]),
            None,
            None,
            rows["1.weight"][row],
            rows["1.bias"][row],
            True,
        )
        return F.cross_entropy(F.linear(hidden.tanh(), theta["3.weight"], theta["3.bias"]), y)

    theta = {name: value for name, value in problem.parameters.items() if name not in rows}
    for row in (0, 1, 1):
        gradients = torch.autograd.grad(loss(theta, row, x[0], y[0]), list(theta.values()), create_graph=True)
        theta = {name: value - 0.4 * g for (name, value), g in zip(theta.items(), gradients, strict=True)}
    expected = loss(theta, 1, query_x[0], query_y[0])
    got = meta_loss(problem, Support(x, y), Query(query_x, query_y)).loss
    assert close(got, expected)
    inputs = list(problem.parameters.values())
    for one, other in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert close(one, other)
    # A query pass before any step, and after the first, reads row 0.
    for steps in (0, 1):
        start = replace(problem, steps=steps, rates=dict.fromkeys(problem.rates, next(iter(problem.rates.values()))))
        later = {**rows, "1.weight": torch.stack([rows["1.weight"][0], randn(4)])}
        other = replace(start, parameters={**problem.parameters, **later})
        query = Query(query_x, query_y)
        assert close(meta_loss(start, Support(x, y), query).loss, meta_loss(other, Support(x, y), query).loss)


def test_dropout_repeats_with_its_seed_and_differs_between_tasks_steps_and_query():
    model = nn.Sequential(nn.Linear(3, 30), nn.Dropout(0.5), nn.Linear(30, 2)).double()
    x, y = randn(1, 5, 3).expand(2, -1, -1), torch.randint(2, (1, 5)).expand(2, -1)
    problem = inner_problem(model, 0.1, 2, seed=11)
    once = adapt(problem, Support(x, y))
    assert torch.equal(once, adapt(problem, Support(x, y)))
    assert not torch.equal(once[0], once[1])
    assert not torch.equal(once, adapt(replace(problem, seed=12), Support(x, y)))
    model.eval()
    once = adapt(problem, Support(x, y))
    assert torch.equal(once[0], once[1])


def test_it_writes_nothing_into_the_module():
    model = convolutional()
    before = copy.deepcopy(model.state_dict())
    x, y = randn(2, 4, 1, 4, 4), torch.randint(3, (2, 4))
    for policy in ("batch", "running", "frozen"):
        problem = inner_problem(model, 0.1, 2, batch_norm=policy)
        meta_loss(problem, Support(x, y), Query(x, y)).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_running_statistics_are_those_of_the_last_query_pass():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    problem = inner_problem(model, 0.3, 2, batch_norm="running")
    support = Support(randn(3, 5, 3), torch.randint(4, (3, 5)))
    query = Query(randn(3, 6, 3), torch.randint(4, (3, 6)))
    (seen,) = running_statistics(problem, support, query)
    theta = unpack(problem, adapt(problem, support))
    hidden = query.x @ theta["0.weight"].transpose(1, 2) + theta["0.bias"][:, None]
    assert seen.name == "1.running_mean"
    assert close(seen.mean, hidden.mean(1).detach())
    assert close(seen.variance, hidden.var(1).detach())


def test_packing_keeps_order_and_shapes():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(4, 5, bias=False))
    model.scale = nn.Parameter(torch.randn(()))
    problem = inner_problem(model, 0.1, 1)
    flat = pack(problem.parameters)
    assert list(problem.parameters) == ["scale", "0.weight", "0.bias", "1.weight"]
    for name, value in unpack(problem, flat.expand(4, 7, -1)).items():
        assert torch.equal(value, problem.parameters[name].expand(4, 7, *problem.parameters[name].shape))


def test_accuracy_is_for_class_ids_alone():
    x, y = randn(2, 4, 3), randn(2, 4, 2).softmax(-1)
    assert meta_loss(inner_problem(mlp(), 0.1, 1), Support(x, y), Query(x, y)).accuracy is None
    assert meta_loss(inner_problem(mlp(), 0.1, 1, loss="mse"), Support(x, y), Query(x, y)).accuracy is None


def test_sample_weights_weigh_and_do_not_normalise():
    weight = torch.rand(4, dtype=torch.float64)
    output, target = randn(4, 2), torch.randint(2, (4,))
    expected = (weight * F.cross_entropy(output, target, reduction="none")).sum() / 4
    assert close(task_loss("cross_entropy", output, target, weight), expected)
