import inspect
import json

import pytest
import yaml

from metaaug_fast.data import SOURCES
from metaaug_fast.learners import LEARNERS
from metaaug_fast.models import MODELS
from metaaug_fast.runs import configure, recipe, recipes
from metaaug_fast.runs.config import Judging, Sampling, Training, merged, read_yaml
from metaaug_fast.runs.registry import find_learner

ROOTED = (
    "cifar10", "cifar100", "clinc150", "csv", "fashion_mnist", "folder", "idx", "kmnist", "mini_imagenet", "mnist",
    "omniglot",
)  # fmt: skip
ROOT = {name: {"root": "here"} for name in ROOTED}
REGRESSION = tuple(name for name, reader in SOURCES.items() if getattr(reader, "target_shape", None) is not None)
MODEL = {**dict.fromkeys(REGRESSION, "mlp"), "clinc150": "deep_averaging", "csv": "deep_averaging"}
"""That suits the data; the other data are pictures."""


def content(learner="maml", data="sinusoid", **sections):
    named = {"learner": {"name": learner}, "data": {"name": data, **ROOT.get(data, {})}}
    return {**named, **sections}


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("data", SOURCES)
def test_every_pair_survives_a_file(learner, data):
    config = configure(content(learner, data))
    assert configure(config.as_dict()) == config
    assert configure(json.loads(json.dumps(config.as_dict()))) == config
    assert configure(yaml.safe_load(config.as_yaml())) == config
    assert data in config.in_words(regression=data in REGRESSION)
    if "loss" in config.learner.fields:
        own = inspect.signature(find_learner(learner)).parameters.get("loss")
        of_classes = "cross_entropy" if own is None else own.default
        assert config.learner.fields["loss"] == ("mse" if data in REGRESSION else of_classes)
    assert config.model.name == MODEL.get(data, "conv4")


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_a_run_with_its_source(name):
    learner, data, *_ = name.split("-")
    config = configure(merged(recipe(name), {"data": ROOT.get(data, {})}))
    assert (config.learner.name, config.data.name) == (learner, data)
    given = recipe(name)
    assert all(
        config.as_dict()[section][field] == value for section in given for field, value in given[section].items()
    )
    encoder = find_learner(learner).encoder
    assert encoder or config.sampling.train_ways is None


def test_the_papers_settings():
    run = configure(recipe("maml-omniglot"), ["--root", "x"])
    assert (run.learner.fields["inner_lr"], run.learner.fields["inner_steps"]) == (0.4, 1)
    assert (run.training.meta_lr, run.training.schedule, run.sampling.tasks) == (1e-3, "constant", 32)
    run = configure(recipe("maml-sinusoid"))
    assert (run.learner.fields["inner_lr"], run.learner.fields["inner_steps"]) == (0.01, 1)
    assert (run.sampling.tasks, run.sampling.shots, run.training.steps) == (25, 10, 70_000)
    run = configure(recipe("reptile-omniglot"), ["--root", "x"])
    assert [run.learner.fields[name] for name in ("inner_lr", "inner_batch", "inner_steps")] == [1e-3, 25, 3]
    assert (run.sampling.tasks, run.sampling.train_shots, run.training.schedule) == (10, 15, "linear")
    run = configure(recipe("maml-cifar100"), ["--root", "x"])
    assert (run.learner.fields["inner_lr"], run.learner.fields["inner_steps"]) == (0.01, 5)
    assert (run.model.fields["hidden"], run.data.fields["splits"], run.evaluation.test_steps) == (32, "cifar_fs", 10)
    assert (run.sampling.shots, run.sampling.queries, run.sampling.tasks, run.training.steps) == (5, 15, 4, 60_000)
    run = configure(recipe("maml-mini_imagenet"), ["--root", "x"])
    assert (run.learner.fields["inner_lr"], run.learner.fields["inner_steps"]) == (0.01, 5)
    assert (run.model.fields["hidden"], run.data.fields["size"], run.evaluation.test_steps) == (32, 84, 10)
    assert (run.sampling.shots, run.sampling.queries, run.sampling.tasks, run.training.steps) == (1, 15, 4, 60_000)
    run = configure(recipe("protonet-omniglot"), ["--root", "x"])
    assert (run.sampling.train_ways, run.sampling.queries, run.training.schedule) == (60, 5, "halving")


