"""Dropout masks computed from counters, so that every pass over the same step sees the same mask.

A random generator has a state, and the reverse sweep visits the steps in another order than the forward one. Here
each element's random number is a hash of what it belongs to: seed, task, pass, site, place. The mixing function is
the 32-bit finaliser of Wellons' hash prospector (lowbias32); the fused engine computes the same bits.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


@overload
def mix(x: int) -> int: ...
@overload
def mix(x: Tensor) -> Tensor: ...
def mix(x: int | Tensor) -> int | Tensor:
    """A bijection of 32-bit integers that scatters them, for Python integers and int64 tensors alike.

    >>> [mix(x) for x in (0, 1, 2)]
    [0, 1753845952, 3507691905]
    """
    x = x & _WORD
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD  # an int64 product may wrap; its low 32 bits, the only ones kept, are right
    return x ^ (x >> 16)


def mask(
    shape: tuple[int, ...], p: float, *, seed: int, task: int | Tensor, step_pass: int, site: int, like: Tensor
) -> Tensor:
    """What dropout multiplies an activation by: 0 with probability `p`, else `1 / (1 - p)`.

    Args:
        shape: of one task's activation. Element e, counted in row-major order, keeps iff `u(e) >= p`.
        p: drop probability, `0 <= p <= 1`.
        seed: of the whole meta-step.
        task: index of the task in its batch; may be a scalar int64 tensor under `torch.vmap`.
        step_pass: `2 k` for the support pass at step k, `2 k + 1` for a query pass after k steps.
        site: ordinal of the dropout call in the model's forward order, from 0.
        like: gives the mask's dtype and device.

    Raises:
        ValueError: `p` is outside 0..1.

    >>> like = torch.zeros(())
    >>> mask((2, 3), 0.5, seed=1, task=0, step_pass=0, site=0, like=like).unique()
    tensor([0., 2.])
    >>> mask((4,), 0.0, seed=1, task=0, step_pass=0, site=0, like=like)
    tensor([1., 1., 1., 1.])
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout p must be in 0..1 (got {p})")
    key: int | Tensor = mix(seed)
    for part in (task, step_pass, site):
        key = mix(key ^ part)
    element = torch.arange(math.prod(shape), device=like.device).reshape(shape)
    keep = mix(mix(element ^ key) + key) >= math.ceil(p * 2**32)  # u >= p in integers: no rounding
    return keep.to(like.dtype) * (1 / (1 - p) if p < 1 else 0.0)
