"""Prompt tuning against its formulas, a task and a sentence at a time, without padding; and what it costs."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metaaug_fast as mf
from metaaug_fast.models import SentenceEncoder, perceptron
from tests.exactness import gradients, relative_error
from tests.learners.comparing import assert_exact

VOCABULARY, WORDS, DIM, PROMPT = 40, 6, 8, 3


def encoder(layers=2, dim=DIM, positions=PROMPT + WORDS):
    model = SentenceEncoder(layers=layers, dim=dim, heads=2, hidden=12, vocabulary=VOCABULARY, positions=positions)
    return shaken(model.double())


def shaken(model):
    """Weights so large that the prompt matters to the states."""
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return model


class Own(nn.Module):
    """A user's, in torch's own layers, whose input may have any length and whose states are wider than its input."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, DIM)
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.dropout, self.wide = nn.Dropout(0.5), nn.Linear(DIM, 2 * DIM)

    def get_input_embeddings(self):
        return self.words

    def forward(self, inputs_embeds, attention_mask, **rest):
        seen, _ = self.attention(inputs_embeds, inputs_embeds, inputs_embeds, attention_mask == 0, need_weights=False)
        return self.wide(torch.tanh(self.dropout(inputs_embeds + seen)))


def own():
    return shaken(Own().double())


def sentence_tasks(tasks=3, ways=3, shots=2, queries=2, words=WORDS):
    """Sentences of one to so many words; the longest of all may leave padding behind."""

    def samples(count):
        labels = torch.arange(ways).repeat(tasks, count)
        labels = labels.gather(1, torch.rand(labels.shape).argsort(1))
        x = torch.randint(1, VOCABULARY, (tasks, ways * count, words))
        lengths = torch.randint(1, words + 1, x.shape[:2])
        return x * (torch.arange(words) < lengths.unsqueeze(-1)), labels

    return mf.TaskBatch(*samples(shots), *samples(queries))


def feature(model, prompt, ids):
    """Of one sentence, without padding and without a mask that hides anything."""
    ids = ids[ids != 0]
    vectors = torch.cat([prompt, model.get_input_embeddings().weight[ids]])[None]
    states = model(inputs_embeds=vectors, attention_mask=torch.ones(vectors.shape[:2]))[0]
    mean = states[len(prompt) :].mean(0)
    return mean / mean.norm()


def features(model, prompt, x):
    return torch.stack([feature(model, prompt, each) for each in x])


def adapted_by_hand(learner, x, y, first_order=False):
    """The prompt and a classifier of one task, by plain autograd."""
    model, scale, ways = learner.model, learner.log_scale.exp(), int(y.max()) + 1

    def means(prompt):
        found = features(model, prompt, x)
        return torch.stack([found[y == way].mean(0) for way in range(ways)])

    def near(prompt, centres, x):
        apart = features(model, prompt, x)[:, None] - centres
        return -scale * apart.square().sum(-1)

    def linear(prompt, weight, bias, x):
        return features(model, prompt, x) @ weight.T + bias

    state = [learner.prompt.clone()]
    rates = [learner.inner_lr] + [learner.head_lr] * 2
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        if learner.head_lr is not None:
            centres = means(learner.prompt)
            state += [2 * scale * centres, -scale * centres.square().sum(-1)]
        for _ in range(learner.inner_steps):
            if learner.head_lr is None:
                loss = F.cross_entropy(near(state[0], means(state[0]), x), y)
            else:
                loss = F.cross_entropy(linear(*state, x), y)
            found = torch.autograd.grad(loss, state, create_graph=True)
            found = [each.detach() if first_order else each for each in found]
            state = [each - rate * slope for each, rate, slope in zip(state, rates, found)]  # noqa: B905
    if learner.head_lr is None:
        return state[0], lambda x: near(state[0], means(state[0]), x)
    return state[0], lambda x: linear(*state, x)


def learner_of(model, head_lr=None, steps=2, outer="second_order"):
    return mf.PromptTuning(model, PROMPT, (), 0.7, steps, head_lr, outer, scale=3.0 + random.random())


