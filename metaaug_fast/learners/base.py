"""The contract of a learner: all that training, evaluation, checkpoints, checks and reports know of one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import check_count, check_number
from ..engine.losses import Loss, check_targets, judge
from ..tasks import MetaOutput, TaskBatch, check_inputs_of, check_samples, check_tensor, class_ids, is_one_task, usable


class Adapted(Protocol):
    """T tasks after adaptation, or one: what `Learner.adapt` gives."""

    def __len__(self) -> int:
        """T."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions `[T, N, ...]` for `x` `[T, N, ...]`; of one task `[N, ...]`."""
        ...

    def evaluate(self, x: Tensor, y: Tensor) -> MetaOutput:
        """Losses, and accuracies for class ids, of the predictions for `x`."""
        ...


class Learner(nn.Module):
    """A way to learn new tasks from few samples. Subclass it, write `adapt`, and everything else here works.

    `forward` is the meta-loss, `meta_step` one update of the learner, `adapt` what it learns of new tasks. Training
    (`mf.train`), evaluation (`mf.evaluate`), checkpoints, `mf.check_gradients`, reports and `metaaug-fast` use nothing
    but what stands here. `mf.check_learner(learner, tasks)` puts a learner through all of it.

    Attributes:
        encoder: whether the learner's model has to give features `[N, D]` rather than outputs for each class.
        inner_steps: steps of its inner loop; None: it has none.
        loss: what it minimises on queries, a name or a callable: the metric's name where there are no classes. It need
            not be there.
        first_order: whether its gradients leave a part out on purpose.
        order_matters: whether it reads its support samples one after the other.
        names_matter: whether it treats classes differently by their names, from the start and on purpose.

    >>> import torch, metaaug_fast as mf
    >>> class NearestMean(mf.Learner):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.scale = torch.nn.Parameter(torch.ones(()))
    ...
    ...     @mf.learners.one_task_too
    ...     def adapt(self, support_x, support_y):
    ...         means = mf.learners.class_means(support_x, support_y)
    ...         return mf.learners.Predictor(lambda x: -self.scale * torch.cdist(x, means), len(support_x))
    >>> y = torch.arange(3).repeat(4, 1)
    >>> tasks = mf.TaskBatch(torch.randn(4, 3, 2), y, torch.randn(4, 3, 2), y)
    >>> NearestMean()(tasks).task_losses.shape
    torch.Size([4])
    """

    encoder: ClassVar[bool] = False
    inner_steps: int | None = None
    loss: Loss  # no value here, which would hide a loss that is a module
    first_order: bool = False
    order_matters: bool = False
    names_matter: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a module or a parameter where the class has a plain value, which would hide it."""
        if isinstance(value, nn.Module | nn.Parameter) and hasattr(type(self), name):
            plain = getattr(type(self), name)
            if not hasattr(plain, "__get__"):
                wanted = (
                    "True or False"
                    if isinstance(plain, bool)
                    else f"no module or parameter, for the class has {plain!r}"
                )
                raise TypeError(f"{name} must be {wanted} (got {value!r})")
        super().__setattr__(name, value)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        """Learn T tasks from `support_x` `[T, S, ...]`, `support_y` `[T, S, ...]`, all at once; or one, without T."""
        raise NotImplementedError(f"{type(self).__name__} must write adapt(support_x, support_y)")

    def forward(self, tasks: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """Adapt to every task's support set and judge the result on its query set.

        Args:
            steps: of the inner loop, if there is one; None: `inner_steps`.

        Raises:
            TypeError, ValueError: the tasks do not fit, or `steps` is given where there is no inner loop.
        """
        tasks = TaskBatch.of(tasks)
        options = {} if check_steps(self, steps) is None else {"steps": steps}
        return self.adapt(tasks.support_x, tasks.support_y, **options).evaluate(tasks.query_x, tasks.query_y)

    def by_step(self, tasks: TaskBatch, steps: int | None = None) -> list[MetaOutput]:
        """The metric after 0, 1, ... steps of the inner loop; this default adapts anew for each."""
        if self.inner_steps is None:
            raise ValueError(f"by_step needs a learner with an inner loop ({type(self).__name__} has none)")
        last = self.inner_steps if check_steps(self, steps) is None else steps
        return [self(tasks, steps=step) for step in range((last or 0) + 1)]

    def optimizers(self, lr: float | None = None) -> list[Optimizer]:
        """What `meta_step` steps: Adam on all parameters, of rate `lr` or 0.001."""
        if lr is not None:
            check_number("meta_lr", lr)
        return [torch.optim.Adam(self.parameters(), 1e-3 if lr is None else lr, fused=True)]

    def prepare(self, episodes: Any, *, resumed: bool = False) -> Any:
        """What a run does before its meta-training, and the episodes that this goes through; here nothing, and these.

        A learner may be pre-trained on the samples that episodes are drawn from, or have others drawn of its own.

        Args:
            resumed: the run goes on, so that it has been pre-trained.
        """
        return episodes

    def meta_step(self, tasks: TaskBatch, optimizers: Sequence[Optimizer]) -> MetaOutput:
        """One update from a batch of tasks; what it found before it moved."""
        return gradient_step(self, tasks, optimizers)

    @property
    def transductive(self) -> bool:
        """Whether one query's prediction depends on the other queries."""
        return False

    def specification(
        self, tasks: TaskBatch, *, first_order: bool, step_weights: Tensor | None = None
    ) -> MetaOutput | None:
        """What `forward` computes, as plain autograd; None where `forward` is that itself. For `check_gradients`."""
        return None

    def extra_repr(self) -> str:
        """The constructor's arguments that are plain and not the defaults."""
        defaults: dict[str, Any] = {}
        for init in [vars(each)["__init__"] for each in type(self).__mro__ if "__init__" in vars(each)]:
            parameters = inspect.signature(init).parameters
            defaults = {name: parameter.default for name, parameter in parameters.items()} | defaults
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                break  # what it takes, it names
        values = {name: getattr(self, name, default) for name, default in defaults.items()}
        return ", ".join(
            f"{name}={value!r}"
            for name, value in values.items()
            if type(value) in (bool, int, float, str, tuple) and value != defaults[name]
        )

    def runs_on(self, sample_shape: tuple[int, ...], ids: bool = False) -> str:
        """What computes it on samples of a shape, of numbers or of token ids, in a word."""
        return "torch"


