import json
import math
import struct

import pytest
import safetensors.torch
import torch

from metaaug_fast import checkpoint
from metaaug_fast.errors import CheckpointError


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_any_state_comes_back_equal(tmp_path):
    state = {
        "step": 12,
        "lr": 0.1 + 0.2,
        "none": None,
        "flags": [True, False],
        "betas": (0.9, (0.999, "x")),
        "best": math.inf,
        "by index": {0: {"exp_avg": torch.randn(3, 4)}, 1: "one"},
        "$odd": {"$tensor": "not a tensor"},
        "empty": {},
        "tensors": [torch.randn(2, dtype=torch.float64), torch.tensor(7), torch.zeros(0, 3), torch.get_rng_state()],
        "strided": torch.randn(4, 6)[:, ::2].T,
    }
    path = tmp_path / "deep" / "state.safetensors"
    checkpoint.save(path, state)
    assert equal(checkpoint.load(path), state)
    assert [file.name for file in path.parent.iterdir()] == ["state.safetensors"]


def test_optimizer_continues_bit_for_bit(tmp_path):
    def model_and_optimizer():
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)

    def steps(model, optimizer, data):
        for x in data:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    data = torch.randn(6, 5, 3)
    model, optimizer = model_and_optimizer()
    steps(model, optimizer, data[:3])
    checkpoint.save(tmp_path / "c", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    steps(model, optimizer, data[3:])

    resumed, resumed_optimizer = model_and_optimizer()
    state = checkpoint.load(tmp_path / "c")
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    steps(resumed, resumed_optimizer, data[3:])
    assert torch.equal(resumed.weight, model.weight)
    assert torch.equal(resumed.bias, model.bias)


def test_tensors_that_share_memory_are_kept_apart(tmp_path):
    shared = torch.randn(4)
    checkpoint.save(tmp_path / "c", {"a": shared, "b": shared, "c": shared[1:]})
    state = checkpoint.load(tmp_path / "c")
    assert torch.equal(state["a"], shared)
    assert torch.equal(state["b"], shared)
    assert torch.equal(state["c"], shared[1:])


def test_other_readers_find_tensors_by_path(tmp_path):
    checkpoint.save(tmp_path / "c", {"learner": {"0.weight": torch.ones(2)}})
    assert list(safetensors.torch.load_file(tmp_path / "c")) == ["learner.0.weight"]


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_file_is_one_clear_error(tmp_path, keep):
    path = tmp_path / "c"
    checkpoint.save(path, {"weights": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="c is truncated or no checkpoint"):
        checkpoint.load(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "c"
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="truncated or no checkpoint"):
        checkpoint.load(path)
    safetensors.torch.save_file({"weights": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="no checkpoint of metaaug_fast"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "absent")


def test_newer_version_is_refused(tmp_path):
    path = tmp_path / "c"
    header = json.dumps({"__metadata__": {"metaaug_fast": json.dumps({"version": 99, "state": {}})}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="version 99; this metaaug_fast reads up to 1"):
        checkpoint.load(path)


def test_state_that_cannot_be_kept_names_its_place(tmp_path):
    with pytest.raises(TypeError, match=r"got function at 'scheduler.lambdas.0'"):
        checkpoint.save(tmp_path / "c", {"scheduler": {"lambdas": [equal]}})
    assert not (tmp_path / "c").exists()


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c"
    checkpoint.save(path, {"step": 1})

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["c"]
