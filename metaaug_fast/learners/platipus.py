"""PLATIPUS, probabilistic MAML (Finn, Xu, Levine 2018, arXiv 1806.02817): a distribution of weights to adapt from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from ..checks import check_choice, check_count, check_integer, check_number, check_positive
from ..engine import reference
from ..engine.choice import choose_executor
from ..engine.fast_weights import FastWeights
from ..engine.loop import adapt_tasks, meta_loss
from ..engine.losses import Loss
from ..engine.problem import InnerProblem, LearningRate, Query, Rate, Support, check_query, with_seed
from ..tasks import MetaOutput, TaskBatch, check_inputs_of
from .base import OneTask, Predictor, check_steps, gradient_step, one_task_too, scored
from .unrolled import UnrolledLearner

POLICIES = ("batch", "running", "frozen")
Adapt = Callable[[InnerProblem, Support], Tensor]
Judge = Callable[[InnerProblem, Support, Query], MetaOutput]


class PLATIPUS(UnrolledLearner):
    """Learn a Gaussian of weights theta, from draws of which a few gradient steps solve a task in several ways.

        p(theta) = N(mu - gamma_p * grad L(mu; support), sigma_p^2)                         which tests draw from
        q(theta) = N(mu - gamma_q * grad [L(mu; support) + L(mu; query)], sigma_q^2)        which training draws from
        phi = theta - inner_lr * grad L(theta; support)                                     inner_steps times
        minimise the mean over tasks of L(phi; query) + kl_weight * KL(q || p), theta drawn from q

    mu are the model's parameters; sigma_p and sigma_q have an element for each of theirs, and gamma_p and gamma_q are
    numbers. All are learned. L is a mean over samples and KL a sum over weights, so that a `kl_weight` of 1 over the
    number of query samples gives the variational bound of a log-likelihood L.

    In training mode `forward` is this objective, with one theta for each task by torch's generator. In evaluation mode
    it judges what `adapt` gives: the mean prediction of `draws` weights phi. Their noise is that of `seed`, the same in
    every task, so a task is always learned in the same way.

    Args:
        model: any module; its parameters are the means mu.
        inner_lr, inner_steps, adapt, learn_inner_lr, loss, label_smoothing, momentum, weight_decay, backend,
            task_chunk, precision: see `MAML`. Of an `adapt` that leaves parameters out, those are the same in each
            draw.
        draws: how many weights `adapt` draws for each task.
        kl_weight: of the KL divergence.
        kl_steps: the weight rises from 0 in a line, over so many `meta_step`s. 0: it is there from the start.
        init_std: what sigma_p and sigma_q start from.
        gamma_p, gamma_q: what these start from.
        first_order: take all gradients of L above for constants. May be changed at any time.
        batch_norm: "batch", "running" or "frozen"; see `inner_loop`.
        seed: of the noise of `adapt`.

    Raises:
        TypeError, ValueError: an argument is out of range, or nothing adapts.

    >>> import torch, metaaug_fast as mf
    >>> platipus = mf.PLATIPUS(mf.models.mlp([1, 40, 40, 1]), inner_lr=0.01, draws=7, loss="mse")
    >>> tasks = mf.TaskBatch(*(torch.randn(25, 5, 1) for _ in range(4)))
    >>> platipus(tasks).loss.backward()
    >>> platipus.gamma_q.grad.shape, platipus.log_prior_std.shape     # of all 1761 weights, in the model's order
    (torch.Size([]), torch.Size([1761]))
    >>> drawn = platipus.adapt(tasks.support_x, tasks.support_y)
    >>> drawn(tasks.query_x).shape, drawn.each(tasks.query_x).shape
    (torch.Size([25, 5, 1]), torch.Size([25, 7, 5, 1]))
    """

    names_matter = True
    meta_steps: Tensor

    def __init__(
        self,
        model: nn.Module,
        inner_lr: LearningRate = 0.1,
        inner_steps: int = 1,
        draws: int = 10,
        kl_weight: float = 0.001,
        kl_steps: int = 0,
        init_std: float = 0.01,
        gamma_p: float = 0.01,
        gamma_q: float = 0.01,
        first_order: bool = False,
        loss: Loss = "cross_entropy",
        adapt: str | Iterable[str] | None = None,
        learn_inner_lr: bool = False,
        batch_norm: str = "batch",
        backend: str = "auto",
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_count("draws", draws, low=1)
        check_count("kl_steps", kl_steps)
        check_positive("init_std", init_std)
        for name, value in (("kl_weight", kl_weight), ("gamma_p", gamma_p), ("gamma_q", gamma_q)):
            check_number(name, value)
        check_choice("batch_norm", batch_norm, POLICIES)
        check_integer("seed", seed, low=0)
        super().__init__(model, inner_lr, inner_steps, first_order, loss, batch_norm, backend, **options)
        self.draws = draws
        self.kl_weight = kl_weight
        self.kl_steps = kl_steps
        self.seed = seed
        self._settle(adapt, learn_inner_lr)
        like = reference.pack(self.problem().parameters).detach()
        self.log_prior_std = nn.Parameter(torch.full_like(like, math.log(init_std)))
        self.log_posterior_std = nn.Parameter(torch.full_like(like, math.log(init_std)))
        self.gamma_p = nn.Parameter(like.new_tensor(gamma_p))
        self.gamma_q = nn.Parameter(like.new_tensor(gamma_q))
        self.register_buffer("meta_steps", torch.zeros((), dtype=torch.int64))

    def forward(  # type: ignore[override]
        self, tasks: TaskBatch, *, steps: int | None = None, sample_weight: Tensor | None = None
    ) -> MetaOutput:
        """In training mode the objective, in evaluation mode the mean prediction's loss.

        Args:
            steps: another number than `inner_steps`.
            sample_weight: `[T, S]`, of the support samples; see `inner_loop`.

        Raises:
            TypeError, ValueError: the tasks do not fit the model. NonFiniteError: NaN or infinity arose.
        """
        tasks = TaskBatch.of(tasks)
        if not self.training:
            adapted = self.adapt(tasks.support_x, tasks.support_y, steps=steps, sample_weight=sample_weight)
            output: MetaOutput = adapted.evaluate(tasks.query_x, tasks.query_y)
            return output
        support = Support(tasks.support_x, tasks.support_y, sample_weight)
        return self._objective(self.problem(steps), support, Query(tasks.query_x, tasks.query_y), *self._engine())

    def adapt(  # type: ignore[override]
        self,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int | None = None,
        draws: int | None = None,
        generator: Generator | None = None,
        sample_weight: Tensor | None = None,
    ) -> Drawn | OneTask:
        """Draw weights for each task `[T, S, ...]`, and adapt all of them at once; one task may lack its T.

        Args:
            steps: another number than `inner_steps`.
            draws: another number than the learner's.
            generator: of other noise than that of `seed`; on any device.
            sample_weight: `[T, S]`; see `inner_loop`.

        Raises:
            TypeError, ValueError: the support set fits neither the model nor itself, or `draws` is below 1.
            NonFiniteError: NaN or infinity arose; it counts task t's draw d as task `t * draws + d`.
        """
        options: dict[str, Any] = {"steps": steps, "generator": generator, "sample_weight": sample_weight}
        found = self._drawn(support_x, support_y, draws=self.draws if draws is None else draws, **options)
        return DrawnForOne(found.many) if isinstance(found, OneTask) else found

    def by_step(self, tasks: TaskBatch, steps: int | None = None) -> list[MetaOutput]:
        """What `adapt` gives after 0, 1, ... steps from each theta, judged without gradient.

        Raises:
            TypeError, ValueError: the tasks do not fit the model, or `steps` is no count.
        """
        tasks = TaskBatch.of(tasks)
        last = self.inner_steps if check_steps(self, steps) is None else steps
        with torch.no_grad():
            return [
                self.adapt(tasks.support_x, tasks.support_y, steps=step).evaluate(tasks.query_x, tasks.query_y)
                for step in range((last or 0) + 1)
            ]

    def meta_step(self, tasks: TaskBatch, optimizers: Sequence[Optimizer]) -> MetaOutput:
        """One update from a batch of tasks, which `kl_steps` counts."""
        out = gradient_step(self, tasks, optimizers)
        self.meta_steps.add_(1)
        return out

    def specification(
        self,
        tasks: TaskBatch,
        *,
        first_order: bool,
        step_weights: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> MetaOutput | None:
        """What `forward` computes in training mode, by `reference.adapt` and `reference.meta_loss`."""
        if not self.training:
            return None
        problem = replace(self.problem(), first_order=first_order)
        support = Support(tasks.support_x, tasks.support_y, sample_weight)
        query = Query(tasks.query_x, tasks.query_y, step_weights)
        return self._objective(
            problem,
            support,
            query,
            lambda problem, *given: reference.adapt(with_seed(problem), *given),
            lambda problem, *given: reference.meta_loss(with_seed(problem), *given),
        )

    def _engine(self) -> tuple[Adapt, Judge]:
        return (
            lambda problem, support: adapt_tasks(problem, support, self.backend).flat,
            functools.partial(meta_loss, backend=self.backend),
        )

    def _objective(
        self, problem: InnerProblem, support: Support, query: Query, adapt: Adapt, judge: Judge
    ) -> MetaOutput:
        """That of training, of a theta that is drawn from q for each task."""
        mu = reference.pack(problem.parameters)
        noise = self._noise(problem, len(support.x))
        on_support = self._descent(problem, support, adapt)
        self._check_query(problem, support, query)
        on_query = self._descent(problem, Support(query.x, query.y), adapt)
        prior = mu + self.gamma_p * on_support
        posterior = mu + self.gamma_q * (on_support + on_query)
        theta = torch.addcmul(posterior, self.log_posterior_std.exp(), noise)
        out = judge(problem, replace(support, initial=theta), query)
        divergence = gaussian_divergence(posterior, self.log_posterior_std, prior, self.log_prior_std)
        penalty = self._kl_weight(divergence) * divergence
        return replace(out, loss=out.loss + penalty.mean(), task_losses=out.task_losses + penalty)

    @one_task_too
    def _drawn(
        self,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int | None,
        draws: int,
        generator: Generator | None,
        sample_weight: Tensor | None,
    ) -> Any:
        check_count("draws", draws, low=1)
        problem = self.problem(check_steps(self, steps))
        support = Support(support_x, support_y, sample_weight)
        adapt, _ = self._engine()
        prior = reference.pack(problem.parameters) + self.gamma_p * self._descent(problem, support, adapt)
        generator = Generator().manual_seed(self.seed) if generator is None else generator
        noise = self._noise(problem, draws, generator)
        theta = prior.unsqueeze(1) + self.log_prior_std.exp() * noise
        x, y = (value.repeat_interleave(draws, 0) for value in (support_x, support_y))
        weight = None if sample_weight is None else sample_weight.repeat_interleave(draws, 0)
        repeated = Support(x, y, weight, initial=theta.flatten(0, 1))
        return Drawn(adapt_tasks(problem, repeated, self.backend), draws)

    def _descent(self, problem: InnerProblem, data: Support, adapt: Adapt) -> Tensor:
        """-grad L(mu; data) of each task, `[T, P]`: how far the inner loop goes in a step of rate 1."""
        one = Rate(self.gamma_p.new_ones(()))
        step = replace(problem, steps=1, rates=dict.fromkeys(problem.rates, one), momentum=0.0, weight_decay=0.0)
        return adapt(step, data) - reference.pack(problem.parameters)

    def _noise(self, problem: InnerProblem, count: int, generator: Generator | None = None) -> Tensor:
        """Standard normal, `[count, P]`, and 0 where nothing adapts.

        With a generator it is the same for each dtype and device; without one, torch's own gives it a seed.
        """
        like = self.log_prior_std
        if generator is None:
            generator = Generator(like.device).manual_seed(int(torch.randint(2**31, ())))
            noise = torch.randn(count, len(like), generator=generator, dtype=like.dtype, device=like.device)
        else:
            exact = torch.randn(count, len(like), generator=generator, dtype=torch.float64, device=generator.device)
            noise = exact.to(like)
        if problem.rates.keys() == problem.parameters.keys():
            return noise
        moves = {name: torch.full_like(value, name in problem.rates) for name, value in problem.parameters.items()}
        return noise * reference.pack(moves)

    def _kl_weight(self, like: Tensor) -> Tensor:
        """As it stands after the meta-steps taken so far."""
        if not self.kl_steps:
            return like.new_tensor(self.kl_weight)
        return self.kl_weight * (self.meta_steps.to(like.dtype) / self.kl_steps).clamp(max=1)

    def _check_query(self, problem: InnerProblem, support: Support, query: Query) -> None:
        ids = query.x.dtype == torch.int64
        executor = choose_executor(problem, support.x.shape[2:], self.backend, ids=ids)
        check_query(problem, support, query, executor.output_shape)


class Drawn(Predictor):
    """T tasks with D sets of adapted weights each, whose predictions are averaged.

    Of "cross_entropy" and "bce" these are logits, for which the mean probabilities are meant: the logarithm of the mean
    softmax, and the logit of the mean sigmoid. Of all other losses they are mean outputs.

    fast: all T * D sets, `[T * D, P]`, those of a task behind one another.

    >>> import torch, metaaug_fast as mf
    >>> drawn = mf.PLATIPUS(mf.models.mlp([4, 8, 3])).adapt(torch.randn(2, 3, 4), torch.arange(3).repeat(2, 1))
    >>> x = torch.randn(2, 5, 4)
    >>> torch.allclose(drawn(x).softmax(-1), drawn.each(x).softmax(-1).mean(1), atol=1e-6)
    True
    """

    def __init__(self, fast: FastWeights, draws: int) -> None:
        self.fast = fast
        self.draws = draws
        problem = fast.problem
        score = functools.partial(scored, problem.loss, label_smoothing=problem.label_smoothing)
        super().__init__(lambda x: average(problem.loss, self.each(x)), len(fast) // draws, problem.loss, score)

    def each(self, x: Tensor) -> Tensor:
        """What each draw predicts for `x` `[T, N, ...]`: `[T, D, N, ...]`, differentiable.

        Raises:
            TypeError, ValueError: `x` does not hold samples for T tasks, or does not fit the model.
        """
        check_inputs_of(len(self), x)
        return self.fast(x.repeat_interleave(self.draws, 0)).unflatten(0, (len(self), self.draws))


class DrawnForOne(OneTask):
    """`Drawn`, of one task without its axis."""

    def each(self, x: Tensor) -> Tensor:
        """What each draw predicts for `x` `[N, ...]`: `[D, N, ...]`."""
        prediction: Tensor = self.many.each(x[None])[0]
        return prediction


def average(loss: Loss, predictions: Tensor) -> Tensor:
    """The mean prediction `[T, N, ...]` of draws `[T, D, N, ...]`, as a loss takes it; see `Drawn`.

    >>> average("cross_entropy", torch.tensor([[[[0.8, 0.2]], [[0.4, 0.6]]]]).log()).exp()
    tensor([[[0.6000, 0.4000]]])
    """
    count = math.log(predictions.shape[1])
    if loss == "cross_entropy":
        return F.log_softmax(predictions, -1).logsumexp(1) - count
    if loss == "bce":
        return F.logsigmoid(predictions).logsumexp(1) - F.logsigmoid(-predictions).logsumexp(1)
    return predictions.mean(1)


def gaussian_divergence(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """KL divergence of Gaussians of independent elements from others: means `[..., P]`, deviations `[P]`, to `[...]`.

        sum of log(s' / s) + (s^2 + (m - m')^2) / (2 s'^2) - 1/2

    >>> zero = torch.zeros(1)
    >>> gaussian_divergence(zero + 2, zero, zero, zero)         # 2^2 / 2
    tensor(2.)
    """
    ratio = 2 * (log_std - other_log_std)
    distance = (mean - other_mean).square() @ (-2 * other_log_std).exp()
    return 0.5 * (distance + (ratio.expm1() - ratio).sum(-1))
