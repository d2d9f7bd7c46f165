"""`metaaug-fast evaluate --attack`: figures under attack, with the attack's settings."""

import json

import pytest

from metaaug_fast.cli.main import main

QUICK = ["--steps", "3", "--tasks", "2", "--episodes", "6", "--validation-episodes", "2", "--quiet", "--hidden", "4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of Adversarial Querying on letters."""
    path = tmp_path_factory.mktemp("trained") / "robust.safetensors"
    arguments = ["adv_query", "--data", "glyphs", "--model", "strided_conv4", "--radius", "0.2", "--low", "0", *QUICK]
    assert main(["train", *arguments, "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize(
    ("options", "words", "settings"),
    [
        (
            ["--attack", "pgd", "--radius", "0.25", "--attack-steps", "4", "--attack-low", "0", "--attack-high", "1"],
            "under pgd of radius 0.25, 4 steps of 0.15625 from a random start, in 0..1",
            {"name": "pgd", "radius": 0.25, "steps": 4, "step": 0.15625, "random_start": True, "low": 0, "high": 1},
        ),
        (
            ["--attack", "pgd", "--radius", "0.25", "--attack-step", "0.125"],
            "under pgd of radius 0.25, 20 steps of 0.125 from a random start)",
            {
                "name": "pgd",
                "radius": 0.25,
                "steps": 20,
                "step": 0.125,
                "random_start": True,
                "low": None,
                "high": None,
            },
        ),
        (
            ["--attack", "fgsm", "--radius", "0.5"],
            "under fgsm of radius 0.5, 1 step of 0.5)",
            {"name": "fgsm", "radius": 0.5, "steps": 1, "step": 0.5, "random_start": False, "low": None, "high": None},
        ),
    ],
    ids=["pgd", "step", "fgsm"],
)
def test_both_figures_and_the_attack_are_shown_and_reported(trained, tmp_path, capsys, options, words, settings):
    report = tmp_path / "report.json"
    assert main(["evaluate", str(trained), "--report", str(report), "--episodes", "8", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("new classes: accuracy")]
    assert ["under" in line for line in lines] == [False, True]
    assert words in lines[1]
    content = json.loads(report.read_text())
    assert content["evaluation"]["attack"] is None
    assert content["attacked"]["attack"] == settings
    assert content["attacked"]["episodes"] == 8
    assert content["attacked"]["loss"] > content["evaluation"]["loss"]
    assert f"{100 * content['attacked']['mean']:.2f} %" in lines[1]


def test_a_report_without_an_attack_has_none(trained, tmp_path):
    report = tmp_path / "report.json"
    assert main(["evaluate", str(trained), "--report", str(report), "--episodes", "4"]) == 0
    assert "attacked" not in json.loads(report.read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attack", "pgd"], "--radius must be given, how far pgd may move an element of a query (got none)"),
        (["--radius", "0.1"], "--radius needs an --attack, pgd or fgsm (got 0.1 alone)"),
        (["--attack-steps", "3"], "--attack-steps needs an --attack, pgd or fgsm (got 3 alone)"),
        (
            ["--attack", "fgsm", "--radius", "0.1", "--attack-steps", "3"],
            "--attack-steps must be left out with fgsm, one step of the whole radius (got 3)",
        ),
        (
            ["--attack", "pgd", "--radius", "0.1", "--attack-low", "1", "--attack-high", "0"],
            "--attack-low must be below --attack-high, 0 (got 1)",
        ),
        (
            ["--attack", "pgd", "--radius", "0.1", "--attack-low", "0.5"],
            "inputs must lie between low and high, 0.5 and inf, to be attacked (got 0)",
        ),
    ],
)
def test_options_that_do_not_fit(trained, capsys, options, message):
    capsys.readouterr()
    assert main(["evaluate", str(trained), "--episodes", "4", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attack", "blur"], "argument --attack: invalid choice: 'blur'"),
        (["--attack", "pgd", "--radius", "-1"], "argument --radius: must be a number >= 0 (got -1)"),
        (
            ["--attack", "pgd", "--radius", "1", "--attack-steps", "0"],
            "--attack-steps: must be an integer >= 1 (got 0)",
        ),
        (["--attack", "pgd", "--radius", "1", "--attack-low", "x"], "argument --attack-low: must be a number (got x)"),
    ],
)
def test_options_that_are_none(trained, capsys, options, message):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", str(trained), *options])
    assert message in capsys.readouterr().err
