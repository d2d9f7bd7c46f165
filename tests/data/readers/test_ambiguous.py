import math

import numpy as np
import pytest
import torch

from metaaug_fast.data import AmbiguousCurves, Draws, Episodes


def test_points_lie_on_the_task_s_curve_but_for_noise(rng):
    family, seed = AmbiguousCurves(noise=0.0), int(rng.integers(2**40))
    settings = {"shots": 7, "queries": 4, "tasks": 50, "seed": seed, "dtype": torch.float64}
    batch = Episodes(family, **settings).batch(3)
    line, first, second = (torch.from_numpy(value)[..., None] for value in family.curves(Draws(seed, 3, 50)))
    assert 10 < int(line.sum()) < 40
    for x, y, points in ((batch.support_x, batch.support_y, 7), (batch.query_x, batch.query_y, 4)):
        assert x.shape == y.shape == (50, points, 1)
        assert torch.allclose(y, torch.where(line, first * x + second, first * torch.sin(x - second)), rtol=1e-12)
    noisy = Episodes(AmbiguousCurves(), **settings).batch(3)
    assert torch.equal(noisy.support_x, batch.support_x)
    assert torch.equal(noisy.query_x, batch.query_x)
    assert not torch.equal(noisy.query_y, batch.query_y)


def test_noise_is_normal(rng):
    seed, scale = int(rng.integers(2**40)), float(rng.uniform(0.1, 2))
    settings = {"shots": 5, "queries": 5, "tasks": 4000, "seed": seed, "dtype": torch.float64}
    noisy, plain = (Episodes(AmbiguousCurves(noise=noise), **settings).batch(0) for noise in (scale, 0.0))
    for one, other in ((noisy.support_y, plain.support_y), (noisy.query_y, plain.query_y)):
        noise = (one - other) / scale
        assert abs(noise.mean()) < 5 / math.sqrt(noise.numel())
        assert abs(noise.square().mean() - 1) < 5 * math.sqrt(2 / noise.numel())
        assert abs(noise.pow(4).mean() - 3) < 5 * math.sqrt(96 / noise.numel())


def test_half_of_them_are_lines_and_ranges_are_filled_evenly(rng):
    family = AmbiguousCurves()
    line, first, second = family.curves(Draws(int(rng.integers(2**40)), 0, 20_000))
    assert abs(line.mean() - 0.5) < 5 * 0.5 / math.sqrt(20_000)
    for which, extents in ((line, (family.slope, family.intercept)), (~line, (family.amplitude, family.phase))):
        for values, (low, high) in zip((first, second), extents, strict=True):
            unit = (values[which] - low) / (high - low)
            assert unit.min() >= 0
            assert unit.max() < 1
            expected = len(unit) / 20
            counts, _ = np.histogram(unit, 20, (0, 1))
            assert ((counts - expected) ** 2 / expected).sum() < 19 + 7 * math.sqrt(38)
    for share in (0.0, 1.0):
        assert AmbiguousCurves(lines=share).curves(Draws(0, 0, 100))[0].mean() == share


def test_single_precision_is_the_double_rounded(rng):
    seed = int(rng.integers(2**40))
    single, double = (
        Episodes(AmbiguousCurves(), seed=seed, dtype=dtype).batch(0) for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(single.query_y, double.query_y.float())


def test_defaults_are_the_papers():
    family = AmbiguousCurves()
    assert (family.amplitude, family.phase, family.x) == ((0.1, 5.0), (0.0, math.pi), (-5.0, 5.0))
    assert (family.slope, family.intercept, family.noise, family.lines) == ((-3.0, 3.0), (-3.0, 3.0), 0.3, 0.5)
    assert repr(family).startswith("AmbiguousCurves(amplitude=(0.1, 5.0), phase=")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"slope": (2.0, 1.0)}, ValueError, "slope must be two finite numbers in ascending order"),
        ({"phase": (0.0, math.nan)}, ValueError, "phase must be two finite numbers in ascending order"),
        ({"intercept": (1.0,)}, ValueError, "intercept must be two finite numbers in ascending order"),
        ({"noise": -0.1}, ValueError, r"noise must be >= 0 \(got -0.1\)"),
        ({"noise": "much"}, TypeError, r"noise must be a number \(got 'much'\)"),
        ({"lines": 1.5}, ValueError, r"lines must be in 0..1 \(got 1.5\)"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        AmbiguousCurves(**options)


def test_no_styles():
    with pytest.raises(ValueError, match=r"split_styles needs a data set with styles \(got AmbiguousCurves\)"):
        Episodes(AmbiguousCurves(), split_styles=True)
