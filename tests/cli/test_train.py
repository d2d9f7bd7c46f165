"""Settings of a run as files, options and recipes, and how they are listed."""

import contextlib
import io
import json
import random
from importlib.metadata import EntryPoint

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metaaug_fast.cli.main import main
from metaaug_fast.data import SOURCES
from metaaug_fast.learners import LEARNERS
from metaaug_fast.models import MODELS
from metaaug_fast.runs import checkpoint, configure, recipe, recipes, registry

QUICK = ["--tasks", "2", "--episodes", "20", "--validation-episodes", "10", "--quiet"]
SINUSOID = ["--data", "sinusoid", "--hidden", "[4]", "--steps", "3", *QUICK]


def shown(*arguments):
    """What the program writes to stdout, once it has succeeded."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(map(str, arguments))) == 0
    return out.getvalue()


def failed(capsys, *arguments):
    """The one line that the program fails with."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# --- any settings, as options and in a file ---

COUNT, RATE = st.integers(1, 1000), st.floats(0, 10, width=32)
PATTERNS = st.lists(st.sampled_from(["head.*", "block4.*", "linear1.weight", "*bias"]), min_size=1, max_size=2)
RATES = RATE | st.lists(RATE, min_size=1, max_size=3) | st.dictionaries(st.sampled_from(["head.weight", "head"]), RATE)
INNER = {
    "inner_lr": RATES, "inner_steps": COUNT, "backend": st.just("fused"), "adapt": PATTERNS | st.just("a.*"),
}  # fmt: skip
VALUES = {
    "learner": {
        "maml": INNER | {"first_order": st.booleans(), "learn_inner_lr": st.booleans(), "task_chunk": COUNT},
        "reptile": INNER | {"inner_batch": st.none() | COUNT, "batched": st.booleans(), "betas": st.just([0.5, 0.25])},
        "protonet": {},
    },
    "data": {
        "cifar100": {"splits": st.sampled_from(["cifar_fs", "fc100", "shuffled"])},
        "glyphs": {"size": COUNT, "seed": COUNT, "cache_dir": st.none() | st.just("some where")},
        "idx": {"prefix": st.just("emnist-"), "splits": st.sampled_from(["shuffled", "ordered"])},
        "omniglot": {"archives": st.just(["a", "b"]), "rotations": st.none() | st.booleans()},
        "sinusoid": {"amplitude": st.lists(RATE, min_size=2, max_size=2), "x": st.just([-1.0, 2.5])},
    },
    "model": {
        "mlp": {"hidden": st.lists(COUNT, max_size=3), "activation": st.sampled_from(["relu", "tanh"])},
        "conv4": {"hidden": COUNT, "pool": st.booleans(), "sample_shape": st.just([1, 28, 28])},
        "strided_conv4": {"hidden": COUNT, "norm": st.sampled_from(["batch", "none"]), "ways": COUNT},
    },
}
RUN = {
    "sampling": {"ways": COUNT, "train_shots": st.none() | COUNT, "split_styles": st.booleans()},
    "training": {
        "meta_lr": st.just(0.25), "clip_norm": st.none() | RATE, "keep_best": st.booleans(), "steps": COUNT,
        "seed": st.integers(0, 2**63 - 1), "schedule": st.sampled_from(["constant", "linear"]),
    },
    "evaluation": {"test_steps": COUNT, "episodes": st.integers(2, 1000)},
}  # fmt: skip
ANOTHERS = ("data.seed", "model.ways")  # whose short name is that of another field
ROOTED = (
    "cifar10", "cifar100", "clinc150", "csv", "fashion_mnist", "folder", "idx", "kmnist", "mini_imagenet", "mnist",
    "omniglot",
)  # fmt: skip
NEEDED = {name: ["--root", "some where"] for name in ROOTED}


