"""iMAML, MAML with implicit gradients (Rajeswaran, Finn, Kakade, Levine 2019, arXiv 1909.04630, algorithms 1 and 2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from ..checks import check_choice, check_count, check_number
from ..engine.fast_weights import FastWeights
from ..engine.implicit import Proximal, Solved, adapt_proximally, proximal_steps
from ..engine.losses import Loss
from ..engine.problem import InnerProblem, Support, inner_problem, patterns
from ..errors import ConvergenceWarning
from ..tasks import MetaOutput, TaskBatch
from .base import check_steps, one_task_too
from .gradient import GradientLearner

POLICIES = ("batch", "frozen")


class IMAML(GradientLearner):
    """Learn weights theta near which there is a solution of every task, by gradients that see the solution alone.

        theta_i = argmin loss(phi; support of task i) + proximal / 2 |phi - theta|^2        by inner_steps steps
        g_i     = (I + H_i / proximal)^-1 grad loss(theta_i; query of task i)               by cg_steps steps
        descend along the mean over tasks of g_i                                            with any torch optimizer

    H_i is the Hessian of the support loss at theta_i, of which conjugate gradients ask one product in each step; all
    tasks at once. What a meta-gradient costs and keeps does not depend on `inner_steps`. It is exact where both are
    solved, and `check_gradients`, which compares it with the slope of the meta-loss, then says so. Gradients also reach
    the support data.

    Steps down the inner problem are plain gradient steps, the pull to theta included. (The authors' code takes steps
    without it and then one down it alone, and leaves it out in tests.)

    Attributes:
        residuals: `|b - A x| / |b|` of each task's equations after the last backward pass, `[T]`; None before.

    Args:
        model: any module; its parameters are the meta-parameters.
        inner_lr: a number, with `inner_lr * proximal` below 2, or steps would overshoot whatever the loss.
        inner_steps: of gradient descent.
        proximal: the weight lambda of the distance, > 0.
        cg_steps: the most steps of conjugate gradients.
        cg_damping: added to `proximal` in the equations alone. It makes them solvable where the loss has negative
            curvature, which batch norms have much of, and the gradients those of a stronger pull. (The authors' code
            damps by what comes to 22.)
        cg_tolerance: the residual at which a task is solved. One above it after `cg_steps` is said in a
            `ConvergenceWarning`, once, as is a direction of negative curvature in any case. None: take `cg_steps`, as
            in the paper; see `residuals`.
        loss, adapt, label_smoothing, backend, task_chunk, precision: see `inner_loop`.
        batch_norm: "batch" or "frozen", see `inner_loop`.

    Raises:
        TypeError, ValueError: an argument is out of range, or nothing adapts.

    >>> import torch, metaaug_fast as mf
    >>> imaml = mf.IMAML(mf.models.mlp([1, 40, 40, 1]), inner_lr=0.01, proximal=20.0, loss="mse")
    >>> tasks = mf.TaskBatch(*(torch.randn(25, 10, 1) for _ in range(4)))
    >>> imaml(tasks).loss.backward()
    >>> imaml.residuals.shape
    torch.Size([25])
    """

    residuals: Tensor | None
    _said: set[str]

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = 0.1,
        inner_steps: int = 16,
        proximal: float = 2.0,
        cg_steps: int = 5,
        cg_damping: float = 0.0,
        cg_tolerance: float | None = None,
        loss: Loss = "cross_entropy",
        adapt: str | Iterable[str] | None = None,
        batch_norm: str = "batch",
        backend: str = "auto",
        *,
        label_smoothing: float = 0.0,
        task_chunk: int | None = None,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        check_choice("batch_norm", batch_norm, POLICIES)
        self.model = model
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.proximal = proximal
        self.cg_steps = cg_steps
        self.cg_damping = cg_damping
        self.cg_tolerance = cg_tolerance
        self.loss = loss
        self.adapted = patterns(adapt)
        self.batch_norm = batch_norm
        self.backend = backend
        self.label_smoothing = label_smoothing
        self.task_chunk = task_chunk
        self.precision = precision
        self.__dict__["residuals"] = None
        self.__dict__["_said"] = set()
        self._proximal()

    @one_task_too
    def adapt(
        self,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int | None = None,
        sample_weight: Tensor | None = None,
        rows: Tensor | None = None,
        initial: Tensor | None = None,
    ) -> FastWeights:
        """Adapt to each task `[T, S, ...]`, differentiably, by implicit gradients; one task may lack its T.

        Args:
            steps: another number than `inner_steps`.
            sample_weight: `[T, S]`; see `inner_loop`.
            rows: must be None.
            initial: `[T, P]`, a theta for each task, in the place of the model's parameters.

        Raises:
            ValueError: the support set fits neither the model nor itself. NonFiniteError: NaN or infinity arose.
        """
        if rows is not None:
            raise ValueError("rows must be None: the inner problem is one of all support samples (got a tensor)")
        support = Support(support_x, support_y, sample_weight, None, initial)
        return adapt_proximally(self._proximal(steps), support, self.backend)

    def by_step(self, tasks: TaskBatch, steps: int | None = None) -> list[MetaOutput]:
        """The metric after 0, 1, ... steps of the inner problem, without gradient.

        Raises:
            TypeError, ValueError: the tasks do not fit the model, or `steps` is no count.
        """
        tasks = TaskBatch.of(tasks)
        proximal = self._proximal(check_steps(self, steps))
        support = Support(tasks.support_x, tasks.support_y)
        return [
            weights.evaluate(tasks.query_x, tasks.query_y)
            for weights in proximal_steps(proximal, support, self.backend)
        ]

    def specification(
        self,
        tasks: TaskBatch,
        *,
        first_order: bool,
        step_weights: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> None:
        """None: there is no unrolled loop to compare with, but the slope of the meta-loss."""

    def _proximal(self, steps: int | None = None) -> Proximal:
        """What is solved for each task, and how; checked."""
        for name, value in (
            ("inner_lr", self.inner_lr),
            ("proximal", self.proximal),
            ("cg_damping", self.cg_damping),
        ):
            check_number(name, value)
        if not self.proximal > 0:
            raise ValueError(f"proximal must be > 0, or theta would be forgotten (got {self.proximal})")
        if self.inner_lr * self.proximal >= 2:
            raise ValueError(
                f"inner_lr * proximal must be below 2, or every step overshoots (got {self.inner_lr * self.proximal:g})"
            )
        check_count("cg_steps", self.cg_steps, low=1)
        if self.cg_tolerance is not None:
            check_number("cg_tolerance", self.cg_tolerance)
        return Proximal(
            self.problem(steps), self.proximal, self.cg_damping, self.cg_steps, self.cg_tolerance or 0.0, self._report
        )

    def _inner_problem(self) -> InnerProblem:
        return inner_problem(
            self.model,
            self.inner_lr,
            self.inner_steps,
            loss=self.loss,
            label_smoothing=self.label_smoothing,
            adapt=self.adapted,
            batch_norm=self.batch_norm,
            task_chunk=self.task_chunk,
            precision=self.precision,
            prefix="inner_",
        )

    def _report(self, solved: Solved) -> None:
        """Keep the residuals, and say what is wrong with them."""
        self.__dict__["residuals"] = solved.residuals
        if "indefinite" not in self._said and (count := int(solved.indefinite.sum())):
            self._say(
                "indefinite",
                f"the inner problem has a direction of negative curvature in {count} of {len(solved.indefinite)} "
                f"tasks, where conjugate gradients end early: proximal or cg_damping must be larger "
                f"(got {self.proximal:g} and {self.cg_damping:g})",
            )
        limit = math.inf if self.cg_tolerance is None else self.cg_tolerance
        if "residual" not in self._said and (worst := float(solved.residuals.max())) > limit:
            self._say(
                "residual",
                f"conjugate gradients stopped after cg_steps={self.cg_steps} with a relative residual of {worst:.1e}, "
                f"above cg_tolerance={limit:g}: more steps, or a larger proximal or cg_damping, would reach it",
            )

    def _say(self, what: str, message: str) -> None:
        warnings.warn(f"{message}. It is said once; see residuals.", ConvergenceWarning, stacklevel=2)
        self._said.add(what)
