"""Few points of a curve, the rest to be predicted: sinusoids, and a Gaussian process by a source of one's own.

python examples/regression.py
"""

from collections.abc import Callable

import numpy as np
import torch

import metaaug_fast as mf


class Curves:
    """Draws from a Gaussian process on [-2, 2] with an RBF kernel, every task with a length scale of its own.

    All that a source of tasks needs: the shapes, and a function from a batch's random streams to its tasks.
    """

    sample_shape = target_shape = (1,)

    def sampler(self, spec: mf.data.EpisodeSpec) -> Callable[[mf.data.Draws], mf.TaskBatch]:
        """Tasks of `spec.shots` and `spec.queries` points, `[T, points, 1]`."""

        def sample(draws: mf.data.Draws) -> mf.TaskBatch:
            points = spec.shots + spec.queries
            length = 0.3 + 0.7 * draws.uniform(1)[..., None]
            x = 4 * draws.uniform(points)[..., None] - 2
            kernel = np.exp(-(((x - x.swapaxes(1, 2)) / length) ** 2) / 2) + 1e-6 * np.eye(points)
            y = np.linalg.cholesky(kernel) @ draws.normal(points)[..., None]
            support, query = slice(spec.shots), slice(spec.shots, None)
            sets = (x[:, support], y[:, support], x[:, query], y[:, query])
            return mf.TaskBatch(*(torch.from_numpy(each).to(spec.dtype) for each in sets))

        return sample


def net() -> torch.nn.Module:
    """The same one for all, MAML's regressor."""
    torch.manual_seed(0)
    return mf.models.mlp([1, 40, 40, 1])


def compare(name: str, source: mf.data.TaskSource, shots: int, inner_lr: float) -> None:
    """Train on some tasks; print the error on others beside what goes without meta-learning."""
    maml = mf.MAML(net(), inner_lr=inner_lr, inner_steps=5, loss="mse")
    mf.train(maml, mf.data.Episodes(source, shots=shots, queries=10, tasks=25), steps=2000, progress=False)
    new = mf.data.Episodes(source, shots=shots, queries=50, tasks=50, seed=1)
    # Reptile's inner loop is Adam on the support points: from weights that nothing has trained, training from scratch.
    # The best of three rates, judged on tasks of their own.
    choice = mf.data.Episodes(source, shots=shots, queries=50, tasks=50, seed=2)
    rates = [
        mf.Reptile(net(), inner_lr=lr, inner_steps=300, betas=(0.9, 0.999), loss="mse") for lr in (0.003, 0.01, 0.03)
    ]
    scratch = min(rates, key=lambda each: mf.evaluate(each, choice, 50).mean)
    print(f"{name}, {shots} points given: squared error on others, 600 tasks, 95 % interval (lower is better)")
    for label, found in {
        "MAML, 5 steps": mf.evaluate(maml, new),
        "MAML's start, no adaptation": mf.evaluate(maml, new, steps=0),
        f"from scratch, {scratch.inner_steps} steps of Adam": mf.evaluate(scratch, new),
    }.items():
        print(f"  {label}: {found.mean:.3f} +- {found.interval:.3f}")


torch.set_num_threads(1)  # tensors are tiny
compare("sinusoids", mf.data.Sinusoids(), shots=10, inner_lr=0.01)
compare("Gaussian processes", Curves(), shots=5, inner_lr=0.05)
