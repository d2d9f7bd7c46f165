import json

import pytest
import torch

import metaaug_fast as mf
from metaaug_fast.errors import CheckpointError
from metaaug_fast.runs import checkpoint, configure, run
from metaaug_fast.runs.build import make_episodes, make_sources
from metaaug_fast.runs.load import configuration, interrupted
from tests.runs.small import done, small

OWN = """
import metaaug_fast as mf
class Mine(mf.MAML):
    def __init__(self, model, tau: float = 1.0, **options):
        super().__init__(model, **options)
        self.tau = tau
"""


@pytest.mark.parametrize(("learner", "data"), [("maml", "sinusoid"), ("reptile", "glyphs"), ("protonet", "glyphs")])
def test_the_learner_is_as_its_run_left_it(tmp_path, learner, data):
    path = tmp_path / "c.safetensors"
    outcome = run(small(learner, data, "--seed", "3", steps=2), path, progress=False, say=lambda text: None)
    torch.rand(3)
    before = torch.get_rng_state()
    loaded = mf.load(path)
    assert torch.equal(before, torch.get_rng_state())
    assert type(loaded) is type(outcome.learner)
    tasks = make_episodes(outcome.config, "test", make_sources(outcome.config.data)["test"]).batch(0)
    for mode in (True, False):
        with torch.no_grad():
            ours, theirs = (
                each.train(mode).adapt(tasks.support_x, tasks.support_y)(tasks.query_x)
                for each in (loaded, outcome.learner)
            )
        assert torch.equal(ours, theirs)
    assert configuration(path, checkpoint.load(path)) == outcome.config


def test_settings_come_along(tmp_path):
    options = ["--inner-lr", "[0.1, 0.2]", "--inner-steps", "2", "--learn-inner-lr", "--adapt", "[head.*, linear1.*]"]
    done(small("maml", "sinusoid", *options), tmp_path / "c")
    loaded = mf.load(tmp_path / "c")
    assert loaded.inner_lr.shape == (2,)
    assert loaded.inner_lr.requires_grad
    assert set(loaded.problem().rates) == {"head.weight", "head.bias", "linear1.weight", "linear1.bias"}
    options = ["--inner-lr", "{head.weight: 0.5}", "--adapt", "head.weight"]
    done(small("maml", "sinusoid", *options), tmp_path / "d")
    assert mf.load(tmp_path / "d").inner_lr == {"head.weight": 0.5}


def test_code_of_the_users_own_is_named_by_its_module(tmp_path, own_code):
    own_code("own", OWN)
    done(small("own:Mine", "sinusoid", "--tau", "2.5"), tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"own:Mine is code outside this package, .*in Python allow=\['own'\]"):
        mf.load(tmp_path / "c")
    assert mf.load(tmp_path / "c", allow=["own"]).tau == 2.5


def test_two_copies_of_one_ready_module(tmp_path, own_code):
    own_code("net", "from metaaug_fast.models import mlp\nready = mlp([1, 4, 1])\n")
    for name, seed in (("a", "1"), ("b", "2")):
        done(small("maml", "sinusoid", "--seed", seed, model="net:ready"), tmp_path / name)
    one, other = (mf.load(tmp_path / name, allow=["net"]) for name in "ab")
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    assert torch.equal(one.model.head.weight, checkpoint.load(tmp_path / "a")["learner"]["model.head.weight"])


def test_a_learner_that_the_caller_makes(tmp_path):
    path = tmp_path / "c"
    learner = mf.MAML(mf.models.mlp([1, 4, 1]), inner_lr=0.01, loss="mse")
    episodes = mf.data.Episodes(mf.data.Sinusoids(), shots=5, queries=5, tasks=2)
    mf.train(learner, episodes, 2, checkpoint=path, progress=False)
    with pytest.raises(CheckpointError, match=r"has no configuration, .* mf.load\(path, learner\) takes the learner"):
        mf.load(path)
    fresh = mf.MAML(mf.models.mlp([1, 4, 1]), inner_lr=0.01, loss="mse")
    assert mf.load(path, fresh) is fresh
    assert torch.equal(fresh.model.head.weight, learner.model.head.weight)
    other = mf.MAML(mf.models.mlp([1, 5, 1]), inner_lr=0.01, loss="mse")
    before = other.model.head.weight.clone()
    with pytest.raises(CheckpointError, match=r"does not fit the learner \(learner.model.*must be \[5"):
        mf.load(path, other)
    assert torch.equal(other.model.head.weight, before)


def test_files_that_hold_no_learner(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        mf.load(tmp_path / "absent")
    path = tmp_path / "c"
    state = done(small("maml", "sinusoid", steps=1), path)
    for change in ({"learner": 3}, {"learner": {}}, {"learner": None}):
        checkpoint.save(path, state | change)
        with pytest.raises(CheckpointError, match=f"{path} does not fit the learner"):
            mf.load(path)
    checkpoint.save(path, {name: value for name, value in state.items() if name != "learner"})
    with pytest.raises(CheckpointError, match=f"{path} does not fit the learner"):
        mf.load(path)
    state["config"]["model"]["hidden"] = [0]
    checkpoint.save(path, state)
    with pytest.raises(CheckpointError, match=rf"{path} cannot be used \(hidden must be >= 1 \(got 0\)\)"):
        mf.load(path)


def test_what_can_go_on(tmp_path):
    path = tmp_path / "c"
    config = small("maml", "sinusoid", steps=3)
    state = done(config, path)
    found = interrupted(path)
    assert (found.path, found.step) == (path, 3)
    assert found.config == configure(json.loads(json.dumps(state["config"])))
    for step in (-1, "x", None, 1.5):
        checkpoint.save(path, state | {"step": step})
        with pytest.raises(CheckpointError, match="was not written by a run"):
            interrupted(path)


def test_a_damaged_file_goes_on_from_the_one_before(tmp_path):
    path = tmp_path / "c.safetensors"
    done(small("maml", "sinusoid", "--checkpoint-every", "2", steps=4), path)
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="going on from the checkpoint before it"):
        found = interrupted(path)
    assert (found.path.name, found.step) == ("c.previous.safetensors", 2)