def test_options_go_before_the_content_and_that_before_defaults():
    given = {**content(training={"steps": 7}), "learner": {"name": "maml", "inner_lr": 0.3, "inner_steps": 2}}
    config = configure(given, ["--inner-lr", "0.1", "--model.hidden", "[3]", "--first-order"])
    assert [config.learner.fields[name] for name in ("inner_lr", "inner_steps", "first_order")] == [0.1, 2, True]
    assert config.model.fields["hidden"] == [3]
    assert (config.training.steps, config.training.seed) == (7, 0)
    assert given["learner"] == {"name": "maml", "inner_lr": 0.3, "inner_steps": 2}


def test_only_some_sections_may_be_open():
    config = configure(content(data="glyphs"), ["--ways", "3", "--data.seed", "4"], sections=("data", "sampling"))
    assert (config.sampling.ways, config.data.fields["seed"]) == (3, 4)
    for option in ("--seed", "--inner-lr", "--steps", "--training.seed", "--hidden"):  # --seed is no field of the data
        with pytest.raises(ValueError, match=f"{option} is no option here"):
            configure(content(data="glyphs"), [option, "3"], sections=("data", "sampling", "evaluation"))


def test_names_that_change_take_their_fields_along():
    start = {"learner": {"name": "maml", "inner_lr": 0.4}, "sampling": {"ways": 3}}
    assert merged(start, {"learner": {"name": "maml"}})["learner"] == {"name": "maml", "inner_lr": 0.4}
    assert merged(start, {"learner": {"name": "reptile"}})["learner"] == {"name": "reptile"}
    assert merged(start, {"sampling": {"shots": 2}})["sampling"] == {"ways": 3, "shots": 2}
    assert merged(start, {"sampling": {"ways": None}})["sampling"] == {"ways": None}


def test_a_learner_without_a_model(own_code):
    own_code(
        "bare", "import metaaug_fast as mf\nclass Bare(mf.Learner):\n  def __init__(self, power: float = 2.0): pass\n"
    )
    config = configure(content("bare:Bare", "glyphs"))
    assert config.model is None
    assert "model" not in config.as_dict()
    assert configure(config.as_dict()) == config
    assert config.in_words(False).startswith("bare:Bare on glyphs, 5-way 1-shot: 16 tasks, power 2, ")
    with pytest.raises(ValueError, match=r"model must not be given: bare:Bare takes none \(got conv4\)"):
        configure(content("bare:Bare", "glyphs", model={"name": "conv4"}))
    with pytest.raises(ValueError, match=r"--model\.hidden is no option here"):
        configure(content("bare:Bare", "glyphs"), ["--model.hidden", "3"])


OWN_DATA = """
from metaaug_fast.data import Sinusoids
class Data(Sinusoids): default_model = None
class Odd(Sinusoids): default_model = 3
class Named(Sinusoids): default_model = "net:made"
"""


