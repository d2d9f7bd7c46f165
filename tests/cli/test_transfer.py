"""`metaaug-fast transfer`, as a user starts it."""

import json

import pytest

from metaaug_fast.cli.main import main
from tests.building import picture_folder

QUICK = ["--pretrain-steps", "3", "--meta-steps", "2", "--tune-steps", "3", "--tasks", "2", "--queries", "2"]
QUICK += ["--model", "strided_conv4", "--hidden", "4", "--seeds", "2", "--threads", "1", "--quiet"]


def one_line(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning:" not in line]
    assert len(lines) == 1
    return lines[0]


def test_from_letters_to_a_folder_of_ones_own(tmp_path, capsys):
    root, out = str(picture_folder(tmp_path / "mine", each=6)), tmp_path / "found.json"
    arguments = ["--sources", "glyphs", "--target", "folder", "--root", root, "--shots", "1,3", "--lambda", "0.5"]
    assert main(["transfer", *arguments, *QUICK, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "3 classes of 9 held-out samples; meta-tasks of 3 ways, 1, 3 shots" in shown
    for text in (
        "target accuracy",
        "1 a class",
        "3 a class",
        "scratch",
        "fine-tuned",
        "meta-transfer - scratch",
        "2 seeds",
    ):
        assert text in shown
    report = json.loads(out.read_text())
    assert report["sources"] == ["glyphs"]
    assert report["target"] == "folder"
    assert report["recipe"]["target_weight"] == 0.5
    assert len(report["figures"]) == 2 * (4 + 3)
    assert all(len(each["accuracies"]) == 2 for each in report["figures"])
    assert report["config"]["model"]["hidden"] == 4


def test_sources_of_other_shapes_are_converted_where_that_is_asked_for(tmp_path, capsys):
    root, other = (
        str(picture_folder(tmp_path / name, size, channels, each=6))
        for name, size, channels in (("mine", 20, 3), ("other", 16, 1))
    )
    arguments = ["--sources", f"glyphs,folder={other}", "--target", "folder", "--root", root, "--shots", "2"]
    arguments = ["transfer", *arguments, *QUICK, "--out", str(tmp_path / "found.json")]
    message = one_line(arguments, capsys)
    assert "sources must have samples of the target's shape, (3, 20, 20) (got (1, 28, 28) of glyphs" in message
    assert main([*arguments, "--convert"]) == 0
    shown = capsys.readouterr().out
    assert "glyphs: pictures (1, 28, 28) are brought to (3, 20, 20)" in shown
    assert "folder: pictures (1, 16, 16) are brought to (3, 20, 20)" in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--sources", "glyhps"], "data must be one of"),
        (["--sources", "glyhps"], "did you mean 'glyphs'?"),
        (["--sources", "glyphs,glyphs"], "sources must be named once (got glyphs twice)"),
        (["--sources", "omniglot"], "sources must say where omniglot lies, omniglot=DIR (got omniglot)"),
        (["--sources", "glyphs=here"], "sources must have a folder only where data lie in one (got glyphs=here)"),
        (["--sources", "sinusoid"], "sources must be labelled samples of numbers (got sinusoid)"),
        (["--sources", "omniglot=nowhere"], "nowhere"),
        (["--target", "mnits"], "did you mean 'mnist'?"),
        (["--target", "mnist"], "data.root must be given: mnist has no default for it (got none)"),
        (["--shots", "0"], "argument --shots: must be an integer >= 1 (got 0)"),
        (["--shots", "5,"], "argument --shots: must be an integer >= 1 (got )"),
        (["--shots", "99"], "shots must leave samples of every class to judge on (got 99; class"),
        (["--seeds", "0"], "argument --seeds: must be an integer >= 1 (got 0)"),
        (["--lambda", "-1"], "argument --lambda: must be a number >= 0 (got -1)"),
        (["--learns", "body"], "learns must be one of scale_shift, head, weights, all (got 'body')"),
        (["--hiden", "4"], "--hiden is no option here; did you mean '--hidden'?"),
        (["--batch-norm", "none"], "batch_norm must be one of frozen, batch (got 'none')"),
        (["--ways", "5"], "--ways is no option here"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(given, message, tmp_path, capsys):
    arguments = {"--sources": "glyphs", "--target": "glyphs", "--out": str(tmp_path / "found.json")}
    arguments |= dict(zip(given[::2], given[1::2], strict=True))
    line = one_line(["transfer", *QUICK, *(each for pair in arguments.items() for each in pair)], capsys)
    assert message in line
    assert line.startswith("metaaug-fast transfer: error: ")
