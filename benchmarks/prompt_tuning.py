"""A learned prompt against the same frozen features without it, on intents of CLINC150 that nothing has seen.

    python benchmarks/prompt_tuning.py --root DIR                # a quarter of an hour on a core; a table in markdown
    python benchmarks/prompt_tuning.py --root DIR --intents 1    # other intents for training and for the test

Trains with the settings of `prompt-clinc150.yaml`, without inner steps. The features of a sentence then depend on no
task, so those of the test intents are computed once for each row, and all rows see the same episodes.
"""

import argparse
import time
import warnings

import torch
from torch import Tensor, nn

import metaaug_fast as mf
from metaaug_fast.runs import configure, recipe
from metaaug_fast.runs.build import fitted, make_episodes, make_learner, make_sources
from metaaug_fast.runs.config import merged

SETTINGS = [(20, 1), (30, 1), (5, 1), (5, 5), (20, 5), (30, 5)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="the folder with data_full.json")
    parser.add_argument("--intents", type=int, default=0, help="seed of the division of intents")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--steps", type=int, help="meta-steps, where they differ from the recipe's")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*sentences have more than")
    content = merged(recipe("prompt-clinc150"), {"data": {"root": options.root, "seed": options.intents}})
    config = configure(content, ["--training.seed", str(options.seed)])
    steps = options.steps or config.training.steps
    sources = make_sources(config.data, ["train", "test"])
    config = fitted(config, sources["train"].sample_shape, None, sources["train"].vocabulary)
    learner = make_learner(config)
    test = sources["test"]

    began = time.perf_counter()
    rows = {"nearest class mean": embedded(learner.model, test)}
    rows["untrained prompt"] = embedded(alone(learner), test)
    embedding = (time.perf_counter() - began) / 2
    began = time.perf_counter()
    episodes = make_episodes(config, "train", sources["train"])
    mf.train(learner, episodes, steps, meta_lr=config.training.meta_lr, schedule=config.training.schedule)
    minutes = (time.perf_counter() - began) / 60
    rows["learned prompt"] = embedded(alone(learner), test)
    check(learner, test, rows["learned prompt"])

    print(f"intents {options.intents}, seed {options.seed}: {steps} meta-steps in {minutes:.1f} min, ", end="")
    print(f"{embedding:.0f} s for {len(test.samples)} sentences, {options.threads} threads\n")
    print(f"| {options.episodes} episodes | {' | '.join(f'{ways}-way {shots}-shot' for ways, shots in SETTINGS)} |")
    print("|---" * (len(SETTINGS) + 1) + "|")
    for name, source in rows.items():
        line([name, *(accuracies(means, source, *each, options.episodes) for each in SETTINGS)])
        if name == "nearest class mean":
            line(["linear head alone", *(accuracies(linear, source, *each, options.episodes) for each in SETTINGS)])


def line(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def alone(learner: mf.PromptTuning) -> "nn.Module":
    """The learner's features of sentences `[N, L]`."""

    class Features(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return learner._features(learner.prompt[None], ids[None])[0]

    return Features()


@torch.no_grad()
def embedded(features: nn.Module, source: mf.data.ClassSamples) -> mf.data.ClassSamples:
    """The same classes, of features in the place of sentences; by length, so that little padding is computed."""
    x = torch.cat([source.class_samples(index) for index in range(len(source))])
    labels = torch.arange(len(source)).repeat_interleave(torch.as_tensor(source.counts.sum(1)))
    order = (x != 0).sum(1).argsort()
    found = [features(part[:, : int((part != 0).any(0).sum())]) for part in x[order].split(100)]
    return mf.data.ClassSamples.from_arrays(torch.cat(found)[order.argsort()], labels)


def sampled(source: mf.data.ClassSamples, ways: int, shots: int) -> mf.data.Episodes:
    return mf.data.Episodes(source, ways=ways, shots=shots, queries=5, tasks=8, seed=-2)


def means(ways: int) -> mf.Learner:
    return mf.ProtoNet(nn.Identity())


def linear(ways: int) -> mf.Learner:
    """Logistic regression by 50 steps from 0; without a learned start."""
    head = nn.Linear(384, ways)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return mf.MAML(nn.Sequential(head), inner_lr=10.0, inner_steps=50)


def accuracies(make, source, ways: int, shots: int, episodes: int) -> str:
    found = mf.evaluate(make(ways), sampled(source, ways, shots), episodes)
    return f"{100 * found.mean:.1f} ± {100 * found.interval:.1f}"


def check(learner: mf.PromptTuning, test: mf.data.ClassSamples, features: mf.data.ClassSamples) -> None:
    """Features computed once decide as the learner itself does."""
    pairs = ((learner, test), (means(5), features))
    ours, cached = (mf.evaluate(each, sampled(source, 5, 1), 16).mean for each, source in pairs)
    assert abs(ours - cached) < 1e-6, (ours, cached)


if __name__ == "__main__":
    main()
