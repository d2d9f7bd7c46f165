"""A stream of tasks, learned one after the other: what is learned, and what of it is forgotten.

python examples/continual.py

A stream is five tasks of two letters each, with five pictures a letter; ten outputs for the ten letters, and no task is
seen again. The meta-loss is that on all ten after the last task, through the whole stream: each task starts where the
one before it ended, and gradients reach `initial`. The idea is OML's (Javed, White 2019, arXiv 1905.12588), but there
only the upper layers adapt; here all do, with a rate for each tensor, which is learned, too.
"""

import torch

import metaaug_fast as mf

TASKS, WAYS, SHOTS, QUERIES = 5, 2, 5, 5


def net() -> torch.nn.Module:
    """No batch norm, whose statistics would be those of two letters."""
    torch.manual_seed(0)
    return mf.models.perceptron(TASKS * WAYS, (1, 28, 28), hidden=(64, 64))


def learner(rate: float, steps: int) -> mf.MAML:
    """All weights adapt, in so many steps a task."""
    model = net()
    rates = {name: rate for name, _ in model.named_parameters()}
    return mf.MAML(model, inner_lr=rates, inner_steps=steps, learn_inner_lr=True)


def learn(maml: mf.MAML, streams: mf.TaskBatch) -> list[mf.FastWeights]:
    """The weights after each task of T streams; labels come class after class."""
    after, weights = [], None
    for x, y in zip(streams.support_x.chunk(TASKS, 1), streams.support_y.chunk(TASKS, 1), strict=True):
        after.append(maml.adapt(x, y, initial=weights))
        weights = after[-1].flat
    return after


@torch.no_grad()
def judge(maml: mf.MAML, streams: mf.data.Episodes, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Accuracy `[streams, tasks]` on each task right after it, and on each at the end, among all ten outputs."""
    found = []
    for batch in map(streams.batch, range(count)):
        after = learn(maml, batch)
        queries = zip(after, batch.query_x.chunk(TASKS, 1), batch.query_y.chunk(TASKS, 1), strict=True)
        right = [[(fast(x).argmax(-1) == y).float().mean(1) for fast in (now, after[-1])] for now, x, y in queries]
        found.append(torch.stack([torch.stack(each) for each in right], 2))  # [2, streams, tasks]
    now, end = torch.cat(found, 1)
    return now, end


def streams(split: str, seed: int = 0) -> mf.data.Episodes:
    """Ten letters each, which are new ones for another split."""
    letters = mf.data.Glyphs(split=split)
    return mf.data.Episodes(letters, ways=TASKS * WAYS, shots=SHOTS, queries=QUERIES, tasks=20, seed=seed)


torch.set_num_threads(1)  # tensors are tiny
maml, training = learner(0.05, steps=3), streams("train")
optimizer = torch.optim.Adam(maml.parameters(), 2e-3)
for _ in range(200):
    batch = next(training)
    optimizer.zero_grad()
    learn(maml, batch)[-1].evaluate(batch.query_x, batch.query_y).loss.backward()
    optimizer.step()
# From random weights, with the best of four rates and two numbers of steps for what is left at the end, judged on
# training letters.
choices = [learner(rate, steps) for rate in (0.01, 0.03, 0.1, 0.3) for steps in (3, 30)]
random = max(choices, key=lambda each: judge(each, training, 3)[1].mean())
found = {"meta-learned start": judge(maml, streams("test"), 20), "random start": judge(random, streams("test"), 20)}
titles = ("on all five tasks at the end", "on a task right after it")
for title, index in zip(titles, (1, 0), strict=True):
    print(f"accuracy {title}, new letters, 400 streams, 95 % interval (higher is better)")
    for label, each in found.items():
        values = each[index].mean(1)
        print(f"  {label}: {values.mean():.3f} +- {1.96 * values.std() / len(values) ** 0.5:.3f}")
for label, (now, end) in found.items():
    print(f"forgotten of the first four tasks, {label}: {(now - end)[:, :4].mean():.3f} of {now[:, :4].mean():.3f}")
