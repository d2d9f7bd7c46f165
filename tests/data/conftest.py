"""Fresh randomness and a cache of the session's own."""

import numpy as np
import pytest
import torch


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator whose seed is drawn from torch's, which a failing test prints."""
    return np.random.default_rng(int(torch.randint(2**32, ())))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache that starts empty and is shared by the session's tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAAUG_CACHE", str(folder))
        yield folder
