"""What the README shows runs as it stands: its programs, and its files with the commands that use them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
PROGRAMS = [text for kind, text in BLOCKS if kind == "python" and text.startswith("import")]
FILES = {text.split(".py")[0][2:]: text for kind, text in BLOCKS if kind == "python" and text.startswith("# my_")}
COMMANDS = [
    line.partition("  #")[0].split()
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.splitlines()
    if line.startswith("metaaug-fast")
]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program, tmp_path):
    (tmp_path / "new.py").write_text(program)
    done = subprocess.run([sys.executable, "new.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_of_the_users_own_are_used(tmp_path):
    assert set(FILES) == {"my_data", "my_net", "my_file"}
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    own = [command for command in COMMANDS if any(name in " ".join(command) for name in FILES)]
    assert len(own) == 2
    for command in own:
        quick = ["--quiet", "--episodes", "20", "--validation-episodes", "10", "--steps", "3"]
        program = [sys.executable, "-m", "metaaug_fast", *command[1:], *quick]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "new classes: accuracy" in done.stdout


@pytest.mark.parametrize("command", [each for each in COMMANDS if each[1] == "train" and "my_" not in " ".join(each)])
def test_options_of_train_are_known(command, tmp_path):
    if "--resume" in command:
        pytest.skip("needs the checkpoint of the line before it")
    program = [sys.executable, "-m", "metaaug_fast", *command[1:], "--print-config"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("learner:")
