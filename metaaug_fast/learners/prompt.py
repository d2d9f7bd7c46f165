"""Soft prompts (Lester et al. 2021, arXiv 2104.08691) that are meta-learned (Qin et al. 2023, arXiv 2302.08143)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from ..checks import check_choice, check_count, check_integer, check_number, check_positive
from ..tasks import MetaOutput, TaskBatch
from .base import Learner, Predictor, check_steps, class_means, class_members, one_task_too

Head = tuple[Tensor, Tensor]
"""Weights `[T, ways, D]` and biases `[T, ways]`."""
OUTER = ("second_order", "first_order", "reptile")


class PromptTuning(Learner):
    """Learn a soft prompt P, vectors in front of every sentence, from which each task's own adapts. No weight moves.

        f(x; P) = the mean of the Transformer's states over the tokens of x in [P, x], of length 1
        c_k(P)  = mean of f(x; P) over the support samples of class k                                    (1)
        p(y = k | x; P) = softmax over k of -scale |f(x; P) - c_k(P)|^2                                  (2)
        P_i = P - inner_lr * grad_P of the mean of -log p(y | x; P) over support samples of task i     inner_steps times
        minimise the mean over tasks of -log p(y | x; P_i) of the queries        over P and the scale

    With `head_lr` a linear head is adapted beside the prompt. It starts from (1) as `ProtoMAML`'s does and decides
    as (2) until it moves: logits w_k f(x; P_i) + b_k, w_k = 2 scale c_k(P), b_k = -scale |c_k(P)|^2. Without steps both
    are a prototypical network that learns nothing but its prompt.

    The prompts of all tasks go through the Transformer in one batch `[T * N, prompt + L, dim]`: its weights are there
    once, whatever T. Second order is exact: attention runs in torch's own products, which have a second derivative.

    Args:
        model: any Transformer that takes vectors, those of Hugging Face among them: it has `get_input_embeddings()`, an
            `nn.Embedding`, and `model(inputs_embeds=[N, L, dim], attention_mask=[N, L])` gives states `[N, L, D]` or an
            object with these as `last_hidden_state`. Its longest input is `model.positions` or
            `model.config.max_position_embeddings`, if there is one. It is frozen: its parameters ask for no gradient
            from here on, and it stays in evaluation mode. `mf.models.minilm()` is one with trained weights.
        prompt: vectors in P.
        start: ids of the tokens whose vectors these are at first, again and again if they are fewer. Words that a
            sentence could begin with leave features as good as they were; tokens drawn at random, which is what an
            empty list gives, do not.
        inner_lr, inner_steps: of the inner loop.
        head_lr: the inner rate of a linear head; None: class means decide.
        outer: "second_order"; "first_order", which takes the inner gradients for constants; or "reptile", which moves P
            towards the mean of P_i and learns no scale.
        scale: at the start.

    Raises:
        TypeError: `model` is no such Transformer, or another argument is of the wrong type.
        ValueError: an argument is out of range, or the prompt leaves no room for a sentence.

    >>> import torch, metaaug_fast as mf
    >>> encoder = mf.models.SentenceEncoder(layers=1, dim=8, heads=2, hidden=16, vocabulary=50, positions=16)
    >>> learner = mf.PromptTuning(encoder, prompt=4)
    >>> x, y = torch.randint(1, 50, (2, 2, 6, 9)), torch.arange(3).repeat(2, 2)
    >>> out = learner(mf.TaskBatch(x[0], y, x[1], y))
    >>> out.loss.backward()
    >>> learner.prompt.grad.shape, encoder.embedding.weight.grad
    (torch.Size([4, 8]), None)
    """

    encoder = True
    inner_steps: int
    loss = "cross_entropy"

    def __init__(
        self,
        model: nn.Module,
        prompt: int = 4,
        start: Sequence[int] = (),
        inner_lr: float = 0.1,
        inner_steps: int = 1,
        head_lr: float | None = None,
        outer: str = "second_order",
        scale: float = 10.0,
    ) -> None:
        super().__init__()
        embedding = _embedding_of(model)
        check_count("prompt", prompt, low=1)
        check_number("inner_lr", inner_lr)
        check_count("inner_steps", inner_steps)
        if head_lr is not None:
            check_number("head_lr", head_lr)
        check_choice("outer", outer, OUTER)
        check_positive("scale", scale)
        positions = _positions_of(model)
        if positions is not None and prompt >= positions:
            raise ValueError(f"prompt must be below the model's {positions} positions (got {prompt})")
        first = self._first(embedding, prompt, start)
        self.model = model.requires_grad_(False).eval()
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.head_lr = head_lr
        self.outer = outer
        self.start = tuple(start)
        self.prompt = nn.Parameter(embedding.weight[first].clone())
        self.log_scale = nn.Parameter(embedding.weight.new_tensor(scale).log(), requires_grad=outer != "reptile")

    @staticmethod
    def _first(embedding: nn.Embedding, prompt: int, start: Sequence[int]) -> Tensor:
        """The ids whose vectors P is at first."""
        if isinstance(start, (str, bytes)) or not isinstance(start, Sequence):
            raise TypeError(f"start must be a list of token ids (got {start!r})")
        end, device = embedding.num_embeddings, embedding.weight.device
        for each in start:
            check_integer("start", each, low=0)
            if each >= end:
                raise ValueError(f"start must hold token ids 0..{end - 1} (got {each})")
        if len(start) > prompt:
            raise ValueError(f"start must hold at most prompt, {prompt}, token ids (got {len(start)})")
        if not start:
            return torch.randint(end, (prompt,)).to(device)
        return torch.tensor(start, device=device).repeat(-(-prompt // len(start)))[:prompt]

    @property
    def first_order(self) -> bool:  # type: ignore[override]
        """Whether the inner gradients count as constants."""
        return self.outer != "second_order" and self.inner_steps > 0

    def train(self, mode: bool = True) -> PromptTuning:
        """The mode of the learner; the Transformer stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, tasks: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """Adapt to every task's support set and judge the result on its query set; for Reptile without gradient.

        Raises:
            TypeError, ValueError: the tasks do not fit the model, or `steps` is no count.
        """
        with torch.no_grad() if self.outer == "reptile" else nullcontext():
            return super().forward(tasks, steps=steps)

    @one_task_too
    def adapt(self, support_x: Tensor, support_y: Tensor, *, steps: int | None = None) -> Predictor:
        """What each task `[T, S, L]` of token ids learns from its support set; one task may lack its T.

        Raises:
            TypeError, ValueError: the support set fits neither the model nor itself, or `steps` is no count.
        """
        return self._adapted_to(support_x, support_y, steps)

    def optimizers(self, lr: float | None = None) -> list[Optimizer]:
        """Adam on P and the scale, of rate `lr` or 0.01; for Reptile SGD, of rate `lr` or 1."""
        if lr is not None:
            check_number("meta_lr", lr)
        if self.outer == "reptile":
            return [torch.optim.SGD([self.prompt], 1.0 if lr is None else lr)]
        return [torch.optim.Adam([self.prompt, self.log_scale], 1e-2 if lr is None else lr, fused=True)]

    def meta_step(self, tasks: TaskBatch, optimizers: Sequence[Optimizer]) -> MetaOutput:
        """One update; for Reptile by optimizers for which `mean_i(P - P_i)` is the gradient."""
        if self.outer != "reptile":
            return super().meta_step(tasks, optimizers)
        tasks = TaskBatch.of(tasks)
        with torch.no_grad():
            prompts, head = self._adapted(tasks.support_x, tasks.support_y)
            predictor = Predictor(lambda x: _logits(self._features(prompts, x), head), len(prompts))
            out = predictor.evaluate(tasks.query_x, tasks.query_y)
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.prompt.grad = (self.prompt - prompts).mean(0)
            for optimizer in optimizers:
                optimizer.step()
        return out

    def specification(
        self, tasks: TaskBatch, *, first_order: bool, step_weights: Tensor | None = None
    ) -> MetaOutput | None:
        """What `forward` computes, which is plain autograd itself, of either order."""
        return self._adapted_to(tasks.support_x, tasks.support_y, None, first_order).evaluate(*tasks.tensors[2:])

    def _adapted_to(self, x: Tensor, y: Tensor, steps: int | None = None, first_order: bool | None = None) -> Predictor:
        prompts, head = self._adapted(x, y, steps, first_order)
        return Predictor(lambda x: _logits(self._features(prompts, x), head), len(prompts))

    def _adapted(
        self, x: Tensor, y: Tensor, steps: int | None = None, first_order: bool | None = None
    ) -> tuple[Tensor, Head]:
        """Each task's prompt `[T, prompt, dim]`, and the head that goes with it."""
        steps = check_steps(self, steps)
        steps = self.inner_steps if steps is None else steps
        class_members(y, self.prompt.dtype)  # before any work
        through = torch.is_grad_enabled() and not (self.outer != "second_order" if first_order is None else first_order)
        with sdpa_kernel(SDPBackend.MATH) if through and steps else nullcontext():  # others are derived but once
            start = self.prompt.expand(len(x), -1, -1)
            moving, rates = [start.clone()], [self.inner_lr]  # a head depends on where it starts, a gradient does not
            if self.head_lr is not None:
                moving += self._means(self._features(start, x), y)
                rates += [self.head_lr, self.head_lr]
            for _ in range(steps):
                slopes = self._slopes(moving, x, y, through)
                moving = [each - rate * slope for each, rate, slope in zip(moving, rates, slopes, strict=True)]
            prompts, *head = moving
            return prompts, (head[0], head[1]) if head else self._means(self._features(prompts, x), y)

    def _slopes(self, moving: list[Tensor], x: Tensor, y: Tensor, through: bool) -> Sequence[Tensor]:
        """Each task's gradient of its support loss with respect to its prompt and, if it has one, its head."""
        with torch.enable_grad():
            at = moving if through else [each.detach().requires_grad_() for each in moving]
            features = self._features(at[0], x)
            logits = _logits(features, self._means(features, y) if len(at) == 1 else (at[1], at[2]))
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / x.shape[1]
            return torch.autograd.grad(loss, at, create_graph=through)  # of the sum over tasks, which do not mix

    def _features(self, prompts: Tensor, x: Tensor) -> Tensor:
        """f(x; P) of each task: `[T, prompt, dim]` and ids `[T, N, L]` to `[T, N, D]`."""
        ids = self._checked(x)
        known = ids != 0
        length = max(int(known.any(0).nonzero().amax()) + 1 if known.any() else 1, 1)  # the rest is padding
        ids, known = ids[:, :length], known[:, :length].to(self.prompt.dtype)
        count, size = x.shape[1], prompts.shape[1]
        front = prompts.unsqueeze(1).expand(-1, count, -1, -1).flatten(0, 1)
        vectors = torch.cat([front, _embedding_of(self.model)(ids)], 1)
        mask = torch.cat([known.new_ones(len(ids), size), known], 1).long()
        model: Any = self.model
        found = model(inputs_embeds=vectors, attention_mask=mask)
        states = getattr(found, "last_hidden_state", found)
        if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[:2] != vectors.shape[:2]:
            got = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"model must give states [N, L, D] of vectors {tuple(vectors.shape)} (got {got})")
        means = (states[:, size:] * known.unsqueeze(-1)).sum(1) / known.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(means, dim=-1).unflatten(0, x.shape[:2])

    def _checked(self, x: Tensor) -> Tensor:
        """Ids `[T * N, L]`."""
        if x.dtype != torch.int64 or x.ndim != 3:
            raise TypeError(f"x must be token ids, int64 [T, N, L] (got {x.dtype} {tuple(x.shape)})")
        low, high = (int(value) for value in torch.aminmax(x))
        vocabulary = _embedding_of(self.model).num_embeddings
        if low < 0 or high >= vocabulary:
            raise ValueError(f"x must hold token ids 0..{vocabulary - 1} (got {low if low < 0 else high})")
        positions, size = _positions_of(self.model), len(self.prompt)
        if positions is not None and size + x.shape[2] > positions:
            raise ValueError(
                f"x must have at most {positions - size} tokens, for the prompt takes {size} of the model's "
                f"{positions} positions (got {x.shape[2]})"
            )
        return x.flatten(0, 1)

    def _means(self, features: Tensor, labels: Tensor) -> Head:
        """The head by which class means decide (2), but for what all classes share."""
        means, scale = class_means(features, labels), self.log_scale.exp()
        return 2 * scale * means, -scale * means.square().sum(-1)


def _logits(features: Tensor, head: Head) -> Tensor:
    return features @ head[0].mT + head[1].unsqueeze(1)


def _embedding_of(model: Any) -> nn.Embedding:
    """What makes vectors of token ids; TypeError unless `model` takes vectors."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module (got {type(model).__name__})")
    takes = inspect.signature(model.forward).parameters
    gives: Any = getattr(model, "get_input_embeddings", None)
    found = gives() if callable(gives) else None
    if not isinstance(found, nn.Embedding) or not {"inputs_embeds", "attention_mask"} <= set(takes):
        raise TypeError(
            "model must be a Transformer with get_input_embeddings() that is called with inputs_embeds and "
            f"attention_mask, such as models.minilm() (got {type(model).__name__})"
        )
    return found


def _positions_of(model: Any) -> int | None:
    """How long an input may be; None: it does not say."""
    found = getattr(model, "positions", None)
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None) if found is None else found
    if not isinstance(found, int):
        return None
    tables = [each for name, each in model.named_modules() if name.endswith("position_embeddings")]
    padding = [getattr(each, "padding_idx", None) for each in tables]  # RoBERTa's begin behind that of padding
    return found - sum(each + 1 for each in padding[:1] if each is not None)
