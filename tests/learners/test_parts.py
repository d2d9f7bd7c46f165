"""Where a network's head is, and networks that share their parts."""

import copy

import pytest
import torch
from torch import nn

from metaaug_fast.learners.parts import find_head, inside, outside, replaced
from metaaug_fast.models import conv4, resnet12


class Backwards(nn.Module):
    """Its head is registered first; a layer is never used, another decides nothing."""

    def __init__(self):
        super().__init__()
        self.classifier, self.body, self.unused = nn.Linear(5, 3), nn.Linear(4, 5), nn.Linear(3, 3)
        self.gate = nn.Linear(4, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.gate(x)
        hidden = torch.relu(self.body(x)) * self.gate(x).sigmoid()
        return self.classifier(hidden).log_softmax(-1)


class Branches(nn.Module):
    """No trace can follow it."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if x.sum() > 0 else x
        return x


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.weight = nn.Linear(4, 5), nn.Parameter(torch.rand(3, 5))

    def forward(self, x):
        return nn.functional.linear(self.body(x), self.weight)


def test_the_head_is_the_last_linear_layer_that_is_used():
    assert find_head(conv4(ways=5)) == find_head(resnet12(ways=5)) == "head"
    model = Backwards()
    state = torch.get_rng_state()
    assert find_head(model) == "classifier"
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert find_head(model, "body") == "body"
    assert find_head(nn.Linear(2, 2)) == ""
    assert find_head(Branches(1)) == "layers.0"
    assert find_head(nn.Sequential(conv4(ways=7), nn.ReLU(), nn.Sequential(nn.Linear(7, 2)))) == "2.0"


@pytest.mark.parametrize(
    ("model", "head", "message"),
    [
        (
            conv4(ways=None),
            None,
            r"head must be named, for Sequential ends in block4.1 \(got None; there is no linear la",
        ),
        (Branches(2), None, r"for Branches cannot be traced \(got None; the linear layers are layers.0, layers.1\)"),
        (Functional(), None, r"for Functional ends in weight \(got None; the linear layers are body\)"),
        (Backwards(), "head", r"got 'head'; there are classifier, body, unused, gate\)"),
        (nn.Flatten(), None, "model must have parameters to adapt"),
    ],
)
def test_no_head(model, head, message):
    with pytest.raises(ValueError, match=message):
        find_head(model, head)


def test_a_head_has_parameters_of_its_own():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"head must have parameters of its own \(got '2', of which '2.weight' is an"):
        find_head(model)


def test_inside_and_outside():
    assert (inside("a.b"), inside("")) == ("a.b.*", "*")
    assert outside(Backwards(), "gate") == tuple(
        f"{layer}.{name}" for layer in ("classifier", "body", "unused") for name in ("weight", "bias")
    )


def test_a_replaced_part_leaves_the_rest_shared_and_the_model_alone():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    before = copy.deepcopy(model)
    twin = replaced(model, {"0.0": nn.Linear(3, 4), "1": nn.Identity()})
    assert twin[0][1] is model[0][1]
    assert twin[0][0] is not model[0][0]
    assert twin(torch.rand(5, 3)).shape == (5, 4)
    model.eval(), before.eval()
    model.load_state_dict(before.state_dict())
    x = torch.rand(5, 3)
    assert torch.equal(model(x), before(x))
    assert replaced(model, {"": twin}) is twin
