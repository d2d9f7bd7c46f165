import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaaug_fast.engine.norms import BatchStatistics, forward, update_running
from metaaug_fast.engine.problem import InnerProblem
from tests.exactness import randn

KEY = {"task": 0, "step": 0}


pytestmark = pytest.mark.usefixtures("fresh_numbers")


class Call(nn.Module):
    """A function of the input and of some weights, as a module."""

    def __init__(self, function, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


def problem_of(model: nn.Module, **kwargs) -> InnerProblem:
    return InnerProblem(model.double(), dict(model.named_parameters()), {}, steps=0, **kwargs)


def derivatives(function, inputs: list[Tensor]) -> list[Tensor]:
    """Value, gradient, and the gradient of a function of the gradient."""
    value = function()
    first = torch.autograd.grad(value.sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(each.square().sum() for each in first), inputs)
    return [value.detach(), *(each.detach() for each in first), *second]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    scale = max(float(each.norm()) for each in expected)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm()) < 1e-11 * max(float(other.norm()), 1e-3 * scale)


def agrees_with_torch(model: nn.Module, x: Tensor, **kwargs) -> None:
    """Value, first and second order of a model called by us and by torch (plain autograd, which is right)."""
    problem = problem_of(model, **kwargs)
    inputs = [x.requires_grad_(), *problem.parameters.values()]
    with sdpa_kernel(SDPBackend.MATH):
        expected = derivatives(lambda: model(x), inputs)
    assert_same(derivatives(lambda: forward(problem, problem.parameters, x, **KEY), inputs), expected)


@pytest.mark.parametrize(
    "model",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, affine=False, eps=0.1),
        nn.BatchNorm1d(3, track_running_stats=False),
        Call(lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, 0.2), (3,), (3,)),
        Call(lambda x, w: F.batch_norm(x, None, None, weight=w, training=True), (3,)),
        Call(lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 0.2, False), (3,), (3,)),
        nn.LayerNorm(5),
        nn.LayerNorm((3, 5), bias=False),
        nn.LayerNorm(5, elementwise_affine=False, eps=0.3),
        Call(lambda x, w, b: torch.layer_norm(x, (5,), w, b, 0.2), (5,), (5,)),
        nn.InstanceNorm1d(3),
        nn.InstanceNorm1d(3, affine=True, eps=0.1),
        Call(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (3,), (3,)),
        Call(lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.1, 0.2, False), (3,), (3,)),
    ],
    ids=repr,
)
def test_norms_are_torchs(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    agrees_with_torch(model, randn(4, 3, 5))


def test_batch_norm_over_pictures_and_vectors():
    agrees_with_torch(nn.BatchNorm2d(3), randn(4, 3, 5, 2))
    agrees_with_torch(nn.BatchNorm3d(3), randn(2, 3, 2, 2, 2))
    agrees_with_torch(nn.BatchNorm1d(3), randn(6, 3))
    agrees_with_torch(nn.InstanceNorm2d(3, affine=True), randn(4, 3, 5, 2))


def with_statistics(model: nn.Module) -> nn.Module:
    for name, value in model.double().named_buffers():
        if name.endswith("running_mean"):
            value.normal_()
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("policy", ["batch", "per_step", "running", "frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_the_policy_decides_which_statistics_a_batch_norm_uses(policy, training):
    model = with_statistics(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).train(training)
    problem, x = problem_of(model, batch_norm=policy), randn(6, 3)
    got = forward(problem, problem.parameters, x, **KEY)
    uses_running = policy == "frozen" or (policy == "running" and not training)
    before = {name: value.clone() for name, value in model.named_buffers()}
    norm = model[1]
    expected = F.batch_norm(
        model[0](x),
        norm.running_mean if uses_running else None,
        norm.running_var if uses_running else None,
        norm.weight,
        norm.bias,
        training=not uses_running,
    )
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_with_running_statistics_does_as_torch_and_writes_none(training):
    model = with_statistics(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)).train(training)
    problem, x = problem_of(model), randn(4, 3, 6)
    before = model.running_mean.clone()
    got = forward(problem, problem.parameters, x, **KEY)
    assert torch.equal(model.running_mean, before)
    torch.testing.assert_close(got, model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_collected_statistics_move_the_buffers_as_torch_does(momentum):
    model = with_statistics(nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3)))
    model[1].num_batches_tracked.fill_(4)
    problem, x = problem_of(model, batch_norm="running"), randn(3, 2, 4, 4)
    seen: list[BatchStatistics] = []
    forward(problem, problem.parameters, x, **KEY, statistics=seen)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(x)
    expected = {name: value.clone() for name, value in model.named_buffers()}
    for name, value in model.named_buffers():
        value.copy_(before[name])
    assert [each.name for each in seen] == ["1.running_mean", "2.running_mean"]
    update_running(model, [BatchStatistics(s.name, s.momentum, s.mean[None], s.variance[None]) for s in seen])
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11)


