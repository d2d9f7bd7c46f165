"""Rivals that are right, wrong, broken or absent."""

import multiprocessing
import os
from pathlib import Path

import pytest

from metaaug_fast.bench.harness import measure
from metaaug_fast.bench.rivals import RIVALS, Rival
from metaaug_fast.bench.workloads import Workload
from tests.bench import fake_rivals

pytestmark = pytest.mark.slow
TINY = Workload("tiny", "mlp", (1,), 2, 3, 3, 2, 0.1, None, {"sizes": (1, 4, 1)})


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    pids = tmp_path_factory.mktemp("harness") / "pids"
    os.environ[fake_rivals.PIDS] = str(pids)
    rivals = {name: Rival(name, getattr(fake_rivals, name)) for name in ("raising", "dying", "hanging")}
    rivals |= {name: Rival(name, getattr(fake_rivals, name)) for name in ("off_by_a_percent", "hanging_later")}
    rivals["ours"] = RIVALS["metaaug_fast"]
    rivals["absent"] = Rival("absent", fake_rivals.raising, "no_such_package", "pip install it")
    rivals["refusing"] = Rival("refusing", fake_rivals.raising, refuses=lambda workload: "not this one")
    try:
        found = measure(TINY, list(rivals), threads=1, rounds=2, limit=2, rivals=rivals)
    finally:
        del os.environ[fake_rivals.PIDS]
    assert [row.rival for row in found] == list(rivals)
    return {row.rival: row for row in found} | {"pids": pids.read_text().split()}


def test_right_one_is_timed(rows):
    row = rows["ours"]
    assert row.status == "exact"
    assert row.error < 1e-5
    assert row.rounds == 2
    assert 0 < row.low <= row.median <= row.high
    assert row.first_call > 0
    assert row.total_peak > row.peak >= 0


def test_wrong_one_is_marked_with_its_error(rows):
    row = rows["off_by_a_percent"]
    assert row.status == "wrong"
    assert row.error == pytest.approx(0.01)
    assert "1e-02 off in float32; in float64 on 2 tasks 1e-02" in row.note
    assert row.timed


def test_broken_ones_say_why(rows):
    assert (rows["raising"].status, rows["raising"].note) == ("failed", "ValueError: no such op")
    assert (rows["dying"].status, rows["dying"].note) == ("failed", "the process died (exit code 3)")
    assert not rows["raising"].timed
    assert not rows["dying"].timed


def test_hanging_ones_are_cut_off_with_all_that_they_started(rows):
    assert (rows["hanging"].status, rows["hanging"].note) == ("cut off", "no result within 2 s")
    assert rows["hanging_later"].status == "cut off"
    assert rows["hanging_later"].first_call is not None
    assert not rows["hanging_later"].timed
    assert len(rows["pids"]) == 2
    assert not any(map(running, rows["pids"]))
    assert not multiprocessing.active_children()


def test_absent_ones_are_shown(rows):
    assert (rows["absent"].status, rows["absent"].note) == ("missing", "not installed: pip install it")
    assert (rows["refusing"].status, rows["refusing"].note) == ("unsupported", "not this one")
