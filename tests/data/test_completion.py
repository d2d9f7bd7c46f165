import pytest
import torch

from metaaug_fast.cli.main import main
from metaaug_fast.data import Completion, Episodes, Glyphs, Pixels


def test_it_is_the_pixels_of_a_split_of_that_data_set():
    for split in ("train", "test"):
        named, own = Completion("glyphs", split=split), Pixels(Glyphs(split=split))
        tasks = [Episodes(source, shots=3, queries=4, tasks=5, seed=1).batch(2) for source in (named, own)]
        assert all(map(torch.equal, *(each.tensors for each in tasks)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pictures": "sinusoid"}, r"pictures must be one of .*mnist.* \(got 'sinusoid'\)"),
        ({"pictures": "completion"}, r"pictures must be one of .* \(got 'completion'\)"),
        ({}, r"root must be the folder of mnist \(got None\)"),
        ({"pictures": "glyphs", "root": "here"}, r"root must not be given: glyphs takes none \(got 'here'\)"),
        ({"pictures": "glyphs", "download": True}, r"download must not be given: glyphs takes none \(got True\)"),
        ({"pictures": "glyphs", "split": "some"}, "split must be one of"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Completion(**given)


def test_the_command_line_names_it(tmp_path, capsys):
    sizes = ["--shots", "20", "--queries", "30", "--tasks", "2", "--steps", "2", "--episodes", "4"]
    options = ["--data", "completion", "--pictures", "glyphs", *sizes, "--quiet", "--out", str(tmp_path / "run")]
    assert main(["train", "cnp", *options]) == 0
    assert "new tasks: negative log-likelihood" in capsys.readouterr().out
    assert main(["train", "cnp", "--data", "completion", "--quiet", "--out", str(tmp_path / "other")]) == 2
    assert "root must be the folder of mnist" in capsys.readouterr().err
