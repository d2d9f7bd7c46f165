"""Files are whole or not there, whoever writes them and whenever it ends."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from metaaug_fast.errors import FileWriteError
from metaaug_fast.files import (
    claimed,
    naming,
    previous_of,
    try_writing,
    try_writing_folder,
    write_atomically,
    writing_folder,
)
from metaaug_fast.runs import checkpoint

WRITER = """
import sys, torch
from metaaug_fast.runs import checkpoint
path, number, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
import time
print("ready", flush=True)
end, saves = time.monotonic() + seconds, 0
while time.monotonic() < end:
    checkpoint.save(path, {"writer": number, "weights": torch.full((20_000,), float(number))})
    saves += 1
print(saves, flush=True)
"""


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def started(*arguments):
    process = subprocess.Popen([sys.executable, "-c", WRITER, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_two_writers_and_a_reader(tmp_path):
    """No save fails, and every file that is read is one writer's, the one before too."""
    path = tmp_path / "c.safetensors"
    seconds = float(os.environ.get("METAAUG_TEST_WRITERS_SECONDS", "2"))
    writers = [started(path, number, seconds) for number in (1, 2)]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        for each in (path, previous_of(path)):
            if each.exists():
                state = checkpoint.load(each)
                assert (state["weights"] == state["writer"]).all()
                reads += 1
    assert [writer.wait() for writer in writers] == [0, 0]
    saves = [int(writer.stdout.read()) for writer in writers]
    print(f"{saves} saves, {reads} reads")
    assert min(saves) > 0
    assert reads > 0
    assert names(tmp_path) == ["c.previous.safetensors", "c.safetensors"]


def test_what_killed_writers_leave_is_removed(tmp_path):
    """Killed in its saves until something is left; the next save leaves a whole file and nothing else."""
    path = tmp_path / "c.safetensors"
    for _ in range(40):
        writer = started(path, 1, 60)
        time.sleep(0.05 * int.from_bytes(os.urandom(1), "little") / 255)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        if path.exists():
            assert (checkpoint.load(path)["weights"] == 1).all()
        if set(names(tmp_path)) - {path.name, previous_of(path).name}:
            break
    else:
        pytest.fail("no kill came in a save")
    checkpoint.save(path, {})
    assert set(names(tmp_path)) <= {path.name, previous_of(path).name}


def test_what_another_writes_stays(tmp_path, monkeypatch):
    """A save that another comes into finishes: what it writes is held, and not taken for left over."""
    sync, inner = os.fsync, []

    def slow(descriptor):
        if not inner:
            inner.append(names(tmp_path))
            write_atomically(tmp_path / "other", b"2")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", slow)
    write_atomically(tmp_path / "one", b"1")
    assert len(inner[0]) == 1
    assert names(tmp_path) == ["one", "other"]


def test_the_file_before_is_kept(tmp_path):
    path = tmp_path / "c.safetensors"
    for step in range(3):
        checkpoint.save(path, {"step": step})
    assert checkpoint.load(path) == {"step": 2}
    assert checkpoint.load(previous_of(path)) == {"step": 1}
    assert names(tmp_path) == ["c.previous.safetensors", "c.safetensors"]


def test_damage_does_not_take_the_place_of_the_file_before(tmp_path):
    path = tmp_path / "c"
    for step in range(2):
        checkpoint.save(path, {"step": step})
    path.write_bytes(b"damage")
    checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 2}
    assert checkpoint.load(previous_of(path)) == {"step": 0}


def test_a_kill_between_the_two_renames_leaves_nothing_behind(tmp_path):
    """Then the file and the one before are two names of one file."""
    path = tmp_path / "c"
    write_atomically(path, b"1")
    os.link(path, previous_of(path))
    write_atomically(path, b"2", keep=True)
    assert (path.read_bytes(), previous_of(path).read_bytes()) == (b"2", b"1")
    assert names(tmp_path) == ["c", "c.previous"]


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    path = tmp_path / "c"
    write_atomically(path, b"1")
    write_atomically(path, b"2", keep=True)
    assert (path.read_bytes(), previous_of(path).read_bytes()) == (b"2", b"1")
    assert names(tmp_path) == ["c", "c.previous"]


