"""Judgements, tables, JSON and pictures of results that are made up."""

import json
import math
from dataclasses import replace

import pytest
import torch

from metaaug_fast.bench import suite
from metaaug_fast.bench.ceilings import Ceilings
from metaaug_fast.bench.growth import Curve, Gain, Growth
from metaaug_fast.bench.machine import machine
from metaaug_fast.bench.operations import Count
from metaaug_fast.bench.pictures import draw, draw_scaling
from metaaug_fast.bench.report import MARKDOWN, PLAIN, Report, Result, judge
from metaaug_fast.bench.row import Row
from metaaug_fast.bench.scaling import thread_gain
from metaaug_fast.bench.workloads import Target, Workload

CEILINGS = Ceilings(convolution=100.0, gemm=200.0, copy=10.0)
MLP = Workload("one", "mlp", (1,), 2, 3, 3, 2, 0.1, None, {"sizes": (1, 4, 1)}, targets=())
CONV = Workload("two", "conv4", (1, 28, 28), 2, 5, 5, 1, 0.4, targets=())


def row(rival, seconds=None, status="exact", **others):
    quartiles = {} if seconds is None else {"low": 0.9 * seconds, "median": seconds, "high": 1.1 * seconds, "rounds": 3}
    return Row(rival, rival.upper(), status, **({"first_call": 2 * (seconds or 0), "peak": 2**20} | quartiles | others))


def result(*rows, workload=MLP, count=Count(1e9, 1e9)):  # noqa: B008
    return Result(workload, rows, count)


def judged(target, *args, twin=None, **others):
    verdict = judge(target, result(*args, **others), CEILINGS, twin)
    return verdict.met, verdict.value, verdict.text


OURS = row("metaaug_fast", 1.0)


def test_speedup_is_over_the_fastest_exact_one():
    rivals = (row("jax", 5.0), row("compile", 3.0), row("vmap", 2.0), row("loop", 0.5, "wrong"))
    met, value, text = judged(Target("speedup", 2.5, ("jax", "compile")), OURS, *rivals)
    assert (met, value) == (True, 3.0)
    assert text == "3.00 times as fast as COMPILE (at least 2.5)"
    met, value, text = judged(Target("speedup", 4.0), OURS, *rivals)
    assert (met, value) == (False, 2.0)
    assert text == "2.00 times as fast as VMAP (at least 4), off by 50%"


def test_speedup_says_which_rival_is_not_in_it():
    cut = row("compile", status="cut off")
    met, _, text = judged(Target("speedup", 4.0, ("jax", "compile")), OURS, row("jax", 5.0), cut)
    assert met is True
    assert "without COMPILE" in text
    met, value, text = judged(Target("speedup", 4.0, ("jax", "compile")), OURS, row("vmap", 5.0), cut)
    assert (met, value) == (None, None)
    assert text == "speedup: no exact time of JAX jit(vmap), torch.compile(vmap)"


@pytest.mark.parametrize("ours", [row("metaaug_fast", 1.0, "wrong"), row("metaaug_fast", status="failed")])
@pytest.mark.parametrize("quantity", ["speedup", "cost", "ceiling", "first call", "memory"])
def test_nothing_is_judged_without_an_exact_time_of_ours(ours, quantity):
    met, value, text = judged(Target(quantity, 1.0), ours, row("loop", 2.0))
    assert (met, value, text) == (None, None, f"{quantity}: ours has no exact time")


def test_cost_is_over_the_first_order_twin():
    target = Target("cost", 2.2)
    assert judged(target, OURS)[0] is None
    assert judged(target, OURS, twin=result(row("metaaug_fast", 0.5, "wrong")))[0] is None
    assert judged(target, OURS, twin=result(row("metaaug_fast", 0.5)))[:2] == (True, 2.0)
    met, value, text = judged(target, OURS, twin=result(row("metaaug_fast", 0.25)))
    assert (met, value) == (False, 4.0)
    assert "off by 82%" in text


def test_share_of_the_ceiling_that_bounds_the_workload():
    target = Target("ceiling", 0.5)
    assert judged(target, OURS, count=Count(120e9, 1e9))[:2] == (True, 0.6)
    assert judged(target, OURS, count=Count(40e9, 1e9), workload=CONV)[:2] == (False, 0.4)
    assert judged(target, OURS, count=None)[0] is None


def test_first_call_is_what_it_takes_more_than_a_later_one():
    target = Target("first call", 0.5)
    assert judged(target, row("metaaug_fast", 3.0, first_call=3.25))[:2] == (True, 0.25)
    assert judged(target, row("metaaug_fast", 3.0, first_call=2.0))[:2] == (True, 0.0)
    assert judged(target, row("metaaug_fast", 3.0, first_call=4.0))[:2] == (False, 1.0)


