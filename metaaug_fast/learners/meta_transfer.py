"""Meta-transfer learning (Sun, Liu, Chua, Schiele 2019, arXiv 1812.02391, algorithms 1 and 2)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import check_choice, check_count, check_integer, check_number
from ..data.draws import Draws
from ..data.episodes import Episodes
from ..data.samples import ClassSamples
from ..engine.problem import NORMS, LearningRate, parameters_of
from ..errors import NonFiniteError
from ..tasks import MetaOutput, TaskBatch, check_tensor, class_ids
from .base import class_members
from .parts import find_head, inside, replaced
from .unrolled import UnrolledLearner

POLICIES = ("frozen", "batch")
LEARNS = ("scale_shift", "head", "weights", "all")
SCALED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HARD = 1 << 40  # where the batches of hard tasks begin, which no run of episodes gets to


class MetaTransfer(UnrolledLearner):
    """Learn weights Theta by plain classification, freeze them, and meta-learn to scale and shift them; then fine-tune.

        1. `pretrain`:   minimise the cross entropy of [Theta; a head for all source classes]       over Theta and it
        2. `mf.train`:   theta_i = theta - inner_lr * grad_theta loss(S, theta; support of task i)  inner_steps times
                         minimise the mean over tasks of loss(S, theta_i; query of task i)          over S and theta
        3. `fine_tune`:  minimise the loss of few labelled target samples                           over S and theta

    S are scales and shifts: a layer of weights W and bias b computes `(W * scale) x + (b + shift)`, with a scale for
    each kernel of a convolution (a number for each k x k filter, as in the paper's figure 3) or each output of a linear
    layer, and a shift for each output. They start at 1 and 0, where the network is what it was. The head theta alone
    adapts, so the scaled body runs once a task, whatever the number of steps. `HardTasks` draws the paper's hard tasks.

    Norms keep what the pre-training gave them: running statistics, weights and biases. So nothing is transductive.

    Args:
        model: any module with a linear layer or convolution before its head. It is shared, its body is frozen.
        inner_lr, inner_steps, learn_inner_lr: see `MAML`. The paper's, for 640 features; fewer want a higher rate.
        head: the name of the layer that adapts, such as "classifier". None: it is found.
        batch_norm: "frozen": by running statistics; "batch": by the batch's own in meta-training and meta-testing.
        first_order, loss, backend, label_smoothing, momentum, weight_decay, task_chunk, precision: see `MAML`.

    Raises:
        ValueError: no head can be found, none goes by that name, nothing before it can be scaled, or another argument
            is out of range.

    >>> import torch, metaaug_fast as mf
    >>> learner = mf.MetaTransfer(mf.models.conv4(ways=5, hidden=8))
    >>> learner.pretrain((torch.rand(40, 1, 28, 28), torch.arange(40) % 20), steps=2) > 0
    True
    >>> sorted({name.rpartition(".")[2] for name, value in learner.named_parameters() if value.requires_grad})
    ['bias', 'scale', 'shift', 'weight']
    >>> letters = mf.data.Episodes(mf.data.Glyphs(), tasks=2)
    >>> history = mf.train(learner, mf.learners.HardTasks(learner, letters), steps=2, progress=False)
    >>> classifier = learner.fine_tune(torch.rand(10, 1, 28, 28), torch.arange(10) % 5, steps=2)
    >>> classifier(torch.rand(7, 1, 28, 28)).shape
    torch.Size([7, 5])
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: LearningRate = 0.01,
        inner_steps: int = 20,
        head: str | None = None,
        learn_inner_lr: bool = False,
        batch_norm: str = "frozen",
        **options: Any,
    ) -> None:
        check_choice("batch_norm", batch_norm, POLICIES)
        head = find_head(model, head)
        super().__init__(scaled(model, head), inner_lr, inner_steps, batch_norm=batch_norm, **options)
        self.head = head
        self.target: tuple[Tensor, Tensor] | None = None
        self.target_weight = 0.0
        self._settle(inside(head), learn_inner_lr)
        _let_learn(self.model, head, "scale_shift")

    def pretrain(
        self,
        data: ClassSamples | tuple[Tensor, Tensor] | Any,
        steps: int = 1000,
        *,
        epochs: int | None = None,
        lr: float = 1e-3,
        batch: int = 64,
        seed: int = 0,
    ) -> float:
        """Learn the weights of the body by classification over all classes of `data`, behind a head that is dropped.

        Scales and shifts are 1 and 0 again afterwards; the learner's own head stays as it is.

        Args:
            data: all source classes: `ClassSamples`, inputs `[N, ...]` with class ids `[N]`, or a data set with labels.
            steps: of Adam, whose rate `lr` falls to 0 along a cosine.
            epochs: passes over the data, instead of steps.
            batch: samples a step.
            seed: of their order.

        Returns:
            The mean loss of the last tenth of the steps.

        Raises:
            TypeError, ValueError: an argument is out of range, there are fewer than two classes, or the head is no
                linear layer.
            NonFiniteError: the loss is NaN or infinite.
        """
        x, y = labelled(data)
        _check_labelled(x, y)
        layer = self.model.get_submodule(self.head)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"head must be a linear layer to pretrain (got {type(layer).__name__} at {self.head!r})")
        classes = int(y.max()) + 1
        if classes < 2:
            raise ValueError(f"data must have at least two classes (got {classes})")
        if epochs is not None:
            check_count("epochs", epochs, low=1)
            check_count("batch", batch, low=1)
            steps = epochs * (len(x) // min(batch, len(x)))
        like = layer.weight
        head = nn.Linear(layer.in_features, classes, device=like.device, dtype=like.dtype)
        _reset(self.model)
        network = replaced(self.model, {self.head: head})
        training = network.training
        try:
            _let_learn(network, self.head, "weights")
            return fit(network.train(), x, y, steps, lr=lr, batch=batch, seed=seed)
        finally:
            _let_learn(self.model, self.head, "scale_shift")
            self.model.train(training)

    def join_target(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Let every meta-step minimise `sum_i loss(task i) + weight * loss(target task)`, divided by its tasks.

        The target task is drawn anew in each step from few labelled samples: half of each class's to learn from, the
        others to be judged on; a class of one sample is judged on it, too. Torch's generator draws. A checkpoint does
        not hold the samples.

        Args:
            x: `[N, ...]`, of the target.
            y: class ids `[N]`, below the head's outputs.
            weight: lambda; 0 leaves the target out.

        Raises:
            TypeError, ValueError: the samples do not fit each other, or `weight` is negative.
        """
        check_number("weight", weight)
        _check_labelled(x, y)
        y = class_ids(y)
        self.target, self.target_weight = (x, y), weight

    def meta_step(self, tasks: TaskBatch, optimizers: Sequence[Optimizer]) -> MetaOutput:
        """One update of scales, shifts and the head; what it found on `tasks` before it moved."""
        if self.target is None or not self.target_weight:
            return super().meta_step(tasks, optimizers)
        out = self(tasks)
        loss = out.loss + self.target_weight / len(out.task_losses) * self(self._target_task(out.loss.device)).loss
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return out

    def fine_tune(
        self,
        x: Tensor,
        y: Tensor,
        steps: int = 100,
        *,
        learns: str = "scale_shift",
        lr: float = 1e-3,
        batch: int = 64,
        seed: int = 0,
    ) -> nn.Module:
        """A classifier of the target's classes from few labelled samples; the learner stays as it is.

        Args:
            x: `[N, ...]`.
            y: class ids `[N]`, below the head's outputs.
            steps: of Adam, whose rate `lr` falls to 0 along a cosine.
            learns: besides the head: "scale_shift", "weights" (plain fine-tuning), "all" of these, or "head": nothing.
            batch: samples a step.
            seed: of their order.

        Returns:
            A copy of the network, in evaluation mode. Its norms go by the running statistics; with
            `batch_norm="batch"` these follow the target's samples.

        Raises:
            TypeError, ValueError: the samples do not fit each other or the model, or an argument is out of range.
            NonFiniteError: the loss is NaN or infinite.
        """
        check_choice("learns", learns, LEARNS)
        network = copy.deepcopy(self.model)
        _let_learn(network, self.head, learns)
        network.train()
        if self.batch_norm == "frozen":
            for norm in network.modules():
                if isinstance(norm, NORMS):
                    norm.eval()
        fit(network, x, y, steps, lr=lr, batch=batch, seed=seed)
        return network.eval()

    def _target_task(self, device: torch.device) -> TaskBatch:
        assert self.target is not None
        x, y = inputs(self.target[0], next(self.model.parameters())), self.target[1].to(device)
        support, query = [], []
        for label in y.unique():
            rows = (y == label).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows)).to(device)]
            half = len(rows) // 2
            support.append(rows[:half] if half else rows)
            query.append(rows[half:])
        one, other = torch.cat(support), torch.cat(query)
        return TaskBatch(x[one][None], y[one][None], x[other][None], y[other][None])


class ScaledLayer(nn.Module):
    """A linear layer or convolution that computes `(W * scale) x + (b + shift)`, of frozen W and b.

    >>> layer = nn.Conv2d(2, 3, 5)
    >>> ours, x = ScaledLayer(layer), torch.randn(4, 2, 8, 8)
    >>> ours.scale.shape, torch.equal(ours(x), layer(x))
    (torch.Size([3, 2, 1, 1]), True)
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        weight = layer.weight
        shape = (len(weight), 1) if weight.ndim == 2 else (*weight.shape[:2], *(1,) * (weight.ndim - 2))
        self.scale = nn.Parameter(weight.detach().new_ones(shape))
        self.shift = nn.Parameter(weight.detach().new_zeros(len(weight)))
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        """As it is scaled."""
        weight: Tensor = self.layer.weight * self.scale
        return weight

    @property
    def bias(self) -> Tensor:
        """As it is shifted."""
        bias: Tensor = self.shift if self.layer.bias is None else self.layer.bias + self.shift
        return bias

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        output: Tensor = self.layer._conv_forward(x, self.weight, self.bias)
        return output


class HardTasks:
    """Episodes among which hard tasks are, drawn online from the classes that the learner has just failed on.

    After each `every` batches of `episodes` there is one of hard tasks. In each of the former's tasks the class with
    the lowest query accuracy, once the learner has learned from the batch, is the failure class m. Hard tasks are new
    samples of the classes {m} alone or, where there are fewer of these than a task has, of these and others.

    The authors' code has no hard tasks; this is their paper's section 4.3.

    Args:
        learner: whose failures count.
        episodes: of labelled samples, without a transform.
        every: batches.

    Raises:
        TypeError, ValueError: `episodes` are others, or `every` is no count.

    >>> import metaaug_fast as mf
    >>> learner = mf.MetaTransfer(mf.models.strided_conv4(ways=5, hidden=4))
    >>> tasks = HardTasks(learner, mf.data.Episodes(mf.data.Glyphs(), tasks=6))
    >>> first, hard = next(tasks), next(tasks)
    >>> len(hard), len(tasks.classes) <= 6
    (6, True)
    """

    def __init__(self, learner: Any, episodes: Episodes, every: int = 1) -> None:
        check_count("every", every, low=1)
        if not isinstance(episodes, Episodes) or not isinstance(episodes.dataset, ClassSamples):
            raise TypeError(f"episodes must be Episodes of labelled samples (got {episodes!r})")
        if episodes.transform is not None:
            raise ValueError("episodes must have no transform, which may move classes (got one)")
        self.learner = learner
        self.episodes = episodes
        self.every = every
        self.classes: list[int] = []
        """Those that the last hard tasks were drawn from."""
        self._failed: list[int] = []  # since the last hard tasks
        self._given: int | None = None  # the batch whose failures are not known yet
        self._normal = self._hard = 0  # batches since the last hard one; hard ones

    def __iter__(self) -> HardTasks:
        return self

    def __next__(self) -> TaskBatch:
        if self._given is not None:
            self._failed += self.failures(self._given)
            self._given = None
            self._normal += 1
        if self._normal < self.every:
            self._given = self.episodes.position
            return next(self.episodes)
        self.classes = sorted(set(self._failed))
        self._failed, self._normal, self._hard = [], 0, self._hard + 1
        tasks = [self._hard_task(task) for task in range(self.episodes.tasks)]
        return TaskBatch(*map(torch.cat, zip(*(task.tensors for task in tasks), strict=True)))

    @torch.no_grad()
    def failures(self, index: int) -> list[int]:
        """The class of the lowest accuracy in each task of the batch of that index, as the learner is now."""
        episodes, training = self.episodes, self.learner.training
        device = next(self.learner.parameters()).device
        tasks = episodes.batch(index).to(device)
        self.learner.eval()
        try:
            found = self.learner.adapt(tasks.support_x, tasks.support_y)(tasks.query_x).argmax(-1)
        finally:
            self.learner.train(training)
        right = class_members(tasks.query_y, torch.float32) * (found == tasks.query_y)[..., None]
        hardest = right.sum(1).argmin(1).cpu().numpy()  # of classes with as many queries
        dataset: Any = episodes.dataset
        draws = Draws(episodes.seed, index, episodes.tasks, episodes.first)
        classes = draws.distinct(len(dataset), episodes.spec.ways)  # what `ClassSamples.sampler` draws first
        return [int(row[place]) for row, place in zip(classes, hardest, strict=True)]

    def _hard_task(self, task: int) -> TaskBatch:
        episodes, dataset = self.episodes, self.episodes.dataset
        assert isinstance(dataset, ClassSamples)
        draws = Draws(episodes.seed, _HARD + self._hard, 1, episodes.first + task)
        ways, failed = episodes.spec.ways, np.array(self.classes)
        chosen = failed[draws.distinct(len(failed), min(ways, len(failed)))[0]]
        if len(chosen) < ways:
            others = np.setdiff1d(np.arange(len(dataset)), failed)
            chosen = np.concatenate([chosen, others[draws.distinct(len(others), ways - len(chosen))[0]]])
        return dataset.subset(chosen).sampler(episodes.spec)(draws)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands."""
        given = -1 if self._given is None else self._given
        counts = [given, self._normal, self._hard]
        return {"episodes": self.episodes.state_dict(), "failed": list(self._failed), "counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`."""
        given, normal, hard = state["counts"]
        for each in (normal, hard, *state["failed"]):
            check_integer("state", each, low=0)
        self.episodes.load_state_dict(state["episodes"])
        self._failed, self._given = list(state["failed"]), None if given < 0 else given
        self._normal, self._hard = normal, hard


def scaled(model: nn.Module, head: str) -> nn.Module:
    """The model with a `ScaledLayer` for every linear layer and convolution outside of its head.

    It shares all parameters. Layers of the user's own classes stay as they are, for these may compute something else.

    Raises:
        ValueError: there is none.

    >>> scaled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "2")[0].scale.shape
    torch.Size([4, 1])
    """
    parameters_of(model)
    layers = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if type(module) in SCALED and head and not f"{path}.".startswith(f"{head}.")
    }
    if not layers:
        raise ValueError(
            f"model must have a linear layer or a convolution before its head, {head!r} (got none in "
            f"{type(model).__name__})"
        )
    made = {id(layer): ScaledLayer(layer) for layer in layers.values()}
    return replaced(model, {path: made[id(layer)] for path, layer in layers.items()})


def labelled(data: Any) -> tuple[Tensor, Tensor]:
    """Samples and class ids; those of a data set with labels as they are stored, class after class.

    >>> x, y = labelled(ClassSamples.from_arrays(torch.rand(6, 2), ["b", "a", "b", "a", "c", "a"]))
    >>> x.shape, y.tolist()
    (torch.Size([6, 2]), [0, 0, 0, 1, 1, 2])
    """
    if isinstance(data, tuple):
        return data
    if not isinstance(data, ClassSamples):
        data = ClassSamples.from_dataset(data)
    parts = [data.class_samples(index) for index in range(len(data))]
    return torch.cat(parts), torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])


