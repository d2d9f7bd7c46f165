"""Whether a learner keeps the contract of `learners/base.py`: the same trials for ours and for a user's own."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ContractError, in_one_line
from ..learners.base import Learner
from ..report.tables import plain
from ..runs.evaluation import learner_in
from ..runs.training import train
from ..tasks import MetaOutput, TaskBatch

TOLERANCE = 1e-6
"""How far numbers in float64 that should be equal may be apart, relative: sums in another order, through some steps."""


@dataclass(frozen=True)
class ContractReport:
    """Every clause, and "kept", or why it was not tried."""

    learner: str
    clauses: dict[str, str]

    def __str__(self) -> str:
        return plain((f"{self.learner} keeps the contract", ""), list(self.clauses.items()))


class _Skip(Exception):
    """A clause says nothing about this learner or these tasks."""


def check_learner(learner: nn.Module, tasks: TaskBatch) -> ContractReport:
    """Put a learner through all that training, evaluation and checkpoints will ask of it.

    Copies of the learner are tried, in float64 where numbers are compared; it stays as it is. Run it in a test of your
    own learner.

    Args:
        learner: a `Learner`, fresh or trained.
        tasks: at least two small tasks, of class ids or of numbers.

    Raises:
        TypeError: `learner` is none. ContractError: a clause is broken; the message says which, and how.

    >>> import torch, metaaug_fast as mf
    >>> y = torch.arange(3).repeat(2, 2)
    >>> tasks = mf.TaskBatch(torch.randn(2, 6, 4), y, torch.randn(2, 6, 4), y)
    >>> print(mf.check_learner(mf.MAML(mf.models.mlp([4, 8, 3]), inner_lr=0.1), tasks))
    MAML keeps the contract
    forward gives a loss for every task                         kept
    adapt learns all tasks at once                              kept
    adapt takes one task                                        kept
    each task is learned on its own                             kept
    predictions do not see query labels                         kept
    the order of support samples does not matter                kept
    predictions permute with the labels                         kept
    transductive says whether queries see each other            kept
    judging leaves no trace                                     kept
    meta_step moves the learner                                 kept
    a resumed run is the uninterrupted one                      kept
    what is wrong is refused by TypeError or ValueError         kept
    """
    tasks = TaskBatch.of(tasks)
    own = learner_in(learner)
    if tasks.tasks < 2:
        raise ValueError(f"tasks must hold at least two tasks (got {tasks.tasks})")
    clauses = {}
    for clause, trial in _CLAUSES.items():
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                trial(_Trial(copy.deepcopy(own), tasks) if trial in _AS_IT_IS else _Trial.exact(own, tasks))
        except _Skip as reason:
            clauses[clause] = f"not tried: {reason}"
        except ContractError as error:
            raise ContractError(f"{type(own).__name__}: {clause}: {error}") from None
        except Exception as error:  # the learner is another's, and may raise anything
            raise ContractError(f"{type(own).__name__}: {clause}: {in_one_line(error, name=True)}") from error
        else:
            clauses[clause] = "kept"
    return ContractReport(type(own).__name__, clauses)


@dataclass
class _Trial:
    """A copy of the learner, which may be spoilt, and the tasks."""

    learner: Learner
    tasks: TaskBatch

    @classmethod
    def exact(cls, learner: Learner, tasks: TaskBatch) -> _Trial:
        """In float64, so that rounding does not hide what is compared."""
        return cls(copy.deepcopy(learner).double(), tasks.to(torch.float64))

    @property
    def classes(self) -> bool:
        return not self.tasks.support_y.is_floating_point()

    @torch.no_grad()
    def predict(self, tasks: TaskBatch, query_x: Tensor | None = None) -> Tensor:
        self.learner.eval()
        adapted = self.learner.adapt(tasks.support_x, tasks.support_y)
        return adapted(tasks.query_x if query_x is None else query_x)

    @torch.no_grad()
    def judge(self, tasks: TaskBatch) -> MetaOutput:
        self.learner.eval()
        return self.learner(tasks)


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise ContractError(message)


def _demand_equal(found: Tensor, expected: Tensor, what: str) -> None:
    _demand(found.shape == expected.shape, f"{what} must be {list(expected.shape)} (got {list(found.shape)})")
    scale = float(expected.detach().abs().max()) or 1.0
    apart = float((found - expected).detach().abs().max()) / scale
    _demand(apart <= TOLERANCE, f"{what} must be equal (they are {apart:.1e} apart, relative)")


def _forward(trial: _Trial) -> None:
    """loss is the mean of task_losses [T], finite; accuracy [T] within 0..1 for class ids, None otherwise."""
    out, count = trial.judge(trial.tasks), trial.tasks.tasks
    _demand(isinstance(out, MetaOutput), f"forward must return a MetaOutput (got {type(out).__name__})")
    _demand(out.loss.ndim == 0, f"loss must be a scalar (got {list(out.loss.shape)})")
    _demand(
        tuple(out.task_losses.shape) == (count,), f"task_losses must be [{count}] (got {list(out.task_losses.shape)})"
    )
    _demand(bool(out.task_losses.isfinite().all()), "task_losses must be finite")
    _demand_equal(out.loss, out.task_losses.mean(), "loss and the mean of task_losses")
    if trial.classes:
        found = out.accuracy
        _demand(found is not None and tuple(found.shape) == (count,), f"accuracy must be [{count}] for class ids")
        assert found is not None
        _demand(bool(((found >= 0) & (found <= 1)).all()), "accuracy must be within 0..1")


def _many(trial: _Trial) -> None:
    """len is T, predictions [T, Q, ...]; evaluate says what forward says."""
    tasks = trial.tasks
    trial.learner.eval()
    with torch.no_grad():
        adapted = trial.learner.adapt(tasks.support_x, tasks.support_y)
        _demand(len(adapted) == tasks.tasks, f"len(adapted) must be {tasks.tasks} (got {len(adapted)})")
        shape, wanted = tuple(adapted(tasks.query_x).shape[:2]), tuple(tasks.query_x.shape[:2])
        _demand(shape == wanted, f"adapted(x) must be [{wanted[0]}, {wanted[1]}, ...] (got {list(shape)}, ...)")
        judged = adapted.evaluate(tasks.query_x, tasks.query_y)
    _demand_equal(judged.task_losses, trial.judge(tasks).task_losses, "losses of adapted.evaluate and of forward")


def _one(trial: _Trial) -> None:
    """[S, ...] in, [N, ...] out, as the first of many."""
    tasks, many = trial.tasks, trial.predict(trial.tasks[0])
    trial.learner.eval()
    with torch.no_grad():
        adapted = trial.learner.adapt(tasks.support_x[0], tasks.support_y[0])
        one = adapted(tasks.query_x[0])
        _demand_equal(one, many[0], "predictions of one task and of a batch of one")
        judged = adapted.evaluate(tasks.query_x[0], tasks.query_y[0])
    _demand(
        tuple(judged.task_losses.shape) == (1,),
        f"task_losses of one task must be [1] (got {list(judged.task_losses.shape)})",
    )


def _alone(trial: _Trial) -> None:
    """A task's predictions do not depend on the tasks beside it."""
    together = trial.predict(trial.tasks)
    _demand_equal(trial.predict(trial.tasks[0]), together[:1], "predictions of a task alone and beside others")


