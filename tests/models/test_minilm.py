"""BERT's encoder against its formulas, and the trained one against what its publishers' code gives."""

import json

import pytest
import torch
import torch.nn.functional as F

from metaaug_fast import installed, models
from metaaug_fast.data.wordpiece import pieces, wordpiece
from metaaug_fast.models import MODELS, SentenceEncoder, minilm

SIZES = {"layers": 2, "dim": 6, "heads": 3, "hidden": 10, "vocabulary": 30, "positions": 9}


def by_hand(model, ids):
    """Features of one sentence without padding, head by head."""

    def normed(layer, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * layer.weight + layer.bias

    x = model.embedding.weight[ids] + model.position.weight[: len(ids)] + model.kind.weight[0]
    x = normed(model.norm, x)
    for block in model.blocks:
        seen = []
        for part in torch.arange(x.shape[1]).split(x.shape[1] // block.heads):
            q, k, v = (layer(x)[:, part] for layer in (block.query, block.key, block.value))
            seen.append((q @ k.T / len(part) ** 0.5).softmax(-1) @ v)
        x = normed(block.attended, x + block.mixed(torch.cat(seen, 1)))
        wide = block.wide(x)
        wide = wide * 0.5 * (1 + torch.erf(wide / 2**0.5))
        x = normed(block.norm, x + block.narrow(wide))
    mean = x.mean(0)
    return mean / mean.norm(), x


def test_it_is_berts():
    model = SentenceEncoder(**SIZES).double()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.5 * torch.randn_like(value))
    ids = torch.randint(1, 30, (4, 7)) * (torch.arange(7) < torch.tensor([[7], [5], [1], [3]]))
    expected = [by_hand(model, each[each != 0]) for each in ids]
    assert torch.allclose(model(ids), torch.stack([feature for feature, _ in expected]), rtol=1e-12)
    states = model(inputs_embeds=model.embedding(ids), attention_mask=ids != 0)
    for each, row, (_, found) in zip(states, ids, expected, strict=True):
        assert torch.allclose(each[row != 0], found, rtol=1e-10)
    assert model(torch.zeros(2, 3, dtype=torch.int64)).isfinite().all()
    headed = SentenceEncoder(5, **SIZES)
    assert headed(ids).shape == (4, 5)


def test_bad_arguments(monkeypatch, tmp_path):
    model = SentenceEncoder(**SIZES)
    assert MODELS["minilm"] is minilm is models.minilm
    with pytest.raises(TypeError, match=r"x must be token ids, int64 \[N, L\] \(got torch.float32 \(2, 3\)\)"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x must be of at most 9 tokens \(got 10\)"):
        model(torch.ones(2, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"dim must be a multiple of heads, 3 \(got 7\)"):
        SentenceEncoder(**{**SIZES, "dim": 7})
    with pytest.raises(
        ValueError, match=r"vocabulary must be that of the weights, 30522 \(got 32768\); data have it by"
    ):
        minilm(vocabulary=32768)
    with pytest.raises(
        ValueError, match=r"sample_shape must be \(length,\) of at most 512 token ids \(got \(3, 4, 4\)\)"
    ):
        minilm(sample_shape=(3, 4, 4))
    monkeypatch.setattr(installed, "PACKAGE", "no_such_package")
    with pytest.raises(
        FileNotFoundError, match=r"not installed: pip install 'metaaug_fast\[text\]', or pip install --no"
    ):
        minilm()
    monkeypatch.setattr(installed, "PACKAGE", "another_package")
    (tmp_path / "another_package" / "model").mkdir(parents=True)
    (tmp_path / "another_package" / "__init__.py").write_text("raise AssertionError('its code must not run')")
    (tmp_path / "another_package" / "model" / "model.safetensors").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors must be the published file, of SHA-256 53aa.* \(got "):
        minilm()


def test_pieces():
    vocabulary = {"play": 0, "##ing": 1, "##in": 2, "!": 3, "a": 4, "b": 5, "$": 6, "_": 7, "京": 8}
    assert pieces("Playing\tPLAÝ!", vocabulary) == ["play", "##ing", "play", "!"]
    assert pieces("a_b$ 京a\u200bb", vocabulary) == ["a", "_", "b", "$", "京", "[UNK]"]
    assert pieces("playx " + "a" * 101, vocabulary) == ["[UNK]", "[UNK]"]


def test_the_trained_one_and_its_words(real_minilm):
    """Sentences that mean the same are nearer than others; ids as the publishers' tokenizer gives them."""
    sentences = ["How do I send money?", "What's the way to transfer funds", "unbelievably spicy Jalapeños!"]
    ids = wordpiece(sentences)
    assert ids[0] == [101, 2129, 2079, 1045, 4604, 2769, 1029, 102]
    vocabulary = json.loads((real_minilm / "tokenizer.json").read_text())["model"]["vocab"]
    assert ids[1] == [
        vocabulary[each] for each in ["[CLS]", "what", "'", "s", "the", "way", "to", "transfer", "funds", "[SEP]"]
    ]
    cut = "[CLS] un ##bel ##ie ##va ##bly spicy ja ##la ##pen ##os ! [SEP]"
    assert ids[2] == [vocabulary[each] for each in cut.split()]
    x = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in ids], batch_first=True)
    with torch.no_grad():
        features = minilm()(x)
    near, far = features[0] @ features[1], features[0] @ features[2]
    assert near > 0.6 > 0.3 > far
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(real_minilm / "tokenizer.json"))
    theirs.no_padding()
    odd = [*sentences, "İstanbul ﬁne ①② 😀“q”—d", "東京タワー", "a\x00b\ufffd \x7f ~`^|"]
    assert wordpiece(odd) == [each.ids for each in theirs.encode_batch(odd)]


def test_the_trained_one_is_the_publishers(real_minilm):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel.from_pretrained(real_minilm).eval()
    ids = torch.randint(1, 30522, (5, 12)) * (torch.arange(12) < torch.randint(1, 13, (5, 1)))
    known = (ids != 0).float()
    with torch.no_grad():
        states = theirs(input_ids=ids, attention_mask=known).last_hidden_state
        expected = F.normalize((states * known[..., None]).sum(1) / known.sum(1, keepdim=True), dim=-1)
        found = minilm()(ids)
    assert torch.allclose(found, expected, atol=1e-5)
