import functools
import gc
import random
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from metaaug_fast import models
from metaaug_fast.engine.lowering.graph import LoweringError, Op, Refusal
from metaaug_fast.engine.lowering.trace import lower, survey
from metaaug_fast.errors import NotFusedError

# --- what every op means ---------------------------------------------------------------------------------------------


def batch_norm(op, x, weight, bias):
    fixed = op.attributes["fixed"]
    mean, variance = op.buffers if fixed else (None, None)
    return F.batch_norm(x, mean, variance, weight, bias, training=not fixed, eps=op.attributes["eps"])


def group_norm(op, x, weight, bias):
    return F.group_norm(x, op.attributes["groups"], weight, bias, op.attributes["eps"])


def conv2d(op, x, weight, bias):
    assert op.attributes["kernel"] == tuple(weight.shape[2:])
    return F.conv2d(x, weight, bias, *(op.attributes[name] for name in ("stride", "padding", "dilation")))


def pool(op, x, function, **more):
    return function(x, op.attributes["kernel"], op.attributes["stride"], op.attributes["padding"], **more)


KINDS = {
    "linear": lambda op, x, weight, bias: F.linear(x, weight, bias),
    "conv2d": conv2d,
    "batch_norm": batch_norm,
    "layer_norm": lambda op, x, weight, bias: F.layer_norm(x, x.shape[1:], weight, bias, op.attributes["eps"]),
    "group_norm": group_norm,
    "relu": lambda op, x, *_: F.relu(x),
    "leaky_relu": lambda op, x, *_: F.leaky_relu(x, op.attributes["slope"]),
    "gelu": lambda op, x, *_: F.gelu(x),
    "gelu_tanh": lambda op, x, *_: F.gelu(x, approximate="tanh"),
    "tanh": lambda op, x, *_: x.tanh(),
    "sigmoid": lambda op, x, *_: x.sigmoid(),
    "softplus": lambda op, x, *_: F.softplus(x, **op.attributes),
    "max_pool": lambda op, x, *_: pool(op, x, F.max_pool2d),
    "avg_pool": lambda op, x, *_: pool(op, x, F.avg_pool2d, count_include_pad=op.attributes["count_include_pad"]),
    "mean_pool": lambda op, x, *_: x.mean((2, 3)).reshape(len(x), *op.shape),
    "flatten": lambda op, x, *_: x.reshape(len(x), *op.shape),
}


OF_TWO = {"add": torch.add, "multiply": torch.mul}


def run_graph(graph, parameters, x):
    """The lowered graph in plain torch."""
    values = {0: x}
    assert graph.shapes[0] == x.shape[1:]
    for op in graph.ops:
        inputs = [values[value] for value in op.inputs]
        weights = [None if name is None else parameters[name] for name in op.params]
        output = OF_TWO[op.kind](*inputs) if op.kind in OF_TWO else KINDS[op.kind](op, *inputs, *weights)
        assert output.shape[1:] == op.shape == graph.shapes[op.output], op
        values[op.output] = output
    assert len(graph.shapes[graph.output]) == 1
    return values[graph.output].reshape(len(x), *graph.output_shape)


def check(model, sample_shape):
    """The graph computes what the module computes, in train and eval mode, for several batch sizes, with gradients."""
    model = model.double()
    for value in model.buffers():
        if value.is_floating_point():
            value.data = torch.rand_like(value) + 0.5
    for value in model.parameters():
        value.data = torch.randn_like(value) / 2
    for training in (True, False):
        model.train(training)
        graph = lower(model, sample_shape, fixed_statistics=not training)
        for samples in (2, 5):
            x = torch.randn(samples, *sample_shape, dtype=torch.float64, requires_grad=True)
            got = run_graph(graph, dict(model.named_parameters()), x)
            statistics = {name: value.clone() for name, value in model.named_buffers()}
            want = torch.func.functional_call(model, statistics, (x,))
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
            mix = torch.randn_like(want)
            leaves = [x, *model.parameters()]
            for a, b in zip(gradients(got * mix, leaves), gradients(want * mix, leaves), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    return graph


def gradients(value, leaves):
    return torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)


def kinds(graph):
    return [op.kind for op in graph.ops]


# --- modules as users write them -------------------------------------------------------------------------------------


