import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from metaaug_fast import MAML, Learner, learners
from metaaug_fast.data import SOURCES, Glyphs, Sinusoids
from metaaug_fast.models import MODELS as NETWORKS
from metaaug_fast.runs import registry
from metaaug_fast.runs.registry import DATA, LEARNERS, MODELS, Registry, find_data, find_learner, find_model, nearest

OWN = """
import os
from functools import partial
import torch
from torch import nn
from metaaug_fast import MAML, Learner
from metaaug_fast.data import Sinusoids
from metaaug_fast.models import conv4

number = 3
net = nn.Linear(2, 3)
small = partial(conv4, hidden=4)
class Mine(MAML): pass
class Sub:
    class Inner(MAML): pass
class Data(Sinusoids): pass
class Half:
    targets = [0, 1]
ready, half = Data(), Half()
def made(): return Data()
"""


@pytest.fixture
def own(own_code):
    own_code("own", OWN)


@pytest.fixture
def points(monkeypatch):
    """Entry points as installed packages have them."""

    def install(*entries):
        found = [EntryPoint(name, value, group) for group, name, value in entries]
        monkeypatch.setattr(registry, "entry_points", lambda group: [each for each in found if each.group == group])

    return install


def test_ours_go_by_their_names():
    assert all(find_learner(name) is found for name, found in learners.LEARNERS.items())
    assert all(find_model(name) is found for name, found in NETWORKS.items())
    assert all(find_data(name) is found for name, found in SOURCES.items())
    assert set(LEARNERS.names()) >= set(learners.LEARNERS)


@pytest.mark.parametrize("allow", [None, ["own"]])
def test_what_a_user_names(own, allow):
    assert issubclass(find_learner("own:Mine", allow), MAML)
    assert issubclass(find_learner("own:Sub.Inner", allow), MAML)
    assert find_learner("own:MAML", allow) is MAML
    assert isinstance(find_model("own:net", allow), nn.Linear)
    assert isinstance(find_data("own:ready", allow), Sinusoids)
    assert isinstance(find_data("own:made", allow)(), Sinusoids)
    assert find_data("own:half", allow).targets == [0, 1]


def test_packages_register_their_own(own, points):
    points(
        ("metaaug_fast.learners", "theirs", "own:Mine"),
        ("metaaug_fast.data", "things", "own:ready"),
        ("metaaug_fast.models", "theirs", "own:small"),
        ("another.group", "unseen", "own:Mine"),
    )
    assert LEARNERS.names() == sorted([*learners.LEARNERS, "theirs"])
    assert find_learner("theirs", allow=()) is find_learner("own:Mine")
    assert isinstance(find_data("things", allow=()), Sinusoids)
    assert find_model("theirs", allow=())(ways=3).head.out_features == 3
    with pytest.raises(ValueError, match=f"learner must be one of {', '.join(LEARNERS.names())}, or module:attribute"):
        find_learner("unseen")


def test_a_name_that_two_packages_register(own, points):
    points(("metaaug_fast.learners", "theirs", "own:Mine"), ("metaaug_fast.learners", "theirs", "own:Sub.Inner"))
    with pytest.raises(ValueError, match=r"learner 'theirs' is registered more than once: own:Mine, own:Sub.Inner"):
        find_learner("theirs")


def test_a_package_that_cannot_be_imported(points):
    points(("metaaug_fast.learners", "theirs", "nosuchthing:Mine"))
    with pytest.raises(ValueError, match=r"learner 'theirs' cannot be imported \(ModuleNotFoundError: No module named"):
        find_learner("theirs")
    assert find_learner("maml") is MAML


@pytest.mark.parametrize(
    ("find", "name", "message"),
    [
        (find_learner, "mamml", r"learner must be one of .* \(got 'mamml'; did you mean 'maml'\?\)"),
        (find_learner, "quite.other", r"learner must be one of .*, or module:attribute \(got 'quite.other'\)"),
        (find_learner, "own:Data", r"learner 'own:Data' must be a subclass of metaaug_fast.Learner \(got Data\)"),
        (find_learner, "own:net", r"learner 'own:net' must be a subclass of metaaug_fast.Learner \(got Linear\)"),
        (
            find_learner,
            "own:nothing",
            r"learner 'own:nothing' cannot be imported \(AttributeError: module 'own' has no",
        ),
        (find_model, "own:number", r"model 'own:number' must be an nn.Module or make one \(got int\)"),
        (find_data, "own:number", r"data 'own:number' must be, or make, a TaskSource or a data set .* \(got int\)"),
        (find_data, "sinus", r"data must be one of .*, omniglot, sinusoid, .* did you mean 'sinusoid'"),
    ],
)
def test_names_of_nothing(own, find, name, message):
    with pytest.raises(ValueError, match=message):
        find(name)


@pytest.mark.parametrize("name", ["own:Learner", "own:os.getcwd", "own:partial", "own:nn.Linear"])
def test_an_allowed_module_lends_no_name_to_the_code_of_others(own, name):
    found = Registry("thing", {}, "metaaug_fast.things")
    assert found.find(name) is not None
    with pytest.raises(ValueError, match=rf"thing {name} is code outside this package, which only you can name"):
        found.find(name, allow=["own"])
    home = found.find(name).__module__
    assert found.find(name, allow=["own", home]) is found.find(name)


def test_a_package_is_allowed_as_a_whole_and_a_name_by_itself(own_code, tmp_path):
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").write_text("from .room import Mine\nfrom os import getcwd\n")
    (tmp_path / "house" / "room.py").write_text("from metaaug_fast import MAML\nclass Mine(MAML): pass\n")
    found = Registry("thing", {}, "metaaug_fast.things")
    for allow in (["house"], ["house:Mine"], ["x", "house"]):
        assert found.find("house:Mine", allow).__module__ == "house.room"
    assert found.find("house.room:Mine", ["house"]) is found.find("house:Mine", None)
    assert found.find("house:getcwd", ["house:getcwd"])() == str(tmp_path)
    for name, allow in (("house:getcwd", ["house", "house:Mine"]), ("house:Mine", ["house.room", "hous", ""])):
        with pytest.raises(ValueError, match="is code outside this package"):
            found.find(name, allow)


def test_what_is_not_allowed_is_not_imported(own):
    for allow in ((), ["other"], ["own2"]):
        with pytest.raises(ValueError, match=r"allow its module \(--allow own, in Python allow=\['own'\]\)"):
            find_model("own:net", allow)
    assert "own" not in sys.modules


def test_a_module_is_imported_as_with_one_seed(own_code):
    content = "import torch\nnet = torch.nn.Linear(3, 4)\n"
    own_code("first", content)
    own_code("second", content)
    before = torch.get_rng_state()
    one = find_model("first:net")
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(one.weight, find_model("second:net").weight)


def test_the_nearest_name():
    assert nearest("--inner-stepz", ["--inner-steps", "--inner_steps"]) == "; did you mean '--inner-steps'?"
    assert nearest("--inner_step", ["--inner-steps", "--steps"]) == "; did you mean '--inner-steps'?"
    assert nearest("--root", ["--shots", "--tasks"]) == ""
    assert nearest("mpl", MODELS.names()) == "; did you mean 'mlp'?"
    assert nearest("x", []) == ""


def test_a_name_of_ours_cannot_be_taken(own, points):
    points(("metaaug_fast.data", "glyphs", "own:Data"), ("metaaug_fast.learners", "maml", "own:Mine"))
    assert DATA.find("glyphs") is Glyphs
    assert LEARNERS.find("maml") is MAML
    assert issubclass(MAML, Learner)
