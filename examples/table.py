"""Few rows of each class of a table, others to be told apart: classes that training has not seen.

python examples/table.py [TABLE.csv [LABEL]]

Without a table, one is made: 90 kinds of a thing, 30 rows each, measured in 24 columns. A kind is a place in 4
dimensions; a row mixes that, noise of its own and 6 dimensions that have nothing to do with the kind into the columns.
"""

import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import metaaug_fast as mf


def make(path: Path, kinds: int = 90, rows: int = 30) -> None:
    """Write the table; its label is `kind`."""
    rng = np.random.default_rng(0)
    kind = np.arange(kinds).repeat(rows)
    hidden = rng.normal(size=(kinds, 4))[kind] + 0.3 * rng.normal(size=(len(kind), 4))
    both = np.concatenate([hidden, rng.normal(size=(len(kind), 6))], axis=1)
    mixed = both @ rng.normal(size=(10, 24)) / 10**0.5
    values = rng.uniform(1, 100, 24) * (mixed + 0.3 * mixed**3)  # in units of their own
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", *(f"column{index}" for index in range(24))])
        writer.writerows([f"kind {label}", *row] for label, row in zip(kind, values.tolist(), strict=True))


def read(path: Path, label: str) -> tuple[mf.data.ClassSamples, mf.data.ClassSamples]:
    """Training and new classes, 7 : 3; all columns are standardised by the rows of the training classes."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    labels = np.array([row.pop(label) for row in rows])
    values = np.array([[float(each) for each in row.values()] for row in rows])
    classes = np.random.default_rng(0).permutation(np.unique(labels))
    training = np.isin(labels, classes[: len(classes) * 7 // 10])
    values = (values - values[training].mean(0)) / values[training].std(0).clip(min=1e-9)
    parts = []
    for chosen in (training, ~training):
        columns = dict(zip(rows[0], values[chosen].T, strict=True))
        parts.append(mf.data.ClassSamples.from_table({**columns, label: labels[chosen]}, label=label))
    return parts[0], parts[1]


class NearestMean(mf.Learner):
    """No training: the class whose mean of standardised columns is nearest."""

    @mf.learners.one_task_too
    def adapt(self, support_x: torch.Tensor, support_y: torch.Tensor) -> mf.learners.Predictor:
        """The nearer, the higher the score."""
        means = mf.learners.class_means(support_x, support_y)
        return mf.learners.Predictor(lambda x: -torch.cdist(x, means), len(support_x))


def main(path: Path, label: str) -> None:
    """Train on some classes; print the accuracy on others beside what goes without meta-learning."""
    known, new = read(path, label)
    columns = known.sample_shape[0]

    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return mf.models.mlp([columns, 64, 64, 5])

    maml = mf.MAML(net(), inner_lr=0.1, inner_steps=3)
    mf.train(maml, mf.data.Episodes(known, ways=5, shots=5, queries=10, tasks=16), steps=1500, progress=False)
    # Reptile's inner loop is Adam on the support rows: from weights that nothing has trained, training from scratch.
    # The best of three rates, judged on the training classes.
    rates = [mf.Reptile(net(), inner_lr=lr, inner_steps=100, betas=(0.9, 0.999)) for lr in (0.001, 0.003, 0.01)]
    choice = mf.data.Episodes(known, ways=5, shots=5, queries=10, tasks=100, seed=2)
    scratch = max(rates, key=lambda each: mf.evaluate(each, choice, 100).mean)
    episodes = mf.data.Episodes(new, ways=5, shots=5, queries=10, tasks=100, seed=1)
    print(f"{path.name}, {len(new)} new classes, 5 ways, 5 rows each: accuracy, 600 episodes, 95 % (higher is better)")
    for name, found in {
        "MAML, 3 steps": mf.evaluate(maml, episodes),
        "MAML's start, no adaptation": mf.evaluate(maml, episodes, steps=0),
        "nearest class mean, standardised": mf.evaluate(NearestMean(), episodes),
        f"from scratch, {scratch.inner_steps} steps of Adam": mf.evaluate(scratch, episodes),
    }.items():
        print(f"  {name}: {found.mean:.3f} +- {found.interval:.3f}")


torch.set_num_threads(1)  # tensors are tiny
if len(sys.argv) > 1:
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "label")
else:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "made.csv")
        main(Path(folder) / "made.csv", "kind")