class Forward(nn.Module):
    """A module out of a forward function and named children or parameters."""

    def __init__(self, function, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 5), nn.Conv2d(3, 4, 3, padding=(1, 0))
        self.fc1, self.fc2 = nn.Linear(4 * 4, 7), nn.Linear(7, 5)

    def forward(self, x):
        assert x.shape[1:2] == (1,), "grey images"
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.avg_pool2d(torch.tanh(self.conv2(x)), (1, 2), stride=1)
        x = x.view(-1, self.num_flat_features(x))
        return self.fc2(F.relu(self.fc1(x)))

    def num_flat_features(self, x):
        count = 1
        for size in x.size()[1:]:
            count *= size
        return count


class BasicBlock(nn.Module):
    """Torchvision's way: in place, an optional downsampling, `out += identity`."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class FunctionalNet(nn.Module):
    """All weights held by the module itself, as in functional MAML scripts."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.empty(shape)) for shape in ((4, 2, 3, 3), (4,), (4,), (4,), (3, 4 * 4), (3,))]
        )
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x):
        conv, conv_bias, scale, shift, fc, fc_bias = self.weights
        x = F.conv2d(x, conv, conv_bias, stride=2, padding=1, dilation=1)
        x = F.batch_norm(x, self.mean, self.variance, weight=scale, bias=shift, training=self.training, momentum=0.3)
        x = F.leaky_relu_(x, 0.2)
        x = F.dropout(x, 0.5, training=False)
        return F.linear(x.view(len(x), -1), fc, fc_bias)


class Wrapped(nn.Linear):
    """A subclass with its own forward must not be taken for its parent."""

    def forward(self, input):
        return torch.relu(super().forward(input))


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    return model


def all_norms():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", dilation=2),
        nn.GroupNorm(2, 4, eps=1e-3),
        nn.GELU(),
        nn.InstanceNorm2d(4, affine=True),
        nn.GELU(approximate="tanh"),
        nn.LayerNorm([4, 5, 6], bias=False),
        nn.Softplus(beta=2, threshold=1),
        nn.BatchNorm2d(4, affine=False, eps=1e-2),
        nn.InstanceNorm2d(4),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 8),
        nn.BatchNorm1d(8),
        nn.LayerNorm(8),
        nn.GroupNorm(4, 8),
    )


def branches(self, x):
    a, b = self.left(x), torch.add(self.right(x), self.left(x), alpha=1)
    pooled = F.adaptive_avg_pool2d(a.add(b), (1, 1))
    return self.head(pooled.reshape(pooled.shape[0], -1) + (a + a).mean([-2, -1]))


def excited(self, x):
    gate = torch.sigmoid(self.excite(x.mean((2, 3)).unsqueeze(-1).unsqueeze(-1).squeeze(3).squeeze(-1)))
    y = x * gate[:, :, None, None]
    y *= self.shift(F.adaptive_avg_pool2d(x, 1))
    return torch.multiply(y, x.mul(x)) + self.excite(gate).view(*gate.shape, 1, 1)


def methods(self, x):
    x = x.relu().contiguous().clone().tanh().sigmoid()
    x = torch.relu(torch.sigmoid(x)).mean((2, 3), keepdim=True)
    return self.fc(torch.flatten(x, start_dim=1).reshape(-1, 3).view(x.size(0), -1).flatten(1))


REAL = {
    "lenet": (LeNet, (1, 12, 13)),
    "resnet": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), BasicBlock(3, 3, 1), BasicBlock(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
        (2, 7, 8),
    ),
    "functional": (FunctionalNet, (2, 4, 4)),
    "subclass": (lambda: nn.Sequential(Wrapped(4, 3), type("Plain", (nn.Linear,), {})(3, 2)), (4,)),
    "tied": (tied, (6,)),
    "shared": (lambda: nn.Sequential(*[nn.Linear(5, 5), nn.ReLU()] * 3), (5,)),
    "norms": (all_norms, (2, 5, 6)),
    "branches": (
        lambda: Forward(branches, left=nn.Conv2d(2, 3, 1), right=nn.Conv2d(2, 3, 1), head=nn.Linear(3, 2)),
        (2, 3, 4),
    ),
    "gates": (lambda: Forward(excited, excite=nn.Linear(3, 3), shift=nn.Conv2d(3, 3, 1)), (3, 4, 2)),
    "methods": (lambda: Forward(methods, fc=nn.Linear(3, 2)), (3, 2, 2)),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Identity()), nn.Dropout(0.0), nn.ReLU()),
        (3,),
    ),
    "spatial output": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3, padding="valid"), nn.MaxPool2d(2, 1)), (3, 6, 5)),
    "module alone": (lambda: nn.BatchNorm2d(3), (3, 2, 2)),
    "flat input": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.LeakyReLU(0.3)), (4,)),
    "pool with padding": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0)), nn.AvgPool2d(2)),
        (1, 9, 8),
    ),
    "mlp": (lambda: models.mlp([3, 5, 4, 2], "gelu", batch_norm=True), (3,)),
    "conv4": (lambda: models.conv4(3, sample_shape=(1, 17, 17), hidden=4, norm="group"), (1, 17, 17)),
    "strided_conv4": (lambda: models.strided_conv4(3, sample_shape=(1, 9, 9), hidden=4, norm="layer"), (1, 9, 9)),
    "resnet12": (lambda: models.resnet12(3, sample_shape=(3, 16, 16), widths=(2, 3, 2, 3)), (3, 16, 16)),
}