@pytest.mark.parametrize("target", ["there", "not yet there"])
def test_links_are_written_through(tmp_path, target):
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / "real.safetensors", tmp_path / "link.safetensors"
    if target == "there":
        checkpoint.save(real, {"step": 1})
    link.symlink_to(real)
    checkpoint.save(link, {"step": 2})
    assert link.is_symlink()
    assert checkpoint.load(real) == {"step": 2}
    assert names(tmp_path) == ["link.safetensors", "store"]
    if target == "there":
        assert checkpoint.load(previous_of(link)) == {"step": 1}
        assert names(real.parent) == ["real.previous.safetensors", "real.safetensors"]


def test_files_have_the_permissions_that_others_get(tmp_path):
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "c", b"1")
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "plain").stat().st_mode


def unusable(kind, tmp_path):
    """A path that cannot be written to, and the reason."""
    if kind == "folder":
        (tmp_path / "d").mkdir()
        return tmp_path / "d", "it is a folder"
    if kind == "below a file":
        (tmp_path / "file").touch()
        return tmp_path / "file" / "c", "file is no folder"
    if kind == "deep below a file":
        (tmp_path / "file").touch()
        return tmp_path / "file" / "deep" / "c", "Not a directory"
    if kind == "device":
        os.mkfifo(tmp_path / "pipe")
        return tmp_path / "pipe", "it is no regular file"
    if kind == "link to itself":
        (tmp_path / "link").symlink_to(tmp_path / "link")
        return tmp_path / "link", "it is a link to itself"
    if kind == "long name":
        return tmp_path / ("x" * 250), "File name too long"
    return Path("/proc/nothing-here/c"), "No such file or directory"


def write(path):
    write_atomically(path, b"x")


def claim(path):
    with claimed(path):
        pass


KINDS = ["folder", "below a file", "deep below a file", "device", "link to itself", "long name", "no writing there"]


@pytest.mark.parametrize("write", [write, try_writing, claim])
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_written_is_one_sentence(tmp_path, kind, write):
    path, reason = unusable(kind, tmp_path)
    before = names(tmp_path)
    with pytest.raises(FileWriteError) as caught:
        write(path)
    assert str(caught.value) == f"{path} cannot be written ({caught.value.__cause__.strerror})"
    assert reason in str(caught.value)
    assert names(tmp_path) == before


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_failed_write_leaves_no_trace(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "new" / "c"
    monkeypatch.setattr(call, full)
    with pytest.raises(FileWriteError, match=r"new/c cannot be written \(No space left on device\)"):
        write_atomically(path, b"1")
    assert names(tmp_path) == []


def test_room_is_tried_and_given_back(tmp_path):
    try_writing(tmp_path / "c", 1 << 20)
    with pytest.raises(FileWriteError, match="c cannot be written"):
        try_writing(tmp_path / "c", 1 << 60)
    assert names(tmp_path) == []


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "out" / "c.safetensors"
    caught = []

    def other(which=path):
        try:
            with claimed(which):
                caught.append(None)
        except FileWriteError as error:
            caught.append(str(error))

    with claimed(path), claimed(path):
        for which in (path, tmp_path / "out" / "d.safetensors"):
            thread = threading.Thread(target=other, args=[which])
            thread.start()
            thread.join()
        write_atomically(path, b"1")
    other()
    message = f"{path} is being written by another run; wait for it, or write to another file"
    assert caught == [message, None, None]
    assert names(path.parent) == [path.name]


def test_a_killed_runs_claim_ends_with_it(tmp_path):
    path = tmp_path / "c"
    script = "import sys, time; from metaaug_fast.files import claimed\n"
    script += "with claimed(sys.argv[1]):\n  print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(FileWriteError, match="another run"), claimed(path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with claimed(path):
        pass
    assert names(tmp_path) == []


def test_an_unused_claim_leaves_no_folder(tmp_path):
    with claimed(tmp_path / "a" / "b" / "c"):
        pass
    assert names(tmp_path) == []


def fill(path, content, files=3):
    """A folder of some files, one of them in a folder of its own."""
    with writing_folder(path) as folder, naming(path):
        (folder / "inner").mkdir()
        for number in range(files):
            (folder / ("inner" if number else ".") / f"{number}").write_bytes(content)


def contents(folder):
    return {each.relative_to(folder): each.read_bytes() for each in folder.rglob("[!.]*") if each.is_file()}


def test_a_folder_is_whole_and_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "deep" / "pictures"
    fill(path, b"1")
    assert contents(path) == {Path("0"): b"1", Path("inner/1"): b"1", Path("inner/2"): b"1"}
    with writing_folder(path) as folder:
        (folder / "new").write_bytes(b"2")
        assert len(contents(path)) == 3
    assert contents(path) == {Path("new"): b"2"}
    assert names(path.parent) == ["pictures"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("bug"), KeyboardInterrupt()]
)
def test_a_folder_that_fails_leaves_all_as_it_was(tmp_path, error, before):
    path = tmp_path / "deep" / "pictures"
    if before:
        fill(path, b"1")

    def fails():
        with writing_folder(path) as folder, naming(path):
            (folder / "half").write_bytes(b"2")
            raise error

    with pytest.raises(FileWriteError if isinstance(error, OSError) else type(error)) as caught:
        fails()
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path} cannot be written (No space left on device)"
    assert names(tmp_path) == (["deep"] if before else [])
    if before:
        assert names(path.parent) == ["pictures"]
        assert len(contents(path)) == 3


