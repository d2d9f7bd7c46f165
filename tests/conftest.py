import pytest
import torch


@pytest.fixture
def fresh_numbers():
    """Other random numbers in every run, whose seed a failing test prints; one thread, for tensors are tiny."""
    print("torch.manual_seed", torch.seed())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