@pytest.mark.parametrize("name", REAL)
def test_graph_computes_what_the_module_computes(name):
    make, sample_shape = REAL[name]
    check(make(), sample_shape)


def test_conv4_op_by_op():
    graph = lower(models.conv4(ways=7, sample_shape=(1, 16, 16), hidden=2), (1, 16, 16))
    assert kinds(graph) == ["conv2d", "batch_norm", "relu", "max_pool"] * 4 + ["flatten", "linear"]
    first, head = graph.ops[0], graph.ops[-1]
    assert first == Op(
        "conv2d",
        (0,),
        1,
        (2, 16, 16),
        ("block1.0.weight", "block1.0.bias"),
        attributes={"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)},
        path="block1.0",
    )
    assert (head.params, head.shape, head.path, graph.output) == (("head.weight", "head.bias"), (7,), "head", 18)
    assert graph.output_shape == (7,)


@pytest.mark.parametrize(
    ("module", "kind", "attributes"),
    [
        (nn.LeakyReLU(0.25), "leaky_relu", {"slope": 0.25}),
        (nn.Softplus(3, 4), "softplus", {"beta": 3, "threshold": 4}),
        (nn.GroupNorm(2, 4, eps=0.5), "group_norm", {"eps": 0.5, "groups": 2}),
        (nn.InstanceNorm2d(4, eps=0.5), "group_norm", {"eps": 0.5, "groups": 4}),
        (nn.LayerNorm([4, 6, 6], eps=0.5), "layer_norm", {"eps": 0.5}),
        (nn.BatchNorm2d(4, eps=0.5), "batch_norm", {"eps": 0.5, "momentum": 0.1, "fixed": False}),
        (nn.MaxPool2d(2, padding=(1, 0)), "max_pool", {"kernel": (2, 2), "stride": (2, 2), "padding": (1, 0)}),
        (
            nn.AvgPool2d((2, 3), 1),
            "avg_pool",
            {"kernel": (2, 3), "stride": (1, 1), "padding": (0, 0), "count_include_pad": True},
        ),
        (nn.AdaptiveAvgPool2d((1, 1)), "mean_pool", {}),
    ],
)
def test_attributes(module, kind, attributes):
    op = lower(module, (4, 6, 6)).ops[0]
    assert (op.kind, op.attributes, op.inputs, op.path) == (kind, attributes, (0,), "")


def test_names_of_tied_and_shared_weights():
    graph = lower(tied(), (6,))
    assert [op.params for op in graph.ops] == [("0.weight", "0.bias"), (None, None), ("0.weight", None)]
    graph = lower(REAL["shared"][0](), (5,))
    assert [op.params for op in graph.ops][::2] == [("0.weight", "0.bias")] * 3


@pytest.mark.parametrize("fixed", [False, True])
def test_running_statistics_are_the_live_buffers(fixed):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None))
    op = lower(model, (3,), fixed_statistics=fixed).ops[1]
    assert op.attributes == {"eps": 1e-5, "momentum": None, "fixed": fixed}
    assert op.buffers[0] is model[1].running_mean
    assert op.buffers[1] is model[1].running_var
    model = FunctionalNet()
    op = lower(model, (2, 4, 4), fixed_statistics=fixed).ops[1]
    assert op.attributes["momentum"] == 0.3
    assert op.buffers[0] is model.mean
    assert op.buffers[1] is model.variance