def test_the_model_that_suits_the_data(own_code):
    own_code("own", OWN_DATA)
    own_code("net", "def made(hidden: int = 3): pass\n")
    assert configure(content(data="own:Named")).model.as_dict() == {"name": "net:made", "hidden": 3}
    assert configure(content(data="own:Data", model={"name": "mlp"})).model.name == "mlp"
    for data in ("own:Data", "own:Odd"):
        with pytest.raises(
            ValueError, match=rf"model must be given: data {data} names none that suits it \(got none\)"
        ):
            configure(content(data=data))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], r"a configuration must have the sections learner, model, .* \(got \[1\]\)"),
        (None, r"a configuration must have the sections .* \(got none\)"),
        ({}, r"learner.name must be given \(got none\)"),
        ({"learner": {"name": "maml"}}, r"data.name must be given \(got none\)"),
        (content(lerner={}), r"a section must be one of .* \(got 'lerner'; did you mean 'learner'\?\)"),
        ({**content(), 3: {}}, r"a section must be one of .* \(got 3\)"),
        (content(training=[1]), r"training must be a mapping from fields to values \(got \[1\]\)"),
        (content(training=None), r"training must be a mapping from fields to values \(got none\)"),
        (content(training={3: 1}), r"training must be a mapping from fields to values \(got a field 3\)"),
        (content(model={"name": [1]}), r"model.name must be a name \(got \[1\]\)"),
        (
            content(training={"stesp": 1}),
            r"training has no field 'stesp'; did you mean 'steps'\? \(it has steps, meta_lr",
        ),
        (content(training={"name": "x"}), r"training has no field 'name'"),
        (
            {**content(), "learner": {"name": "maml", "inner_batch": 3}},
            r"learner has no field 'inner_batch'.* \(it has inner_lr, ",
        ),
        ({**content(), "learner": {"name": "maml", "model": 3}}, r"learner has no field 'model'"),
        (content(training={"steps": "x"}), r"training.steps must be an integer \(got 'x'\)"),
        (content(training={"steps": None}), r"training.steps must be an integer \(got none\)"),
        (
            {**content(), "learner": {"name": "maml", "inner_lr": [1, "x"]}},
            r"learner.inner_lr must be a number, a list of numbers ",
        ),
        (
            {**content("maml", "omniglot"), "data": {"name": "omniglot"}},
            r"data.root must be given: omniglot has no default",
        ),
        (content("mmal"), r"learner must be one of .*did you mean 'maml'"),
        (content(data="sinusoids"), r"data must be one of .*did you mean 'sinusoid'"),
        (content(model={"name": "conv5"}), r"model must be one of .*did you mean 'conv4'"),
    ],
)
def test_contents_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        configure(given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(ways=0), r"ways must be >= 1 \(got 0\)"),
        (lambda: Sampling(train_shots=0), r"train_shots must be >= 1 \(got 0\)"),
        (lambda: Sampling(tasks=2**31), r"tasks must be below 2\*\*31 \(got 2147483648\)"),
        (lambda: Training(steps=0), r"steps must be >= 1 \(got 0\)"),
        (lambda: Training(meta_lr=0), r"meta_lr must be > 0 and finite in float32 \(got 0\)"),
        (lambda: Training(meta_lr=float("nan")), r"meta_lr must be > 0 and finite in float32 \(got nan\)"),
        (lambda: Training(meta_lr=1e39), r"meta_lr must be > 0 and finite in float32 \(got 1e\+39\)"),
        (lambda: Training(clip_norm=-1.0), r"clip_norm must be >= 0 \(got -1.0\)"),
        (lambda: Training(seed=-2), r"seed must be >= 0 \(got -2\)"),
        (lambda: Training(seed=2**63), r"seed must be below 2\*\*63 \(got 9223372036854775808\)"),
        (lambda: Training(schedule="up"), r"schedule must be one of constant, linear, cosine, halving \(got 'up'\)"),
        (lambda: Training(validation_episodes=1), r"validation_episodes must be >= 2 \(got 1\)"),
        (lambda: Judging(episodes=1), r"episodes must be >= 2 \(got 1\)"),
        (lambda: Judging(test_steps=-1), r"test_steps must be >= 0 \(got -1\)"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a configuration must have the sections .* \(got none\)"),
        ("- 1\n", r"a configuration must have the sections .* \(got \[1\]\)"),
        ("words\n", r"a configuration must have the sections .* \(got 'words'\)"),
        ("a: [", r"is no YAML \(while parsing"),
        ("a: b: c", r"is no YAML \(mapping values are not allowed here"),
        ("learner: maml\n", r"learner must be a mapping from fields to values \(got 'maml'\)"),
        ("learner:\n", r"learner must be a mapping from fields to values \(got none\)"),
        ("lerner: {}\n", r"a section must be one of .*did you mean 'learner'"),
        ("training: {steps: 1, steps: 2}\n", r"is no YAML \(steps is given twice"),
        ("? [1]\n: 2\n", "is no YAML"),
        ("learner: !!python/object/apply:os.getcwd []\n", "is no YAML"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_yaml(path)
    assert str(raised.value).startswith(str(path))


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"config must be a file .there is none at {path}"):
            read_yaml(str(path))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ValueError, match=r"bytes.yaml is no YAML"):
        read_yaml(tmp_path / "bytes.yaml")


def test_a_recipe_of_another_name():
    with pytest.raises(
        ValueError, match=r"recipe must be one of .* \(got 'maml-omniglott'; did you mean 'maml-omniglot'\?\)"
    ):
        recipe("maml-omniglott")


def test_every_model_can_be_configured():
    for name in MODELS:
        fields = configure(content(data="glyphs", model={"name": name})).model.fields
        assert fields["ways"] is fields["sample_shape"] is None