def _blind(trial: _Trial) -> None:
    """forward judges what adapt, which never sees them, predicts: whatever the labels are."""
    tasks = trial.tasks
    other = TaskBatch(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y.flip(1))
    trial.learner.eval()
    with torch.no_grad():
        adapted = trial.learner.adapt(tasks.support_x, tasks.support_y)
        expected = adapted.evaluate(tasks.query_x, other.query_y).task_losses
    _demand_equal(
        trial.judge(other).task_losses, expected, "losses of forward and of adapted.evaluate for other labels"
    )


def _order(trial: _Trial) -> None:
    """Support samples with their labels in another order are the same set."""
    tasks = trial.tasks
    flipped = TaskBatch(tasks.support_x.flip(1), tasks.support_y.flip(1), tasks.query_x, tasks.query_y)
    if getattr(trial.learner, "inner_batch", None) is not None:
        raise _Skip("the learner takes its samples in batches")
    if trial.learner.order_matters:
        raise _Skip("it says that it does")
    _demand_equal(trial.predict(flipped), trial.predict(tasks), "predictions from a support set in another order")


def _permutes(trial: _Trial) -> None:
    """Classes under other names are predicted under these; where the network has no opinion of its own on names."""
    tasks = trial.tasks
    if not trial.classes:
        raise _Skip("there are no classes")
    if trial.learner.names_matter:
        raise _Skip("it says that names matter")
    with torch.no_grad():
        ways = trial.predict(tasks).shape[-1]
    if not trial.learner.encoder and not _forget_names(trial.learner, ways):
        raise _Skip(f"no last layer of {ways} outputs was found, whose rows could be made equal")
    names = torch.arange(ways).roll(1)
    renamed = TaskBatch(tasks.support_x, names[tasks.support_y], tasks.query_x, tasks.query_y)
    _demand_equal(trial.predict(renamed)[..., names], trial.predict(tasks), "predictions of renamed classes")