def test_spatial_output_ends_in_a_flatten():
    graph = lower(nn.Conv2d(1, 2, 3), (1, 5, 4))
    assert (kinds(graph), graph.output_shape, graph.shapes[graph.output]) == (["conv2d", "flatten"], (2, 3, 2), (12,))
    graph = lower(nn.AdaptiveAvgPool2d(1), (3, 5, 4))
    assert (kinds(graph), graph.output_shape) == (["mean_pool", "flatten"], (3, 1, 1))


def dropouts(self, x):
    x = self.drop(x)
    x = F.dropout(x, 0.0)
    x = F.dropout(x, 0.25, self.training)
    x = F.dropout(x, 0.3, training=False)
    return torch.dropout(self.other(self.drop(x)), 0.75, self.training)


def test_dropout_sites_count_the_calls_that_drop():
    model = Forward(dropouts, drop=nn.Dropout(0.5), other=nn.Dropout(0.1).eval())
    graph = lower(model, (4,), drop=True)
    assert [(op.kind, op.attributes) for op in graph.ops] == [
        ("dropout", {"p": p, "site": site}) for site, p in enumerate((0.5, 0.25, 0.5, 0.75))
    ]
    assert kinds(lower(model, (4,), drop=False)) == []
    assert kinds(lower(model.eval(), (4,), drop=True)) == []


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda self, x: (lambda y: F.relu_(y) + y)(self.fc(x)), "both"),
        (lambda self, x: (lambda y: y + y.relu())(self.fc(x)), "none"),
        (lambda self, x: (lambda y: self.act(y) + y)(self.fc(x)), "both"),
        (lambda self, x: (lambda y: (y.add_(x), y.relu_() + y)[1])(self.fc(x)), "both"),
    ],
)
def test_in_place_changes_reach_every_later_reader(function, wanted):
    graph = check(Forward(function, fc=nn.Linear(4, 4), act=nn.ReLU(inplace=True)), (4,))
    relu = next(op for op in graph.ops if op.kind == "relu")
    add = graph.ops[-1]
    assert (relu.inputs[0] in add.inputs) == (wanted == "none")


@pytest.mark.parametrize("act", ["relu_", "add"])
def test_in_place_through_an_alias_is_refused_when_read_again(act):
    def forward(self, x):
        features = self.conv(x)
        flat = features.flatten(1)
        if act == "relu_":
            flat.relu_()
        else:
            flat += flat
        return features

    with pytest.raises(LoweringError, match="changed in place through another name"):
        lower(Forward(forward, conv=nn.Conv2d(1, 2, 1)), (1, 2, 2))


def test_in_place_on_an_alias_that_stays_in_use_is_fine():
    def forward(self, x):
        flat = self.conv(x).flatten(1)
        flat += flat
        flat.relu_()
        return flat

    check(Forward(forward, conv=nn.Conv2d(1, 2, 1)), (1, 2, 2))


# --- what is refused -------------------------------------------------------------------------------------------------


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def without_gradient(self, x):
    with torch.no_grad():
        x = self.fc(x)
    return self.fc(x)


def hooked(register, child=True):
    def make():
        model = nn.Sequential(nn.Linear(4, 4))
        getattr(model[0] if child else model, register)(lambda *_: None)
        return model

    return make


def replaced():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    return model


def counting(self, x):
    self.calls = self.calls + 1
    return self.fc(x)


def remembering(self, x):
    self.features = self.fc(x)
    return self.features


def listing(self, x):
    self.seen.append(self.fc(x))
    return self.seen[-1]


def buffering(self, x):
    self.n += 1
    return self.fc(x)


def clamping(self, x):
    with torch.no_grad():
        self.fc.weight.clamp_(-1, 1)
    return self.fc(x)


def unused(self, x):
    self.fc(x)
    return x.relu()


def positive(self, x):
    if x.sum() > 0:
        return self.fc(x)
    return x


def times_in_place(a, b):
    a *= b
    return a


def big_batch(self, x):
    return self.fc(x) if x.size(0) > 4 else x


def call(function, **parts):
    return lambda: Forward(function, **(parts or {"fc": nn.Linear(4, 4)}))


