"""Every rival's way of writing a workload, against the reference in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metaaug_fast import models
from metaaug_fast.bench.check import expected
from metaaug_fast.bench.rivals import OURS, RIVALS
from metaaug_fast.bench.workloads import WORKLOADS, Workload, select

REGRESSION = Workload("regression", "mlp", (1,), 3, 4, 5, 2, 0.1, None, {"sizes": (1, 6, 1)})
PICTURES = Workload(
    "pictures", "conv4", (1, 16, 16), 2, 6, 4, 2, 0.1, 3, {"ways": 3, "sample_shape": (1, 16, 16), "hidden": 4}
)
TINY = {
    "regression": REGRESSION,
    "regression, first order": replace(REGRESSION, first_order=True),
    "reptile": replace(REGRESSION, kind="reptile", first_order=True),
    "evaluation": replace(REGRESSION, kind="evaluation", first_order=True, batch=2),
    "pictures": PICTURES,
    "pictures, first order": replace(PICTURES, first_order=True),
    "pictures, strided": replace(PICTURES, net="strided_conv4"),
    "pictures, head only": replace(PICTURES, adapt="head.*"),
    "pictures, head only, first order": replace(PICTURES, adapt="head.*", first_order=True),
    "perceptron": replace(
        PICTURES, net="omniglot_mlp", options={"ways": 3, "sample_shape": (1, 16, 16)}, tasks=1, inner_steps=1
    ),
}
TOO_SLOW = ("compile",)  # minutes of compiling
WRONG = ("vmap-batchnorm",)


@pytest.mark.parametrize("tiny", TINY)
@pytest.mark.parametrize("name", [name for name in RIVALS if name not in TOO_SLOW + WRONG])
def test_is_exact(name, tiny):
    workload, rival = TINY[tiny], RIVALS[name]
    refusal = rival.refuses(workload)
    if refusal is not None:
        assert name != OURS
        return
    if not rival.installed:
        pytest.skip(f"{rival.title} is not installed: {rival.install}")
    tasks = workload.inputs().to(torch.float64)
    call = rival.build(workload, workload.model().double(), tasks)
    call()
    found = [each.detach().numpy() if isinstance(each, torch.Tensor) else np.asarray(each) for each in call()]
    wanted = expected(workload, workload.tasks)
    assert [each.shape for each in found] == [each.shape for each in wanted]
    found, wanted = (np.concatenate([each.ravel() for each in arrays]) for arrays in (found, wanted))
    assert np.linalg.norm(found - wanted) < 1e-9 * np.linalg.norm(wanted)


def test_ours_says_where_it_is_not_fused(monkeypatch):
    monkeypatch.setattr(
        models, "odd", lambda: torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.SELU()), raising=False
    )
    assert RIVALS[OURS].remark(REGRESSION) == ""
    assert RIVALS[OURS].remark(replace(REGRESSION, net="odd", options={})).startswith("not fused: ")


def test_workloads_are_the_same_at_every_call():
    for name in ("sinusoid-t25-k1", "conv4-t8-k1"):
        workload = WORKLOADS[name]
        torch.rand(1)
        first, second = workload.inputs(), workload.inputs()
        assert torch.equal(first.support_x, second.support_x)
        assert torch.equal(first.query_y, second.query_y)
        weights = zip(workload.model().parameters(), workload.model().parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in weights)


def test_twins_of_cost_targets_are_workloads_too():
    for workload in WORKLOADS.values():
        if any(target.quantity == "cost" for target in workload.targets):
            twin = WORKLOADS[workload.twin]
            assert twin == replace(
                workload, name=twin.name, first_order=True, targets=twin.targets, shows=(), core=twin.core
            )
            assert twin.core == workload.core


def test_targets_name_rivals():
    for workload in WORKLOADS.values():
        assert {name for target in workload.targets for name in target.rivals} | set(workload.shows) <= set(RIVALS)


def test_selection():
    names = [workload.name for workload in select(["conv4-t8-k1*", "evaluation-*"])]
    assert names == ["conv4-t8-k1", "conv4-t8-k1-first-order", "evaluation-omniglot"]
    assert len(select(every=True)) == len(WORKLOADS) > len(select()) > 0
    with pytest.raises(ValueError, match=r"workloads must be .* \(got 'nope'\)"):
        select(["conv4-t8-k1", "nope"])
