"""On the real sentences, what is learned must be worth more than counting words."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from metaaug_fast import evaluate
from metaaug_fast.runs import configure, recipe, run
from metaaug_fast.runs.build import make_episodes, make_sources
from metaaug_fast.runs.config import merged
from metaaug_fast.tasks import TaskBatch


def nearest(tasks: TaskBatch, vocabulary: int) -> Tensor:
    """Accuracy on each task of the label of the nearest support sentence, by the cosine between counts of words."""

    def counts(ids: Tensor) -> Tensor:
        return normalize(torch.stack([each.bincount(minlength=vocabulary)[1:].float() for each in ids]))

    found = []
    for support_x, support_y, query_x, query_y in zip(
        tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, strict=True
    ):
        likeness = counts(query_x) @ counts(support_x).T
        found.append((support_y[likeness.argmax(1)] == query_y).float().mean())
    return torch.stack(found)


def test_the_nearest_has_the_most_words_in_common():
    support = torch.tensor([[[1, 1, 2, 0], [3, 4, 0, 0], [1, 4, 5, 6]]])
    query = torch.tensor([[[2, 1, 1, 1], [4, 0, 0, 0], [6, 5, 2, 0], [3, 0, 0, 0]]])
    tasks = TaskBatch(support, torch.tensor([[0, 1, 2]]), query, torch.tensor([[0, 1, 2, 0]]))
    assert nearest(tasks, 7).tolist() == [0.75]


@pytest.mark.slow
def test_protonet_beats_the_nearest_neighbour_on_counts(real_clinc150, tmp_path):
    content = merged(recipe("protonet-clinc150"), {"data": {"root": str(real_clinc150)}})
    config = configure(content, ["--steps", "500", "--train-ways", "20", "--validation-episodes", "50"])
    learner = run(config, tmp_path / "c", progress=False, say=lambda text: None).learner
    source = make_sources(config.data, ["test"])["test"]
    ours = evaluate(learner, make_episodes(config, "test", source), 200)
    episodes = make_episodes(config, "test", source)
    theirs = torch.cat([nearest(episodes.batch(each), source.vocabulary) for each in range(200)])
    print(f"ProtoNet {ours}; nearest neighbour on counts {theirs.mean():.2%}")
    assert 0.8 < theirs.mean() < 0.9
    assert ours.mean > theirs.mean() + 0.02
