import pytest
import torch
from torch import nn

from metaaug_fast import models
from metaaug_fast.engine.lowering.trace import lower

MODELS = {
    "mlp": (lambda: models.mlp([3, 5, 2]), (3,), (2,), ["linear", "relu", "linear"]),
    "linear": (lambda: models.mlp([3, 2]), (3,), (2,), ["linear"]),
    "mlp of images": (
        lambda: models.mlp([12, 5, 2], "tanh", batch_norm=True),
        (3, 2, 2),
        (2,),
        ["flatten", "linear", "batch_norm", "tanh", "linear"],
    ),
    "omniglot_mlp": (
        lambda: models.omniglot_mlp(ways=20),
        (1, 28, 28),
        (20,),
        ["flatten", *["linear", "batch_norm", "relu"] * 4, "linear"],
    ),
    "conv4": (
        lambda: models.conv4(ways=5),
        (1, 28, 28),
        (5,),
        [*["conv2d", "batch_norm", "relu", "max_pool"] * 4, "flatten", "linear"],
    ),
    "conv4 without pooling": (
        lambda: models.conv4(sample_shape=(3, 19, 19), hidden=6, norm="none", pool=False),
        (3, 19, 19),
        (5,),
        [*["conv2d", "relu"] * 4, "flatten", "linear"],
    ),
    "strided_conv4": (
        lambda: models.strided_conv4(ways=5),
        (1, 28, 28),
        (5,),
        [*["conv2d", "batch_norm", "relu"] * 4, "mean_pool", "flatten", "linear"],
    ),
    "strided_conv4 flattened": (
        lambda: models.strided_conv4(sample_shape=(1, 30, 30), hidden=4, norm="instance", mean=False),
        (1, 30, 30),
        (5,),
        [*["conv2d", "group_norm", "relu"] * 4, "flatten", "linear"],
    ),
    "resnet12": (
        lambda: models.resnet12(ways=6, sample_shape=(3, 20, 20), widths=(2, 3, 2, 3)),
        (3, 20, 20),
        (6,),
        [
            *["conv2d", "batch_norm", "leaky_relu", "conv2d", "batch_norm", "leaky_relu", "conv2d", "batch_norm",
              "conv2d", "batch_norm", "add", "leaky_relu", "max_pool"] * 4,
            "mean_pool", "flatten", "linear",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_shape_and_ops(name):
    make, sample_shape, output_shape, kinds = MODELS[name]
    model = make()
    assert model(torch.randn(3, *sample_shape)).shape == (3, *output_shape)
    graph = lower(model, sample_shape)
    assert [op.kind for op in graph.ops] == kinds
    assert graph.output_shape == output_shape
    assert {name for op in graph.ops for name in op.params if name} == dict(model.named_parameters()).keys()
    assert isinstance(model.head, nn.Linear)
    assert all(
        norm.track_running_stats for norm in model.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)
    )


def parameters(model):
    return sum(value.numel() for value in model.parameters())


def test_sizes_of_the_published_networks():
    assert parameters(models.mlp([1, 40, 40, 1])) == 1761
    assert parameters(models.conv4(ways=5)) == 112_261
    assert parameters(models.conv4(ways=5, sample_shape=(3, 84, 84), hidden=32)) == 32_901
    assert parameters(models.strided_conv4(ways=5)) == 112_261
    assert parameters(models.resnet12(ways=5)) == 12_427_525
    assert parameters(models.resnet12(ways=5, small=True)) < parameters(models.resnet12(ways=5))


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "instance", "none"])
@pytest.mark.parametrize("image", [16, 17, 31])
def test_norms_fit_every_image(norm, image):
    for make in (models.conv4, models.strided_conv4):
        assert make(ways=3, sample_shape=(1, image, image), hidden=6, norm=norm)(
            torch.randn(2, 1, image, image)
        ).shape == (2, 3)


def test_instance_norm_is_per_channel():
    norm = models.conv4(hidden=6, norm="instance").block1[1]
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(norm(x), nn.functional.instance_norm(x), rtol=1e-4, atol=1e-5)


def test_group_norm_takes_the_most_groups_that_divide():
    assert [models.conv4(hidden=hidden, norm="group").block1[1].num_groups for hidden in (64, 6, 14, 11)] == [
        8,
        6,
        7,
        1,
    ]


def test_initial_weights_of_the_papers():
    torch.manual_seed(0)
    for module in models.omniglot_mlp():
        if isinstance(module, nn.Linear):
            assert 0 < module.weight.abs().max() <= 0.02
            assert module.weight.std().item() == pytest.approx(
                0.0088, rel=0.1
            )  # a normal of 0.01, cut at two deviations
            assert not module.bias.any()
    weight = models.resnet12().block2.body[3].weight
    assert weight.std().item() == pytest.approx((2 / (1.0001 * 9 * 160)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.mlp([3]), r"sizes must be two or more layer widths >= 1 \(got \[3\]\)"),
        (lambda: models.mlp([3, 0, 1]), r"got \[3, 0, 1\]"),
        (lambda: models.mlp([3, 1], "swish"), "activation must be one of relu, .* \\(got 'swish'\\)"),
        (lambda: models.omniglot_mlp(0), r"ways must be >= 1 \(got 0\)"),
        (lambda: models.conv4(hidden=0), r"hidden must be >= 1 \(got 0\)"),
        (lambda: models.conv4(sample_shape=(1, 15, 15)), r"sample_shape must be .*>= 16 \(got \(1, 15, 15\)\)"),
        (lambda: models.strided_conv4(sample_shape=(1, 0, 5)), r"sample_shape must be .*\(got \(1, 0, 5\)\)"),
        (lambda: models.conv4(norm="spectral"), "norm must be one of batch, .* \\(got 'spectral'\\)"),
        (lambda: models.resnet12(widths=(1, 2, 3)), r"widths must be four numbers >= 1 \(got \(1, 2, 3\)\)"),
        (lambda: models.resnet12(sample_shape=(3, 16, 8)), r"sample_shape must be .*>= 16 \(got \(3, 16, 8\)\)"),
        (lambda: models.resnet12(sample_shape=(784,)), r"sample_shape must be \(channels, height, width\)"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_velocity_net_gives_planes_of_the_same_size_and_features_without_a_head():
    net = models.velocity_net(3, (4, 6, 8), hidden=12, blocks=3)
    x = torch.randn(5, 4, 6, 8)
    assert net(x).shape == (5, 3, 6, 8)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))  # samples stay apart
    assert [block.conv1.dilation for block in net.blocks] == [(1, 1), (2, 2), (1, 1)]
    graph = lower(net, (4, 6, 8))
    assert {name for op in graph.ops for name in op.params if name} == dict(net.named_parameters()).keys()
    assert models.velocity_net(None, (4, 6, 8), hidden=12)(x).shape == (5, 12)
    assert not torch.allclose(net(x), net(x + torch.tensor([0, 0, 0, 1.0])[:, None, None]))  # another time


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ways": 0}, r"ways must be >= 1 \(got 0\)"),
        ({"sample_shape": (2, 28)}, r"sample_shape must be \(channels, height, width\) \(got \(2, 28\)\)"),
        ({"hidden": 0}, r"hidden must be >= 1 \(got 0\)"),
        ({"blocks": 0}, r"blocks must be >= 1 \(got 0\)"),
    ],
)
def test_arguments_of_velocity_net(given, message):
    with pytest.raises(ValueError, match=message):
        models.velocity_net(**given)
