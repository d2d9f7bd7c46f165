import pytest
import torch
from torch import nn

from metaaug_fast.engine.lowering.snapshot import Snapshot


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))
        self.items, self.table, self.names, self.sizes = [1, 2], {"a": torch.relu}, {"x"}, ((1, 2), 3)
        self.scale = 0.5


def replace_weight(model):
    model.fc.weight = nn.Parameter(torch.zeros(2, 2))


def resize_weight(model):
    model.fc.weight.data = torch.zeros(3, 2)


CHANGES = {
    "attribute": (lambda model: setattr(model, "scale", 0.25), ("", "scale")),
    "new attribute": (lambda model: setattr(model, "more", 1), ("", "more")),
    "deleted attribute": (lambda model: delattr(model, "scale"), ("", "scale")),
    "mode": (lambda model: model.fc.eval(), ("fc", "training")),
    "child": (lambda model: setattr(model, "fc", nn.Linear(2, 2)), ("", "_modules")),
    "parameter": (replace_weight, ("fc", "_parameters")),
    "buffer": (lambda model: setattr(model, "count", torch.ones(())), ("", "_buffers")),
    "list": (lambda model: model.items.append(3), ("", "items")),
    "element": (lambda model: model.items.__setitem__(0, 3), ("", "items")),
    "dict": (lambda model: model.table.update(a=torch.tanh), ("", "table")),
    "set": (lambda model: model.names.add("y"), ("", "names")),
    "hook": (lambda model: model.fc.register_forward_hook(print), ("fc", "_forward_hooks")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_and_restore(name):
    model = Model()
    change, where = CHANGES[name]
    snapshot = Snapshot(model)
    assert snapshot.change() is None
    child = model.fc
    change(model)
    assert snapshot.change() == where
    snapshot.restore()
    assert snapshot.change() is None
    assert model.fc is child
    assert (model.scale, model.items, model.table, model.names) == (0.5, [1, 2], {"a": torch.relu}, {"x"})
    assert not hasattr(model, "more")


def test_shapes_count_and_values_do_not():
    model = Model()
    snapshot = Snapshot(model)
    with torch.no_grad():
        model.fc.weight.add_(1)
        model.count.add_(1)
    assert snapshot.change() is None
    resize_weight(model)
    assert snapshot.change() == ("", "parameters")


@pytest.mark.parametrize(
    ("value", "complete"),
    [
        (((1, 2.0), "a", None, torch.float32), True),
        ([nn.Linear(2, 2), torch.relu], True),
        (object(), False),
        (torch.zeros(2), False),
        ([[1]], False),
        ((1, ([2],)), False),
        (nn.LazyLinear(2), False),
    ],
)
def test_complete(value, complete):
    model = Model()
    model.extra = value
    assert Snapshot(model).complete == complete