@st.composite
def calls(draw):
    """A learner, data and a model, and options for some of their fields, in any spelling."""
    named = {section: draw(st.sampled_from(sorted(VALUES[section]))) for section in VALUES}
    sections = RUN | {section: VALUES[section][name] for section, name in named.items()}
    values = {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
    words = [named["learner"], "--data", named["data"], "--model", named["model"], *NEEDED.get(named["data"], [])]
    expected = {}
    for key in draw(st.lists(st.sampled_from(sorted(values)), unique=True, max_size=6)):
        value = expected[key] = draw(values[key])
        section, _, name = key.partition(".")
        name = name.replace("_", "-") if draw(st.booleans()) else name
        option = f"--{name}" if key not in ANOTHERS and draw(st.booleans()) else f"--{section}.{name}"
        if value is True and draw(st.booleans()):
            words.append(option)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            words += [f"{option}={text}"] if draw(st.booleans()) else [option, text]
    return words, expected


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls())
def test_what_is_printed_is_the_same_run(tmp_path, call):
    words, expected = call
    printed = shown("train", *words, "--print-config")
    content = yaml.safe_load(printed)
    for key, value in expected.items():
        section, _, name = key.partition(".")
        assert content[section][name] == value
    path = tmp_path / "run.yaml"
    path.write_text(printed)
    assert shown("train", "--config", path, "--print-config") == printed
    assert configure(content).as_dict() == content
    changed = content | {"training": content["training"] | {"steps": 7}}
    assert yaml.safe_load(shown("train", words[0], "--config", path, "--steps=7", "--print-config")) == changed


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("data", SOURCES)
def test_every_pair_is_printed_and_read(tmp_path, learner, data):
    printed = shown("train", learner, "--data", data, *NEEDED.get(data, []), "--print-config")
    (tmp_path / "run.yaml").write_text(printed)
    assert shown("train", "--config", tmp_path / "run.yaml", "--print-config") == printed


def test_a_file_trains_as_its_options_did(tmp_path):
    options = ["--learner.adapt", "[head.*, linear1.*]", "--inner_lr", "0.1", "--first-order", "--seed=3"]
    assert main(["train", "maml", *SINUSOID, *options, "--out", str(tmp_path / "a")]) == 0
    (tmp_path / "run.yaml").write_text(shown("train", "maml", *SINUSOID, *options, "--print-config"))
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "b"), "--quiet"]) == 0
    ours, theirs = (checkpoint.load(tmp_path / name) for name in "ab")
    assert ours["config"] == theirs["config"]
    assert ours["config"]["learner"]["adapt"] == ["head.*", "linear1.*"]
    assert all(torch.equal(value, theirs["learner"][name]) for name, value in ours["learner"].items())


def test_a_file_names_the_learner(tmp_path):
    (tmp_path / "run.yaml").write_text("learner: {name: maml}\ndata: {name: sinusoid}\n")
    given = ["--inner-lr", "{head.weight: 0.5}", "--adapt", "a:b"]
    content = yaml.safe_load(shown("train", "--config", tmp_path / "run.yaml", *given, "--print-config"))
    assert content["learner"]["inner_lr"] == {"head.weight": 0.5}
    assert content["learner"]["adapt"] == "a:b"