IMAGE, FLAT = (2, 4, 4), (4,)
REFUSED = {
    "softmax": (call(lambda self, x: F.softmax(self.fc(x), -1)), FLAT, r"softmax at test_trace.py:\d+: not among"),
    "attention": (lambda: nn.Sequential(nn.Linear(4, 4), nn.SiLU()), FLAT, "SiLU at 1: not among the fused ops"),
    "lazy": (lambda: nn.LazyLinear(3), FLAT, "LazyLinear"),
    "multiply": (call(lambda self, x: self.fc(x) * 2), FLAT, "mul at"),
    "buffer": (call(lambda self, x: x + self.shift, shift=nn.Buffer(torch.ones(4))), FLAT, "got a buffer"),
    "own tensor": (call(lambda self, x: x + torch.ones(4)), FLAT, "got a tensor that is no parameter"),
    "added parameter": (call(lambda self, x: x + self.fc.bias), FLAT, "got parameter 'fc.bias'"),
    "added number": (call(lambda self, x: x + 1.0), FLAT, "got 1.0"),
    "computed weight": (call(lambda self, x: F.linear(x, x)), FLAT, "weight must be a parameter"),
    "weight arithmetic": (call(lambda self, x: F.linear(x, self.fc.weight * 2)), FLAT, "mul at"),
    "transposed weight": (call(lambda self, x: F.linear(x, self.fc.weight.t())), FLAT, "t at"),
    "mask of space": (call(lambda self, x: x * x.mean(1, keepdim=True)), IMAGE, "two dimensions of space"),
    "row and column": (call(lambda self, x: F.max_pool2d(x, (1, 4)) * x), IMAGE, r"got \[N, 2, 4, 1\]"),
    "flat by picture": (call(lambda self, x: x * torch.flatten(x, 1)), IMAGE, r"and \[N, 32\]"),
    "multiplied parameter": (call(lambda self, x: x * self.fc.bias), FLAT, "got parameter 'fc.bias'"),
    "larger into smaller": (call(lambda self, x: times_in_place(x.mean((2, 3), keepdim=True), x)), IMAGE, "equal"),
    "new first dimension": (call(lambda self, x: x.unsqueeze(0)), FLAT, "mixes the samples of a batch"),
    "some rows": (call(lambda self, x: self.fc(x)[:, :2]), FLAT, "adds dimensions"),
    "first sample": (call(lambda self, x: self.fc(x)[0]), FLAT, "adds dimensions"),
    "no first dimension": (call(lambda self, x: x.squeeze((0, 2))), IMAGE, "takes away the samples"),
    "scaled add": (call(lambda self, x: torch.add(x, x, alpha=2)), FLAT, "alpha=1"),
    "batch mean": (call(lambda self, x: self.fc(x).mean(0)), FLAT, "mixes the samples of a batch"),
    "mean of all": (call(lambda self, x: x.mean()), FLAT, "mixes the samples of a batch"),
    "mean of channels": (call(lambda self, x: x.mean(1)), IMAGE, "two dimensions of space"),
    "flatten batch": (lambda: nn.Flatten(0), IMAGE, "mixes the samples of a batch"),
    "view over batch": (call(lambda self, x: x.view(-1, 8)), IMAGE, r"\[N, 2, 4, 4\] to \[-1, 8\]"),
    "fixed batch": (call(lambda self, x: x.view(3, -1)), IMAGE, r"to \[3, -1\]"),
    "half flattened": (call(lambda self, x: x.flatten(2)), IMAGE, "fused only from"),
    "unflatten": (call(lambda self, x: x.view(-1, 1, 2, 2)), FLAT, "fused only from"),
    "batch at the end": (call(lambda self, x: x.view(-1, x.size(0))), FLAT, "keep the samples"),
    "squeeze": (call(lambda self, x: x.squeeze()), IMAGE, "squeeze at"),
    "transpose": (call(lambda self, x: x.transpose(0, 1)), FLAT, "transpose at"),
    "concatenation": (call(lambda self, x: torch.cat([x, x], 1)), FLAT, "cat at"),
    "groups": (lambda: nn.Conv2d(2, 4, 3, groups=2), IMAGE, "groups=1"),
    "padding mode": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), IMAGE, "padding_mode='zeros'"),
    "uneven same": (lambda: nn.Conv2d(2, 4, 2, padding="same"), IMAGE, "symmetric"),
    "window": (lambda: nn.Conv2d(2, 4, 5), IMAGE, "does not fit"),
    "channels": (lambda: nn.Conv2d(3, 4, 3), IMAGE, r"weight must have shape \(4, 2, 3, 3\) \(got \(4, 3, 3, 3\)\)"),
    "features": (lambda: nn.Linear(3, 4), FLAT, r"weight must have shape \(4, 4\) \(got \(4, 3\)\)"),
    "linear on images": (lambda: nn.Linear(4, 4), IMAGE, r"Linear: fused only on \[N, F\] \(got \[N, 2, 4, 4\]\)"),
    "unbatched": (lambda: nn.Conv2d(2, 4, 3), FLAT, r"fused only on \[N, C, H, W\]"),
    "sequence": (lambda: nn.Linear(4, 4), (3, 4), r"input: the engine takes .* \(got \[N, 3, 4\]\)"),
    "scalar samples": (lambda: nn.ReLU(), (), "input: the engine takes"),
    "batch norm 2d on vectors": (lambda: nn.BatchNorm2d(4), FLAT, "4 dimensions"),
    "batch norm 1d on images": (lambda: nn.BatchNorm1d(2), IMAGE, "2 dimensions"),
    "layer norm of rows": (lambda: nn.LayerNorm(4), IMAGE, "whole sample"),
    "running instance norm": (lambda: nn.InstanceNorm2d(2, track_running_stats=True).eval(), IMAGE, "own statistics"),
    "instance of one": (lambda: nn.InstanceNorm2d(2), (2, 1, 1), "single spatial"),
    "ceil": (lambda: nn.MaxPool2d(2, ceil_mode=True), IMAGE, "ceil_mode=False"),
    "indices": (lambda: nn.MaxPool2d(2, return_indices=True), IMAGE, "return_indices=False"),
    "dilated pool": (lambda: nn.MaxPool2d(2, dilation=2), IMAGE, "dilation"),
    "divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), IMAGE, "divisor_override"),
    "padded pool": (lambda: nn.MaxPool2d(2, padding=2), IMAGE, "at most half"),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d(2), IMAGE, "output size 1"),
    "channel dropout": (lambda: nn.Dropout2d(0.5), IMAGE, "Dropout2d"),
    "drop all": (call(lambda self, x: F.dropout(x, 1.0)), FLAT, "0 <= p < 1"),
    "drops in eval mode": (lambda: Forward(lambda self, x: F.dropout(x)).eval(), FLAT, "in eval mode"),
    "input in place": (lambda: nn.ReLU(inplace=True), FLAT, "changes the module's input in place"),
    "view of input in place": (call(lambda self, x: x.flatten(1).relu_()), IMAGE, "input in place"),
    "control flow": (call(positive), FLAT, r"control flow at test_trace.py:\d+: .*`if x.sum"),
    "batch control flow": (call(big_batch), FLAT, "control flow at .*Python branches"),
    "loop over samples": (call(lambda self, x: sum(self.fc(row) for row in x)), FLAT, "iterates"),
    "integer": (call(lambda self, x: self.fc(x)[: int(x.sum())]), FLAT, "sum at"),
    "range": (call(lambda self, x: next(self.fc(x) for _ in range(len(x)))), FLAT, "cannot be traced"),
    "no_grad": (call(without_gradient), FLAT, "torch.no_grad"),
    "detach": (call(lambda self, x: self.fc(x).detach()), FLAT, "detach at"),
    "custom gradient": (call(lambda self, x: Reverse.apply(self.fc(x))), FLAT, "test_trace.py"),
    "forward hook": (hooked("register_forward_hook"), FLAT, "Linear at 0: it has hooks"),
    "forward pre-hook": (hooked("register_forward_pre_hook"), FLAT, "it has hooks"),
    "backward hook": (hooked("register_full_backward_hook"), FLAT, "it has hooks"),
    "backward pre-hook": (hooked("register_full_backward_pre_hook"), FLAT, "it has hooks"),
    "hook on the whole": (hooked("register_forward_hook", child=False), FLAT, "Sequential: it has hooks"),
    "parametrization": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), FLAT, "parametrize"),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 4))), FLAT, "hooks"),
    "replaced forward": (replaced, FLAT, "replaced on the instance"),
    "counter": (call(counting, fc=nn.Linear(4, 4), calls=0), FLAT, "Forward: forward changes its calls"),
    "memory": (call(remembering), FLAT, "Forward: forward changes its features"),
    "list": (call(listing, fc=nn.Linear(4, 4), seen=[]), FLAT, "Forward: forward changes its seen"),
    "counting buffer": (call(counting, fc=nn.Linear(4, 4), calls=nn.Buffer(torch.zeros(()))), FLAT, "add at"),
    "counting buffer in place": (call(buffering, fc=nn.Linear(4, 4), n=nn.Buffer(torch.zeros(()))), FLAT, "iadd at"),
    "clamped weight": (call(clamping), FLAT, "clamp_ at"),
    "random layer": (call(lambda self, x: self.fc(x) if torch.rand(()) < 2 else x), FLAT, "draws random numbers"),
    "random branch": (call(lambda self, x: self.fc(x) if random.random() < 2 else x), FLAT, "draws random numbers"),
    "noise": (call(lambda self, x: x + torch.rand(4)), FLAT, "add at"),
    "unused": (call(unused), FLAT, "linear at fc: its result is never used"),
    "two outputs": (call(lambda self, x: (self.fc(x), x)), FLAT, "must return one tensor"),
    "parameter as output": (call(lambda self, x: self.fc.weight), FLAT, "must return one tensor"),
    "unknown keyword": (call(lambda self, x: torch.add(x, x, out=x)), FLAT, "called in a form"),
    "mean in another dtype": (call(lambda self, x: x.mean((2, 3), dtype=torch.float64)), IMAGE, "called in a form"),
    "autocast": (call(lambda self, x: autocast(self.fc, x)), FLAT, "autocast"),
}  # fmt: skip