@pytest.mark.parametrize("make", [encoder, own], ids=["BERT", "own"])
@pytest.mark.parametrize("head_lr", [None, 0.4], ids=["means", "head"])
@pytest.mark.parametrize("outer", ["second_order", "first_order"])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_it_is_the_papers(make, head_lr, outer, steps):
    learner = learner_of(make(), head_lr, steps, outer)

    def unbatched(x, y, query_x, query_y):
        _, predict = adapted_by_hand(learner, x, y, outer == "first_order")
        return F.cross_entropy(predict(query_x), query_y)

    assert {name for name, value in learner.named_parameters() if value.requires_grad} == {"prompt", "log_scale"}
    assert_exact(learner, sentence_tasks(), unbatched)


@pytest.mark.parametrize("head_lr", [None, 0.4], ids=["means", "head"])
def test_orders_differ(head_lr):
    """So that the comparison above could fail."""
    model, batch, found = encoder(), sentence_tasks(), {}
    learner = learner_of(model, head_lr)
    for outer in ("second_order", "first_order"):
        learner.outer = outer
        found[outer] = gradients(learner(batch).loss, {"prompt": learner.prompt})["prompt"]
    assert relative_error(found["first_order"], found["second_order"]) > 1e-4


@pytest.mark.parametrize("head_lr", [None, 0.4], ids=["means", "head"])
def test_reptile_moves_to_the_mean_of_the_tasks_prompts(head_lr):
    learner, batch = learner_of(encoder(), head_lr, outer="reptile"), sentence_tasks()
    before = learner.prompt.detach().clone()
    tasks = list(zip(*batch.tensors, strict=True))
    adapted = [adapted_by_hand(learner, x, y) for x, y, _, _ in tasks]
    losses = torch.stack([F.cross_entropy(p(x), y) for (_, p), (_, _, x, y) in zip(adapted, tasks, strict=True)])
    out = learner.meta_step(batch, learner.optimizers(0.3))
    expected = before + 0.3 * torch.stack([prompt - before for prompt, _ in adapted]).mean(0)
    assert relative_error(learner.prompt, expected) < 1e-10
    assert relative_error(learner.prompt - before, expected - before) < 1e-9
    assert relative_error(out.task_losses, losses) < 1e-10
    assert not out.loss.requires_grad
    assert not learner(batch).loss.requires_grad
    assert not learner.log_scale.requires_grad


def test_without_steps_a_head_decides_as_the_means_do():
    model, batch = encoder(), sentence_tasks()
    torch.manual_seed(7)
    one = mf.PromptTuning(model, PROMPT, inner_steps=3)
    torch.manual_seed(7)
    other = mf.PromptTuning(model, PROMPT, inner_steps=3, head_lr=0.1)
    assert relative_error(other(batch, steps=0).task_losses, one(batch, steps=0).task_losses) < 1e-12
    assert relative_error(other(batch).task_losses, one(batch, steps=0).task_losses) > 1e-6


def test_it_starts_as_words():
    model = encoder()
    learner = mf.PromptTuning(model, 5, start=[7, 9])
    assert torch.equal(learner.prompt, model.embedding.weight[[7, 9, 7, 9, 7]])
    learner = mf.PromptTuning(model, 5)
    drawn = (learner.prompt[:, None] == model.embedding.weight).all(-1)
    assert (drawn.sum(1) == 1).all()


def test_adapted_without_gradient_it_predicts_the_same():
    learner, batch = learner_of(encoder()), sentence_tasks()
    expected = learner(batch)
    with torch.no_grad():
        found = learner.adapt(batch.support_x, batch.support_y).evaluate(batch.query_x, batch.query_y)
    assert relative_error(found.task_losses, expected.task_losses) < 1e-12
    assert not found.loss.requires_grad