def test_what_comes_before_what(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learner: {inner_lr: 0.25, inner_steps: 3}\nsampling: {tasks: 7}\n")
    printed = shown("train", "maml", "--data", "sinusoid", "--config", path, "--inner-lr", "0.5", "--print-config")
    content = yaml.safe_load(printed)
    assert (content["learner"]["inner_lr"], content["learner"]["inner_steps"]) == (0.5, 3)  # option, file
    assert (content["sampling"]["tasks"], content["sampling"]["shots"]) == (7, 10)  # file, recipe
    assert content["training"]["seed"] == 0
    path.write_text(
        "learner: {name: reptile, inner_batch: 3}\ndata: {name: sinusoid}\nmodel: {name: conv4, hidden: 3}\n"
    )
    content = yaml.safe_load(shown("train", "maml", "--model", "mlp", "--config", path, "--print-config"))
    assert content["learner"]["name"] == "maml"
    assert "inner_batch" not in content["learner"]
    assert content["model"]["hidden"] == [40, 40]


# --- recipes ---


def test_a_recipe_is_found_by_its_pair():
    for name in recipes():
        learner, data, *more = name.split("-")
        if not more:
            content = yaml.safe_load(shown("train", learner, "--data", data, *NEEDED.get(data, []), "--print-config"))
            for section, fields in recipe(name).items():
                assert fields.items() <= content[section].items()


def test_a_recipe_that_is_named():
    content = yaml.safe_load(shown("train", "--recipe", "maml-omniglot-20way", "--root", "x", "--print-config"))
    assert (content["sampling"]["ways"], content["learner"]["inner_steps"]) == (20, 5)
    content = yaml.safe_load(
        shown("train", "maml", "--data", "glyphs", "--recipe", "maml-omniglot-20way", "--print-config")
    )
    assert (content["data"]["name"], content["sampling"]["ways"], content["model"]["name"]) == (
        "glyphs",
        20,
        "strided_conv4",
    )
    content = yaml.safe_load(shown("train", "reptile", "--recipe", "maml-sinusoid", "--print-config"))
    assert content["learner"]["inner_steps"] == 5  # Reptile's own


def test_a_pair_without_a_recipe_is_said(tmp_path, monkeypatch, own_code):
    own_code("own", "from metaaug_fast import MAML\nclass Mine(MAML): pass\n")
    text = shown("train", "own:Mine", *SINUSOID, "--inner-lr", "0.1")
    lines = text.splitlines()
    assert lines[0] == "there is no recipe own:Mine-sinusoid: what is not given is each constructor's own default"
    assert "there is no recipe" not in "".join(lines[1:])
    assert "checkpoint: runs/mine-sinusoid.safetensors" in lines
    assert "no recipe" not in shown("train", "maml", *SINUSOID, "--out", "c")
    assert "no recipe" not in shown("train", "own:Mine", *SINUSOID, "--print-config")


# --- what is wrong ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml: a configuration must have the sections learner, model, "),
        ("- 1\n", "run.yaml: a configuration must have the sections "),
        ("a: [", "run.yaml is no YAML (while parsing"),
        ("learner: maml\n", "run.yaml: learner must be a mapping from fields to values (got 'maml')"),
        ("lerner: {name: maml}\n", "did you mean 'learner'?"),
        ("learner: {name: mamml}\ndata: {name: sinusoid}\n", f"learner must be one of {', '.join(LEARNERS)}, "),
        (
            "learner: {name: 'no.such:Thing'}\ndata: {name: sinusoid}\n",
            "learner 'no.such:Thing' cannot be imported (Mod",
        ),
        (
            "learner: {name: maml}\n",
            f"--data must be one of {', '.join(sorted(SOURCES))}, or module:attribute (got none)",
        ),
        ("data: {name: sinusoid}\n", f"LEARNER must be one of {', '.join(LEARNERS)}, or module:attribute (got none)"),
        ("learner: {name: maml, inner_steps: x}\ndata: {name: sinusoid}\n", "inner_steps must be an integer (got 'x')"),
        (
            "learner: {name: maml}\ndata: {name: sinusoid}\nsampling: {wayss: 3}\n",
            "no field 'wayss'; did you mean 'ways'?",
        ),
        ("learner: {name: maml}\ndata: {name: omniglot}\n", "data.root must be given: omniglot has no default for it"),
    ],
)
def test_files_that_are_none(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    assert message in failed(capsys, "train", "--config", "run.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_file_that_is_missing(tmp_path, capsys):
    for path in (tmp_path / "absent.yaml", tmp_path):
        assert f"config must be a file (there is none at {path})" in failed(capsys, "train", "maml", "--config", path)


def test_resume_takes_no_other_settings(tmp_path, capsys):
    out = tmp_path / "c"
    assert main(["train", "maml", *SINUSOID, "--out", str(out)]) == 0
    (tmp_path / "run.yaml").write_text("training: {steps: 3}\n")
    for option in (["--config", tmp_path / "run.yaml"], ["--recipe", "maml-sinusoid"]):
        message = f"{option[0]} must not be given with --resume, which has the checkpoint's settings"
        assert message in failed(capsys, "train", "maml", "--resume", out, *option)
    for option in (["--tasks", "9"], ["--sampling.tasks=9"]):
        message = "sampling.tasks must be that of the checkpoint, 2 (got 9)"
        assert message in failed(capsys, "train", "--resume", out, *option)
    message = "--data must be that of the checkpoint, sinusoid (got glyphs)"
    assert message in failed(capsys, "train", "--resume", out, "--data", "glyphs")
    assert yaml.safe_load(shown("train", "--resume", out, "--steps", "9", "--print-config"))["training"]["steps"] == 9


OWN = """
import torch
from torch import Tensor, nn
import metaaug_fast as mf
class Thing: pass
class Needs(mf.Learner):
    def __init__(self, model, other: Tensor): super().__init__()
class Asks(mf.Learner):
    def __init__(self, model, size: int): super().__init__()
class Fails(mf.MAML):
    def __init__(self, model): raise KeyError("k")
class Silent:
    sample_shape = target_shape = (1,)
    def sampler(self, spec): raise NotImplementedError
def broken(): raise RuntimeError("first\\nsecond")
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["own:Thing", "--data", "sinusoid"],
            "learner 'own:Thing' must be a subclass of metaaug_fast.Learner (got Thing)",
        ),
        (
            ["own:Needs", "--data", "sinusoid"],
            "learner 'own:Needs' cannot be configured: no file can give its other; a run",
        ),
        (["own:Asks", "--data", "sinusoid"], "learner.size must be given: own:Asks has no default for it (got none)"),
        (["own:Asks", "--data", "sinusoid", "--size", "x"], "learner.size must be an integer (got x)"),
        (["own:Fails", "--data", "sinusoid"], "learner 'own:Fails' cannot be made (KeyError: 'k')"),
        (["own:nothing", "--data", "sinusoid"], "learner 'own:nothing' cannot be imported (AttributeError: "),
        (["maml", "--data", "own:Silent"], "model must be given: data own:Silent names none that suits it (got none)"),
        (
            ["maml", "--data", "own:broken", "--model", "mlp"],
            "data 'own:broken' cannot be made (RuntimeError: first second)",
        ),
    ],
)
def test_own_code_that_cannot_be_used(own_code, capsys, arguments, message):
    own_code("own", OWN)
    assert message in failed(capsys, "train", *arguments)


# --- help and lists ---


def test_help_names_every_field(monkeypatch, own_code):
    monkeypatch.setenv("COLUMNS", "120")
    text = shown("train", "--help")
    assert "usage: metaaug-fast train LEARNER --data NAME" in text
    assert "lists the fields of these" in text
    assert "--inner-lr" not in text
    text = shown("train", "maml", "--data", "omniglot", "--help")
    for part in ("learner maml:", "model strided_conv4:", "data omniglot:", "sampling:", "training:", "evaluation:"):
        assert f"\n{part}\n" in text
    assert "(required)" in text
    config = configure(recipe("maml-omniglot"), ["--root", "x"])
    for part in config.as_dict().values():
        for name in part.keys() - {"name", "seed", "ways"}:
            assert f"\n  --{name.replace('_', '-')} " in text
    for option in ("--seed", "--data.seed", "--ways", "--model.ways", "--resume"):
        assert f"\n  {option} " in text
    assert max(map(len, text.splitlines())) <= 120
    own_code("own", "from metaaug_fast import MAML\nclass Mine(MAML):\n  '''100% mine.'''\n")
    assert "learner own:Mine:" in shown("train", "own:Mine", "--data", "sinusoid", "--help")


@pytest.mark.parametrize("command", ["train", "evaluate", "list", "explain", "demo", "bench"])
def test_every_command_helps(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert code == 0
    assert f"metaaug-fast {command}" in capsys.readouterr().out


def test_list_has_a_line_for_each(monkeypatch, own_code):
    own_code("theirs", 'from metaaug_fast import MAML\nclass Mine(MAML):\n  """Theirs.\n\n  More."""\n')
    found = {
        "metaaug_fast.learners": [("theirs", "theirs:Mine"), ("broken", "nosuchthing:Mine")],
        "metaaug_fast.data": [("things", "theirs:Mine")],
    }
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [EntryPoint(*each, group) for each in found.get(group, [])]
    )
    lines = shown("list").splitlines()
    starts = [line.partition(" ")[0] for line in lines]
    for name in (*LEARNERS, *MODELS, *SOURCES, *recipes(), "theirs", "broken", "things"):
        assert starts.count(name) == 1
    assert any(line.split() == ["theirs", "Theirs."] for line in lines)
    assert any(line.startswith("broken ") and "cannot be imported (ModuleNotFoundError: " in line for line in lines)
    assert [line for line in lines if line in ("learners", "models", "data", "recipes")] == [
        "learners", "models", "data", "recipes",
    ]  # fmt: skip


def test_any_order_of_options_is_the_same_run():
    options = [
        ["--steps", "7"],
        ["--model", "mlp"],
        ["--data", "sinusoid"],
        ["--hidden=[3]"],
        ["--first-order"],
        ["--quiet"],
    ]
    random.shuffle(options)
    words = [word for each in options for word in each]
    assert yaml.safe_load(shown("train", "maml", *words, "--print-config")) == yaml.safe_load(
        shown(
            "train", "maml", "--data=sinusoid", "--hidden", "[3]", "--first-order=true", "--steps=7", "--print-config"
        )
    )
