"""A table is the same text wherever it is printed, and shows every cell as it is."""

import random
import string

import pytest
import torch

from metaaug_fast.report.tables import markdown, plain
from tests.building import python

CELLS = ["", "?", "[N, 4]", "[bold]x[/bold]", "[/]", ":smile:", "1,000", "λ", r"\[x]", "a" * 300]
CELLS.append("no" + ", it is long" * 40)


def drawn():
    """A head of a few columns, rows, and which columns hold numbers."""
    draw = random.Random(torch.initial_seed())
    head = draw.sample(string.ascii_letters, draw.randint(1, 5))
    rows = [[draw.choice(CELLS) for _ in head] for _ in range(draw.randint(0, 6))]
    return head, rows, draw.sample(head, draw.randint(0, len(head)))


def columns(lines, widths):
    """The lines cut into cells of these widths, two spaces apart."""
    starts = [sum(widths[:place]) + 2 * place for place in range(len(widths))]
    return [[line[start : start + width] for start, width in zip(starts, widths, strict=True)] for line in lines]


def test_every_cell_is_whole_and_numbers_end_together():
    head, rows, numbers = drawn()
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = plain(head, rows, numbers).split("\n")
    assert all(line == line.rstrip() for line in lines)
    padded = [line.ljust(sum(widths) + 2 * len(widths)) for line in lines]
    sides = [">" if name in numbers else "<" for name in head]
    assert columns(padded, widths) == [
        [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in (head, *rows)
    ]


def test_markdown_has_the_same_cells():
    head, rows, numbers = drawn()
    first, rule, *others = markdown(head, rows, numbers).split("\n")
    assert len({len(line) for line in (first, rule, *others)}) == 1
    assert [[cell.strip() for cell in line[2:-2].split(" | ")] for line in (first, *others)] == [
        [cell.strip() for cell in row] for row in (head, *rows)
    ]
    assert [cell.endswith(":") for cell in rule[2:-2].split(" | ")] == [name in numbers for name in head]


@pytest.mark.parametrize(
    "surroundings",
    [
        {"COLUMNS": "20", "LINES": "5"},
        {"FORCE_COLOR": "1", "TERM": "dumb"},
        {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"},
        {"TTY_COMPATIBLE": "1", "COLUMNS": "1"},
        {"JUPYTER_COLUMNS": "30"},
    ],
    ids=" ".join,
)
def test_surroundings_do_not_matter(surroundings, monkeypatch):
    head, rows, numbers = drawn()
    table = head, [*rows, ["wide " * 60] * len(head)], numbers
    before = plain(*table)
    assert "\x1b" not in before
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    assert plain(*table) == before


@pytest.mark.parametrize("write", [plain, markdown])
def test_a_table_that_does_not_fit_its_head_is_refused(write):
    for row in (["x"], ["x", "y", "z"]):
        with pytest.raises(ValueError, match=r"rows must have a cell for each of \['a', 'b'\] \(got \['x'"):
            write(["a", "b"], [["x", "y"], row])
    with pytest.raises(ValueError, match=r"numbers must be among \['a', 'b'\] \(got \['c'\]\)"):
        write(["a", "b"], [], ["a", "c"])


def test_who_prints_no_table_does_not_wait_for_rich():
    code = "import sys, metaaug_fast; print(sorted({'rich', 'metaaug_fast.report.tables'} & set(sys.modules)))"
    assert python(code) == "['metaaug_fast.report.tables']\n"
