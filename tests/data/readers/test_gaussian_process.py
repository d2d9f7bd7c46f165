import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from metaaug_fast.data import Draws, Episodes, GaussianProcesses
from tests.exactness import relative_error

VARYING = {"length": (0.3, 0.6), "amplitude": (0.5, 2.0), "noise": 0.1}


def covariance(x, z, length, amplitude):
    """Entry by entry, from the kernel's formula."""
    rows = [[amplitude**2 * math.exp(-((a - b) ** 2) / (2 * length**2)) for b in z] for a in x]
    return torch.tensor(rows, dtype=torch.float64)


def test_support_and_queries_are_of_one_curve_with_its_own_kernel(rng):
    """Whitened by each task's own covariance, all its targets are standard normal."""
    family, seed = GaussianProcesses(**VARYING), int(rng.integers(2**40))
    tasks = Episodes(family, shots=3, queries=4, tasks=400, seed=seed, dtype=torch.float64).batch(2)
    kernels = family.kernels(Draws(seed, 2, 400))
    white = []
    for task, (length, amplitude) in enumerate(np.hstack(kernels)):
        x = torch.cat([tasks.support_x[task], tasks.query_x[task]]).flatten().tolist()
        y = torch.cat([tasks.support_y[task], tasks.query_y[task]])
        known = covariance(x, x, length, amplitude) + (0.1**2 + 1e-8) * torch.eye(7, dtype=torch.float64)
        white.append(torch.linalg.solve(torch.linalg.cholesky(known), y).flatten())
    values = torch.stack(white)
    assert abs(float(values.mean())) < 5 / math.sqrt(values.numel())
    assert abs(float(values.var()) - 1) < 5 * math.sqrt(2 / values.numel())
    correlation = torch.corrcoef(values.T) - torch.eye(7)
    assert float(correlation.abs().max()) < 5 / math.sqrt(len(values))


def test_the_kernel_is_fixed_or_fills_its_ranges(rng):
    draws = Draws(int(rng.integers(2**40)), 0, 5000)
    length, amplitude = GaussianProcesses().kernels(draws)
    assert (np.unique(length), np.unique(amplitude)) == (0.4, 1.0)
    for values, (low, high) in zip(GaussianProcesses(**VARYING).kernels(draws), ((0.3, 0.6), (0.5, 2.0)), strict=True):
        counts, _ = np.histogram(values, 10, (low, high))
        assert counts.sum() == 5000
        assert ((counts - 500) ** 2 / 500).sum() < 9 + 7 * math.sqrt(18)
    x = Episodes(GaussianProcesses(), shots=1, queries=1, tasks=5000).batch(0).query_x
    assert -2 <= float(x.min()) < -1.99
    assert 1.99 < float(x.max()) < 2


def test_the_exact_prediction_is_that_of_the_joint_distribution(rng):
    """By conditioning the joint normal distribution of all points through its inverse, the precision."""
    family, seed = GaussianProcesses(**VARYING), int(rng.integers(2**40))
    tasks = Episodes(family, shots=5, queries=3, tasks=4, seed=seed, dtype=torch.float64).batch(0)
    kernels = family.kernels(Draws(seed, 0, 4))
    exact = family.predict(tasks, *kernels)
    for task, (length, amplitude) in enumerate(np.hstack(kernels)):
        for query in range(3):
            x = [*tasks.support_x[task].flatten().tolist(), float(tasks.query_x[task, query])]
            joint = covariance(x, x, length, amplitude) + (0.1**2 + 1e-8) * torch.eye(6, dtype=torch.float64)
            precision = torch.linalg.inv(joint)
            variance = 1 / precision[-1, -1]
            mean = -variance * precision[-1, :-1] @ tasks.support_y[task].flatten()
            assert relative_error(exact.mean[task, query], mean[None]) < 1e-7
            assert relative_error(exact.stddev[task, query], variance.sqrt()[None]) < 1e-7


def test_no_one_predicts_better_than_who_knows_the_kernel(rng):
    family, seed = GaussianProcesses(**VARYING), int(rng.integers(2**40))
    tasks = Episodes(family, shots=6, queries=5, tasks=1000, seed=seed, dtype=torch.float64).batch(0)
    length, amplitude = family.kernels(Draws(seed, 0, 1000))
    best, *others = (
        float(family.predict(tasks, scale, size).log_prob(tasks.query_y).mean())
        for scale, size in ((length, amplitude), (1.3 * length, amplitude), (length, 0.7 * amplitude))
    )
    assert best > max(others)
    prior = MultivariateNormal(torch.zeros(1).double(), torch.eye(1).double() * float((amplitude**2).mean() + 0.01))
    assert best > float(prior.log_prob(tasks.query_y).mean()) + 0.1


def test_single_precision_is_the_double_rounded_and_many_points_have_a_factor(rng):
    seed = int(rng.integers(2**40))
    single, double = (
        Episodes(GaussianProcesses(noise=0.0), shots=200, queries=200, tasks=2, seed=seed, dtype=dtype).batch(0)
        for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(single.query_y, double.query_y.float())
    assert bool(double.support_y.isfinite().all())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": (2.0, 1.0)}, ValueError, "length must be two finite numbers in ascending order"),
        ({"length": (0.0, 1.0)}, ValueError, r"length must be > 0 \(got \(0.0, 1.0\)\)"),
        ({"amplitude": (-1.0, 1.0)}, ValueError, r"amplitude must be >= 0 \(got \(-1.0, 1.0\)\)"),
        ({"x": (-math.inf, 0.0)}, ValueError, "x must be two finite numbers in ascending order"),
        ({"noise": -0.1}, ValueError, r"noise must be >= 0 \(got -0.1\)"),
        ({"noise": "low"}, TypeError, r"noise must be a number \(got 'low'\)"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        GaussianProcesses(**options)


def test_no_styles():
    with pytest.raises(ValueError, match=r"split_styles needs a data set with styles \(got GaussianProcesses\)"):
        Episodes(GaussianProcesses(), split_styles=True)