@pytest.mark.parametrize("call", ["os.fsync", "os.rename"])
def test_a_folder_that_cannot_be_put_in_its_place(tmp_path, monkeypatch, call):
    path = tmp_path / "pictures"
    fill(path, b"1")
    real, calls = getattr(os, call.partition(".")[2]), []

    def fails_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(call, fails_at_the_second)
    with pytest.raises(FileWriteError, match=r"pictures cannot be written \(No space left"):
        fill(path, b"2")
    assert set(contents(path).values()) == {b"1"}
    assert names(tmp_path) == ["pictures"]


def test_a_disk_that_is_full_in_the_middle(tmp_path):
    """Files may have 1,000 bytes in this process, so that the last one is not written whole."""
    program = """
import resource, sys
from pathlib import Path
from metaaug_fast.files import naming, writing_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
path = Path(sys.argv[1])
with writing_folder(path) as folder, naming(path):
    for size in (10, 900, 5000):
        (folder / str(size)).write_bytes(bytes(size))
"""
    path = tmp_path / "pictures"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith(f"{path} cannot be written (File too large)")
    assert names(tmp_path) == []


def test_folders_of_others_stay(tmp_path):
    path = tmp_path / "mine"
    path.mkdir()
    (path / "cat.png").write_bytes(b"1")
    for write in (lambda: fill(path, b"2"), lambda: try_writing_folder(path)):
        with pytest.raises(FileWriteError, match=r"mine cannot be written \(a folder of something else lies there"):
            write()
    with pytest.raises(FileWriteError, match="it is no folder"):
        try_writing_folder(path / "cat.png")
    with pytest.raises(FileWriteError, match="is no folder"):
        try_writing_folder(path / "cat.png" / "deep")
    assert names(path) == ["cat.png"]
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", b"2")
    try_writing_folder(tmp_path / "empty")
    try_writing_folder(tmp_path / "new" / "deep")
    assert len(contents(tmp_path / "empty")) == 3
    assert names(tmp_path) == ["empty", "mine"]


def test_folders_that_killed_writers_leave_are_removed_and_held_ones_are_not(tmp_path):
    path = tmp_path / "pictures"
    left = tmp_path / f".pictures.{'0' * 16}.part"
    (left / "inner").mkdir(parents=True)
    (left / "inner" / "half").touch()
    with writing_folder(path) as folder:
        assert not left.exists()
        fill(tmp_path / "other", b"1")
        assert folder.exists()
    assert names(tmp_path) == ["other", "pictures"]