def autocast(function, x):
    with torch.autocast("cpu", torch.bfloat16):
        return function(x)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, sample_shape, message = REFUSED[name]
    with pytest.raises(LoweringError, match=message):
        lower(make(), sample_shape)


def test_the_error_is_a_not_fused_error():
    with pytest.raises(NotFusedError, match="SiLU"):
        lower(nn.SiLU(), (3,))


def test_batch_norm_without_running_statistics():
    model = nn.BatchNorm1d(3, track_running_stats=False)
    op = lower(model, (3,)).ops[0]
    assert (op.kind, op.buffers) == ("batch_norm", ())
    with pytest.raises(LoweringError, match="needs running statistics"):
        lower(model, (3,), fixed_statistics=True)


@pytest.mark.parametrize("function", [remembering, buffering, listing, clamping])
def test_lowering_leaves_the_module_alone(function):
    parts = {"fc": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "n": nn.Buffer(torch.zeros(())), "seen": []}
    model = Forward(function, **parts)
    model.fc.weight = model.fc[0].weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LoweringError):
        lower(model, (4,))
    assert "features" not in vars(model)
    assert model.seen == []
    assert type(model.n) is nn.Buffer or type(model.n) is torch.Tensor
    assert "len" not in globals()
    assert "isinstance" not in globals()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_isinstance_takes_the_branch_it_takes_outside_of_a_trace():
    def forward(self, x):
        return self.fc(x) if isinstance(x, torch.Tensor) and torch.is_tensor(x) else x.relu()

    assert kinds(lower(Forward(forward, fc=nn.Linear(4, 2)), (4,))) == ["linear"]