def gradient_step(learner: nn.Module, tasks: TaskBatch, optimizers: Sequence[Optimizer]) -> MetaOutput:
    """Descend along the gradient of the meta-loss; `learner` may be one inside a wrapper, such as DDP."""
    out: MetaOutput = learner(tasks)
    for optimizer in optimizers:
        optimizer.zero_grad()
    out.loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return out


def check_steps(learner: Learner, steps: int | None) -> int | None:
    """`steps`; ValueError where it is given and there is no inner loop, or is no count."""
    if steps is not None:
        if learner.inner_steps is None:
            raise ValueError(f"steps must be None for {type(learner).__name__}, which has no inner loop (got {steps})")
        check_count("steps", steps)
    return steps


class Predictor:
    """An `Adapted` made of a function that predicts, for learners without adapted weights.

    Args:
        predict: from `x` `[T, N, ...]` to predictions `[T, N, ...]`.
        tasks: T.
        loss: a name or a callable, see `inner_loop`.
        score: what `evaluate` gives of predictions and targets, where that is no mean of `loss`.
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        tasks: int,
        loss: Loss = "cross_entropy",
        score: Callable[[Tensor, Tensor], MetaOutput] | None = None,
    ) -> None:
        self.predict = predict
        self.tasks = tasks
        self.loss = loss
        self.score = functools.partial(scored, loss) if score is None else score

    def __len__(self) -> int:
        return self.tasks

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions `[T, N, ...]`; TypeError or ValueError unless `x` holds samples for T tasks."""
        check_inputs_of(len(self), x)
        return self.predict(usable(x))

    def evaluate(self, x: Tensor, y: Tensor) -> MetaOutput:
        """Losses and accuracies of the predictions for `x`; TypeError or ValueError where `x` and `y` do not fit."""
        y = class_ids(y)
        check_samples("query", x, y, tasks=len(self))
        return self.score(self(x), usable(y))


