"""MetaGAN (Zhang, Che, Ghahramani, Bengio, Song 2018, NeurIPS): a learner that tells real samples from fakes, too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import check_count, check_integer, check_number
from ..engine.losses import check_targets
from ..engine.problem import LearningRate
from ..tasks import MetaOutput, TaskBatch, check_tensor
from .around import Around
from .base import Adapted, Learner, Predictor, check_steps, gradient_step, one_task_too, scored
from .encoder import EncoderLearner
from .maml import MAML
from .parts import find_head, inside, replaced
from .shapes import sample_shape_of


class MetaGAN(Around):
    """A few-shot learner D that has a further class, of fakes, beside a generator G that makes fakes of a task's kind.

        l_1 .. l_N = what D predicts for x after learning the task, l_{N+1} = 0
        p(y = k | x) = exp l_k / sum over j <= N + 1 of exp l_j
        s = mean of e(x) over the support samples, fakes G(s, z), z ~ N(0, I)
        minimise over D   -log p(y | x, y <= N) - weight * log p(y <= N | x)    mean over real queries
                          - weight * log p(y = N + 1 | x)                       mean over fakes
        minimise over G, e   -log p(y <= N | x)                                 mean over fakes; does not saturate

    A meta-step updates D, then G against the new D. For G, D after learning the task is a constant, and for D fakes
    are. The fake class has the logit 0 throughout, as in semi-supervised GANs (Salimans et al. 2016, arXiv 1606.03498):
    softmax does not notice when all logits move together, so that one of them may stay, any learner can be D as it is,
    and MAML's inner loop stays in the fused engine.

    With MAML as D the inner loop knows fakes, too: other ones, which join the support set,

        theta_i = theta - inner_lr * grad(-mean log p(y | x; support) - weight * mean log p(N + 1 | x; fakes))

    exactly to second order; in evaluation as in training, where z are the same for every task, so that a task is always
    learned in the same way. Any other D learns from the support set alone. Predictions are l_1 .. l_N.

    Args:
        model: a network with an output for each class, of which `MAML` is made, or D itself: a `MAML` or an
            `EncoderLearner`, such as `mf.MetaGAN(mf.RelationNet(encoder))`. Its logits should be able to be of either
            sign: `ProtoNet`'s are distances below zero, and hardly ever say that a sample is real.
        inner_lr, inner_steps: of MAML. None: 0.4 and 1. Not for a learner, which has its own.
        weight: of what is adversarial, 1 in the paper. 0: there are no fakes, and D trains as it does alone.
        fakes: of each task, among the queries; as many join the support set of MAML.
        noise: numbers in z.
        encoding: numbers in s.
        generator: G, a module from s `[N, encoding]` and z `[N, noise]` to samples. None: a `FakeGenerator`.
        sample_shape: of one sample. None: what the network tells.
        head: the network's last linear layer. None: it is found.
        seed: of the z of evaluation.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, `sample_shape` is not given where the
            network does not tell it, or D does not minimise the cross-entropy of class ids.

    >>> import torch, metaaug_fast as mf
    >>> learner = mf.MetaGAN(mf.models.conv4(ways=5, hidden=8))
    >>> y = torch.arange(5).repeat(2, 1)
    >>> tasks = mf.TaskBatch(torch.rand(2, 5, 1, 28, 28), y, torch.rand(2, 5, 1, 28, 28), y)
    >>> learner.meta_step(tasks, learner.optimizers()).accuracy.shape
    torch.Size([2])
    >>> learner.make(tasks.support_x).shape
    torch.Size([2, 5, 1, 28, 28])
    """

    turns: Tensor

    def __init__(
        self,
        model: nn.Module,
        inner_lr: LearningRate | None = None,
        inner_steps: int | None = None,
        weight: float = 1.0,
        fakes: int = 5,
        noise: int = 16,
        encoding: int = 64,
        generator: nn.Module | None = None,
        sample_shape: Sequence[int] | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_number("weight", weight)
        check_integer("seed", seed)
        for name, count in {"fakes": fakes, "noise": noise, "encoding": encoding}.items():
            check_count(name, count, low=1)
        if generator is not None and not isinstance(generator, nn.Module):
            raise TypeError(f"generator must be an nn.Module or None (got {type(generator).__name__})")
        given = {"inner_lr": inner_lr, "inner_steps": inner_steps}
        learner = _discriminator(model, {name: value for name, value in given.items() if value is not None})
        self.inside = isinstance(learner, MAML) and weight > 0
        self.learner: Any = learner
        if isinstance(learner, MAML) and self.inside:
            self.learner, self.ways = _with_fakes(learner, head)
        shape = sample_shape_of(learner.model) if sample_shape is None else tuple(sample_shape)
        if shape is None:
            raise ValueError(f"sample_shape must be given: {type(learner.model).__name__} takes any size (got None)")
        self.weight = weight
        self.fakes = fakes
        self.noise = noise
        self.register_buffer("turns", torch.randn(fakes, noise, generator=torch.Generator().manual_seed(seed)))
        self.encoding = encoding
        self.sample_shape = shape
        self.generator = FakeGenerator(shape, noise, encoding) if generator is None else generator
        self.task_encoder = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), encoding), nn.ReLU())
        like = next(learner.parameters(), torch.empty(0))
        for part in (self.generator, self.task_encoder):
            part.to(like)
        self.encoder = learner.encoder  # type: ignore[misc]

    def runs_on(self, sample_shape: tuple[int, ...], ids: bool = False) -> str:
        """The discriminator's executor."""
        return str(self.learner.runs_on(sample_shape, ids))

    def optimizers(self, lr: float | None = None) -> list[Optimizer]:
        """The discriminator's, and Adam of the same rate or 0.001 on the generator and the encoding of tasks.

        This one's first moment is short, of beta 0.5, as is usual for GANs (Radford et al. 2015, arXiv 1511.06434).
        """
        made_by = [*self.generator.parameters(), *self.task_encoder.parameters()]
        rate = 1e-3 if lr is None else lr
        return [*self.learner.optimizers(lr), torch.optim.Adam(made_by, rate, betas=(0.5, 0.999), fused=True)]

    def forward(self, tasks: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """Learn every task from its support set and judge the result on its query set, among the N classes.

        Raises:
            TypeError, ValueError: the tasks do not fit the model, or `steps` is given where there is no inner loop.
        """
        if self.inside:
            return super().forward(tasks, steps=steps)
        output: MetaOutput = self.learner(tasks, steps=steps)
        return output

    @one_task_too
    def adapt(self, support_x: Tensor, support_y: Tensor, *, steps: int | None = None) -> Adapted:
        """What each task `[T, S, ...]` learns, which predicts the N real logits; one task may lack its T."""
        options = {} if check_steps(self, steps) is None else {"steps": steps}
        if self.inside:
            return self._adapted(support_x, support_y, None, **options)
        adapted: Adapted = self.learner.adapt(support_x, support_y, **options)
        return adapted

    def make(self, support_x: Tensor) -> Tensor:
        """Fakes `[T, fakes, ...]` of tasks with support sets `[T, S, ...]`.

        In training z are drawn by torch's generator.

        Raises:
            TypeError, ValueError: they are no samples of `sample_shape`, or the generator gives others.
        """
        check_tensor("support_x", support_x)
        if support_x.shape[2:] != self.sample_shape:
            raise ValueError(f"support_x must hold samples {self.sample_shape} (got {tuple(support_x.shape[2:])})")
        of_sample = self.task_encoder(support_x.flatten(0, 1)).unflatten(0, support_x.shape[:2])
        of_task = of_sample.mean(1).repeat_interleave(self.fakes, 0)
        z = self.turns.to(of_task).repeat(len(support_x), 1)
        made: Tensor = self.generator(of_task, torch.randn_like(z) if self.training else z)
        if made.shape != (len(of_task), *self.sample_shape):
            wanted = ", ".join(map(str, self.sample_shape))
            raise ValueError(f"generator must give samples [N, {wanted}] (got {tuple(made.shape)})")
        return made.unflatten(0, (-1, self.fakes))

    def discriminator_losses(
        self, tasks: TaskBatch, fakes: Tensor, support_fakes: Tensor | None = None
    ) -> tuple[MetaOutput, Tensor]:
        """How the real queries are classified, and what the discriminator minimises of each task, `[T]`.

        Args:
            fakes: `[T, fakes, ...]`, among the queries.
            support_fakes: `[T, fakes, ...]`, which join the support set of MAML; not for another one. None: made.
        """
        if self.inside:
            adapted = self._adapted(tasks.support_x, tasks.support_y, support_fakes)
            real, fake = adapted(tasks.query_x), adapted(fakes)
            out = scored("cross_entropy", real, tasks.query_y)
        else:
            real, fake, features = self._compared(tasks, fakes)
            out = self.learner._score(real, tasks.query_y)
            penalty = self.learner._penalty(features, tasks)
            out = out if penalty is None else replace(out, task_losses=out.task_losses + penalty)
        adversarial = F.softplus(-real.logsumexp(-1)).mean(1) + F.softplus(fake.logsumexp(-1)).mean(1)
        return out, out.task_losses + self.weight * adversarial

    def generator_losses(self, tasks: TaskBatch, fakes: Tensor, support_fakes: Tensor | None = None) -> Tensor:
        """What the generator minimises of each task, `[T]`; arguments as of `discriminator_losses`."""
        if self.inside:
            with torch.no_grad():
                adapted = self._adapted(tasks.support_x, tasks.support_y, support_fakes)
            fake = adapted(fakes)
        else:
            _, fake, _ = self._compared(tasks, fakes)
        return F.softplus(-fake.logsumexp(-1)).mean(1)

    def meta_step(self, tasks: TaskBatch, optimizers: Sequence[Optimizer]) -> MetaOutput:
        """One update of the discriminator, then one of the generator; how real queries were classified before."""
        tasks = TaskBatch.of(tasks)
        *of_discriminator, of_generator = optimizers
        if not self.weight:
            return gradient_step(self, tasks, of_discriminator)
        fakes = self.make(tasks.support_x)
        with torch.no_grad():
            others = self.make(tasks.support_x) if self.inside else None
        out, losses = self.discriminator_losses(tasks, fakes.detach(), others)
        _descend(losses.mean(), of_discriminator)
        _descend(self.generator_losses(tasks, fakes, others).mean(), [of_generator])
        return out

    def _compared(self, tasks: TaskBatch, fakes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An `EncoderLearner`'s l_1 .. l_N of real queries and of fakes, and the features of real samples.

        Batch norms see real samples and fakes together: otherwise D would tell them apart by that.
        """
        shots, queries = tasks.support_x.shape[1], tasks.query_x.shape[1]
        features = self.learner._embed(torch.cat([tasks.support_x, tasks.query_x, fakes], 1))
        logits = self.learner._fit(features[:, :shots], tasks.support_y)(features[:, shots:])
        return logits[:, :queries], logits[:, queries:], features[:, : shots + queries]

    def _adapted(self, x: Tensor, y: Tensor, fakes: Tensor | None, **options: Any) -> Predictor:
        """MAML after an inner loop on support samples and on fakes, given or made, whose losses are a mean each."""
        if y.is_floating_point():
            raise ValueError(f"support_y must be class ids (got {y.dtype})")
        check_targets("support_y", "cross_entropy", y, (self.ways,))
        fakes = self.make(x) if fakes is None else fakes
        real, fake = y.shape[1], fakes.shape[1]
        x, y = torch.cat([x, fakes], 1), F.pad(y, (0, fake), value=self.ways)
        weight = x.new_tensor([1 / real] * real + [self.weight / fake] * fake) * (real + fake)
        fast = self.learner.adapt(x, y, sample_weight=weight.expand(len(x), -1), **options)
        return Predictor(lambda x: fast(x)[..., :-1], len(x))


class FakeGenerator(nn.Module):
    """Fakes from a task's encoding s and noise z, joined, by an MLP: in 0..1 for pictures `(C, H, W)`, else any.

    Args:
        sample_shape: of one fake; three dimensions are a picture.
        noise: numbers in z.
        encoding: numbers in s.
        hidden: width of its two hidden layers.

    Raises:
        TypeError, ValueError: a size is no count.

    >>> FakeGenerator((1, 28, 28))(torch.randn(4, 64), torch.randn(4, 16)).shape
    torch.Size([4, 1, 28, 28])
    """

    def __init__(self, sample_shape: Sequence[int], noise: int = 16, encoding: int = 64, hidden: int = 128) -> None:
        super().__init__()
        sizes = {"sample_shape": min(sample_shape, default=0), "noise": noise, "encoding": encoding, "hidden": hidden}
        for name, count in sizes.items():
            check_count(name, count, low=1)
        layers: list[nn.Module] = [nn.Linear(encoding + noise, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        layers.append(nn.Linear(hidden, math.prod(sample_shape)))
        if len(sample_shape) == 3:
            layers.append(nn.Sigmoid())
        self.layers = nn.Sequential(*layers, nn.Unflatten(1, tuple(sample_shape)))

    def forward(self, encoding: Tensor, noise: Tensor) -> Tensor:
        """`[N, encoding]` and `[N, noise]` to `[N, *sample_shape]`."""
        made: Tensor = self.layers(torch.cat([encoding, noise], 1))
        return made


class _WithFakes(nn.Module):
    """A linear layer with a further output that is 0, by a linear map, which the fused engine has."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        ways = layer.out_features
        self.layer = layer
        identity = torch.eye(ways + 1, ways, dtype=layer.weight.dtype, device=layer.weight.device)
        self.with_zero = nn.Parameter(identity, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x), self.with_zero)


def _discriminator(model: nn.Module, given: dict[str, Any]) -> MAML | EncoderLearner:
    """The learner that is D, or MAML of a network."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module (got {type(model).__name__})")
    if not isinstance(model, Learner):
        return MAML(model, **given)
    if not isinstance(model, (MAML, EncoderLearner)):
        raise TypeError(f"model must be a network, a MAML or an EncoderLearner (got {type(model).__name__})")
    for name, value in given.items():
        raise ValueError(f"{name} must be None where model is a learner, which has its own (got {value})")
    if isinstance(model, MAML) and (model.loss != "cross_entropy" or model.label_smoothing):
        raise ValueError(
            f"model must minimise 'cross_entropy', without smoothing (got {model.loss!r}, {model.label_smoothing})"
        )
    return model


def _with_fakes(learner: MAML, head: str | None) -> tuple[MAML, int]:
    """The same MAML, on a network with a further class, and how many it had; it shares all parameters."""
    head = find_head(learner.model, head)
    layer = learner.model.get_submodule(head)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"head must be a linear layer (got {type(layer).__name__} at {head!r})")
    if isinstance(learner.inner_lr, Mapping):
        raise ValueError("model must have the same inner_lr for all parameters (got a mapping)")
    twin = replaced(learner, {f"model.{head}" if head else "model": _WithFakes(layer)})
    assert isinstance(twin, MAML)
    if learner.adapted is not None:  # patterns, which might match what is fixed
        prefix = inside(head).removesuffix("*")
        new = {f"{prefix}{name}": f"{prefix}layer.{name}" for name, _ in layer.named_parameters()}
        twin.adapted = tuple(new.get(name, name) for name in learner.problem().rates)
    return twin, layer.out_features


def _descend(loss: Tensor, optimizers: Sequence[Optimizer]) -> None:
    """A step of what these optimizers hold; no other parameter gets a gradient."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    loss.backward(inputs=[value for group in groups for value in group["params"] if value.requires_grad])
    for optimizer in optimizers:
        optimizer.step()
