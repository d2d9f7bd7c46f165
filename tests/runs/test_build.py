import sys

import pytest
import torch
from torch import nn

from metaaug_fast.data import ClassSamples, Sinusoids
from metaaug_fast.data.division import PARTS
from metaaug_fast.runs import configure, recipe, recipes
from metaaug_fast.runs.build import (
    fitted,
    make_episodes,
    make_learner,
    make_model,
    make_sources,
    target_shape_of,
    vocabulary_of,
)
from metaaug_fast.runs.config import Part, merged
from metaaug_fast.runs.registry import find_data

OWN = """
import torch
from torch import nn
from metaaug_fast import MAML
from metaaug_fast.data import ClassSamples, Sinusoids

calls = []

def arrays(classes=50):
    return torch.rand(4 * classes, 1, 4, 4), torch.arange(classes).repeat(4)

class Split(ClassSamples):
    def __init__(self, split, size: int = 4):
        calls.append(split)
        data = ClassSamples.from_arrays(torch.rand(40, size, size), torch.arange(10).repeat(4))
        super().__init__(data.samples, data.first, data.counts, [f"{split} {name}" for name in data.names])

class Whole(ClassSamples):
    def __init__(self, classes: int = 50):
        calls.append("whole")
        data = ClassSamples.from_arrays(*arrays(classes))
        super().__init__(data.samples, data.first, data.counts, data.names)

def made(classes: int = 50):
    calls.append("made")
    return ClassSamples.from_arrays(*arrays(classes))

ready = ClassSamples.from_arrays(*arrays())

class Dataset(torch.utils.data.Dataset):
    def __init__(self, classes: int = 50):
        calls.append("dataset")
        self.images, self.targets = arrays(classes)
    def __getitem__(self, index):
        return self.images[index], self.targets[index]

class Labelled:
    def __init__(self):
        self.images, self.labels = arrays()
    def get_labels(self):
        return self.labels
    def __getitem__(self, index):
        return self.images[index], self.labels[index]

class OnlyLabels:
    def __init__(self):
        self.images, self.labels = arrays()
    def __len__(self):
        return len(self.labels)
    def __getitem__(self, index):
        return self.images[index], self.labels[index]

only_labels = OnlyLabels()
dataset = Dataset()

class Family(Sinusoids): pass
family = Family()

class Uncut:
    sample_shape = (3,)
    def sampler(self, spec): raise NotImplementedError

class Ragged(Dataset):
    def __getitem__(self, index):
        return torch.zeros(index + 1), 0

def number(): return 3
def raises(): raise KeyError("k")
def exits(): raise SystemExit(3)
def fetches(download=False):
    calls.append(download)
    return ready

net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
def with_list(widths: list[int], sample_shape, other: tuple = (1,)):
    assert isinstance(widths, list) and isinstance(sample_shape, tuple) and isinstance(other, tuple)
    return net
def stubborn(ways): return nn.Linear(16, ways)
class Fails(MAML):
    def __init__(self, model, when: str = "now", **options):
        super().__init__(model, **options)
        raise KeyError(when)
class Mine(MAML):
    def __init__(self, model, seed, meta_lr=0.5, **options):
        super().__init__(model, **options)
        self.given = seed, meta_lr
"""


@pytest.fixture
def own(own_code):
    own_code("own", OWN)


def calls():
    """What of the user's own was called."""
    return sys.modules["own"].calls


def run_of(name, *options, **sections):
    return configure(merged(recipe(name), sections), options)


def learner_of(config, allow=None):
    source = make_sources(config.data, allow=allow)["train"]
    return make_learner(
        fitted(config, source.sample_shape, target_shape_of(source), vocabulary_of(source), allow=allow), allow=allow
    )


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in recipes()
        if not set(name.split("-")) & {"omniglot", "cifar100", "clinc150", "mini_imagenet", "completion"}
    ],
)
def test_the_data_hold_enough_for_every_split(name):
    run = run_of(name, "--tasks", "2")
    sources = make_sources(run.data)
    for split in PARTS:
        batch = make_episodes(run, split, sources[split]).batch(0)
        assert batch.tasks == 2
        if run.data.name == "glyphs":
            ways = run.sampling.train_ways if split == "train" else None
            assert int(batch.support_y.max()) + 1 == (ways or run.sampling.ways)


