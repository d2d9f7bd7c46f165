"""What networks of all kinds say of their inputs and outputs, and how a network is left that was tried."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.learners.shapes import features_of, gives_maps, sample_shape_of
from metaaug_fast.models import conv4, deep_averaging, omniglot_mlp, perceptron, resnet12, strided_conv4


class Pooled(nn.Module):
    """A user's own, of pictures of any size."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2))

    def forward(self, x):
        return self.body(x).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "features"),
    [
        (conv4(ways=None, hidden=8), 8),
        (conv4(ways=None, sample_shape=(3, 32, 32), hidden=8), 32),
        (conv4(hidden=8, pools=2, maps=True), 8),
        (strided_conv4(ways=None, sample_shape=(3, 84, 84), hidden=8, mean=False), 8 * 36),
        (resnet12(ways=None, sample_shape=(3, 32, 32), widths=(4, 4, 4, 6)), 6),
        (omniglot_mlp(ways=None), 64),
        (perceptron(None, (5,), (7, 6)), 6),
        (perceptron(None, (5,), ()), 5),
        (deep_averaging(ways=None, vocabulary=50), None),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU()), 32),
        (Pooled(), 12),
        (nn.Sequential(nn.Conv1d(2, 6, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()), 6),
        (nn.Linear(4, 3).half(), 3),
        (nn.Linear(4, 3).double(), 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_features_are_found(model, features):
    if features is None:
        features = model(torch.zeros(2, 3, dtype=torch.int64)).shape[1]
    before, training = copy.deepcopy(model.state_dict()), model.training
    random = torch.get_rng_state()
    assert features_of(model) == features
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def own_conv4(channels):
    """As users write it: features depend on the size of the picture."""
    widths = (channels, 8, 8, 8, 8)
    blocks = [
        nn.Sequential(nn.Conv2d(*pair, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        for pair in itertools.pairwise(widths)
    ]
    return nn.Sequential(*blocks, nn.Flatten())


def test_inputs_are_known_where_the_network_tells():
    assert sample_shape_of(conv4(sample_shape=(3, 84, 84))) == (3, 84, 84)
    assert sample_shape_of(copy.deepcopy(perceptron(5, (2, 3)))) == (2, 3)
    assert sample_shape_of(nn.Sequential(nn.ReLU(), nn.Linear(7, 2))) == (7,)
    assert sample_shape_of(nn.Sequential(own_conv4(3), nn.Linear(32, 5))) == (3, 32, 32)  # no other size fits
    assert sample_shape_of(nn.Conv2d(2, 3, 3)) is None
    assert sample_shape_of(nn.Identity()) is None


def test_of_several_sizes_the_papers_counts():
    assert sample_shape_of(own_conv4(1)) == (1, 28, 28)
    assert sample_shape_of(Pooled()) == (3, 84, 84)
    assert (features_of(own_conv4(1)), features_of(own_conv4(3))) == (8, 8 * 25)


@pytest.mark.parametrize(
    "make", [mf.RelationNet, mf.SNAIL, mf.CNP, functools.partial(mf.MatchingNet, full_context=True)]
)
def test_who_has_reckoned_with_another_size_says_so(make):
    y = torch.arange(3).repeat(2, 2)
    tasks = mf.TaskBatch(torch.rand(2, 6, 3, 32, 32), y, torch.rand(2, 6, 3, 32, 32), y)
    with pytest.raises(ValueError, match=r"features must be 32, as model gives of such samples \(got 200\)"):
        make(own_conv4(3))(tasks)
    assert make(own_conv4(3), features=32)(tasks).task_losses.shape == (2,)


def test_maps_are_told_from_features():
    assert gives_maps(conv4(maps=True))
    assert gives_maps(Pooled().body)
    assert not gives_maps(Pooled())
    assert not gives_maps(nn.Linear(4, 3))


def test_what_cannot_be_known_must_be_given():
    flat = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten())
    with pytest.raises(ValueError, match=r"features must be given: how many Sequential gives, for it gives 1352 or "):
        features_of(flat)
    assert features_of(flat, 1352) == 1352
    with pytest.raises(ValueError, match=r"features must be given: how many Identity gives, for it is unknown"):
        features_of(nn.Identity())
    with pytest.raises(TypeError, match=r"model must be an nn.Module \(got str\)"):
        features_of("conv4")
    with pytest.raises(TypeError, match=r"features must be an integer \(got 2.5\)"):
        features_of(flat, 2.5)
