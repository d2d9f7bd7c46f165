"""A data set and more of each class: by every augmenter, the same from a seed, joined with the original."""

import copy

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.augment import (
    AugmentationPolicy,
    FlowTasks,
    Generator,
    Hallucination,
    PictureGenerator,
    Retrieval,
    VectorGenerator,
    generate_augmented_data,
)
from metaaug_fast.learners.supervised import labelled

NAMES = ("ash", "birch", "cedar")


def bytes_of(*counts):
    """Pictures of bytes, so many of each class."""
    return mf.data.ClassSamples.from_classes(
        {
            name: torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8)
            for name, count in zip(NAMES, counts, strict=False)
        }
    )


def flow():
    tasks = FlowTasks(context=1, patch=2)
    return Generator(mf.MAML(tasks.network((1, 16, 16), hidden=4), inner_steps=0, loss="mse"), tasks, steps=2)


def maml():
    return mf.MAML(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), inner_lr=0.1)


AUGMENTERS = {
    "policy": lambda: AugmentationPolicy(["rotation", "noise", "cutout"]),
    "policy with a network": lambda: AugmentationPolicy(
        ["noise", "scale"], network=mf.augment.support_network((1, 16, 16), 4)
    ),
    "hallucination": lambda: Hallucination(maml(), PictureGenerator(1, noise=3, hidden=4), noise=3),
    "generator": flow,
    "retrieval": lambda: Retrieval(maml(), torch.rand(20, 1, 16, 16)),
}


@pytest.mark.parametrize("name", AUGMENTERS)
def test_more_of_each_class_the_same_from_a_seed(name):
    augmenter, few = AUGMENTERS[name](), bytes_of(1, 3, 2)
    if isinstance(augmenter, nn.Module):
        augmenter.train()
        before = copy.deepcopy(augmenter.state_dict())
    torch.manual_seed(0)
    one = generate_augmented_data(augmenter, few, per_class=5, seed=3)
    torch.manual_seed(1)
    again, other = (generate_augmented_data(augmenter, few, per_class=5, seed=seed) for seed in (3, 4))
    assert one.samples.dtype == torch.uint8
    assert one.sample_shape == (1, 16, 16)
    assert torch.equal(one.samples, again.samples)
    assert one.names == again.names
    assert one.samples.shape != other.samples.shape or not torch.equal(one.samples, other.samples)
    if name == "retrieval":
        assert set(one.names) <= set(NAMES)
        assert one.counts.max() <= 5
    else:
        assert one.names == NAMES
        assert one.counts[:, 0].tolist() == [5, 5, 5]
    if isinstance(augmenter, nn.Module):
        assert augmenter.training
        assert all(torch.equal(value, before[key]) for key, value in augmenter.state_dict().items())
    together = few + one
    assert together.names == NAMES
    assert len(together.samples) == len(few.samples) + len(one.samples)
    assert torch.equal(together.class_samples(1)[:3], few.class_samples(1))


def test_each_class_grows_by_its_own():
    x = torch.tensor([[5.0], [50.0], [500.0]])
    few = mf.data.ClassSamples.from_classes(dict(zip(NAMES, x.split(1), strict=True)))
    more = generate_augmented_data(AugmentationPolicy(["noise"]), few, per_class=40)
    means = [float(more.class_samples(index).mean()) for index in range(3)]
    assert means == pytest.approx([5, 50, 500], abs=2)
    assert more.samples.dtype == torch.float32


@pytest.mark.parametrize(("size", "dtype"), [((4,), torch.float64), ((1, 8, 8), torch.float32)])
def test_numbers_stay_in_their_dtype(size, dtype):
    few = mf.data.ClassSamples.from_classes({name: torch.randn(2, *size, dtype=dtype) for name in NAMES})
    more = generate_augmented_data(
        AugmentationPolicy(["noise"] if len(size) == 1 else ["horizontal_flip"]), few, per_class=4
    )
    assert more.samples.dtype == dtype
    assert more.sample_shape == size


def test_a_policy_for_each_task_is_moved_by_the_data():
    few = mf.data.ClassSamples.from_classes({name: torch.ones(2, 4) for name in NAMES})
    network = nn.Linear(4, 2)
    policy = AugmentationPolicy(["noise"], network=network)
    nn.init.zeros_(network.weight)
    for bias, moved in ((-80.0, False), (80.0, True)):
        nn.init.constant_(network.bias, bias)
        more = generate_augmented_data(policy, few, per_class=3)
        assert bool((more.samples != 1).any()) is moved