def test_the_transformer_stays_as_it_is():
    model, batch = own(), sentence_tasks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learner = mf.PromptTuning(model, PROMPT)
    optimizers = learner.optimizers()
    for _ in range(3):
        learner.train().meta_step(batch, optimizers)
    assert not model.training  # nothing drops out
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def saved_bytes(learner, batch):
    """What the graph of a meta-loss keeps: bytes of activations and prompts, and of the weights of the model."""
    weights = {value.untyped_storage().data_ptr() for value in learner.model.parameters()}
    kept = {}

    def keep(value):
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage  # alive, so that no other takes its place
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        out = learner(batch)
    assert out.loss.requires_grad
    own = sum(each.nbytes() for pointer, each in kept.items() if pointer in weights)
    return sum(each.nbytes() for each in kept.values()) - own, own


@pytest.mark.parametrize("steps", [0, 2])
def test_the_weights_are_there_once_whatever_the_number_of_tasks(steps):
    """Of a wide model and few tokens, whose weights are far larger than activations."""
    model = SentenceEncoder(layers=2, dim=128, heads=2, hidden=512, vocabulary=VOCABULARY, positions=8)
    learner = mf.PromptTuning(model, 1, inner_steps=steps)
    whole = sum(value.nbytes for value in model.parameters())
    batch = sentence_tasks(tasks=12, ways=2, shots=1, queries=1, words=2)
    batch.support_x[:, :, -1] = batch.query_x[:, :, -1] = 1  # the same length, whatever the tasks
    few, many = saved_bytes(learner, batch[:4]), saved_bytes(learner, batch)
    assert 0 < few[1] == many[1] <= whole
    assert many[0] < 3.2 * few[0]  # what is kept beside them grows with the tasks, and no faster
    assert many[0] - few[0] < 8 * whole / 4  # weights of their own for 8 tasks more would be four times that


def test_it_keeps_the_contract():
    batch = sentence_tasks()
    for head_lr in (None, 0.4):
        for outer in ("second_order", "first_order", "reptile"):
            learner = mf.PromptTuning(encoder(), PROMPT, head_lr=head_lr, outer=outer)
            clauses = mf.check_learner(learner, batch).clauses
            assert set(clauses.values()) == {"kept"}, clauses
            if outer != "reptile":
                report = mf.check_gradients(learner, batch)
                assert report.order == outer.replace("_", " "), report
                assert report.ok


def test_it_trains_with_its_defaults():
    """On sentences of words that only their class has, among others; the frozen model is drawn at random."""
    torch.manual_seed(0)
    labels = torch.arange(20).repeat_interleave(10)
    x = torch.randint(21, VOCABULARY, (200, 5))
    x[torch.arange(200), torch.randint(5, (200,))] = 1 + labels
    episodes = mf.data.Episodes(mf.data.ClassSamples.from_arrays(x, labels), ways=3, shots=3, queries=3, tasks=8)
    learner = mf.PromptTuning(encoder().float(), PROMPT)
    before = mf.evaluate(learner, episodes, 100)
    mf.train(learner, episodes, 300, progress=False)
    assert mf.evaluate(learner, episodes, 100).mean > before.mean + 0.03


def test_ids_of_a_task_alone():
    learner, batch = learner_of(encoder()), sentence_tasks()
    one = learner.adapt(batch.support_x[0], batch.support_y[0])
    assert one(batch.query_x[0]).shape == (6, 3)
    nothing = torch.zeros(4, WORDS, dtype=torch.int64)
    assert one(nothing).isfinite().all()


class NoMask(Own):
    def forward(self, inputs_embeds):
        return inputs_embeds


