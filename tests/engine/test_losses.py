"""torch's own losses are the named ones, and accuracies are there for class ids."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metaaug_fast as mf
from metaaug_fast.engine.losses import named
from tests.building import C, perceptron, tasks

TWINS = {
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), "cross_entropy", 0.0),
    "smoothed CrossEntropyLoss": (nn.CrossEntropyLoss(label_smoothing=0.2), "cross_entropy", 0.2),
    "cross_entropy": (F.cross_entropy, "cross_entropy", 0.0),
    "smoothed cross_entropy": (functools.partial(F.cross_entropy, label_smoothing=0.2), "cross_entropy", 0.2),
    "MSELoss": (nn.MSELoss(), "mse", 0.0),
    "mse_loss": (F.mse_loss, "mse", 0.0),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), "bce", 0.0),
    "bce_with_logits": (F.binary_cross_entropy_with_logits, "bce", 0.0),
}
OTHERS = {
    "its weight": nn.CrossEntropyLoss(weight=torch.ones(C)),
    "its reduction": nn.MSELoss(reduction="sum"),
    "its pos_weight": nn.BCEWithLogitsLoss(pos_weight=torch.ones(C)),
    "its ignore_index": functools.partial(F.cross_entropy, ignore_index=0),
}


@pytest.mark.parametrize("twin", TWINS)
def test_twins_are_fused_and_say_the_same(twin):
    loss, name, smoothing = TWINS[twin]
    assert named(loss) == (name, smoothing, "")
    batch = tasks(soft=name != "cross_entropy")
    model = perceptron()
    out = mf.MAML(model, 0.3, loss=loss, backend="fused")(batch)
    expected = mf.MAML(model, 0.3, loss=name, label_smoothing=smoothing, backend="fused")(batch)
    assert torch.equal(out.task_losses, expected.task_losses)
    assert (out.accuracy is None) == (name != "cross_entropy")
    for task in range(batch.tasks):
        prediction = mf.MAML(model, 0.3, loss=loss).adapt(*batch.tensors[:2])(batch.query_x)[task]
        assert torch.allclose(out.task_losses[task], loss(prediction, batch.query_y[task]), rtol=1e-9)


@pytest.mark.parametrize("option", OTHERS)
def test_options_that_the_named_loss_lacks_are_the_fallbacks(option):
    loss = OTHERS[option]
    assert named(loss) == (loss, 0.0, option)
    batch = tasks(soft=not isinstance(loss, (nn.CrossEntropyLoss, functools.partial)))
    if isinstance(loss, nn.Module):
        loss = loss.double()
    if option == "its ignore_index":
        batch.support_y[:, 0] = batch.query_y[:, 0] = 1  # of samples that are all ignored there is no mean
    with pytest.raises(mf.NotFusedError, match=f"needs a named loss .*, for {option}"):
        mf.MAML(perceptron(), 0.3, loss=loss, backend="fused")(batch)
    out = mf.MAML(perceptron(), 0.3, loss=loss, backend="fallback")(batch)
    assert out.loss.isfinite()


def test_a_callable_on_class_ids_has_an_accuracy():
    batch, model = tasks(), perceptron()

    def hinge(prediction, target):
        return F.multi_margin_loss(prediction, target)

    out = mf.MAML(model, 0.3, loss=hinge, backend="fallback")(batch)
    prediction = mf.MAML(model, 0.3, loss=hinge, backend="fallback").adapt(*batch.tensors[:2])(batch.query_x)
    assert torch.equal(out.accuracy, (prediction.argmax(-1) == batch.query_y).double().mean(-1))
    values = tasks(soft=True)
    assert mf.MAML(model, 0.3, loss=lambda p, y: (p - y).abs().mean(), backend="fallback")(values).accuracy is None


def test_bad_losses():
    with pytest.raises(ValueError, match=r"loss must be callable or one of cross_entropy, mse, bce \(got 'hinge'\)"):
        mf.MAML(perceptron(), loss="hinge")
    with pytest.raises(ValueError, match=r"label_smoothing must be that of loss, 0.2 \(got 0.1\)"):
        mf.MAML(perceptron(), loss=nn.CrossEntropyLoss(label_smoothing=0.2), label_smoothing=0.1)
