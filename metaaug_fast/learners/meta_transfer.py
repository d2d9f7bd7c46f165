"""Meta-transfer learning (Sun, Liu, Chua, Schiele 2019, arXiv 1812.02391, algorithms 1 and 2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import check_choice, check_count, check_number
from ..data.episodes import Episodes
from ..data.samples import ClassSamples
from ..engine.problem import NORMS, InnerProblem, LearningRate
from ..tasks import MetaOutput, TaskBatch, class_ids
from .hard_tasks import HardTasks
from .parts import find_head, inside, replaced
from .scaling import plain, reset, scaled, scaled_layers, weights
from .supervised import check_labelled, fit, inputs, labelled
from .unrolled import UnrolledLearner

POLICIES = ("frozen", "batch")
LEARNS = ("scale_shift", "head", "weights", "all")


class MetaTransfer(UnrolledLearner):
    """Learn weights Theta by plain classification, freeze them, and meta-learn to scale and shift them; then fine-tune.

        1. `pretrain`:   minimise the cross entropy of [Theta; a head for all source classes]       over Theta and it
        2. `meta_train`: theta_i = theta - inner_lr * grad_theta loss(S, theta; support of task i)  inner_steps times
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
        pretrain_steps: before the meta-training of a run; `pretrain` has its own.
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
    >>> learner.meta_train(mf.data.Episodes(mf.data.Glyphs(), tasks=2), steps=2) > 0
    True
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
        pretrain_steps: int = 1000,
        **options: Any,
    ) -> None:
        check_choice("batch_norm", batch_norm, POLICIES)
        check_count("pretrain_steps", pretrain_steps)
        head = find_head(model, head)
        super().__init__(scaled(model, head), inner_lr, inner_steps, batch_norm=batch_norm, **options)
        self.head = head
        self.pretrain_steps = pretrain_steps
        self.target: tuple[Tensor, Tensor] | None = None
        self.target_weight = 0.0
        self._settle(inside(head), learn_inner_lr)
        _let_learn(self.model, head, "scale_shift")

    def problem(self, steps: int | None = None) -> InnerProblem:
        """The inner problem on the network of plain layers, whose weights are the scaled ones at this moment."""
        problem = super().problem(steps)
        for path, module in problem.model.named_modules():
            module.training = self.model.get_submodule(path).training
        return replace(problem, parameters={**problem.parameters, **weights(self.model)})

    def _inner_problem(self) -> InnerProblem:
        network = plain(self.model)
        return replace(super()._inner_problem(), model=network, parameters=dict(network.named_parameters()))

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
        check_labelled(x, y)
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
        reset(self.model)
        network = replaced(plain(self.model), {self.head: head})
        training, own = self.model.training, {id(value) for value in [*self.model.parameters(), *head.parameters()]}
        try:
            for value in network.parameters():
                value.requires_grad_(id(value) in own)
            return fit(network.train(), x, y, steps, lr=lr, batch=batch, seed=seed)
        finally:
            _let_learn(self.model, self.head, "scale_shift")
            self.model.train(training)

    def prepare(self, episodes: Any, *, resumed: bool = False) -> HardTasks:
        """Pre-train on all samples of the episodes' classes, and draw hard tasks among them."""
        tasks = HardTasks(self, episodes)
        if not resumed and self.pretrain_steps:
            self.pretrain(episodes.dataset, self.pretrain_steps, seed=episodes.seed)
        return tasks

    def meta_train(self, episodes: Episodes, steps: int = 100, *, meta_lr: float | None = None) -> float:
        """Learn scales, shifts and the head from tasks, every second batch of which are hard ones.

        `mf.train(learner, HardTasks(learner, episodes), steps)` does the same with validation and checkpoints.

        Args:
            episodes: of labelled samples, without a transform.
            steps: meta-steps.
            meta_lr: of Adam; None: 0.001.

        Returns:
            The mean meta-loss of the last tenth of the steps.

        Raises:
            TypeError, ValueError: an argument is out of range, or the episodes are others.
            NonFiniteError: NaN or infinity arose.
        """
        check_count("steps", steps, low=1)
        tasks, optimizers = HardTasks(self, episodes), self.optimizers(meta_lr)
        losses = [float(self.meta_step(next(tasks), optimizers).loss.detach()) for _ in range(steps)]
        last = losses[-max(1, steps // 10) :]
        return sum(last) / len(last)

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
        check_labelled(x, y)
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


def _let_learn(network: nn.Module, head: str, learns: str) -> None:
    """Say which parameters learn: see `MetaTransfer.fine_tune`."""
    steering = {id(each) for layer in scaled_layers(network) for each in (layer.scale, layer.shift)}
    heads = {id(each) for each in network.get_submodule(head).parameters()}
    for value in network.parameters():
        kind = "head" if id(value) in heads else "scale_shift" if id(value) in steering else "weights"
        value.requires_grad_(kind == "head" or learns in (kind, "all"))
