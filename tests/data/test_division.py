import numpy as np
import torch

from metaaug_fast.data import ClassSamples, Episodes
from metaaug_fast.data.division import apart


def test_apart_the_same_tasks_are_drawn(rng):
    labels, styles = rng.integers(0, 9, 400), rng.integers(0, 2, 400)
    whole = ClassSamples.from_arrays(torch.from_numpy(rng.random((400, 3))), labels, styles)
    part = whole.subset(rng.permutation(9)[:5])
    own = apart(part)
    assert len(own.samples) == part.counts.sum() < len(whole.samples)
    assert (own.names, own.styles) == (part.names, part.styles)
    assert (own.counts == part.counts).all()
    given = {"ways": 5, "shots": 1, "queries": 2, "tasks": 3, "seed": int(rng.integers(1000))}
    for split_styles in (False, True):
        ours, theirs = (Episodes(each, split_styles=split_styles, **given).batch(0) for each in (own, part))
        assert torch.equal(ours.support_x, theirs.support_x)
        assert torch.equal(ours.query_x, theirs.query_x)


def test_of_the_whole_nothing_is_copied(rng):
    whole = ClassSamples.from_arrays(torch.zeros(12, 2), np.arange(12) % 3)
    assert apart(whole) is whole
    assert apart(whole.subset([2, 0, 1])).samples is whole.samples
