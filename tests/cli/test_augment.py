"""`metaaug-fast augment`, as a user starts it."""

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import metaaug_fast as mf
from metaaug_fast.cli.main import main
from metaaug_fast.runs import checkpoint
from tests.building import picture_folder

QUICK = ["--tasks", "2", "--queries", "2", "--shots", "2", "--hidden", "4", "--steps", "3"]
BRIEF = ["--judge-steps", "2", "--seeds", "2", "--threads", "1", "--quiet", "--per-class", "3"]
LOOP = ["--ways", "3", "--inner-steps", "2"]
POLICY = ["policy", *QUICK, *BRIEF, *LOOP, "--transforms", "rotation,noise"]
METHODS = {
    "policy": POLICY,
    "hallucinate": ["hallucinate", *QUICK, *BRIEF, *LOOP, "--made", "1", "--noise", "3"],
    "generate": ["generate", *QUICK, *BRIEF, "--blocks", "1", "--repeats", "1", "--draw-steps", "3"],
    "retrieve": ["retrieve", *QUICK, *BRIEF, *LOOP, "--found", "2", "--pool", "glyphs"],
    "distill": [
        "distill",
        "--shots",
        "3",
        "--hidden",
        "4",
        "--steps",
        "2",
        "--inner-steps",
        "2",
        "--starts",
        "2",
        *BRIEF,
    ],
}


def names(path):
    return sorted(each.name for each in path.iterdir())


def files_of(path):
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*.png")}


def run(out, *arguments):
    return main(["augment", *arguments, "--out", str(out)])