def test_a_graph_is_remembered_until_something_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    graph = lower(model, (4,), drop=True)
    with torch.no_grad():
        model[0].weight.zero_()
    assert lower(model, (4,), drop=True) is graph
    assert lower(model, [4], drop=True) is graph
    assert kinds(lower(model, (4,))) == ["linear", "batch_norm"]
    model[1].p = 0.25
    assert lower(model, (4,), drop=True).ops[1].attributes["p"] == 0.25
    model.eval()
    assert kinds(lower(model, (4,), drop=True)) == ["linear", "batch_norm"]
    model.double()
    assert lower(model, (4,)).ops[1].buffers[0] is model[2].running_mean
    model[0] = nn.Linear(4, 4, bias=False)
    assert lower(model, (4,)).ops[0].params == ("0.weight", None)
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(LoweringError, match="hooks"):
        lower(model, (4,))


def test_what_hides_in_objects_is_looked_at_every_time():
    class Options:
        deep = True

    def forward(self, x):
        x = self.fc(x)
        return self.fc(x) if self.options.deep else x

    model = Forward(forward, fc=nn.Linear(4, 4), options=Options())
    assert len(lower(model, (4,)).ops) == 2
    model.options.deep = False
    assert len(lower(model, (4,)).ops) == 1


def test_surroundings_count():
    model = nn.Sequential(nn.Linear(4, 4))
    graph = lower(model, (4,))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(LoweringError, match="autocast"):
        lower(model, (4,))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(LoweringError, match="hooks"):
            lower(model, (4,))
    finally:
        handle.remove()
    with torch.inference_mode():
        assert lower(model, (4,)) is graph
    with torch.no_grad():
        assert lower(nn.Sequential(nn.Linear(4, 4)), (4,)).ops == graph.ops