def _forget_names(learner: Learner, ways: int) -> bool:
    """Give the last linear layer of `ways` outputs, and the rates of its elements, the same row for each; if it is."""
    heads = {path: each for path, each in learner.named_modules() if isinstance(each, nn.Linear)}
    heads = {path: each for path, each in heads.items() if each.out_features == ways}
    if not heads:
        return False
    path, head = list(heads.items())[-1]
    rates = f"inner_lr.{path.removeprefix('model.').replace('.', '/')}/"
    with torch.no_grad():
        for value in head.parameters():
            value.copy_(value.mean(0, keepdim=True).expand_as(value))
        for name, value in learner.named_parameters():
            if name.startswith(rates) and value.ndim >= (dim := 2 if name.endswith("weight") else 1):
                value.copy_(value.mean(-dim, keepdim=True).expand_as(value))
    return True


def _transductive(trial: _Trial) -> None:
    """Where it is False, a query alone is predicted as among others."""
    if trial.learner.transductive:
        raise _Skip("it says that they do")
    tasks = trial.tasks
    alone = trial.predict(tasks, tasks.query_x[:, :1])
    _demand_equal(alone, trial.predict(tasks)[:, :1], "predictions of a query alone and among others")


def _no_trace(trial: _Trial) -> None:
    """In evaluation mode, nothing in the learner changes and no gradient arises."""
    before = copy.deepcopy(trial.learner.state_dict())
    trial.judge(trial.tasks)
    for name, value in trial.learner.state_dict().items():
        _demand(not isinstance(value, Tensor) or torch.equal(value, before[name]), f"{name} must not change")
    _demand(all(each.grad is None for each in trial.learner.parameters()), "no gradient must arise")


def _meta_step(trial: _Trial) -> None:
    """optimizers() and meta_step() change a parameter, and return what they found."""
    learner = trial.learner.train()
    before = [value.detach().clone() for value in learner.parameters()]
    out = learner.meta_step(trial.tasks, learner.optimizers())
    _demand(isinstance(out, MetaOutput), f"meta_step must return a MetaOutput (got {type(out).__name__})")
    moved = any(not torch.equal(one, other) for one, other in zip(before, learner.parameters(), strict=True))
    _demand(moved, "no parameter has moved")


def _resumed(trial: _Trial) -> None:
    """Stopped after two meta-steps, stored, loaded into another learner and gone on: the same bits."""
    start = copy.deepcopy(trial.learner)
    other = copy.deepcopy(trial.learner)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "learner.safetensors"
        torch.manual_seed(1)
        train(trial.learner.train(), _Repeated(trial.tasks), 4, progress=False)
        torch.manual_seed(1)
        train(start.train(), _Repeated(trial.tasks), 2, checkpoint=path, progress=False)
        train(other.train(), _Repeated(trial.tasks), 4, resume=path, progress=False)
    wanted = trial.learner.state_dict()
    for name, value in other.state_dict().items():
        same = torch.equal(value, wanted[name]) if isinstance(value, Tensor) else value == wanted[name]
        _demand(same, f"{name} must be the same, bit for bit")


def _refuses(trial: _Trial) -> None:
    """No tasks, samples without labels, labels that are no classes, a negative number of steps."""
    tasks, learner = trial.tasks, trial.learner
    trials: dict[str, Callable[[], object]] = {
        "learner(None)": lambda: learner(None),
        "adapt(support_x, fewer support_y)": lambda: learner.adapt(tasks.support_x, tasks.support_y[:, 1:]),
        "forward(tasks, steps=-1)": lambda: learner(tasks, steps=-1),
    }
    if trial.classes:
        trials["adapt with a negative class id"] = lambda: learner.adapt(tasks.support_x, -1 - tasks.support_y)
    for name, call in trials.items():
        try:
            call()
        except (TypeError, ValueError):
            continue
        except Exception as error:
            raise ContractError(f"{name} must raise TypeError or ValueError (got {type(error).__name__})") from None
        raise ContractError(f"{name} must raise TypeError or ValueError (it went through)")


class _Repeated:
    """The same tasks again and again, as `train` takes them."""

    def __init__(self, tasks: TaskBatch) -> None:
        self.tasks, self.position = tasks, 0

    def __next__(self) -> TaskBatch:
        self.position += 1
        return self.tasks

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


_AS_IT_IS = (_meta_step, _resumed, _refuses)
_CLAUSES: dict[str, Callable[[_Trial], None]] = {
    "forward gives a loss for every task": _forward,
    "adapt learns all tasks at once": _many,
    "adapt takes one task": _one,
    "each task is learned on its own": _alone,
    "predictions do not see query labels": _blind,
    "the order of support samples does not matter": _order,
    "predictions permute with the labels": _permutes,
    "transductive says whether queries see each other": _transductive,
    "judging leaves no trace": _no_trace,
    "meta_step moves the learner": _meta_step,
    "a resumed run is the uninterrupted one": _resumed,
    "what is wrong is refused by TypeError or ValueError": _refuses,
}