def test_vectors_are_hallucinated_by_the_learner_in_evaluation():
    few = mf.data.ClassSamples.from_classes({name: torch.rand(2, 4) for name in NAMES})
    learner = Hallucination(mf.ProtoNet(nn.Identity()), VectorGenerator(4, noise=4), noise=4)
    x, y = labelled(few)
    made, labels = learner.more(x, y, 6, torch.Generator().manual_seed(1))
    z = torch.randn(3 * 6, 4, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([[2 * label, 2 * label + 1] * 3 for label in range(3)]).flatten()
    torch.testing.assert_close(made, learner.generator(x[rows], z), rtol=0, atol=0)
    assert labels.tolist() == sorted([0, 1, 2] * 6)


def test_an_augmenter_of_ones_own():
    class Doubled:
        def more(self, x, y, per_class, generator=None):
            return torch.cat([x] * 2), torch.cat([y] * 2)

    few = bytes_of(2, 1, 1)
    more = generate_augmented_data(Doubled(), few, per_class=2)
    assert torch.equal(more.class_samples(1), few.class_samples(1).repeat(2, 1, 1, 1))


@pytest.mark.parametrize(
    ("augmenter", "few", "options", "error", "message"),
    [
        (AugmentationPolicy(["noise"]), bytes_of(2, 2), {"per_class": 0}, ValueError, "per_class must be >= 1"),
        (AugmentationPolicy(["noise"]), bytes_of(2, 2), {"per_class": 2.5}, TypeError, "per_class must be an integer"),
        (AugmentationPolicy(["noise"]), bytes_of(2, 2), {"seed": "a"}, TypeError, "seed must be an integer"),
        (abs, bytes_of(2, 2), {}, TypeError, r"augmenter must have a method more\("),
        (AugmentationPolicy(["noise"]), 5, {}, TypeError, "dataset"),
        (AugmentationPolicy(["noise"]), bytes_of(2).subset([]), {}, ValueError, "data must have classes"),
        (AugmentationPolicy(["mixup"]), bytes_of(2, 2), {}, ValueError, "transforms must not mix samples"),
        (AugmentationPolicy(["rotation"]), mf.data.ClassSamples.from_classes({"a": torch.rand(3, 4)}), {}, ValueError,
            "must be pictures"),
        (Retrieval(maml(), torch.rand(9, 1, 16, 16)), bytes_of(2), {}, ValueError, "at least two classes"),
        (Retrieval(maml(), torch.rand(9, 1, 16, 16), join="features"), bytes_of(2, 2), {}, ValueError,
            "join must be 'samples' or 'mixed'"),
        (Hallucination(mf.ProtoNet(nn.Identity()), VectorGenerator(4), body=nn.Flatten()), bytes_of(2, 2), {},
            ValueError, r"body must be None for more samples \(got one"),
    ],
)  # fmt: skip
def test_what_is_refused(augmenter, few, options, error, message):
    with pytest.raises(error, match=message):
        generate_augmented_data(augmenter, few, **({"per_class": 2} | options))


# --- data sets that join ---


def test_data_sets_join_by_the_names_of_their_classes():
    one = mf.data.ClassSamples.from_classes({"a": torch.zeros(2, 3), "b": torch.ones(1, 3)})
    other = mf.data.ClassSamples.from_classes({"c": torch.full((4, 3), 2.0), "a": torch.full((1, 3), 3.0)})
    both = one + other
    assert both.names == ("a", "b", "c")
    assert both.counts[:, 0].tolist() == [3, 1, 4]
    assert both.class_samples(0)[:, 0].tolist() == [0, 0, 3]
    assert one.counts[:, 0].tolist() == [2, 1]


def test_bytes_join_numbers_as_they_are_handed_out():
    one, few = bytes_of(2, 1), mf.data.ClassSamples.from_classes({"birch": torch.rand(3, 1, 16, 16)})
    both = one + few
    torch.testing.assert_close(both.class_samples(0), one.class_samples(0) / 255)
    assert torch.equal(both.class_samples(1)[1:], few.samples)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.rand(2, 1, 8, 8), r"classes must hold samples of one shape, dtype and device \(got"),
        (torch.ones(2, 1, 16, 16).long(), "classes must hold samples of one shape"),
    ],
)
def test_data_sets_of_other_samples_do_not_join(other, message):
    with pytest.raises(ValueError, match=message):
        bytes_of(2, 2) + mf.data.ClassSamples.from_classes({"ash": other})
    with pytest.raises(TypeError):
        bytes_of(2, 2) + other


def test_classes_of_one_name_do_not_join():
    twice = mf.data.ClassSamples(torch.rand(2, 3), [0, 1], [[1], [1]], ["a", "a"])
    with pytest.raises(ValueError, match="names of their own"):
        twice + twice


# --- an ordinary classifier of them ---


def test_a_classifier_learns_and_repeats_itself():
    x = torch.rand(60, 1, 16, 16) * 0.3
    y = torch.arange(60) % 3
    x[torch.arange(60), 0, 4 * y + 2] = 1.0  # a line whose height tells the class
    state = torch.get_rng_state()
    network, again = (mf.train_classifier((x[:30], y[:30]), steps=60, batch=16) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), again.parameters(), strict=True))
    assert not network.training
    assert mf.classifier_accuracy(network, (x[30:], y[30:])) > 0.9
    own = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    assert mf.train_classifier((x, y), own, steps=2) is own


def test_a_classifier_needs_a_model_for_samples_of_other_shapes():
    with pytest.raises(ValueError, match=r"model must be given for samples of such a shape \(got \[3, 4\]\)"):
        mf.train_classifier((torch.rand(4, 3, 4), torch.arange(4)))
    with pytest.raises(ValueError, match="x and y must be samples"):
        mf.train_classifier((torch.rand(0, 4), torch.arange(0)))