def scored(loss: Loss, prediction: Tensor, y: Tensor, label_smoothing: float = 0.0) -> MetaOutput:
    """Losses and accuracies of predictions `[T, Q, ...]`; ValueError where `query_y` is no target of such."""
    check_targets("query_y", loss, y, tuple(prediction.shape[2:]))
    return judge(loss, prediction, y, label_smoothing)


class OneTask:
    """One adapted task, without a task axis; all else is that of the batch of one, `many`."""

    def __init__(self, many: Any) -> None:
        self.many = many

    def __len__(self) -> int:
        return 1

    def __call__(self, x: Tensor) -> Tensor:
        check_tensor("x", x)
        prediction: Tensor = self.many(x[None])[0]
        return prediction

    def evaluate(self, x: Tensor, y: Tensor) -> MetaOutput:
        check_tensor("x", x)
        check_tensor("y", y)
        output: MetaOutput = self.many.evaluate(x[None], y[None])
        return output

    def __getattr__(self, name: str) -> Any:
        if name == "many":  # not yet there, while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.many, name)


_Adapt = TypeVar("_Adapt", bound=Callable[..., Any])


def one_task_too(adapt: _Adapt) -> _Adapt:
    """Let an `adapt` for `[T, S, ...]` take one task `[S, ...]` as well, and nothing that is no support set.

    Further tensors, given by name, then lack their T, too.

    Class ids tell by their dimensions, other targets by fitting `support_x`; where both readings fit, as for `[A, B]`
    with `[A, B]`, it is one task.
    """

    @functools.wraps(adapt)
    def wrapper(self: Learner, support_x: Tensor, support_y: Tensor, *args: Any, **options: Any) -> Any:
        check_tensor("support_x", support_x)
        check_tensor("support_y", support_y)
        support_y = class_ids(support_y)
        single = is_one_task(support_x, support_y)
        if single:
            support_x, support_y = support_x[None], support_y[None]
            options = {name: value[None] if isinstance(value, Tensor) else value for name, value in options.items()}
        check_samples("support", support_x, support_y)
        adapted = adapt(self, support_x, support_y, *args, **options)
        return OneTask(adapted) if single else adapted

    return wrapper  # type: ignore[return-value]


def class_members(labels: Tensor, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
    """Who belongs to which class: class ids `[T, S]` to ones and zeros `[T, S, ways]`, ways as in the labels.

    Args:
        mask: bool `[T, S]`, which samples there are; labels of the others are not read. None: all.

    Raises:
        ValueError: labels are no class ids, a task lacks a class that another has, or the mask is no such one.
    """
    if labels.dtype != torch.int64 or labels.ndim != 2:
        raise ValueError(f"support_y must be class ids, int64 [T, S] (got {labels.dtype} {tuple(labels.shape)})")
    if mask is not None:
        check_mask(mask, labels)
        labels = labels.masked_fill(~mask, 0)
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0:
        raise ValueError(f"support_y must hold class ids >= 0 (got {low})")
    members = nn.functional.one_hot(labels, high + 1).to(dtype)
    if mask is not None:
        members = members * mask.unsqueeze(2)
    counts = members.sum(1)
    if not bool(counts.all()):
        task, missing = (counts == 0).nonzero()[0].tolist()
        raise ValueError(
            f"support_y must have a sample of each class 0..{high} in every task (task {task} lacks {missing})"
        )
    return members


def check_mask(mask: Tensor, labels: Tensor) -> None:
    """Raise TypeError or ValueError unless it says of each support sample, `[T, S]`, whether it is there."""
    check_tensor("mask", mask)
    if mask.dtype != torch.bool or mask.shape != labels.shape[:2]:
        raise ValueError(
            f"mask must be bool {list(labels.shape[:2])}, a place for each support sample "
            f"(got {mask.dtype} {list(mask.shape)})"
        )


def class_means(features: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of each class's features: `[T, S, D]` and class ids `[T, S]` to `[T, ways, D]`.

    Args:
        mask: bool `[T, S]`, which samples count. None: all.

    Raises:
        ValueError: as `class_members`.
    """
    members = class_members(labels, features.dtype, mask)
    if mask is not None:
        features = features.masked_fill(~mask.unsqueeze(2), 0)
    return members.mT @ features / members.sum(1).unsqueeze(-1)
