import math

import numpy as np
import pytest
import torch

from metaaug_fast.data import Draws, Episodes, Sinusoids


def test_points_lie_on_the_task_s_sinusoid(rng):
    family, seed = Sinusoids(), int(rng.integers(2**40))
    batch = Episodes(family, shots=7, queries=4, tasks=50, seed=seed, dtype=torch.float64).batch(3)
    amplitude, phase = (torch.from_numpy(value)[..., None] for value in family.curves(Draws(seed, 3, 50)))
    for x, y, points in ((batch.support_x, batch.support_y, 7), (batch.query_x, batch.query_y, 4)):
        assert x.shape == y.shape == (50, points, 1)
        assert torch.allclose(y, amplitude * torch.sin(x - phase), rtol=1e-13, atol=1e-13)


def test_single_precision_is_the_double_rounded(rng):
    seed = int(rng.integers(2**40))
    single, double = (
        Episodes(Sinusoids(), seed=seed, dtype=dtype).batch(0) for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(single.query_y, double.query_y.float())
    assert torch.equal(single.support_x, double.support_x.float())


def test_ranges_are_filled_evenly(rng):
    low, high = np.sort(rng.normal(size=(3, 2)) * 3, axis=1).T
    family = Sinusoids(*zip(low.tolist(), high.tolist(), strict=True))
    draws = Draws(int(rng.integers(2**40)), 0, 20_000)
    amplitude, phase = family.curves(draws)
    x = Episodes(family, shots=1, queries=1, tasks=20_000, seed=int(rng.integers(2**40))).batch(0).query_x.numpy()
    for values, a, b in zip((amplitude, phase, x), low, high, strict=True):
        unit = (values.ravel() - a) / (b - a)
        assert unit.min() > -1e-6
        assert unit.max() < 1 + 1e-6
        counts, _ = np.histogram(unit, 20, (0, 1))
        assert ((counts - 1000) ** 2 / 1000).sum() < 19 + 7 * math.sqrt(38)


def test_defaults_are_the_papers():
    family = Sinusoids()
    assert (family.amplitude, family.phase, family.x) == ((0.1, 5.0), (0.0, math.pi), (-5.0, 5.0))
    # Predicting 0 costs E[A^2] E[sin^2] = 8.5 * 0.5 or so: the meta-learner starts from there.
    y = Episodes(family, shots=10, queries=10, tasks=5000, seed=1).batch(0).query_y
    assert 3.5 < y.square().mean() < 5


@pytest.mark.parametrize(
    ("name", "value"), [("amplitude", (2.0, 1.0)), ("phase", (0.0, math.nan)), ("x", (-math.inf, 0.0)), ("x", (1.0,))]
)
def test_bad_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be two finite numbers in ascending order"):
        Sinusoids(**{name: value})


def test_no_styles():
    with pytest.raises(ValueError, match=r"split_styles needs a data set with styles \(got Sinusoids\)"):
        Episodes(Sinusoids(), split_styles=True)