def inputs(x: Tensor, like: Tensor) -> Tensor:
    """Samples as a network takes them: on its device, in its dtype; bytes divided by 255, ids as they are."""
    x = x.to(like.device)
    if x.dtype == torch.int64:
        return x
    return x.to(like.dtype) / 255 if x.dtype == torch.uint8 else x.to(like.dtype)


def fit(
    network: nn.Module, x: Tensor, y: Tensor, steps: int, *, lr: float = 1e-3, batch: int = 64, seed: int = 0
) -> float:
    """Minimise a classifier's cross entropy on samples, over its parameters that require a gradient.

    By Adam, whose rate falls to 0 along a cosine, on batches of `batch` samples; an epoch's last ones, where they are
    fewer, wait for the next shuffle.

    Args:
        x: `[N, ...]`, bytes (divided by 255) or numbers.
        y: class ids `[N]`.

    Returns:
        The mean loss of the last tenth of the steps.

    Raises:
        TypeError, ValueError: the samples do not fit each other or the network, or an argument is out of range.
        NonFiniteError: the loss is NaN or infinite.
    """
    check_count("steps", steps, low=1)
    check_number("lr", lr)
    check_count("batch", batch, low=1)
    check_integer("seed", seed)
    _check_labelled(x, y)
    y = class_ids(y)
    like = next(network.parameters())
    learns = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(learns, lr, fused=True)
    generator = torch.Generator().manual_seed(seed)
    batch, order = min(batch, len(x)), torch.empty(0, dtype=torch.int64)
    last: list[Tensor] = []
    y = y.to(like.device)
    with torch.enable_grad():
        for step in range(steps):
            if len(order) < batch:
                order = torch.randperm(len(x), generator=generator)
            rows, order = order[:batch], order[batch:]
            output = network(inputs(x[rows.to(x.device)], like))
            if step == 0:
                _check_labels(y, output)
            loss = F.cross_entropy(output, y[rows.to(y.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
            if step >= steps - max(1, steps // 10):
                last.append(loss.detach())
    optimizer.zero_grad()  # what is frozen again must not move in another's step
    found = float(torch.stack(last).mean())
    if not math.isfinite(found):
        raise NonFiniteError(f"the loss is {found} within {steps} steps of rate {lr:g}")
    return found


def _check_labelled(x: Tensor, y: Tensor) -> None:
    check_tensor("x", x)
    check_tensor("y", y)
    if not x.ndim or not len(x) or y.shape != x.shape[:1] or class_ids(y).dtype != torch.int64 or y.min() < 0:
        raise ValueError(
            f"x and y must be samples [N, ...] and class ids >= 0 [N] (got {tuple(x.shape)}, {y.dtype} "
            f"{tuple(y.shape)})"
        )


def _check_labels(y: Tensor, output: Tensor) -> None:
    if output.ndim != 2:
        raise ValueError(f"model must give outputs [N, classes] (got shape {tuple(output.shape)})")
    if y.max() >= output.shape[1]:
        raise ValueError(f"y must be class ids below {output.shape[1]}, the model's outputs (got {int(y.max())})")


def _let_learn(network: nn.Module, head: str, learns: str) -> None:
    """Say which parameters learn: see `MetaTransfer.fine_tune`."""
    steering = {id(each) for layer in _scaled_layers(network) for each in (layer.scale, layer.shift)}
    heads = {id(each) for each in network.get_submodule(head).parameters()}
    for value in network.parameters():
        kind = "head" if id(value) in heads else "scale_shift" if id(value) in steering else "weights"
        value.requires_grad_(kind == "head" or learns in (kind, "all"))


@torch.no_grad()
def _reset(network: nn.Module) -> None:
    for layer in _scaled_layers(network):
        layer.scale.fill_(1)
        layer.shift.zero_()


def _scaled_layers(network: nn.Module) -> list[ScaledLayer]:
    return [each for each in network.modules() if isinstance(each, ScaledLayer)]
