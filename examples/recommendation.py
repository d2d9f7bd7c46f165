"""Cold start: a new user has rated few things, the others' ratings are to be predicted; a user is a task.

python examples/recommendation.py

The ratings are made here: 200 things of 8 features, 1,000 users of 4 types. A user's taste is the type's plus one of
the user's own; ratings are 1 to 5, taste times features plus how good a thing is, plus noise, and rounded.
"""

from collections.abc import Callable

import numpy as np
import torch

import metaaug_fast as mf

USERS, THINGS, FEATURES, TRAINING = 1000, 200, 8, 800


def make() -> tuple[np.ndarray, np.ndarray]:
    """Features `[things, features]` and ratings `[users, things]`."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(THINGS, FEATURES))
    types = rng.normal(size=(4, FEATURES))[rng.integers(4, size=USERS)]
    tastes = (0.8 * types + 0.4 * rng.normal(size=(USERS, FEATURES))) / FEATURES**0.5
    mood, quality = 0.4 * rng.normal(size=(USERS, 1)), 0.5 * rng.normal(size=THINGS)
    ratings = 3 + mood + quality + 1.2 * tastes @ features.T + 0.5 * rng.normal(size=(USERS, THINGS))
    return features, ratings.round().clip(1, 5)


class Users:
    """A task is a user: `shots` ratings are given, `queries` others asked for.

    An input is a thing's features and its mean rating, a target how far the user's rating is from that.
    """

    target_shape = (1,)

    def __init__(self, features: np.ndarray, means: np.ndarray, ratings: np.ndarray) -> None:
        self.inputs = np.column_stack([features, means - 3])
        self.targets = (ratings - means)[..., None]
        self.sample_shape = self.inputs.shape[1:]

    def sampler(self, spec: mf.data.EpisodeSpec) -> Callable[[mf.data.Draws], mf.TaskBatch]:
        """Users, then what each has rated."""

        def sample(draws: mf.data.Draws) -> mf.TaskBatch:
            users = draws.distinct(len(self.targets), 1)
            things = draws.distinct(THINGS, spec.shots + spec.queries)
            x, y = (
                torch.from_numpy(each).to(spec.dtype) for each in (self.inputs[things], self.targets[users, things])
            )
            return mf.TaskBatch(x[:, : spec.shots], y[:, : spec.shots], x[:, spec.shots :], y[:, spec.shots :])

        return sample


class ItemMean(mf.Learner):
    """Each thing's mean rating; with `shifted`, plus how far the user's ratings are from it on average."""

    loss = "mse"

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        self.shifted = shifted

    @mf.learners.one_task_too
    def adapt(self, support_x: torch.Tensor, support_y: torch.Tensor) -> mf.learners.Predictor:
        """Targets are what is left beyond the mean."""
        shift = support_y.mean(1, keepdim=True) * self.shifted
        return mf.learners.Predictor(lambda x: shift.expand(-1, x.shape[1], -1), len(support_x), loss="mse")


def net() -> torch.nn.Module:
    """The same one for all."""
    torch.manual_seed(0)
    return mf.models.mlp([FEATURES + 1, 64, 64, 1])


torch.set_num_threads(1)  # tensors are tiny
features, ratings = make()
means = ratings[:TRAINING].mean(0)
known, new = (Users(features, means, each) for each in (ratings[:TRAINING], ratings[TRAINING:]))
maml = mf.MAML(net(), inner_lr=0.05, inner_steps=3, loss="mse")
mf.train(maml, mf.data.Episodes(known, shots=10, queries=30, tasks=16), steps=1500, progress=False)
# Reptile's inner loop is Adam on the given ratings: from weights that nothing has trained, training from scratch. The
# best of three numbers of steps, judged on training users.
choice = mf.data.Episodes(known, shots=10, queries=100, tasks=100, seed=2)
lengths = [mf.Reptile(net(), inner_lr=0.003, inner_steps=k, betas=(0.9, 0.999), loss="mse") for k in (5, 20, 80)]
scratch = min(lengths, key=lambda each: mf.evaluate(each, choice, 100).mean)
episodes = mf.data.Episodes(new, shots=10, queries=100, tasks=100, seed=1)
print("new users, 10 ratings given: squared error of others, 600 episodes, 95 % interval (lower is better)")
for label, found in {
    "MAML, 3 steps": mf.evaluate(maml, episodes),
    "MAML's start, no adaptation": mf.evaluate(maml, episodes, steps=0),
    "mean rating of each thing": mf.evaluate(ItemMean(False), episodes),
    "that, shifted by the user's own mean": mf.evaluate(ItemMean(True), episodes),
    f"from scratch, {scratch.inner_steps} steps of Adam": mf.evaluate(scratch, episodes),
}.items():
    print(f"  {label}: {found.mean:.3f} +- {found.interval:.3f}")