def test_memory_is_over_the_least_of_the_exact_ones():
    target = Target("memory", 1.0)
    rivals = (row("loop", 2.0, peak=4 * 2**20), row("vmap", 2.0, peak=8 * 2**20), row("jax", 2.0, "wrong", peak=1))
    assert judged(target, row("metaaug_fast", 1.0, peak=2**20), *rivals)[:2] == (True, 0.25)
    met, value, text = judged(target, row("metaaug_fast", 1.0, peak=6 * 2**20), *rivals)
    assert (met, value) == (False, 1.5)
    assert text == "peak memory 6.0 against 4.0 MB of LOOP (at most the least), off by 50%"
    assert judged(target, OURS)[0] is None


@pytest.fixture
def report():
    """Two workloads, a twin, and a row of every status."""
    conv = replace(CONV, targets=(Target("cost", 2.2), Target("speedup", 9.0), Target("ceiling", 0.001)))
    rows = [row("metaaug_fast", 1.0), row("loop", 3.0), row("vmap-batchnorm", 2.0, "wrong", error=math.inf, note="off")]
    rows += [row("higher", status="missing", note="not installed: pip install higher"), row("jax", status="failed")]
    rows += [row("compile", status="cut off"), row("learn2learn", status="unsupported", note="only MAML here")]
    twin = replace(conv, name=conv.twin, first_order=True, targets=())
    return Report(
        {**machine(1), "processor": "a processor"},
        CEILINGS,
        [result(*rows, workload=conv), result(row("metaaug_fast", 0.5), workload=twin, count=None), result(OURS)],
    )


def test_table_shows_every_rival_and_target(report):
    for form, shown in (
        (MARKDOWN, ("## two\n", "| LOOP ", "| COMPILE ")),
        (PLAIN, ("\ntwo\n", "\nLOOP ", "\nCOMPILE ")),
    ):
        text = report.text(form)
        for each in (*shown, "a processor", " 3.00 ", "* HIGHER: not installed: pip install higher", "cut off", "inf"):
            assert each in text
        assert "* met: second order costs 2.00 first orders (at most 2.2)" in text
        assert "* MISSED: 3.00 times as fast as LOOP (at least 9), off by 67%" in text
        assert text.endswith(report.summary())
    assert str(report) == report.text(PLAIN)
    assert report.summary().splitlines() == [
        "targets: 2 met, 1 missed, 0 not judged",
        "  two: 3.00 times as fast as LOOP (at least 9), off by 67%",
    ]


def test_json_round_trip(report):
    content = report.as_dict()
    again = json.loads(json.dumps(content, allow_nan=False))
    assert [each["name"] for each in again["workloads"]] == ["two", "two-first-order", "one"]
    workload = again["workloads"][0]
    assert [each["status"] for each in workload["rows"]] == [each.status for each in report.results[0].rows]
    assert workload["rows"][1]["median"] == 3.0
    assert workload["rows"][1]["gflops"] == pytest.approx(1 / 3)
    assert workload["rows"][2]["error"] is None
    assert [each["met"] for each in workload["targets"]] == [True, False, True]
    assert [each["target"]["quantity"] for each in workload["targets"]] == ["cost", "speedup", "ceiling"]


def test_pictures(report, tmp_path):
    draw(report, tmp_path / "bench.png")
    draw(replace(report, results=[]), tmp_path / "empty.png")
    growth = Growth("T tasks", (1, 4), [Curve("jax", "JAX", [row("jax", 1.0), row("jax", status="cut off")])])
    draw_scaling([growth, growth], tmp_path / "scaling.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("bench.png", "empty.png", "scaling.png"))
    assert "|  4 | cut off |" in growth.text(MARKDOWN)
    assert growth.text(PLAIN).splitlines()[-1] == "4  cut off"


def test_two_threads_are_judged_by_time_and_by_bits():
    assert Gain("g", 2.0, 1.0, True).cells() == ["g", "2000", "1000", "2.00", "met", "met"]
    assert Gain("g", 1.5, 1.0, False).cells() == ["g", "1500", "1000", "1.50", "MISSED, off by 17%", "MISSED"]


@pytest.mark.slow
def test_two_threads_give_the_same_bits():
    gain = thread_gain(replace(MLP, tasks=5), rounds=1, limit=60)
    assert gain.same_bits
    assert gain.one > 0
    assert gain.two > 0


@pytest.mark.slow
def test_a_run_leaves_table_json_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_ceilings", lambda threads: CEILINGS)
    said = []
    out = tmp_path / "new" / "folder"
    report = suite.bench([MLP], out, rivals=(), threads=1, rounds=1, say=said.append)
    assert [each.rival for each in report.results[0].rows] == ["metaaug_fast"]
    assert json.loads((out / "bench.json").read_text()) == report.as_dict()
    assert (out / "bench.md").read_text() == f"{report.text(MARKDOWN)}\n"
    assert (out / "bench.png").exists()
    assert said == ["one: metaaug_fast", "one: rounds"]
    assert report.machine["torch"] == torch.__version__
