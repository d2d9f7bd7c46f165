"""A policy of augmentation, learned for how well those learners do on real queries that adapted to what it gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..checks import check_choice, check_count, check_flag, check_positive, check_probability
from ..tasks import MetaOutput, TaskBatch, check_samples, check_tensor, class_ids
from .parts import checked_few, in_turn, labels_of
from .targets import count_ways
from .transforms import PADDINGS, Drawn, Transform, check_samples_of, find, transformed

CHOICES = ("relaxed", "score")

_CERTAIN = 40.0
"""The logit of a probability or strength of 1: sigmoid gives 1, and unlike infinity it survives a weight decay."""


class AugmentationPolicy(nn.Module):
    """Which transforms to apply to support samples, how often and how strongly; all of it can be learned.

        c ~ Bernoulli(p), u ~ uniform(-1, 1) or (0, 1)          for each sample and transform
        x' = transform(x, amount = c * strength * u * largest)   p and strength in 0..1, sigmoids of the parameters

    Strengths learn by reparameterisation, as the ranges of Augerino (Benton et al. 2020, arXiv 2010.11882). Choices are
    relaxed, `c = sigmoid((logit p + logistic noise) / temperature)` (Maddison, Mnih, Teh 2017, arXiv 1611.00712; of
    augmentations Hataya et al. 2020, arXiv 1911.06987), or the score function. In `eval()` choices are 0 or 1.

    The loop is that of any module; the learner's own parameters may be among the optimizer's or not:

        loss = learner(policy(tasks)).loss
        loss.backward()
        optimizer.step()

    A learner of first order takes the inner gradients for constants and has none for it: that is an error.

    Query samples stay what they are. `print(policy)` shows a table, `policy.transform()` is an ordinary transform, and
    `metaaug_fast.report.plots.plot_policy` draws it. The same `generator` seed gives the same bits on the CPU.

    Args:
        transforms: names (see `TRANSFORMS`), or `Transform`s of your own; in the order in which those of a kind happen.
        probability, strength: in 0..1 at the start, one for all or a mapping by name. 0 and 1 hardly move again, for a
            sigmoid is flat there.
        choices: "relaxed", or "score": c is 0 or 1, and `policy.loss(out)` stands for `out.loss` in the loop.
        temperature: of relaxed choices, > 0.
        network: moves the policy for each task: from samples `[N, ...]` to `[N, k]`, a number for the logit of every
            probability and then of every strength (`policy.settings_count` is k), of which the mean over the support
            set is added. See `support_network`. None: one policy for all tasks.
        copies: of every support sample, each changed anew; the support set grows so many times.
        originals: the samples themselves stay in the support set, in front of what was made of them.
        padding: what lies outside of a picture that was moved: "zeros", "border", "reflection".
        ways: classes of the targets that mixing makes soft; None: the largest label of a batch and 1.

    Raises:
        TypeError, ValueError: an argument is wrong, a transform unknown.
        ModuleNotFoundError: there are transforms of pictures, and kornia is not installed.

    >>> import torch, metaaug_fast as mf
    >>> policy = mf.augment.AugmentationPolicy(["noise", "scaling"], strength=0.2)
    >>> maml = mf.MAML(mf.models.mlp([4, 16, 3]), inner_lr=0.1)
    >>> y = torch.arange(3).repeat(8, 2)
    >>> tasks = mf.TaskBatch(torch.randn(8, 6, 4), y, torch.randn(8, 6, 4), y)
    >>> maml(policy(tasks)).loss.backward()
    >>> policy.strength_logit["noise"].grad is None
    False
    >>> print(policy)
    transform  probability  strength  amount
    noise             0.50      0.20  0..0.10
    scaling           0.50      0.20  ±0.10
    """

    def __init__(
        self,
        transforms: Iterable[str | Transform],
        probability: float | Mapping[str, float] = 0.5,
        strength: float | Mapping[str, float] = 0.5,
        *,
        choices: str = "relaxed",
        temperature: float = 0.5,
        network: nn.Module | None = None,
        copies: int = 1,
        originals: bool = False,
        padding: str = "zeros",
        ways: int | None = None,
    ) -> None:
        super().__init__()
        found = find(transforms)
        names = [each.name for each in found]
        strong = [each.name for each in found if each.has_strength]
        chances = _by_name("probability", probability, names)
        strengths = _by_name("strength", strength, strong)
        check_choice("choices", choices, CHOICES)
        check_positive("temperature", temperature)
        if network is not None and not isinstance(network, nn.Module):
            raise TypeError(f"network must be a module or None (got {network!r})")
        check_count("copies", copies, low=1)
        check_flag("originals", originals)
        check_choice("padding", padding, PADDINGS)
        if ways is not None:
            check_count("ways", ways, low=1)
        self.transforms = tuple(found)
        self.choices = choices
        self.temperature = temperature
        self.network = network
        self.copies = copies
        self.originals = originals
        self.padding = padding
        self.ways = ways
        self.probability_logit, self.strength_logit = nn.ParameterDict(), nn.ParameterDict()
        for name, value in chances.items():  # one by one, for a dict's order it does not keep
            self.probability_logit[name] = _logit(value)
        for name, value in strengths.items():
            self.strength_logit[name] = _logit(value)
        self._log_chance: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_log_chance": None}  # in the graph of a batch that is gone

    @property
    def settings_count(self) -> int:
        """How many probabilities and strengths there are: what a `network` gives for a sample."""
        return len(self.probability_logit) + len(self.strength_logit)

    @property
    def mixes(self) -> tuple[str, ...]:
        """The names of transforms that mix samples, and with them their targets."""
        return tuple(each.name for each in self.transforms if each.acts == "mix")

    def forward(
        self, tasks: TaskBatch, *, generator: Generator | None = None, drawn: Mapping[str, Drawn] | None = None
    ) -> TaskBatch:
        """The tasks with an augmented support set, `[T, S', ...]`, S' = S * (copies + originals).

        Its targets are probabilities `[T, S', ways]` where a transform mixes, which learners that compare features with
        class means do not take; else what they were.

        Args:
            tasks: anything that `TaskBatch.of` takes.
            generator: of random numbers, on the device of the samples; None: torch's own.
            drawn: what `draw` gave, in the place of fresh random numbers.

        Raises:
            TypeError, ValueError: the tasks are none, or not of what the transforms are of.
        """
        tasks = TaskBatch.of(tasks)
        labels = tasks.query_y if tasks.query_y.ndim == tasks.support_y.ndim else tasks.support_y
        ways = self._ways_of(tasks.support_y, labels)
        x, y = self._augmented(tasks.support_x, tasks.support_y, ways, generator, drawn)
        return TaskBatch(x, y, tasks.query_x, tasks.query_y)

    def augment(
        self,
        support_x: Tensor,
        support_y: Tensor,
        *,
        generator: Generator | None = None,
        drawn: Mapping[str, Drawn] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same of a support set alone, `[T, S, ...]` and its targets.

        >>> import torch, metaaug_fast as mf
        >>> policy = mf.augment.AugmentationPolicy(["mixup"], copies=2)
        >>> x, y = policy.augment(torch.rand(4, 6, 1, 28, 28), torch.arange(3).repeat(4, 2))
        >>> x.shape, y.shape
        (torch.Size([4, 12, 1, 28, 28]), torch.Size([4, 12, 3]))
        """
        check_tensor("support_y", support_y)
        support_y = class_ids(support_y)
        check_samples("support", support_x, support_y)
        return self._augmented(support_x, support_y, self._ways_of(support_y), generator, drawn)

    def draw(self, support_x: Tensor, generator: Generator | None = None) -> dict[str, Drawn]:
        """All random numbers for a support set `[T, S, ...]`, by transform; each begins with `[T, S * copies]`."""
        check_tensor("support_x", support_x)
        check_samples_of("support_x", self.transforms, support_x)
        self._check_generator(support_x, generator)
        many = support_x.repeat(1, self.copies, *(1,) * (support_x.ndim - 2)) if self.copies > 1 else support_x
        return {each.name: each.draw(many, generator) for each in self.transforms}

    def loss(self, out: MetaOutput) -> Tensor:
        """What to minimise of a learner's output for the last tasks that this policy has augmented.

        `out.loss`, and with `choices="score"` what gives its choices their gradient, in value 0: for each task its loss
        less the mean of the others', as a constant, times the log probability of its choices (Williams 1992).

        Raises:
            ValueError: with "score", `out` is not of the tasks that were augmented last.

        >>> import torch, metaaug_fast as mf
        >>> policy = mf.augment.AugmentationPolicy(["noise"], choices="score")
        >>> maml = mf.MAML(mf.models.mlp([4, 16, 3]), inner_lr=0.1)
        >>> y = torch.arange(3).repeat(8, 2)
        >>> out = maml(policy(mf.TaskBatch(torch.randn(8, 6, 4), y, torch.randn(8, 6, 4), y)))
        >>> policy.loss(out).backward()
        >>> torch.equal(policy.loss(out), out.loss)
        True
        """
        if self.choices == "relaxed":
            return out.loss
        chance, losses = self._log_chance, out.task_losses.detach()
        if chance is None or len(chance) != len(losses):
            got = "none" if chance is None else len(chance)
            raise ValueError(f"out must be of the tasks that the policy augmented last (got {len(losses)}, {got})")
        if len(losses) > 1:
            losses = (losses - losses.mean()) * len(losses) / (len(losses) - 1)  # less the mean of the others
        surrogate = (losses * chance.to(losses.dtype)).mean()
        return out.loss + (surrogate - surrogate.detach())

    @torch.no_grad()
    def as_dict(self, support_x: Tensor | None = None) -> dict[str, tuple[float, float | None]]:
        """Probability and strength by name; None for what has no strength.

        Args:
            support_x: one task's, `[S, ...]`, for which a network moves the policy; None: what it moves them from.

        >>> import metaaug_fast as mf
        >>> mf.augment.AugmentationPolicy(["mixup"], 0.25, {"mixup": 1.0}).as_dict()
        {'mixup': (0.25, 1.0)}
        """
        chances, strengths = self._logits(None if support_x is None else support_x[None])
        found = {name: float(value.sigmoid()) for name, value in strengths.items()}
        return {name: (float(value.sigmoid()), found.get(name)) for name, value in chances.items()}

    def table(self, support_x: Tensor | None = None) -> str:
        """Probability, strength and what amounts that makes, as text; arguments as of `as_dict`."""
        rows = [("transform", "probability", "strength", "amount")]
        for each, (chance, strength) in zip(self.transforms, self.as_dict(support_x).values(), strict=True):
            reach = "on or off"
            if strength is not None:
                unit = each.unit and (each.unit if each.unit == "°" else f" {each.unit}")
                reach = f"{'±' if each.signed else '0..'}{strength * each.largest:.2f}{unit}"
            rows.append((each.name, f"{chance:.2f}", "-" if strength is None else f"{strength:.2f}", reach))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            f"{name:<{widths[0]}}  {chance:>{widths[1]}}  {strength:>{widths[2]}}  {reach}"
            for name, chance, strength, reach in rows
        )

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"AugmentationPolicy({[each.name for each in self.transforms]}, choices={self.choices!r})"

    def transform(self, support_x: Tensor | None = None, *, batched: bool = False) -> PolicyTransform:
        """What was learned, as an ordinary transform with the probabilities and strengths of now.

        Args:
            support_x: one task's, `[S, ...]`, which a policy with a network needs.
            batched: take samples and targets of a batch, `(x, y)`, which a policy that mixes needs.

        Raises:
            ValueError: it mixes and is not to be batched; it has a network and no `support_x` is given.

        >>> import torch, metaaug_fast as mf
        >>> jitter = mf.augment.AugmentationPolicy(["noise", "scaling"]).transform()
        >>> jitter(torch.randn(4)).shape
        torch.Size([4])
        """
        check_flag("batched", batched)
        if self.mixes and not batched:
            raise ValueError(
                f"batched must be True for a policy that mixes samples (got False, and {', '.join(self.mixes)})"
            )
        if self.network is not None and support_x is None:
            raise ValueError("support_x must be one task's for a policy with a network (got None)")
        fixed = copy.deepcopy(self)
        with torch.no_grad():
            chances, strengths = self._logits(None if support_x is None else support_x[None])
            for logits, found in ((fixed.probability_logit, chances), (fixed.strength_logit, strengths)):
                for name, value in found.items():
                    logits[name].copy_(value.squeeze())
        fixed.network, fixed.copies, fixed.originals = None, 1, False
        return PolicyTransform(fixed.requires_grad_(False).eval(), batched)

    @torch.no_grad()
    def more(self, x: Tensor, y: Tensor, per_class: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """New samples of one task: its own in turn, each transformed anew by what was learned.

        Args:
            x: `[S, ...]`.
            y: class ids `[S]`.
            per_class: so many of each class.
            generator: see `forward`.

        Returns:
            `[ways * per_class, ...]` and their class ids, class after class.

        Raises:
            TypeError, ValueError: the samples are none such, or the policy mixes, which leaves no class ids.

        >>> import torch, metaaug_fast as mf
        >>> policy = mf.augment.AugmentationPolicy(["noise"])
        >>> x, y = policy.more(torch.rand(3, 4), torch.tensor([0, 0, 1]), per_class=2)
        >>> x.shape, y.tolist()
        (torch.Size([4, 4]), [0, 0, 1, 1])
        """
        y = checked_few(x, y, per_class, generator)
        if self.mixes:
            raise ValueError(
                f"transforms must not mix samples where each stays one of its class (got {', '.join(self.mixes)})"
            )
        fixed = self.transform(None if self.network is None else x).policy
        labels = labels_of(int(y.max()) + 1, per_class, y[None])
        made, _ = fixed.augment(x[in_turn(y[None], per_class)[0]], labels, generator=generator)
        return made[0], labels[0]

    def _augmented(
        self,
        x: Tensor,
        y: Tensor,
        ways: int | None,
        generator: Generator | None,
        drawn: Mapping[str, Drawn] | None,
    ) -> tuple[Tensor, Tensor]:
        check_samples_of("support_x", self.transforms, x)
        device = next(iter(self.probability_logit.values())).device
        if x.device != device:
            raise ValueError(f"support_x must be on the device of the policy (got {x.device}, {device})")
        drawn = self.draw(x, generator) if drawn is None else drawn
        self._check_drawn(x, drawn)
        if ways is not None:
            y = F.one_hot(y, ways).to(x.dtype)
        chances, strengths = self._logits(x)
        amounts, log_chance = {}, []
        for each in self.transforms:
            choice, logit = drawn[each.name].choice, chances[each.name].to(x.dtype)
            amounts[each.name], log = self._chosen(choice, logit)
            log_chance.append(log)
            if each.has_strength:
                amount = amounts[each.name] * strengths[each.name].to(x.dtype).sigmoid() * each.largest
                number = drawn[each.name].number
                assert number is not None
                amounts[each.name] = (amount if number.ndim == 2 else amount.unsqueeze(-1)) * number
        self._log_chance = torch.stack(log_chance).sum((0, 2)) if self.choices == "score" else None
        many, targets = (each.repeat(1, self.copies, *(1,) * (each.ndim - 2)) for each in (x, y))
        made, made_y = transformed(self.transforms, many, targets, amounts, drawn, self.padding)
        assert made_y is not None
        return (torch.cat([x, made], 1), torch.cat([y, made_y], 1)) if self.originals else (made, made_y)

    def _chosen(self, choice: Tensor, logit: Tensor) -> tuple[Tensor, Tensor]:
        """How far each sample is transformed, in 0..1, and the log probability of that where it is 0 or 1; `[T, S]`."""
        tiny = torch.finfo(choice.dtype).tiny
        noise = choice.clamp(min=tiny).log() - (1 - choice).clamp(min=tiny).log()
        if self.training and self.choices == "relaxed":
            return ((logit + noise) / self.temperature).sigmoid(), noise
        chosen = (logit.detach() + noise > 0).to(choice.dtype)
        return chosen, -F.softplus(torch.where(chosen > 0, -logit, logit))

    def _logits(self, x: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logits of probabilities and strengths by name, each `[1, 1]` or, moved by the network for `x`, `[T, 1]`."""
        names = [each.name for each in self.transforms]
        strong = [each.name for each in self.transforms if each.has_strength]
        logits = [self.probability_logit[name] for name in names] + [self.strength_logit[name] for name in strong]
        columns = torch.stack(logits)[None]
        if self.network is not None and x is not None:
            found = self.network(x.flatten(0, 1))
            if found.shape != (x.shape[0] * x.shape[1], len(logits)):
                raise ValueError(
                    f"network must give [{x.shape[0] * x.shape[1]}, {len(logits)}] for as many samples "
                    f"(got {tuple(found.shape)})"
                )
            columns = columns + found.view(*x.shape[:2], -1).mean(1)
        chances, strengths = columns.split(1, 1)[: len(names)], columns.split(1, 1)[len(names) :]
        return dict(zip(names, chances, strict=True)), dict(zip(strong, strengths, strict=True))

    def _ways_of(self, *targets: Tensor) -> int | None:
        """Classes for targets that become soft; None where they are floating already, or stay as they are."""
        if not self.mixes or targets[0].is_floating_point():
            return None
        return count_ways(self.ways, *targets)

    def _check_generator(self, x: Tensor, generator: object) -> None:
        if generator is None:
            return
        if not isinstance(generator, Generator):
            raise TypeError(f"generator must be a torch.Generator or None (got {generator!r})")
        if generator.device.type != x.device.type:
            raise ValueError(f"generator must be on the device of support_x (got {generator.device}, {x.device})")

    def _check_drawn(self, x: Tensor, drawn: Mapping[str, Drawn]) -> None:
        shape = (x.shape[0], x.shape[1] * self.copies)
        for each in self.transforms:
            if each.name not in drawn:
                raise ValueError(f"drawn must hold numbers for {each.name} (got {', '.join(drawn) or 'none'})")
            got = tuple(drawn[each.name].choice.shape)
            if got != shape:
                raise ValueError(f"drawn must be of {list(shape)} samples (got {each.name} of {list(got)})")


class PolicyTransform:
    """A policy with settings that stay, as a transform; made by `AugmentationPolicy.transform`.

    It can be pickled, and what it draws comes from torch's own generator, which a `DataLoader` seeds in each process.

    >>> import torch, metaaug_fast as mf
    >>> mix = mf.augment.AugmentationPolicy(["mixup"], ways=10).transform(batched=True)
    >>> x, y = mix(torch.randn(32, 4), torch.randint(10, (32,)))
    >>> x.shape, y.shape
    (torch.Size([32, 4]), torch.Size([32, 10]))
    """

    def __init__(self, policy: AugmentationPolicy, batched: bool) -> None:
        self.policy = policy
        self.batched = batched

    def __repr__(self) -> str:
        return f"PolicyTransform({[each.name for each in self.policy.transforms]}, batched={self.batched})"

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Any:
        """A sample `[...]` transformed; if batched, `(x, y)` of samples `[N, ...]` and targets `[N, ...]`.

        Raises:
            TypeError, ValueError: `x` is not of what the transforms are of, or `y` missing or too much.
        """
        check_tensor("x", x)
        if (y is not None) != self.batched:
            raise TypeError(f"y must be given for batches, and for them alone (got {y!r}, batched={self.batched})")
        if y is not None:
            return tuple(each[0] for each in self.policy.augment(x[None], y[None]))
        none = torch.zeros(1, 1, dtype=torch.int64, device=x.device)
        return self.policy.augment(x[None, None], none)[0][0, 0]


def support_network(sample_shape: tuple[int, ...], settings: int, hidden: int = 32) -> nn.Sequential:
    """A small network for `AugmentationPolicy(network=...)`, whose last layer starts at 0: as one policy for all.

    Args:
        sample_shape: `(C, H, W)`, of which it sees 7 x 7 means, or `(F,)`.
        settings: the policy's `settings_count`.
        hidden: units between.

    >>> import torch, metaaug_fast as mf
    >>> policy = mf.augment.AugmentationPolicy(["noise", "mixup"])
    >>> policy.network = mf.augment.support_network((1, 28, 28), policy.settings_count)
    >>> policy.network(torch.rand(5, 1, 28, 28)).shape
    torch.Size([5, 4])
    """
    check_count("settings", settings, low=1)
    check_count("hidden", hidden, low=1)
    if len(sample_shape) not in (1, 3):
        raise ValueError(f"sample_shape must be (C, H, W) or (F,) (got {tuple(sample_shape)})")
    seen = [nn.Flatten()] if len(sample_shape) == 1 else [nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    inputs = sample_shape[0] * (1 if len(sample_shape) == 1 else 49)
    last = nn.Linear(hidden, settings)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*seen, nn.Linear(inputs, hidden), nn.Tanh(), last)


def _by_name(name: str, value: float | Mapping[str, float], names: list[str]) -> dict[str, float]:
    """One number in 0..1 for each name."""
    if isinstance(value, Mapping):
        if set(value) != set(names):
            raise ValueError(
                f"{name} must be given for {', '.join(names) or 'none'} (got {', '.join(value) or 'none'})"
            )
        found = {each: value[each] for each in names}
    else:
        found = dict.fromkeys(names, value)
        check_probability(name, value)
    for each in found.values():
        check_probability(name, each)
    return found


def _logit(value: float) -> nn.Parameter:
    found = -_CERTAIN if value == 0 else _CERTAIN if value == 1 else math.log(value / (1 - value))
    return nn.Parameter(torch.tensor(max(-_CERTAIN, min(_CERTAIN, found))))
