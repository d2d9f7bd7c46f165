"""Each example runs as a program, and its figure beats the baselines that it prints."""

import ast
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NAMES = [path.stem for path in EXAMPLES]
TITLE = re.compile(r".*\((lower|higher) is better\)")
ROW = re.compile(r"  (.+): (\d+\.\d+) \+- (\d+\.\d+)")


def tables(shown: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Which way is better, and the figures with their intervals, the example's own first, of each table."""
    found: list[tuple[str, list[tuple[float, float]]]] = []
    for line in shown.splitlines():
        if title := TITLE.fullmatch(line):
            found.append((title[1], []))
        elif row := ROW.fullmatch(line):
            found[-1][1].append((float(row[2]), float(row[3])))
    return found


def beats(better: str, rows: list[tuple[float, float]]) -> bool:
    """Whether the first figure is better than each other one by more than both intervals."""
    sign = 1 if better == "higher" else -1
    (figure, interval), *others = rows
    return all(sign * (figure - other) > interval + spread for other, spread in others)


def test_what_beats_what():
    shown = "a (lower is better)\n  x: 0.10 +- 0.02\n  y z: 0.20 +- 0.07\nb (higher is better)\n  x: 0.5 +- 0.1\n"
    assert tables(shown) == [("lower", [(0.1, 0.02), (0.2, 0.07)]), ("higher", [(0.5, 0.1)])]
    assert beats(*tables(shown)[0])
    assert not beats("higher", [(0.1, 0.02), (0.2, 0.07)])
    assert not beats("lower", [(0.1, 0.02), (0.2, 0.09)])
    assert not beats("lower", [(0.1, 0.02), (0.2, 0.01), (0.09, 0.01)])


def test_there_are_examples():
    known = {"regression", "intents", "table", "recommendation", "navigation", "continual", "augment_your_own_folder"}
    assert known <= set(NAMES)


@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_an_example_is_short_says_what_it_is_and_is_listed(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 100
    assert ast.get_docstring(ast.parse(source))
    assert f"]({path.name})" in (path.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_an_example_beats_its_baselines(path, request, tmp_path):
    arguments = [str(request.getfixturevalue("real_clinc150"))] if path.stem == "intents" else []
    program = [sys.executable, str(path), *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(done.stdout, f"{path.stem}: {after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.0f} CPU s")
    assert done.returncode == 0, done.stderr
    found = tables(done.stdout)
    assert found
    for better, rows in found:
        assert len(rows) > 1
        assert beats(better, rows), done.stdout


def test_intents_says_what_it_needs():
    path = next(path for path in EXAMPLES if path.stem == "intents")
    clean = {name: value for name, value in os.environ.items() if name != "METAAUG_DATA"}
    done = subprocess.run([sys.executable, str(path)], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "data_full.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("judged", [True, False])
def test_augmenting_a_folder_of_ones_own(tmp_path, judged):
    """Three commands that are shown, of a user's pictures, with and without others to judge on."""
    for name in ("few", "others"):
        for label in ("cat", "dog"):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(2):
                pixels = np.random.default_rng(int(torch.randint(2**32, ()))).integers(
                    0, 256, (30, 20, 3), dtype=np.uint8
                )
                Image.fromarray(pixels).save(tmp_path / name / label / f"{number}.png")
    path = next(path for path in EXAMPLES if path.stem == "augment_your_own_folder")
    program = [sys.executable, str(path), "few", *(["others"] * judged), "--quick"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ metaaug-fast augment") == 3
    assert len(tables(done.stdout)) == judged
    pictures = tmp_path / "augmented" / "own" / "pictures"
    assert sorted(each.name for each in pictures.glob("[!.]*")) == ["cat", "dog"]
    assert all(len(list(each.iterdir())) == 32 for each in pictures.glob("[!.]*"))
