"""A script in EasyFSL's manner, and that it gives what the learners give."""

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.compat import easyfsl
from metaaug_fast.models import perceptron
from tests.learners.comparing import class_tasks

CLASSIFIERS = [easyfsl.PrototypicalNetworks, easyfsl.MatchingNetworks, easyfsl.RelationNetworks]


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_a_script_of_single_tasks_trains_as_a_batch_of_them(make):
    """Gradients added up over tasks, as such scripts do, are those of one batch."""
    classifier, batch = make(perceptron(None, (5,), (7, 6), "tanh")).double(), class_tasks(5)
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch.tensors, strict=True):
        classifier.process_support_set(support_x, support_y)
        losses.append(classifier.learner._score(classifier(query_x)[None], query_y[None]).loss)
    torch.stack(losses).mean().backward()
    found = {name: value.grad.clone() for name, value in classifier.named_parameters()}
    classifier.zero_grad()
    out = classifier.learner(batch)
    out.loss.backward()
    assert torch.allclose(torch.stack(losses), out.task_losses, rtol=1e-9)
    for name, value in classifier.named_parameters():
        assert torch.allclose(found[name], value.grad, rtol=1e-7, atol=1e-12), name


@pytest.mark.parametrize("learner", [mf.MAML, mf.Reptile, mf.ProtoMAML, mf.ANIL])
def test_any_learner(learner):
    classifier, batch = easyfsl.FewShotClassifier(learner(nn.Linear(5, 3)), use_softmax=True), class_tasks(5)
    batch = batch.to(torch.float32)
    classifier.process_support_set(batch.support_x[1], batch.support_y[1])
    scores = classifier(batch.query_x[1])
    assert torch.allclose(scores.sum(1), torch.ones(9))
    wanted = classifier.learner.adapt(*batch.tensors[:2])(batch.query_x)[1].softmax(-1)
    assert torch.allclose(scores, wanted, rtol=1e-4, atol=1e-6)
    assert not classifier.is_transductive()


def test_bad_input():
    classifier = easyfsl.PrototypicalNetworks(nn.Linear(5, 6))
    with pytest.raises(RuntimeError, match="process_support_set must be called before queries are classified"):
        classifier(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"support_labels must be class ids \[S\] of one task \(got \[2, 3\]\)"):
        classifier.process_support_set(torch.randn(2, 3, 5), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="support_y must have a sample of each class"):
        classifier.process_support_set(torch.randn(2, 5), torch.tensor([0, 2]))
    with pytest.raises(TypeError, match=r"learner must be a Learner \(got Linear\)"):
        easyfsl.FewShotClassifier(nn.Linear(5, 3))
