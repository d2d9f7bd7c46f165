import pytest
import safetensors.torch
import torch

import metaaug_fast as mf
from metaaug_fast.data import load_tasks, save_tasks


def test_a_file_of_tasks_evaluates_like_its_episodes(tmp_path):
    dataset = mf.data.ClassSamples.from_arrays(torch.rand(60, 3), torch.arange(60) % 12)
    episodes = mf.data.Episodes(dataset, ways=3, shots=2, queries=2, tasks=5, dtype=torch.float64)
    batches = [episodes.batch(index) for index in range(4)]
    save_tasks(tmp_path / "t.safetensors", [batches[0], batches[1].tensors, *batches[2:]])
    assert load_tasks(tmp_path / "t.safetensors") == batches
    learner = mf.MAML(mf.models.mlp([3, 8, 3])).double()
    assert mf.evaluate(learner, load_tasks(tmp_path / "t.safetensors")) == mf.evaluate(learner, episodes, 20)
    assert [each.name for each in tmp_path.iterdir()] == ["t.safetensors"]


def test_bad_files(tmp_path):
    path = tmp_path / "t"
    with pytest.raises(FileNotFoundError, match="no tasks at"):
        load_tasks(path)
    with pytest.raises(ValueError, match=r"batches must hold at least one batch \(got none\)"):
        save_tasks(path, [])
    with pytest.raises(TypeError, match="tasks must be a TaskBatch"):
        save_tasks(path, [3])
    assert not path.exists()
    path.write_bytes(safetensors.torch.save({"x": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"t is no whole file of tasks \(it has another format\)"):
        load_tasks(path)
    save_tasks(path, [mf.TaskBatch(*(torch.randn(2, 3, 1) for _ in range(4)))])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="t is no whole file of tasks"):
        load_tasks(path)
