"""Few sentences of each intent, others to be told apart: CLINC150, new intents, Prototypical Networks.

python examples/intents.py FOLDER     (with CLINC150's data_full.json; without it, clinc150/ in $METAAUG_DATA)
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import metaaug_fast as mf


class WordCounts(mf.Learner):
    """No training: sentences as counts of words, compared by cosine.

    nearest: with the nearest sentence, or with the sum of each intent's. weights: of the words, `[vocabulary]`.
    """

    def __init__(self, nearest: bool, weights: torch.Tensor) -> None:
        super().__init__()
        self.nearest, self.weights = nearest, weights

    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        """`[T, N, length]` to unit vectors `[T, N, vocabulary]`; 0 is padding."""
        counts = torch.zeros(*ids.shape[:2], len(self.weights)).scatter_add_(2, ids, (ids != 0).float())
        return F.normalize(counts * self.weights, dim=-1)

    @mf.learners.one_task_too
    def adapt(self, support_x: torch.Tensor, support_y: torch.Tensor) -> mf.learners.Predictor:
        """An intent's score is the cosine with what it is compared with."""
        support = self.counts(support_x)
        if not self.nearest:
            means = F.normalize(mf.learners.class_means(support, support_y), dim=-1)
            return mf.learners.Predictor(lambda x: self.counts(x) @ means.mT, len(support_x))
        others = 2 * (1 - mf.learners.class_members(support_y, support.dtype))[:, None]  # below any cosine

        def score(x: torch.Tensor) -> torch.Tensor:
            return ((self.counts(x) @ support.mT)[..., None] - others).amax(2)

        return mf.learners.Predictor(score, len(support_x))


def main(root: Path) -> None:
    """Train on 96 intents; print the accuracy on 30 others beside that of word counts."""
    torch.manual_seed(0)
    intents = {split: mf.data.Clinc150(root, split, vocabulary=16384) for split in ("train", "test")}
    protonet = mf.ProtoNet(mf.models.deep_averaging(ways=None, vocabulary=16384, dropout=0.5))
    episodes = mf.data.Episodes(intents["train"], ways=60, shots=5, queries=5, tasks=1)
    mf.train(protonet, episodes, steps=500, meta_lr=0.003, schedule="cosine", progress=False)
    new = mf.data.Episodes(intents["test"], ways=5, shots=5, queries=5, tasks=5, seed=1)
    # tf-idf: a word weighs the less, the more of the training sentences have it.
    said = intents["train"].samples
    within = torch.cat([ids.unique() for ids in said]).bincount(minlength=intents["train"].vocabulary)
    rare = ((1 + len(said)) / (1 + within)).log() + 1
    print("new intents, 5 ways, 5 sentences each: accuracy, 600 episodes, 95 % interval (higher is better)")
    for label, learner in {
        "  ProtoNet": protonet,
        "  nearest sentence by word counts": WordCounts(True, torch.ones_like(rare)),
        "beyond the comparison, nearest intent by tf-idf": WordCounts(False, rare),
    }.items():
        found = mf.evaluate(learner, new)
        print(f"{label}: {found.mean:.3f} +- {found.interval:.3f}")
    print("(metaaug-fast train protonet --data clinc150 trains eight times as long)")


if len(sys.argv) < 2 and "METAAUG_DATA" not in os.environ:
    sys.exit("name the folder with CLINC150's data_full.json (github.com/clinc/oos-eval), or set METAAUG_DATA")
main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(os.environ["METAAUG_DATA"]) / "clinc150")
