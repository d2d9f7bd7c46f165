"""What every test has: fresh random numbers, one thread, and the real data where there are any."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_numbers():
    """Other random numbers in every run, whose seed a failing test prints; one thread, for tensors are tiny."""
    print("torch.manual_seed", torch.seed())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_omniglot() -> Path:
    """The folder with the real archives, or a visible skip."""
    root = Path(os.environ.get("METAAUG_DATA", Path(__file__).parents[2] / "shared" / "data")) / "omniglot"
    if not (root / "images_background.zip").is_file():
        pytest.skip(f"no Omniglot in {root}; METAAUG_DATA names the data folder")
    return root
