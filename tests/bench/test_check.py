"""What counts as exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metaaug_fast.bench.check import Check, expected
from metaaug_fast.bench.row import Row
from metaaug_fast.bench.worker import RivalError
from metaaug_fast.bench.workloads import Workload

MLP = Workload("tiny", "mlp", (1,), 3, 4, 4, 2, 0.1, None, {"sizes": (1, 4, 1)})
KINDS = {
    "maml": MLP,
    "reptile": replace(MLP, kind="reptile", first_order=True),
    "evaluation": replace(MLP, kind="evaluation", first_order=True, tasks=25),
}


def verdict(workload, change, again=lambda right: right):
    """The row of a rival that returns the right arrays changed by a function, and `again` in float64."""
    row = Row("rival", "rival", "exact")
    found = change([each.astype(np.float32) for each in expected(workload, workload.tasks)])
    Check(workload, workload.inputs()).judge(row, found, lambda few: again(expected(workload, few.tasks)))
    return row


@pytest.mark.parametrize("workload", KINDS.values(), ids=KINDS)
def test_rounding_is_exact(workload):
    row = verdict(workload, lambda arrays: arrays)
    assert (row.status, row.note) == ("exact", "")
    assert row.error < 1e-6


@pytest.mark.parametrize("workload", KINDS.values(), ids=KINDS)
def test_more_than_rounding_is_decided_in_float64(workload):
    def off(arrays):
        return [each * 1.02 for each in arrays]

    right, wrong = verdict(workload, off), verdict(workload, off, off)
    assert (right.status, wrong.status) == ("exact", "wrong")
    assert "2e-02 off in float32" in right.note
    assert right.error < 1e-12
    assert wrong.error == pytest.approx(0.02)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays[:-1],
        lambda arrays: [*arrays, arrays[0]],
        lambda arrays: [each.ravel() for each in arrays],
        lambda arrays: [each * np.nan for each in arrays],
    ],
    ids=["too few", "too many", "other shapes", "not finite"],
)
def test_arrays_that_cannot_be_compared_are_wrong(change):
    row = verdict(MLP, change, change)
    assert (row.status, row.error) == ("wrong", float("inf"))
    assert row.as_dict()["error"] is None


def test_float64_check_that_does_not_end():
    def cut_off(arrays):
        raise RivalError("no result within 1 s", cut_off=True)

    def fails(arrays):
        raise RivalError("no float64")

    def off(arrays):
        return [each * 1.02 for each in arrays]

    assert verdict(MLP, off, cut_off).status == "unconfirmed"
    assert verdict(MLP, off, fails).status == "wrong"
    assert "float64 check failed: no float64" in verdict(MLP, off, fails).note


def test_parameters_left_out():
    workload = replace(MLP, unchecked="*.bias")
    names = [name for name, _ in MLP.model().named_parameters()]

    def biases_off(arrays):
        return [each + name.endswith("bias") for name, each in zip(names, arrays, strict=True)]

    assert verdict(workload, biases_off).note == ""
    assert verdict(MLP, biases_off, biases_off).status == "wrong"


def test_expected_is_the_mean_over_tasks():
    workload = replace(MLP, inner_lr=0.0)
    inputs, model = workload.inputs().to(torch.float64), workload.model().double()
    loss = torch.nn.functional.mse_loss(model(inputs.query_x.flatten(0, 1)), inputs.query_y.flatten(0, 1))
    loss.backward()
    for found, parameter in zip(expected(workload, workload.tasks), model.parameters(), strict=True):
        assert np.allclose(found, parameter.grad.numpy(), rtol=1e-10, atol=1e-14)
