import errno
import json
import math
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from metaaug_fast.errors import CheckpointError
from metaaug_fast.files import previous_of
from metaaug_fast.runs import checkpoint


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


def test_names_and_keys_that_look_alike_are_kept_apart(fresh_numbers, tmp_path):
    x, y, z, w = torch.randn(4, 3)
    states = [
        {"a": {"b": x}, "a.b": y},
        {1: x, "1": y, 1.0 + 0.5: z, "1.5": w},
        {None: x, "None": y, True: z, "True": w},
        {(0, ("a", 1)): x, "(0, ('a', 1))": y},
        {"": {"x": x}, "x": y, "x#2": z},
        {"__metadata__": x, "sha256": y, '"sha256":"' + "0" * 64 + '"': z},
        {"\ud800": x, "?": y},
    ]
    for state in states:
        checkpoint.save(tmp_path / "c", state)
        assert equal(checkpoint.load(tmp_path / "c"), state)


def test_lazy_tensors_are_kept_as_they_read(tmp_path):
    numbers = torch.tensor([1 - 2j, 3 + 4j])
    state = {"conj": numbers.conj(), "imag": numbers.conj().imag, "negative": torch._neg_view(torch.ones(2))}
    checkpoint.save(tmp_path / "c", state)
    assert equal(checkpoint.load(tmp_path / "c"), state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {frozenset(): 1}}, r"got frozenset at 'a'"),
        ({"a": torch.ones(2).to_sparse()}, r"dense tensors with values \(got another at 'a'\)"),
        ({"a": torch.ones(2, device="meta")}, r"dense tensors with values \(got another at 'a'\)"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, r"tensors that safetensors knows \(got torch.complex128\)"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.save(tmp_path / "c", state)
    assert not (tmp_path / "c").exists()


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


def damaged(data, kind):
    """The file with one bit flipped, or cut short, at random."""
    place = int(torch.randint(len(data), ()))
    if kind == "cut":
        return data[:place]
    if kind == "header":
        place %= 8 + struct.unpack("<Q", data[:8])[0]
    return data[:place] + bytes([data[place] ^ 1 << int(torch.randint(8, ()))]) + data[place + 1 :]


@pytest.mark.parametrize("kind", ["bit", "header", "cut"])
def test_any_damage_is_found_and_the_file_before_named(fresh_numbers, tmp_path, kind):
    path = tmp_path / "c.safetensors"
    before = {"step": 1, "lr": (0.1, {0: torch.randn(5)})}
    for state in (before, {"step": 2, "lr": (0.1, {0: torch.randn(5)}), "weights": torch.randn(100)}):
        checkpoint.save(path, state)
    data = path.read_bytes()
    for _ in range(200):
        path.write_bytes(damaged(data, kind))
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path)
        assert str(caught.value).startswith(f"{path} is damaged or no checkpoint of metaaug_fast (")
        assert str(caught.value).endswith(f"; the checkpoint before it is {previous_of(path)}")
        with pytest.warns(UserWarning, match=r"c.safetensors is damaged .*; going on from the checkpoint before it, "):
            state, source = checkpoint.load_or_previous(path)
        assert source == previous_of(path)
        assert equal(state, before)


def test_without_a_whole_file_before_there_is_none(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, {"step": 1})
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"\(it is truncated\)$"):
            checkpoint.load_or_previous(path)
        previous_of(path).write_bytes(b"damaged too")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*d$"):
        checkpoint.load_or_previous(tmp_path / "d")


def written(path, metadata, tensors=None):
    path.write_bytes(safetensors.torch.save(tensors or {}, metadata=metadata))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({"version": 1}),
        json.dumps({"version": 1, "state": 3}),
        json.dumps({"version": 1, "state": {"a": {"$tensor": "absent"}}}),
        json.dumps({"version": 1, "state": {"a": {"$pairs": [[{"x": 1}, 2]]}}}),
        json.dumps({"version": 1, "state": {"a": {"$tuple": 5}}}),
        json.dumps({"version": "1", "state": {}}),
        json.dumps({"version": True, "state": {}}),
        json.dumps({"version": -1, "state": {}}),
        json.dumps({"version": 1.5, "state": {}}),
        json.dumps({"version": 2, "state": {}}),
        '{"version": 1, "state": ' + '{"a": ' * 900 + "1" + "}" * 900 + "}",
    ],
    ids=lambda content: content[:60],
)
def test_nonsense_is_one_clear_error(tmp_path, content):
    written(tmp_path / "c", {"metaaug_fast": content})
    with pytest.raises(CheckpointError, match="c is damaged or no checkpoint of metaaug_fast"):
        checkpoint.load(tmp_path / "c")


def test_files_of_version_1_are_read_with_a_warning(tmp_path):
    content = {"version": 1, "state": {"weights": {"$tensor": "weights"}, "step": 3}}
    written(tmp_path / "c", {"metaaug_fast": json.dumps(content)}, {"weights": torch.arange(3.0)})
    with pytest.warns(UserWarning, match="c has checkpoint version 1, without a digest: damage in it cannot be seen"):
        state = checkpoint.load(tmp_path / "c")
    assert equal(state, {"weights": torch.arange(3.0), "step": 3})


def test_a_disk_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "c"
    for step in range(2):
        checkpoint.save(path, {"step": step})
    read = Path.read_bytes

    def fail(each):
        if each == path:
            raise OSError(errno.EIO, "Input/output error")
        return read(each)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.warns(UserWarning, match=r"c cannot be read \(Input/output error\); going on from"):
        assert checkpoint.load_or_previous(path)[0] == {"step": 0}


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "c"
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        checkpoint.load(path)
    safetensors.torch.save_file({"weights": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of metaaug_fast \(it lacks the entry"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "absent")


def test_newer_version_is_refused(tmp_path):
    path = tmp_path / "c"
    header = json.dumps({"__metadata__": {"metaaug_fast": json.dumps({"version": 99, "state": {}})}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="version 99; this metaaug_fast reads up to 3"):
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