def test_the_memory_does_not_keep_models_alive():
    model = nn.Sequential(nn.Linear(4, 4))
    lower(model, (4,))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_survey_goes_on_behind_what_it_refuses():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.norm, self.fc = nn.MultiheadAttention(4, 2), nn.SiLU(), nn.Linear(4, 3)

        def forward(self, x):
            mixed, _ = self.attention(x, x, x)
            return self.fc(F.softmax(self.norm(mixed + x), -1).cumsum(1))

    found = survey(Attention(), (4,))
    assert [step.name if isinstance(step, Refusal) else step.kind for step in found.steps] == [
        "MultiheadAttention", "add", "SiLU", "softmax", "cumsum", "linear",
    ]  # fmt: skip
    assert found.blocker is found.steps[0]
    assert found.graph is None
    assert found.steps[3].shape == (4,)
    assert set(found.steps[0].params) == {
        "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias",
    }  # fmt: skip


# --- random nets -----------------------------------------------------------------------------------------------------

ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.Softplus, functools.partial(nn.LeakyReLU, 0.1)]


class Residual(nn.Module):
    def __init__(self, body, inplace):
        super().__init__()
        self.body, self.inplace = body, inplace

    def forward(self, x):
        out = self.body(x)
        if self.inplace:
            out += x
            return out
        return x + out


@st.composite
def nets(draw):
    """A random stack of layers on images that ends flat or not, and its sample shape."""

    def activation():
        return draw(st.sampled_from(ACTIVATIONS))()

    def norm(channels, size):
        return draw(
            st.sampled_from(
                [
                    nn.BatchNorm2d(channels),
                    nn.GroupNorm(channels // 2, channels),
                    nn.LayerNorm([channels, *size]),
                    nn.Identity(),
                ]
            )
        )

    channels, height, width = draw(st.sampled_from([2, 4])), draw(st.integers(5, 9)), draw(st.integers(5, 9))
    sample_shape, layers = (channels, height, width), []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "residual", "max_pool", "avg_pool"]))
        if kind == "residual":
            body = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                norm(channels, (height, width)),
                activation(),
                nn.Conv2d(channels, channels, 1),
            )
            layers.append(Residual(body, draw(st.booleans())))
            continue
        kernel, stride = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.integers(1, 2)] * 2))
        padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
        if kind == "conv":
            channels_in, channels = channels, draw(st.sampled_from([2, 4]))
            layers.append(nn.Conv2d(channels_in, channels, kernel, stride, padding, bias=draw(st.booleans())))
        elif kind == "max_pool":
            layers.append(nn.MaxPool2d(kernel, stride, padding))
        else:
            layers.append(nn.AvgPool2d(kernel, stride, padding, count_include_pad=draw(st.booleans())))
        height, width = (
            (size + 2 * pad - window) // by + 1
            for size, pad, window, by in zip((height, width), padding, kernel, stride, strict=True)
        )
        layers += [norm(channels, (height, width)), activation()]
        if min(height, width) < 3:
            break
    if draw(st.booleans()):
        layers += [nn.Flatten(), nn.Linear(channels * height * width, 3), nn.BatchNorm1d(3), activation()]
    return nn.Sequential(*layers), sample_shape


@settings(max_examples=40, deadline=None)
@given(nets(), st.integers(0, 2**31))
def test_random_nets(net, seed):
    torch.manual_seed(seed)
    check(*net)


def test_message_names_file_line_and_text():
    with pytest.raises(LoweringError) as caught:
        lower(Forward(positive, fc=nn.Linear(4, 4)), (4,))
    line = positive.__code__.co_firstlineno + 1
    assert f"test_trace.py:{line}" in str(caught.value)
    assert re.search(r"\(in `if x.sum\(\) > 0:`\)$", str(caught.value))
