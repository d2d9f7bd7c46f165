"""R2-D2 against its paper, and its two solutions against each other."""

import pytest
import torch
import torch.nn.functional as F

import metaaug_fast as mf
from metaaug_fast.learners.r2d2 import ridge_regression
from metaaug_fast.models import conv4, perceptron
from tests.exactness import relative_error
from tests.learners.comparing import assert_exact, class_tasks


def model(features=6):
    return perceptron(None, (5,), (7, features), "tanh").double()


@pytest.mark.parametrize(("shots", "features"), [(1, 8), (4, 6)], ids=["fewer samples", "fewer features"])
@pytest.mark.parametrize("learn_ridge", [True, False])
def test_it_is_the_papers(shots, features, learn_ridge):
    """By the normal equations and an inverse, whichever is smaller."""
    ridge, scale = (float(value) for value in torch.rand(2) + 0.1)
    learner = mf.R2D2(model(features), ridge, scale, learn_ridge).double()
    batch = class_tasks(5, shots=shots)
    assert learner.log_ridge.requires_grad == learn_ridge

    def unbatched(x, y, query_x, query_y):
        count = len(x)
        ones = torch.ones(count, 1, dtype=torch.float64)
        inputs = torch.cat([learner.model(x), ones], 1) / count**0.5
        targets = torch.stack([(y == way).double() for way in range(3)], 1) / count**0.5
        gram = inputs.T @ inputs + learner.log_ridge.exp() * torch.eye(features + 1, dtype=torch.float64)
        solution = torch.linalg.inv(gram) @ inputs.T @ targets
        weight, bias = solution[:-1], solution[-1]
        return F.cross_entropy(learner.alpha * (learner.model(query_x) @ weight + bias) + learner.beta, query_y)

    assert_exact(learner, batch, unbatched)


def test_both_forms_minimise_what_they_should():
    """Where the gradient of the penalised squares is 0; for fewer samples than features and for more."""
    ridge = torch.rand(()).double() + 0.1
    for samples in (3, 5, 9):
        x, y = torch.randn(4, samples, 5).double(), torch.randn(4, samples, 2).double()
        weights = ridge_regression(x, y, ridge)
        assert float((x.mT @ (x @ weights - y) + ridge * weights).abs().max()) < 1e-12
        direct = torch.linalg.solve(x.mT @ x + ridge * torch.eye(5).double(), x.mT @ y)
        woodbury = x.mT @ torch.linalg.solve(x @ x.mT + ridge * torch.eye(samples).double(), y)
        assert relative_error(weights, direct) < 1e-10
        assert relative_error(weights, woodbury) < 1e-10


def test_float32_is_enough():
    """For large features, some of them alike, and a small lambda."""
    for samples in (6, 60):
        x = 100 * torch.randn(2, samples, 20).double()
        x[:, 1] = x[:, 0]
        y = torch.randn(2, samples, 3).double()
        exact = ridge_regression(x, y, torch.tensor(1e-2).double())
        single = ridge_regression(x.float(), y.float(), torch.tensor(1e-2))
        assert single.dtype == torch.float32
        predictions = [x @ exact, (x.float() @ single).double()]
        assert relative_error(predictions[1], predictions[0]) < 1e-4


def test_training_may_have_other_ways_and_shots_than_testing():
    learner = mf.R2D2(model()).double()
    assert learner(class_tasks(5, ways=7)).task_losses.shape == (3,)
    assert learner.adapt(*class_tasks(5, ways=4, shots=5).tensors[:2])(torch.randn(3, 2, 5).double()).shape == (3, 2, 4)


def test_batch_norm_is_the_modules_own():
    learner = mf.R2D2(conv4(None, (1, 16, 16), hidden=3))
    assert not learner.transductive
    learner(class_tasks(1, 16, 16).to(torch.float32))
    assert int(learner.model.block1[1].num_batches_tracked) == 1


def test_it_keeps_the_contract():
    mf.check_learner(mf.R2D2(model()), class_tasks(5))
    assert mf.check_gradients(mf.R2D2(model()), class_tasks(5)).order == "exact"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ridge": -1.0}, ValueError, r"ridge must be > 0 \(got -1.0\)"),
        ({"ridge": 0.0}, ValueError, r"ridge must be > 0 \(got 0.0\)"),
        ({"ridge": "big"}, TypeError, r"ridge must be a number \(got 'big'\)"),
        ({"scale": float("nan")}, ValueError, r"scale must be >= 0 \(got nan\)"),
        ({"learn_ridge": 1}, TypeError, r"learn_ridge must be True or False \(got 1\)"),
        ({"model": None}, TypeError, r"model must be an nn.Module \(got NoneType\)"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        mf.R2D2(**{"model": model(), **options})


def test_bad_support_sets():
    batch, learner = class_tasks(5), mf.R2D2(model()).double()
    with pytest.raises(
        ValueError, match=r"support_y must have a sample of each class 0..2 in every task \(task 0 lacks 0"
    ):
        learner.adapt(batch.support_x, batch.support_y.clamp(min=1))
    with pytest.raises(ValueError, match=r"support_y must be class ids, int64 \[T, S\] \(got torch.float64"):
        learner.adapt(batch.support_x, batch.support_y.double())