def test_splits_share_no_class_and_tests_do_not_follow_the_seed():
    sources = make_sources(Part("glyphs", {}))
    names = {split: set(source.names) for split, source in sources.items()}
    assert not names["train"] & names["validation"]
    assert not names["train"] & names["test"]
    assert not names["validation"] & names["test"]
    first, second = (
        {split: make_episodes(run, split, Sinusoids()).batch(0) for split in PARTS}
        for run in (run_of("maml-sinusoid", "--seed", seed) for seed in "01")
    )
    assert not torch.equal(first["train"].support_x, second["train"].support_x)
    for split in ("validation", "test"):
        assert torch.equal(first[split].support_x, second[split].support_x)
    assert len({float(batch.support_x.sum()) for batch in first.values()}) == 3


def test_training_may_be_of_other_tasks():
    run = run_of("reptile-sinusoid", "--train-queries", "3")
    train, test = (make_episodes(run, split, Sinusoids()).batch(0) for split in ("train", "test"))
    assert (train.support_x.shape[1], test.support_x.shape[1]) == (50, 10)
    assert (train.query_x.shape[1], test.query_x.shape[1]) == (3, 10)


def test_weights_follow_the_seed():
    one, same, other = (learner_of(run_of("maml-sinusoid", "--seed", seed)) for seed in "445")
    assert torch.equal(one.model.head.weight, same.model.head.weight)
    assert not torch.equal(one.model.head.weight, other.model.head.weight)


@pytest.mark.parametrize(
    "name", ["own:Whole", "own:made", "own:ready", "own:Dataset", "own:Labelled", "own:dataset", "own:only_labels"]
)
def test_data_without_splits_are_made_once_and_cut(own, name):
    find_data(name)
    before = len(calls())
    sources = make_sources(Part(name, {}))
    assert len(calls()) <= before + 1
    assert [len(sources[split]) for split in PARTS] == [32, 8, 10]
    assert len({name for source in sources.values() for name in source.names}) == 50
    assert make_sources(Part(name, {}), ["test"])["test"].names == sources["test"].names


def test_data_with_splits_of_their_own(own):
    sources = make_sources(Part("own:Split", {"size": 3}))
    assert calls()[-3:] == list(PARTS)
    assert all(source.names[0].startswith(split) for split, source in sources.items())
    assert sources["test"].sample_shape == (3, 3)


@pytest.mark.parametrize("name", ["own:Family", "own:family"])
def test_a_family_of_functions_is_whole(own, name):
    assert len(set(map(id, make_sources(Part(name, {})).values()))) == 1


def test_what_may_be_fetched_is_told_so(own):
    make_sources(Part("own:fetches", {}))
    make_sources(Part("own:fetches", {}), download=True)
    assert calls()[-2:] == [False, True]
    with pytest.raises(ValueError, match="download must not be given: data own:ready fetches nothing"):
        make_sources(Part("own:ready", {}), download=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own:number", r"data 'own:number' must be, or make, a TaskSource or a data set with labels \(got int\)"),
        ("own:raises", r"data 'own:raises' cannot be made \(KeyError: 'k'\)"),
        ("own:exits", r"data 'own:exits' cannot be made \(SystemExit: 3\)"),
        ("own:Ragged", r"data 'own:Ragged' cannot be read \(ValueError: samples must have one shape"),
        ("own:Uncut", r"data 'own:Uncut' must take split \('train', 'validation', 'test'\), for its classes cannot be"),
    ],
)
def test_data_that_are_none(own, name, message):
    with pytest.raises(ValueError, match=message):
        make_sources(Part(name, {}))


def test_models_fit_the_data():
    pictures, target = (3, 16, 20), None
    maml = configure({"learner": {"name": "maml"}, "data": {"name": "glyphs"}}, ["--ways", "7"])
    assert fitted(maml, pictures, target).model.fields["ways"] == 7
    assert fitted(maml, pictures, target).model.fields["sample_shape"] == [3, 16, 20]
    assert make_learner(fitted(maml, pictures, target)).model(torch.rand(2, *pictures)).shape == (2, 7)
    protonet = configure({"learner": {"name": "protonet"}, "data": {"name": "glyphs"}}, ["--train-ways", "9"])
    assert fitted(protonet, pictures, target).model.fields["ways"] is None
    assert fitted(maml, (2,), (2, 3)).model.fields["ways"] == 6
    given = configure(maml.as_dict(), ["--model.ways", "11", "--sample-shape", "[1, 16, 16]"])
    assert fitted(given, pictures, target).model == given.model


