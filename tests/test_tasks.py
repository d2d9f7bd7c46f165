"""What a new user hands over: a batch takes it, or says what it must be."""

import numpy as np
import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.engine import reference
from metaaug_fast.engine.problem import Query, Support
from tests.building import C, F, Q, S, T, backends, perceptron, tasks
from tests.exactness import assert_close, gradients

FORMS = {
    "tuple": lambda batch: batch.tensors,
    "list": lambda batch: list(batch.tensors),
    "torchmeta": lambda batch: {"train": batch.tensors[:2], "test": batch.tensors[2:]},
    "support and query": lambda batch: {"support": batch.tensors[:2], "query": batch.tensors[2:], "extra": None},
    "arrays": lambda batch: tuple(each.numpy() for each in batch.tensors),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("learner", ["maml", "reptile", "protonet"])
def test_every_learner_takes_every_form(learner, form):
    batch = tasks()
    batch = mf.TaskBatch(batch.support_x, torch.arange(S).remainder(C).repeat(T, 1), *batch.tensors[2:])
    made = {
        "maml": lambda: mf.MAML(perceptron(), 0.3),
        "reptile": lambda: mf.Reptile(perceptron()),
        "protonet": lambda: mf.ProtoNet(perceptron()),
    }[learner]()
    given = FORMS[form](batch)
    assert mf.TaskBatch.of(given) == batch
    assert torch.equal(made(given).task_losses, made(batch).task_losses)
    one = mf.TaskBatch.of(tuple(each[1] for each in batch.tensors))
    assert one == batch[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@backends
def test_class_ids_of_every_integer_type(dtype, backend):
    batch, model = tasks(), perceptron()
    other = mf.TaskBatch(batch.support_x, batch.support_y.to(dtype), batch.query_x, batch.query_y.to(dtype))
    assert other == batch
    learner = mf.MAML(model, 0.3, backend=backend)
    adapted = learner.adapt(batch.support_x, batch.support_y.to(dtype))
    assert torch.equal(adapted.flat, learner.adapt(batch.support_x, batch.support_y).flat)
    judged = adapted.evaluate(batch.query_x, batch.query_y.to(dtype))
    assert torch.equal(judged.accuracy, learner(batch).accuracy)
    x, y = batch.tensors[:2]
    flat = mf.inner_loop(model, x, y.to(dtype), backend=backend).flat
    assert torch.equal(flat, mf.inner_loop(model, x, y, backend=backend).flat)


def test_lists_and_arrays_become_tensors():
    batch = mf.TaskBatch([[[1.0], [2.0]]], [[0, 1]], np.ones((1, 3, 1), np.float32), [[0, 1, 0]])
    assert [each.dtype for each in batch.tensors] == [torch.float32, torch.int64, torch.float32, torch.int64]


def test_batches_are_compared_and_shown():
    batch = tasks()
    assert batch == mf.TaskBatch(*(each.clone() for each in batch.tensors))
    assert batch != batch[:1]
    assert batch != batch.to(torch.float32)
    changed = [each.clone() for each in batch.tensors]
    changed[3][0, 0] = (changed[3][0, 0] + 1) % C
    assert batch != mf.TaskBatch(*changed)
    assert batch != batch.tensors
    shown = (
        f"TaskBatch(support_x [{T}, {S}, {F}] float64, support_y [{T}, {S}] int64, query_x [{T}, {Q}, {F}] float64, "
    )
    assert repr(batch) == f"{shown}query_y [{T}, {Q}] int64)"
    with pytest.raises(TypeError, match="unhashable"):
        hash(batch)
    assert [each.tasks for each in batch.split(2)] == [2, 1]
    with pytest.raises(IndexError, match=rf"task must be one of {T} \(got {T}\)"):
        batch[T]


class Sentences(nn.Module):
    """Token ids to classes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, C)

    def forward(self, x):
        return self.head(self.embedding(x).mean(1).tanh())


@pytest.mark.filterwarnings("ignore::metaaug_fast.errors.FallbackWarning")
def test_token_ids_reach_a_model_with_an_embedding():
    torch.manual_seed(0)
    x, query_x = (torch.randint(11, (T, count, 5)) for count in (S, Q))
    batch = mf.TaskBatch(x, torch.randint(C, (T, S)), query_x, torch.randint(C, (T, Q)))
    assert batch.to(torch.float64) == batch
    maml = mf.MAML(Sentences().double(), 0.3, 2)
    out = maml(batch)
    expected = reference.meta_loss(maml.problem(), Support(x, batch.support_y), Query(query_x, batch.query_y))
    parameters = dict(maml.named_parameters())
    assert torch.allclose(out.task_losses, expected.task_losses, rtol=1e-10)
    assert_close(gradients(out.loss, parameters), gradients(expected.loss, parameters))
    assert maml.adapt(x[0], batch.support_y[0])(query_x[0]).shape == (Q, C)
    assert mf.check_gradients(maml, batch).order == "second order"
    with pytest.raises(mf.NotFusedError, match=r"takes floating inputs \(got token ids, int64\)"):
        mf.MAML(Sentences().double(), 0.3, backend="fused")(batch)
    dataset = mf.data.ClassSamples.from_arrays(torch.randint(11, (40, 5)), torch.arange(40) % 8)
    episodes = mf.data.Episodes(dataset, ways=C, shots=1, queries=1, tasks=2)
    assert next(episodes).support_x.dtype == torch.int64
    assert mf.ProtoNet(nn.Sequential(nn.Embedding(11, 6), nn.Flatten()))(next(episodes)).loss.isfinite()


def test_integers_never_reach_the_engine_as_numbers():
    """Of a model that the engine would fuse, for floats."""
    batch = mf.TaskBatch(torch.ones(1, 3, F, dtype=torch.int64), [[0, 1, 2]], torch.ones(1, 3, F).long(), [[0, 1, 2]])
    with pytest.raises(mf.NotFusedError, match="takes floating inputs"):
        mf.MAML(perceptron(), 0.3, backend="fused")(batch)
    with pytest.raises(ValueError, match="model must accept samples of shape"):
        mf.MAML(perceptron(), 0.3, backend="fallback")(batch)