def test_statistics_of_several_tasks_are_averaged():
    model = nn.BatchNorm1d(2).double()
    mean, variance = randn(5, 2), randn(5, 2).square()
    update_running(model, [BatchStatistics("running_mean", 0.25, mean, variance)])
    torch.testing.assert_close(model.running_mean, 0.25 * mean.mean(0))
    torch.testing.assert_close(model.running_var, 0.75 + 0.25 * variance.mean(0))
    assert int(model.num_batches_tracked) == 1


def test_one_value_a_channel_is_an_error_as_in_torch():
    model = nn.BatchNorm1d(3)
    problem = problem_of(model)
    with pytest.raises(ValueError, match=r"at least 2 values a channel \(got input \(1, 3\)\)"):
        forward(problem, problem.parameters, randn(1, 3), **KEY)


def attend(x: Tensor, weight: Tensor, **kwargs) -> Tensor:
    q, k, v = (x @ weight).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": "bool", "scale": 0.1},
        {"attn_mask": "float"},
    ],
    ids=str,
)
def test_attention_is_torchs_math_kernel(kwargs):
    if kwargs.get("attn_mask") == "bool":  # a row of nothing but masked keys has no softmax
        kwargs = {**kwargs, "attn_mask": (torch.rand(5, 5) < 0.5).fill_diagonal_(True)}
    elif "attn_mask" in kwargs:
        kwargs = {**kwargs, "attn_mask": torch.randn(5, 5, dtype=torch.float64)}
    agrees_with_torch(Call(lambda x, w: attend(x, w, **kwargs), (6, 24)), randn(3, 5, 6))


def test_grouped_query_attention():
    def grouped(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (8, 4)).transpose(1, 2).split((4, 2, 2), 1)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    agrees_with_torch(Call(grouped, (6, 32)), randn(3, 5, 6))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_has_second_order_in_both_modes(training, need_weights):
    attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    padding = torch.tensor([[False, False, True]] * 2)
    model = Call(lambda x: attention(x, x, x, padding, need_weights=need_weights)[0])
    model.attention = attention
    agrees_with_torch(model.train(training), randn(2, 3, 4))


def test_an_encoder_in_evaluation_mode_leaves_its_fast_path():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    agrees_with_torch(model, randn(2, 3, 4))
    with torch.no_grad():
        x = randn(2, 3, 4)
        torch.testing.assert_close(forward(problem_of(model), dict(model.named_parameters()), x, **KEY), model(x))


ATTENTION = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True, dtype=torch.float64)


@pytest.mark.parametrize(
    "function",
    [
        F.dropout,
        lambda x: torch.dropout(x, 0.5, True),
        lambda x: torch.dropout(x, p=0.5, train=True),
        lambda x: F.dropout(x.clone(), inplace=True),
        nn.Dropout(),
        F.dropout1d,
        lambda x: F.dropout2d(x[..., None])[..., 0],
        lambda x: F.dropout3d(x[..., None, None])[..., 0, 0],
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda x: ATTENTION(x, x, x, need_weights=False)[0],
        lambda x: ATTENTION(x, x, x)[0],
    ],
)
def test_every_dropout_draws_from_the_counter(function):
    model, x = Call(function), randn(3, 4, 8)
    state = torch.get_rng_state()
    problem = problem_of(model, seed=7)

    def out(seed: int = 7, **key) -> Tensor:
        return forward(problem_of(model, seed=seed), problem.parameters, x, **(KEY | key))

    once = out()
    assert torch.equal(once, out())
    assert torch.equal(torch.get_rng_state(), state)
    for other in (out(seed=8), out(task=1), out(step=1), out(query=True)):
        assert not torch.equal(once, other)


def test_features_are_dropped_whole_and_elements_singly():
    x = torch.ones(40, 50, 6, dtype=torch.float64)
    for function, whole in ((F.dropout1d, True), (F.dropout, False)):
        model = Call(lambda x, function=function: function(x, 0.3))
        problem = problem_of(model)
        kept = forward(problem, problem.parameters, x, **KEY) > 0
        assert bool((kept.all(-1) | ~kept.any(-1)).all()) == whole


def test_two_sites_of_a_pass_drop_differently():
    model = Call(lambda x: torch.cat([F.dropout(x), F.dropout(x)]))
    problem = problem_of(model)
    first, second = forward(problem, problem.parameters, torch.ones(4, 20, dtype=torch.float64), **KEY).chunk(2)
    assert not torch.equal(first, second)


def test_nothing_drops_in_evaluation_mode_or_at_zero():
    x = randn(4, 5)
    for model in (nn.Sequential(nn.Linear(5, 5), nn.Dropout()).eval(), nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.0))):
        problem = problem_of(model)
        assert torch.equal(forward(problem, problem.parameters, x, **KEY), model(x))


def test_tied_parameters_and_replacements_reach_every_use():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    problem, weight, x = problem_of(Tied()), randn(3, 3), randn(2, 3)
    torch.testing.assert_close(forward(problem, {"a.weight": weight}, x, **KEY), x @ weight.T @ weight.T)


def test_a_model_must_return_one_tensor():
    model = Call(lambda x: (x, x))
    problem = problem_of(model)
    with pytest.raises(TypeError, match=r"model must return one tensor \(got tuple\)"):
        forward(problem, problem.parameters, randn(2, 3), **KEY)
