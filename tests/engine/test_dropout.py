import pytest
import torch
from torch import Tensor

from metaaug_fast.engine.dropout import mask, mix

LIKE = torch.zeros((), dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("fresh_numbers")


def fresh(count: int, high: int = 2**31) -> list[int]:
    return torch.randint(high, (count,)).tolist()


def spelled_out(size: int, p: float, seed: int, task: int, step_pass: int, site: int) -> list[float]:
    """The mask in words of 32 bits and real numbers, from the written formula."""

    def scatter(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    h = scatter(scatter(scatter(scatter(seed) ^ task) ^ step_pass) ^ site)
    return [1 / (1 - p) if scatter((scatter(h ^ e) + h) % 2**32) / 2**32 >= p else 0.0 for e in range(size)]


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_it_is_the_written_formula(p):
    seed, task, step_pass, site = fresh(1) + fresh(3, 50)
    got = mask((4, 3, 5), p, seed=seed, task=task, step_pass=step_pass, site=site, like=LIKE)
    assert got.flatten().tolist() == spelled_out(60, p, seed, task, step_pass, site)


def test_mix_is_the_same_for_integers_and_tensors_and_loses_nothing():
    values = torch.randint(2**32, (1000,)).unique()
    mixed = mix(values)
    assert mixed.tolist() == [mix(value) for value in values.tolist()]
    assert len(mixed.unique()) == len(values)
    assert int(mixed.min()) >= 0
    assert int(mixed.max()) < 2**32


def test_a_task_under_vmap_gets_the_mask_of_its_index():
    key = {"seed": fresh(1)[0], "step_pass": 3, "site": 1}

    def one(task: Tensor, x: Tensor) -> Tensor:
        return mask(x.shape, 0.4, task=task, like=x, **key)

    got = torch.vmap(one)(torch.arange(5, 9), torch.zeros(4, 3, 7))
    expected = [mask((3, 7), 0.4, task=task, like=torch.zeros(()), **key) for task in range(5, 9)]
    assert torch.equal(got, torch.stack(expected))


@pytest.mark.parametrize("part", ["seed", "task", "step_pass", "site"])
def test_every_part_of_the_key_counts_and_masks_are_uncorrelated(part):
    key = dict(zip(("seed", "task", "step_pass", "site"), fresh(1) + fresh(3, 50), strict=True))
    size, p = 40_000, 0.5
    first = mask((size,), p, **key, like=LIKE)
    second = mask((size,), p, **(key | {part: key[part] + 1}), like=LIKE)
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert abs(float(correlation)) < 6 / size**0.5


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_the_share_dropped_is_p_and_the_mean_stays(p):
    size = 100_000
    got = mask((size,), p, seed=fresh(1)[0], task=1, step_pass=2, site=0, like=LIKE)
    spread = 6 * (p * (1 - p) / size) ** 0.5
    assert abs(float((got == 0).double().mean()) - p) < spread
    assert abs(float(got.mean()) - 1) < spread / (1 - p)


def test_the_ends_of_the_range():
    key = {"seed": fresh(1)[0], "task": 0, "step_pass": 0, "site": 0}
    assert torch.equal(mask((50,), 0.0, **key, like=LIKE), torch.ones(50, dtype=torch.float64))
    assert torch.equal(mask((50,), 1.0, **key, like=LIKE), torch.zeros(50, dtype=torch.float64))
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"dropout p must be in 0\.\.1"):
            mask((2,), p, **key, like=LIKE)


def test_it_has_the_dtype_asked_for():
    for dtype in (torch.float32, torch.float64):
        got = mask((8,), 0.3, seed=0, task=0, step_pass=0, site=0, like=torch.zeros((), dtype=dtype))
        assert got.dtype == dtype