class Pooled(Own):
    def forward(self, inputs_embeds, attention_mask):
        return inputs_embeds.mean(1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": None}, TypeError, r"model must be an nn.Module \(got NoneType\)"),
        ({"model": perceptron()}, TypeError, r"model must be a Transformer .* \(got Sequential\)"),
        ({"model": NoMask()}, TypeError, r"that is called with inputs_embeds and attention_mask.*\(got NoMask\)"),
        ({"prompt": 0}, ValueError, r"prompt must be >= 1 \(got 0\)"),
        ({"prompt": 2.0}, TypeError, r"prompt must be an integer \(got 2.0\)"),
        ({"prompt": 9}, ValueError, r"prompt must be below the model's 9 positions \(got 9\)"),
        ({"inner_lr": -1.0}, ValueError, r"inner_lr must be >= 0 \(got -1.0\)"),
        ({"inner_steps": -1}, ValueError, r"inner_steps must be >= 0 \(got -1\)"),
        ({"head_lr": "fast"}, TypeError, r"head_lr must be a number \(got 'fast'\)"),
        ({"outer": "maml"}, ValueError, r"outer must be one of second_order, first_order, reptile \(got 'maml'\)"),
        ({"start": "hello"}, TypeError, r"start must be a list of token ids \(got 'hello'\)"),
        ({"start": [1.0]}, TypeError, r"start must be an integer \(got 1.0\)"),
        (
            {"start": [1, VOCABULARY]},
            ValueError,
            rf"start must hold token ids 0..{VOCABULARY - 1} \(got {VOCABULARY}\)",
        ),
        ({"start": [1, 2, 3, 4, 5]}, ValueError, r"start must hold at most prompt, 4, token ids \(got 5\)"),
        ({"scale": 0.0}, ValueError, r"scale must be > 0 \(got 0.0\)"),
    ],
)
def test_bad_settings(options, error, message):
    model = options.get("model", encoder())
    asked = [value.requires_grad for value in model.parameters()] if model is not None else []
    with pytest.raises(error, match=message):
        mf.PromptTuning(**{"model": model, **options})
    assert asked == ([value.requires_grad for value in model.parameters()] if model is not None else [])


def test_bad_tasks():
    learner, batch = mf.PromptTuning(encoder(), PROMPT), sentence_tasks()
    with pytest.raises(ValueError, match=r"x must have at most 6 tokens, .* 9 positions \(got 7\)"):
        learner(sentence_tasks(words=7))
    with pytest.raises(TypeError, match=r"x must be token ids, int64 \[T, N, L\] \(got torch.float64"):
        learner(mf.TaskBatch(batch.support_x.double(), batch.support_y, batch.query_x.double(), batch.query_y))
    with pytest.raises(ValueError, match=rf"x must hold token ids 0..{VOCABULARY - 1} \(got {VOCABULARY}\)"):
        learner.adapt(batch.support_x.clamp(min=VOCABULARY), batch.support_y)
    with pytest.raises(ValueError, match=r"query_y must hold class ids 0..2 \(got 3\)"):
        learner(mf.TaskBatch(batch.support_x, batch.support_y, batch.query_x, batch.query_y + 1))
    with pytest.raises(ValueError, match=r"support_y must have a sample of each class 0..3 in every task"):
        learner.adapt(batch.support_x, batch.support_y + 1)
    with pytest.raises(ValueError, match=r"model must give states \[N, L, D\] of vectors .* \(got \(18, 8\)\)"):
        mf.PromptTuning(Pooled().double(), PROMPT)(batch)


def test_a_model_of_hugging_face():
    """As it is: second order through its own attention."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=PROMPT + WORDS,
    )  # fmt: skip
    model = shaken(transformers.BertModel(config).double())
    learner, batch = learner_of(model), sentence_tasks()

    def unbatched(x, y, query_x, query_y):
        return F.cross_entropy(adapted_by_hand(Bare(learner), x, y)[1](query_x), query_y)

    class Bare:
        """The learner, whose model gives states alone."""

        def __init__(self, learner):
            self.__dict__.update(vars(learner), prompt=learner.prompt, log_scale=learner.log_scale)
            self.model = States(learner.model)

    class States(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, **given):
            return self.inner(**given).last_hidden_state

    assert_exact(learner, batch, unbatched)
    with pytest.raises(ValueError, match="x must have at most 6 tokens"):
        learner(sentence_tasks(words=7))


def test_positions_that_begin_behind_padding():
    """RoBERTa's table holds places that no token takes."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=PROMPT + WORDS + 2, pad_token_id=1,
    )  # fmt: skip
    learner, batch = mf.PromptTuning(transformers.RobertaModel(config).double(), PROMPT), sentence_tasks()
    learner(batch).loss.backward()
    with pytest.raises(ValueError, match=rf"at most {WORDS} tokens, .* {PROMPT + WORDS} positions \(got {WORDS + 1}\)"):
        learner(sentence_tasks(words=WORDS + 1))
