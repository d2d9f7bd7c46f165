"""Fresh randomness, a cache of the session's own, and the real data where there are any."""

import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fresh seed, printed so that a failure can be run again."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"rng seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache that starts empty and is shared by the session's tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAAUG_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def real_omniglot() -> Path:
    """The folder with the real archives, or a visible skip."""
    root = Path(os.environ.get("METAAUG_DATA", Path(__file__).parents[3] / "shared" / "data")) / "omniglot"
    if not (root / "images_background.zip").is_file():
        pytest.skip(f"no Omniglot in {root}; METAAUG_DATA names the data folder")
    return root
