"""The random streams against the algorithm written out in plain Python."""

import math

import numpy as np
import pytest
import torch

from metaaug_fast.data.draws import Draws, shuffled

M = 2**64


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % M
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % M
    return x ^ (x >> 31)


class SplitMix:
    """The stream of one task, as the docstring of draws.py defines it."""

    def __init__(self, seed, batch, task):
        golden = 0x9E3779B97F4A7C15
        self.state = mix((mix((mix(seed % M) + golden * (batch + 1)) % M) + golden * (task + 1)) % M)

    def bits(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) % M
        return mix(self.state)

    def distinct(self, population, count):
        entries = list(range(population))
        for i in range(count):
            j = i + ((self.bits() >> 32) * (population - i) >> 32)
            entries[i], entries[j] = entries[j], entries[i]
        return entries[:count]


@pytest.fixture
def where(rng):
    return int(rng.integers(-(2**63), 2**63)), int(rng.integers(0, 2**40)), int(rng.integers(1, 9))


def test_published_values_of_splitmix():
    # The generator's widely printed first outputs for the seed 1234567.
    stream = SplitMix(0, 0, 0)
    stream.state = 1234567
    assert [stream.bits() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_streams_follow_the_definition(rng, where):
    seed, batch, tasks = where
    draws, streams = Draws(seed, batch, tasks), [SplitMix(seed, batch, task) for task in range(tasks)]
    for count in rng.integers(1, 9, 3):
        assert draws.bits(count).tolist() == [[stream.bits() for _ in range(count)] for stream in streams]
    expected = [[(stream.bits() >> 11) / 2**53 for _ in range(4)] for stream in streams]
    assert draws.uniform(4).tolist() == expected


def test_normal_numbers_follow_the_definition_and_are_normal(rng, where):
    seed, batch, tasks = where
    draws, streams = Draws(seed, batch, tasks), [SplitMix(seed, batch, task) for task in range(tasks)]
    for row, stream in zip(draws.normal(3), streams, strict=True):
        uniform = [(stream.bits() >> 11) / 2**53 for _ in range(6)]
        expected = [
            math.sqrt(-2 * math.log(1 - a)) * math.cos(2 * math.pi * b)
            for a, b in zip(uniform, uniform[3:], strict=False)
        ]
        np.testing.assert_allclose(row, expected, rtol=1e-12, atol=1e-12)
    drawn = np.sort(Draws(int(rng.integers(2**62)), 0, 1000).normal(40).ravel())
    normal = torch.special.ndtr(torch.from_numpy(drawn)).numpy()
    # Kolmogorov and Smirnov: 2.7 / sqrt(n) is exceeded once in a million times.
    assert np.abs(normal - (np.arange(len(drawn)) + 0.5) / len(drawn)).max() < 2.7 / math.sqrt(len(drawn))


def test_distinct_is_a_fisher_yates_shuffle(rng, where):
    seed, batch, tasks = where
    for _ in range(20):
        count = int(rng.integers(1, 12))
        populations = rng.integers(count, count + rng.integers(1, 30), (tasks, 3))
        draws, streams = Draws(seed, batch, tasks), [SplitMix(seed, batch, task) for task in range(tasks)]
        one = int(rng.integers(count, 10_000))
        assert draws.distinct(one, count).tolist() == [stream.distinct(one, count) for stream in streams]
        expected = [[s.distinct(int(n), count) for n in row] for s, row in zip(streams, populations, strict=True)]
        assert draws.distinct(populations, count).tolist() == expected


def test_all_of_a_population_is_a_permutation(where):
    seed, batch, tasks = where
    assert (np.sort(Draws(seed, batch, tasks).distinct(17, 17)) == np.arange(17)).all()


def test_every_ordered_choice_is_equally_likely(rng):
    tasks, population, count = 60_000, 5, 3
    drawn = Draws(int(rng.integers(2**62)), 0, tasks).distinct(population, count)
    codes = np.bincount(drawn @ [25, 5, 1], minlength=125)
    codes = codes[codes > 0]
    assert len(codes) == 60
    # Chi-square with 59 degrees of freedom: mean 59, deviation 10.9.
    assert ((codes - 1000) ** 2 / 1000).sum() < 59 + 7 * 10.9


def test_streams_of_other_seeds_batches_and_tasks_differ(where):
    seed, batch, tasks = where
    base = Draws(seed, batch, tasks + 1).bits(4)
    assert len(np.unique(base)) == base.size
    assert not np.intersect1d(base, Draws(seed + 1, batch, tasks).bits(4)).size
    assert not np.intersect1d(base, Draws(seed, batch + 1, tasks).bits(4)).size


def test_more_tasks_leave_the_first_as_they_were(where):
    seed, batch, tasks = where
    assert (Draws(seed, batch, tasks + 5).bits(3)[:tasks] == Draws(seed, batch, tasks).bits(3)).all()


def test_shuffled(rng):
    seed = int(rng.integers(2**40))
    order = shuffled(1623, seed)
    assert (np.sort(order) == np.arange(1623)).all()
    assert (order == shuffled(1623, seed)).all()
    assert (order != shuffled(1623, seed + 1)).any()
