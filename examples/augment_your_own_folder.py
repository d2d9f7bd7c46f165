"""A folder with a few pictures of each class, and more of each: what to do to pictures is learned on letters.

python examples/augment_your_own_folder.py [DIR [OTHERS]] [--quick]

DIR has a folder of pictures, two or more, for each class; OTHERS has other pictures of the same classes, to judge on.
Without them, letters that no training has seen are written as such folders, `letters/few` and `letters/others`.

Three commands: a policy of transforms is learned on the training letters; with it, `augmented/own/pictures` is made,
the pictures with 30 new ones of each class; and the same by another method, which learns to make pictures of pictures.
The last two say how good a classifier is with and without the new pictures, at equal steps.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from PIL import Image

import metaaug_fast as mf
from metaaug_fast.cli.main import main

LETTERS, FEW, OTHERS = 20, 2, 8


def write_letters(root: Path) -> tuple[Path, Path]:
    """Folders of a few pictures of letters of the test split, and of others of the same letters."""
    letters = mf.data.Glyphs(split="test")
    for index, name in enumerate(letters.names[:LETTERS]):
        pictures = letters.class_samples(index)
        chosen = pictures[:: len(pictures) // (FEW + OTHERS)][: FEW + OTHERS]  # typefaces of all families
        few = {0, len(chosen) // 2}
        for number, picture in enumerate(chosen):
            folder = root / ("few" if number in few else "others") / f"U+{ord(name[0]):04X}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[0].numpy()).save(folder / f"{number}.png")
    return root / "few", root / "others"


def command(*arguments: object) -> None:
    """Show a command of the console program, and run it."""
    given = [str(each) for each in arguments]
    print(f"\n$ metaaug-fast {shlex.join(given)}\n", flush=True)
    if code := main([*given, "--quiet"]):
        sys.exit(code)


torch.set_num_threads(1)  # pictures are small
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("few", nargs="?", type=Path, metavar="DIR")
parser.add_argument("others", nargs="?", type=Path, metavar="OTHERS")
parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
options = parser.parse_args()
few, others = (options.few, options.others) if options.few else write_letters(Path("letters"))
steps, judging = (3, 2) if options.quick else (100, 150)
own = ["--few", few, *(["--test", others] if others else []), "--per-class", 30, "--seeds", 5, "--judge-steps", judging]
out = Path("augmented")

command("augment", "policy", "--steps", steps, "--seeds", 1, "--judge-steps", judging // 2, "--out", out / "letters")
command("augment", "policy", "--learned", out / "letters" / "learned.safetensors", *own, "--out", out / "own")
command("augment", "hallucinate", "--steps", steps, *own, "--out", out / "hallucinated")

if figures := json.loads((out / "own" / "report.json").read_text())["figures"]:
    seeds = len(figures[0]["accuracies"])
    print(
        f"\npictures of one's own, with and without a learned policy: accuracy, {seeds} seeds, 95 % (higher is better)"
    )
    for figure in (figures[1], figures[0]):
        print(f"  {figure['way']}: {figure['mean']:.3f} +- {figure['interval']:.3f}")