def one_line(arguments, capsys):
    try:
        code = main(["augment", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning:" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("metaaug-fast augment")
    return lines[0]


@pytest.mark.parametrize("method", METHODS)
def test_more_of_new_classes(method, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert run(out, *METHODS[method], "--classes", "4") == 0
    shown = capsys.readouterr().out
    for text in ("4 classes of", "3 new ones of each; judged on", "original + augmented - original", "2 seeds"):
        assert text in shown
    assert {"pictures", "samples.png", "report.json"} <= set(names(out))
    report = json.loads((out / "report.json").read_text())
    assert report["augment"] == method
    assert report["data"]["name"] == "glyphs"
    assert [each["way"] for each in report["figures"]] == [
        "original", "original + augmented", "original + augmented - original",
    ]  # fmt: skip
    assert all(len(each["accuracies"]) == 2 for each in report["figures"])
    assert report["settings"]["hidden"] == 4
    assert set(report["seconds"]) == {"making", "judging"} | ({"meta-training"} if method != "distill" else set())
    assert report["held_out_pictures"] > 0
    data = mf.data.Folder(out / "pictures", "all")
    assert data.sample_shape == (1, 28, 28)
    counts = {each["folder"]: each["originals"] + each["new"] for each in report["classes"]}
    assert dict(zip(data.names, data.counts.sum(1).tolist(), strict=True)) == counts
    wanted = METHODS[method][METHODS[method].index("--shots") + 1]
    for each in report["classes"]:
        assert each["originals"] == int(wanted)
        assert each["new"] == 3 or (method == "retrieve" and each["new"] <= 3)
    if method == "policy":
        assert "policy.png" in names(out)
        assert set(report["policy"]) == {"rotation", "noise"}
        assert "probability  strength" in shown
    if method != "distill":
        assert report["history"]["training"][-1]["step"] == 3
        assert "learned.safetensors" in names(out)


@pytest.mark.parametrize("method", ["policy", "hallucinate", "retrieve"])
def test_learning_through_maml(method, tmp_path):
    assert run(tmp_path, *METHODS[method], "--through", "maml") == 0
    state = checkpoint.load(tmp_path / "learned.safetensors")
    assert state["config"]["settings"]["through"] == "maml"


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_pictures(method, tmp_path):
    given = [*METHODS[method], "--judge-steps", "1", "--seeds", "1"]
    for name, seed in (("one", "4"), ("same", "4"), ("other", "5")):
        assert run(tmp_path / name, *given, "--seed", seed) == 0
    one, same, other = (files_of(tmp_path / name / "pictures") for name in ("one", "same", "other"))
    assert one == same
    assert one != other


@pytest.mark.parametrize("method", [each for each in METHODS if each != "distill"])
def test_what_has_learned_serves_other_pictures(method, tmp_path, capsys):
    """Of a user's folder, of another size and in colour, without meta-training."""
    assert run(tmp_path / "first", *METHODS[method]) == 0
    few = picture_folder(tmp_path / "few", 20, 3)
    test = picture_folder(tmp_path / "test", 24, 1, seed=1)
    pool = ["--pool", str(picture_folder(tmp_path / "pool", 18, 1, each=5))] if method == "retrieve" else []
    learned = ["--learned", str(tmp_path / "first" / "learned.safetensors"), "--few", str(few), "--test", str(test)]
    capsys.readouterr()
    assert run(tmp_path / "second", method, *BRIEF, *learned, *pool) == 0
    shown = capsys.readouterr().out
    assert f"{few}: pictures (3, 20, 20) are brought to (1, 28, 28)" in shown
    assert "3 classes of 4 samples; 3 new ones of each; judged on 12 others" in shown
    assert "learned.safetensors" not in names(tmp_path / "second")
    report = json.loads((tmp_path / "second" / "report.json").read_text())
    assert report["settings"]["tasks"] == 2
    assert report["history"] is None
    for name in ("class0", "class1", "class2"):
        own = sorted((tmp_path / "second" / "pictures" / name).iterdir())
        assert len(own) == 7 or method == "retrieve"
    again = run(tmp_path / "third", method, *BRIEF, *learned, *pool, "--judge-steps", "1")
    assert again == 0
    assert files_of(tmp_path / "second" / "pictures") == files_of(tmp_path / "third" / "pictures")


def test_pictures_of_ones_own_without_others_to_judge_on(tmp_path, capsys):
    few = picture_folder(tmp_path / "few", 28, 1)
    assert run(tmp_path / "out", *POLICY, "--few", str(few)) == 0
    assert "not judged: --test DIR names other pictures" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["figures"] == []
    own = sorted((tmp_path / "out" / "pictures" / "class1").glob("[!.]*"))
    originals = sorted((few / "class1").iterdir())
    assert len(own) == 7
    for one, other in zip(own, originals, strict=False):  # in front, as they were
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_of_a_class(method, tmp_path):
    per_class = ["--per-class", "1"] if method == "distill" else []
    assert run(tmp_path, *METHODS[method], "--shots", "1", "--judge-steps", "1", *per_class) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert {each["originals"] for each in report["classes"]} == {1}


def test_distilled_pictures_keep_their_own_shape(tmp_path):
    few = picture_folder(tmp_path / "few", 20, 3)
    assert run(tmp_path / "out", *METHODS["distill"], "--few", str(few)) == 0
    assert mf.data.Folder(tmp_path / "out" / "pictures", "all").sample_shape == (3, 20, 20)


def test_learning_from_a_folder_in_colour(tmp_path):
    learn = picture_folder(tmp_path / "learn", 24, 3, classes=12, each=5)
    given = [*POLICY, "--data", "folder", "--root", str(learn), "--size", "16", "--classes", "2"]
    assert run(tmp_path / "out", *given) == 0
    assert mf.data.Folder(tmp_path / "out" / "pictures", "all").sample_shape == (3, 16, 16)


@pytest.mark.parametrize("method", [each for each in METHODS if each != "distill"])
def test_a_resumed_run_is_the_uninterrupted_one(method, tmp_path):
    longer = [*METHODS[method], "--steps", "5"]
    assert run(tmp_path / "whole", *longer) == 0
    assert run(tmp_path / "parts", *METHODS[method]) == 0
    assert run(tmp_path / "parts", *longer, "--resume") == 0
    one, other = (checkpoint.load(tmp_path / name / "learned.safetensors") for name in ("whole", "parts"))
    assert one["step"] == other["step"] == 5
    assert one["config"] == other["config"]
    assert all(torch.equal(value, other["learner"][name]) for name, value in one["learner"].items())
    assert files_of(tmp_path / "whole" / "pictures") == files_of(tmp_path / "parts" / "pictures")


def test_a_damaged_checkpoint_goes_on_from_the_one_before(tmp_path, capsys):
    assert run(tmp_path, *POLICY) == 0
    before = checkpoint.load(tmp_path / "learned.safetensors")
    assert run(tmp_path, *POLICY, "--steps", "5", "--resume") == 0
    after = checkpoint.load(tmp_path / "learned.safetensors")
    (tmp_path / "learned.safetensors").write_bytes(b"damage")
    checkpoint.save(tmp_path / "learned.previous.safetensors", before)
    capsys.readouterr()
    assert run(tmp_path, *POLICY, "--steps", "5", "--resume") == 0
    assert capsys.readouterr().err.count("going on from the checkpoint before it") == 1
    found = checkpoint.load(tmp_path / "learned.safetensors")
    assert all(torch.equal(value, found["learner"][name]) for name, value in after["learner"].items())


def test_pictures_of_mixed_sizes_are_brought_to_one(tmp_path):
    few = picture_folder(tmp_path / "few")
    Image.new("L", (31, 31)).save(few / "class2" / "9.png")
    assert run(tmp_path / "out", *POLICY, "--few", str(few), "--size", "16") == 0
    assert mf.data.Folder(tmp_path / "out" / "pictures", "all").sample_shape == (1, 16, 16)


@pytest.mark.slow
def test_stopped_by_ctrl_c(tmp_path):
    """It saves, says how to go on, and goes on to the same pictures."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = [each for each in POLICY if each != "--quiet"]
    program = [sys.executable, "-m", "metaaug_fast", "augment", *given, "--steps", "1000000"]
    process = subprocess.Popen(
        [*program, "--out", str(parts)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for shown in iter(lambda: process.stderr.read(40), ""):
        if "loss" in shown:
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped by SIGINT; to go on: metaaug-fast augment policy" in out
    assert out.rstrip().endswith("--resume")
    assert names(parts) == ["learned.safetensors"]
    steps = str(checkpoint.load(parts / "learned.safetensors")["step"] + 5)
    assert run(parts, *given, "--quiet", "--steps", steps, "--resume") == 0
    assert run(whole, *given, "--quiet", "--steps", steps) == 0
    assert files_of(whole / "pictures") == files_of(parts / "pictures")


def test_what_does_not_fit_a_checkpoint(tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out, *POLICY) == 0
    learned = str(out / "learned.safetensors")
    capsys.readouterr()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"damage")
    other = tmp_path / "other.safetensors"
    checkpoint.save(other, {"config": {}, "learner": {}})
    content = checkpoint.load(learned)
    odd = tmp_path / "odd.safetensors"
    checkpoint.save(odd, {**content, "config": {**content["config"], "settings": {"__class__": "os.system"}}})
    short = tmp_path / "short.safetensors"
    checkpoint.save(short, {**content, "learner": {}})
    for given, message in (
        ([*POLICY, "--resume", "--inner-lr", "0.1", "--out", str(out)], "inner_lr must be 0.05, as"),
        ([*POLICY, "--resume", "--seed", "3", "--out", str(out)], "seed must be 0, as"),
        ([*POLICY, "--resume", "--out", str(tmp_path / "new")], "no checkpoint at"),
        ([*METHODS["hallucinate"], "--resume", "--out", str(out)], "must be of hallucinate (got one of policy)"),
        (["policy", "--learned", str(bad)], "is damaged or no checkpoint"),
        (["policy", "--learned", str(other)], "is no checkpoint of metaaug-fast augment"),
        (["policy", "--learned", str(odd)], "has settings that are none of policy"),
        (["policy", "--learned", str(short)], "does not fit its settings"),
        (["policy", "--learned", str(tmp_path / "none")], "no checkpoint at"),
        (["generate", "--learned", learned], "must be of generate (got one of policy)"),
        (["policy", "--learned", learned, "--copies", "4"], "copies must not be given with learned"),
        (["policy", "--learned", learned, "--resume"], "learned must not be given with resume"),
    ):
        assert message in one_line([*given, *BRIEF], capsys)


def test_bad_input_is_one_line_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture_folder(tmp_path / "few")
    single = picture_folder(tmp_path / "single")
    for name in ("1.png", "2.png", "3.png"):
        (single / "class1" / name).unlink()
    mixed = picture_folder(tmp_path / "mixed")
    Image.new("L", (30, 28)).save(mixed / "class2" / "9.png")
    broken = picture_folder(tmp_path / "broken")
    (broken / "class0" / "0.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    picture_folder(tmp_path / "others", classes=2)
    (tmp_path / "mine" / "pictures").mkdir(parents=True)
    (tmp_path / "mine" / "pictures" / "holiday.png").touch()
    before = names(tmp_path)
    for given, message in (
        ([], "METHOD"),
        (["polici"], "generate, retrieve, distill (got 'polici'; did you mean 'policy'?)"),
        (["--quiet", "policy"], "METHOD"),
        (["policy", "--per-class", "0"], "argument --per-class: must be an integer >= 1 (got 0)"),
        (["policy", "--few", "single"], "a class must have two pictures or more that can be read (got 1 of 'class1')"),
        (["policy", "--few", "mixed"], "pictures must have one size unless size says which"),
        (["policy", "--few", "broken"], "0.png cannot be read"),
        (["policy", "--few", "nowhere"], "few must be a folder with a folder for each class (there is none at nowh"),
        (["retrieve", "--pool", "nowhere"], "pool must be a folder, or one of "),
        (["policy", "--few", "file"], "few must be a folder with a folder for each class (there is none at file)"),
        (["policy", "--few", "empty"], "empty must hold <class>/<picture>"),
        (["policy", "--few", "few", "--test", "others"], "test must have the classes of few (got 'class2' in one of"),
        (["policy", "--test", "few"], "test must go with few"),
        (["retrieve", "--pool", "empty"], "empty must hold <class>/<picture>"),
        (["retrieve", "--pool", "few", "--found", "99"], "pool must have at least per_class, 99, samples (got 12)"),
        (["retrieve", "--pool", "glyfs"], "did you mean 'glyphs'?"),
        (["retrieve", "--pool", "sinusoid"], "pool must be labelled pictures in bytes (got sinusoid)"),
        (["retrieve"], "required: --pool"),
        (["retrieve", "--pool", "few", "--join", "features"], "join must be one of samples, mixed (got 'features')"),
        (["policy", "--pool", "few"], "--pool is no option here"),
        (["policy", "--transforms", "rotate"], "is it 'rotation'?"),
        (["policy", "--transforms", "rotation,mixup"], "stays one of its class (got mixup)"),
        (["policy", "--transforms", "dropout"], "each of which stays one of its class (got dropout)"),
        (["policy", "--probability", "1.5"], "probability must be in 0..1 (got 1.5)"),
        (["policy", "--strength", "-1"], "strength must be >= 0 (got -1.0)"),
        (["policy", "--through", "protonet"], "through must be one of scratch, maml (got 'protonet')"),
        (["policy", "--copies", "0"], "copies must be >= 1 (got 0)"),
        (["policy", "--steps", "0"], "steps must be >= 1 (got 0)"),
        (["policy", "--shots", "25"], "shots must leave samples of every class to judge on (got 25; class"),
        (["policy", "--classes", "9999"], "classes must be at most those of the test split"),
        (["policy", "--classes", "1"], "classes must be >= 2 (got 1)"),
        (["policy", "--ways", "9999"], "ways"),
        (["policy", "--data", "sinusoid"], "data must be labelled pictures in bytes (got sinusoid)"),
        (["policy", "--data", "omniglot"], "data.root must be given"),
        (["policy", "--seed", "-1"], "seed must be >= 0 (got -1)"),
        (["policy", "--seed", str(2**64)], "seed must be below 2**63"),
        (["policy", "--seeds", "0"], "argument --seeds: must be an integer >= 1 (got 0)"),
        (["policy", "--copiez", "2"], "--copiez is no option here; did you mean '--copies'?"),
        (["generate", "--patch", "5"], "patch must divide the sides of pictures (got 5"),
        (["generate", "--start", "1"], "start must be below 1 (got 1.0)"),
        (["distill", "--per-class", "6"], "per_class must be at most the samples of every class"),
        (["distill", "--resume"], "--resume is no option here"),
        (["policy", "--out", "mine"], "mine/pictures cannot be written (a folder of something else lies there)"),
        (["policy", "--out", "file"], "file"),
        (["policy", "--few", "few", "--size", "0"], "argument --size: must be an integer >= 1 (got 0)"),
    ):  # fmt: skip
        line = one_line([*given[:1], "--quiet", *given[1:]] if given else given, capsys)
        assert message in line, (given, line)
        assert names(tmp_path) == before, given


def test_pictures_that_are_read_are_not_written_over(tmp_path, capsys):
    assert run(tmp_path, *POLICY) == 0
    capsys.readouterr()
    few = str(tmp_path / "pictures")
    line = one_line([*POLICY, "--few", few, "--out", str(tmp_path)], capsys)
    assert f"few must not lie in {few}, which is written anew" in line


def test_a_full_disk_leaves_nothing_half_written(tmp_path, capsys, monkeypatch):
    """While pictures are written: an earlier run's stay; none is left where there were none."""
    earlier, new = tmp_path / "earlier", tmp_path / "new"
    assert run(earlier, *POLICY) == 0
    before = files_of(earlier)
    real, calls = Image.Image.save, []

    def fails_in_the_middle(image, path, *arguments, **options):
        calls.append(path)
        if len(calls) % 8 == 0:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(image, path, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", fails_in_the_middle)
    capsys.readouterr()
    for out in (earlier, new):
        line = one_line([*POLICY, "--seed", "7", "--out", str(out)], capsys)
        assert f"{out / 'pictures'} cannot be written (No space left on device)" in line
    assert len(calls) == 16
    assert files_of(earlier) == before
    assert "pictures" not in names(new)
    assert not [each for each in names(new) + names(earlier) if each.startswith(".")]


def test_no_report_is_of_pictures_that_are_gone(tmp_path, monkeypatch):
    """A run that is interrupted while classifiers judge has written its pictures, and not yet its report."""
    assert run(tmp_path, *POLICY) == 0
    before = files_of(tmp_path / "pictures")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("metaaug_fast.runs.augmenting.compared", interrupted)
    assert run(tmp_path, *POLICY, "--seed", "5") == 128 + signal.SIGINT
    assert files_of(tmp_path / "pictures") != before
    assert "report.json" not in names(tmp_path)


def test_an_unwritable_place(tmp_path, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    assert "cannot be written" in one_line([*POLICY, "--out", str(tmp_path / "out")], capsys)


def test_help(capsys):
    for given, texts in (
        (["--help"], ("policy", "distill", "METHOD --help says more")),
        (["policy", "--help"], ("--transforms", "--learned", "--few", "--per-class", "--resume")),
        (["distill", "--help"], ("an interrupted run begins", "--starts")),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["augment", *given])
        assert stop.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert all(text in shown for text in texts), shown
