from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaaug_fast import _C, ANIL, models
from metaaug_fast.engine.fused import refusal
from metaaug_fast.inspect.explanation import explain


class Blocked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.norm, self.head = nn.Linear(3, 4), nn.SiLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.act(self.fc(x)))
        return self.head(F.softmax(x, -1))


def test_fused_model():
    answer = explain(models.conv4(ways=5, sample_shape=(1, 16, 16), hidden=4), torch.zeros(7, 1, 16, 16))
    assert answer.fused
    assert answer.reason == ""
    assert all(row.fused and not row.reason for row in answer.rows)
    first, head = answer.rows[0], answer.rows[-1]
    assert (first.op, first.path, first.shape, first.parameters) == ("conv2d", "block1.0", (4, 16, 16), 40)
    assert first.flops == 4 * 16 * 16 * (2 * 9 + 1)
    assert (head.op, head.shape, head.parameters, head.flops) == ("linear", (5,), 25, 5 * (2 * 4 + 1))
    assert answer.parameters == sum(row.parameters for row in answer.rows)
    assert answer.flops == sum(row.flops for row in answer.rows)


@pytest.mark.parametrize(
    ("module", "flops"),
    [
        (nn.Linear(6, 4, bias=False), None),
        (nn.Conv2d(4, 6, (3, 2), stride=2, bias=False), 6 * 2 * 3 * 2 * (4 * 3 * 2)),
        (nn.Conv2d(4, 6, (3, 2), stride=2), 6 * 2 * 3 * (2 * 4 * 3 * 2 + 1)),
        (nn.BatchNorm2d(4), 8 * 4 * 5 * 6),
        (nn.LayerNorm([4, 5, 6]), 8 * 4 * 5 * 6),
        (nn.ReLU(), 4 * 5 * 6),
        (nn.MaxPool2d(2), 4 * 2 * 3 * 4),
        (nn.AvgPool2d(3), 4 * 1 * 2 * 9),
        (nn.AdaptiveAvgPool2d(1), 4 * 5 * 6),
        (nn.Flatten(), 0),
    ],
)
def test_flops(module, flops):
    row = explain(module, torch.zeros(2, 4, 5, 6)).rows[0]
    assert row.flops == flops
    assert row.fused == (flops is not None)


def test_residual_add_and_shared_parameters():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(self.fc(x)) + x

    answer = explain(Twice(), torch.zeros(1, 3))
    assert [(row.op, row.parameters, row.flops) for row in answer.rows] == [
        ("linear", 12, 21), ("linear", 12, 21), ("add", 0, 3),
    ]  # fmt: skip
    assert (answer.parameters, answer.flops) == (12, 45)


def test_every_unsupported_op_has_its_row():
    answer = explain(Blocked(), torch.zeros(5, 3))
    assert not answer.fused
    assert [(row.op, row.fused) for row in answer.rows] == [
        ("linear", True), ("SiLU", False), ("batch_norm", True), ("softmax", False), ("linear", True),
    ]  # fmt: skip
    silu, softmax = answer.rows[1], answer.rows[3]
    assert (silu.path, silu.shape, silu.flops, silu.reason) == ("act", (4,), None, "not among the fused ops")
    assert softmax.path.startswith("test_explanation.py:")
    assert softmax.shape == (4,)
    assert answer.reason.startswith("SiLU at act")
    assert answer.flops == sum(row.flops or 0 for row in answer.rows) > 0


def test_the_table_ends_where_shapes_end():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            x = self.fc(x)
            return x if x.max() > 0 else self.fc(x)

    answer = explain(Branch(), torch.zeros(1, 3))
    assert [row.op for row in answer.rows] == ["linear", "max", "control flow"]
    assert answer.reason.startswith("control flow at test_explanation.py:")


def test_table_is_aligned():
    answer = explain(Blocked(), torch.zeros(5, 3))
    lines = str(answer).splitlines()
    assert repr(answer) == str(answer)
    assert lines[0].split() == ["op", "where", "output", "parameters", "FLOPs", "fused"]
    assert lines[-2].split() == ["total", "34", f"{answer.flops}", "+", "?"]
    assert lines[-1].startswith("runs on: fallback (torch.func), because SiLU at act: not among the fused ops")
    column = lines[0].index("fused")
    assert [line[column:] for line in lines[1:-2]] == ["yes", *["no: not among the fused ops", "yes"] * 2]
    assert all(line[column - 1] == " " for line in lines[1:-2])
    assert {len(line[:column].rstrip()) for line in lines[:-2]} == {column - 2}
    assert "runs on: fused engine (CPU)" in str(explain(models.mlp([3, 2]), torch.zeros(1, 3)))


def test_device_and_dtype():
    answer = explain(models.mlp([3, 2]).to("meta"), torch.zeros(1, 3, device="meta"))
    assert not answer.fused
    assert all(row.fused for row in answer.rows)
    assert "fallback (torch.func), because the fused engine runs on the CPU and on CUDA (got meta)" in str(answer)
    answer = explain(models.mlp([3, 2]).bfloat16(), torch.zeros(1, 3))
    assert "float32 or float64 (got torch.bfloat16)" in answer.reason
    assert explain(models.mlp([3, 2]).double(), torch.zeros(1, 3, dtype=torch.float64)).fused


def test_a_build_without_cuda_says_how_to_get_it(monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, is_cuda=True)
    monkeypatch.setattr(_C, "cuda", False)
    monkeypatch.setattr(_C, "why_no_cuda", "nvcc of CUDA 12 (got release 13.0)")
    assert "has no CUDA engine, because it needs nvcc of CUDA 12 (got release 13.0); with that," in refusal(on_gpu)
    assert "METAAUG_CUDA=1 pip install" in refusal(on_gpu)
    monkeypatch.setattr(_C, "cuda", True)
    assert refusal(on_gpu) == ""


def test_dropout_shows_in_training_only():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    assert [row.op for row in explain(model, torch.zeros(1, 3)).rows] == ["linear", "dropout"]
    assert [row.op for row in explain(model.eval(), torch.zeros(1, 3)).rows] == ["linear"]


def test_a_body_that_does_not_adapt():
    model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))
    how = "fused from 2 on, behind a body that runs once"
    for found in (
        explain(model, torch.zeros(1, 3), adapt="2.*"),
        explain(ANIL(model, head="2"), torch.zeros(1, 3)),
    ):
        assert found.split == how
        assert not found.fused
        assert f"runs on: {how}; the whole would run on the fallback (torch.func), because SiLU at 1" in str(found)
    for adapt in (None, ["0.*", "2.*"]):
        assert explain(model, torch.zeros(1, 3), adapt=adapt).split == ""
    assert explain(nn.Linear(3, 2), torch.zeros(1, 3), adapt="weight").split == ""


def test_token_ids():
    answer = explain(nn.Sequential(nn.Embedding(9, 4), nn.Flatten()), torch.zeros(2, 5, dtype=torch.int64))
    assert [(row.op, row.shape, row.parameters) for row in answer.rows[:1]] == [("Embedding", (5, 4), 36)]


def test_example_needs_a_batch():
    with pytest.raises(ValueError, match=r"example_x must be a batch \[N, ...\] \(got shape \(3,\)\)"):
        explain(models.mlp([3, 2]), torch.zeros(3))