def test_models_have_the_vocabulary_of_the_data():
    run = configure({"learner": {"name": "maml"}, "data": {"name": "csv", "root": "x"}})
    assert run.model.name == "deep_averaging"
    model = fitted(run, (9,), None, 50).model
    assert (model.fields["ways"], model.fields["sample_shape"], model.fields["vocabulary"]) == (5, [9], 50)
    assert len(make_model(model).mean.weight) == 50
    larger, smaller = (configure(run.as_dict(), ["--model.vocabulary", size]) for size in ("60", "49"))
    assert fitted(larger, (9,), None, 50).model.fields["vocabulary"] == 60
    assert fitted(larger, (9,), None).model.fields["vocabulary"] == 60
    with pytest.raises(ValueError, match=r"model.vocabulary must be at least that of the data, 50 \(got 49\)"):
        fitted(smaller, (9,), None, 50)
    with pytest.raises(ValueError, match=r"model.vocabulary must be given: data csv do not say .* \(got none\)"):
        fitted(run, (9,), None)
    other = configure(run.as_dict() | {"model": {"name": "mlp"}})
    assert "vocabulary" not in fitted(other, (9,), None, 50).model.fields


def test_training_ways_need_a_learner_that_compares():
    run = configure({"learner": {"name": "maml"}, "data": {"name": "glyphs"}}, ["--train-ways", "7"])
    with pytest.raises(ValueError, match=r"train_ways must be ways, 5, for maml, whose model has .* \(got 7\)"):
        fitted(run, (1, 28, 28), None)
    same = configure({"learner": {"name": "maml"}, "data": {"name": "glyphs"}}, ["--train-ways", "5"])
    assert fitted(same, (1, 28, 28), None).model.fields["ways"] == 5
    assert fitted(run, (1,), (1,)).model.fields["ways"] == 1


def test_a_model_needs_an_output_for_each_class():
    run = configure({"learner": {"name": "maml"}, "data": {"name": "glyphs"}}, ["--model.ways", "4"])
    with pytest.raises(ValueError, match=r"ways must be at most model.ways, 4 \(got 5\)"):
        fitted(run, (1, 28, 28), None)
    assert fitted(configure(run.as_dict(), ["--ways", "3"]), (1, 28, 28), None).model.fields["ways"] == 4


def test_a_ready_module_is_copied(own):
    one, other = (make_model(Part("own:net", {})) for _ in range(2))
    assert torch.equal(one[1].weight, other[1].weight)
    with torch.no_grad():
        one[1].weight.zero_()
    assert other[1].weight.any()


def test_arguments_are_as_they_are_declared(own):
    make_model(Part("own:with_list", {"widths": [1], "sample_shape": [1, 4], "other": [2]}))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("own:number", {}), r"model 'own:number' must be an nn.Module or make one \(got int\)"),
        (Part("own:raises", {}), r"model 'own:raises' cannot be made \(KeyError: 'k'\)"),
        (Part("own:stubborn", {"ways": None}), r"model 'own:stubborn' cannot be made \(TypeError: "),
        (Part("conv4", {"norm": "x"}), r"^norm must be one of batch, layer, group, instance, none \(got 'x'\)"),
        (Part("conv4", {"hidden": 0}), r"^hidden must be >= 1 \(got 0\)"),
    ],
)
def test_models_that_cannot_be_made(own, part, message):
    with pytest.raises(ValueError, match=message):
        make_model(part)


def test_learners_that_cannot_be_made(own):
    net = {"name": "own:net"}
    with pytest.raises(ValueError, match=r"learner 'own:Fails' cannot be made \(KeyError: 'later'\)") as raised:
        learner_of(
            configure(
                {"learner": {"name": "own:Fails"}, "data": {"name": "own:ready"}, "model": net}, ["--when", "later"]
            )
        )
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(ValueError, match=r"^inner_lr must be >= 0 and finite \(got -1\)"):
        learner_of(run_of("maml-sinusoid", "--inner-lr", "-1"))


def test_the_run_gives_its_seed_and_rate(own):
    content = {"learner": {"name": "own:Mine"}, "data": {"name": "own:ready"}, "model": {"name": "own:net"}}
    assert learner_of(configure(content, ["--seed", "3", "--meta-lr", "0.25"])).given == (3, 0.25)
    assert learner_of(configure(content)).given == (0, 0.5)
    learner = learner_of(run_of("reptile-sinusoid", "--seed", "6", "--meta-lr", "0.25"))
    assert (learner.seed, learner.meta_lr) == (6, 0.25)


def test_sources_of_another_kind_are_class_samples(own):
    assert isinstance(make_sources(Part("own:dataset", {}))["train"], ClassSamples)
    assert isinstance(make_model(Part("own:net", {})), nn.Module)
