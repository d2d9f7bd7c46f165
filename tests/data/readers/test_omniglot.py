import hashlib
import io
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from metaaug_fast.data import Episodes, Omniglot, download_omniglot
from metaaug_fast.data.readers import omniglot

# The archives that are made here bear the official names and hold less.
pytestmark = pytest.mark.filterwarnings("ignore:.*characters (are missing|have fewer)")
CHARACTERS = {"images_background": 30, "images_evaluation": 11}
DRAWINGS = 4


def png(paper):
    """A 1-bit picture of a bool array that is True where there is paper."""
    file = io.BytesIO()
    Image.fromarray(paper).convert("1").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pictures(rng):
    """A small Omniglot in the official layout: `{archive: {name: paper}}`, 28x28 and 105x105."""
    result, identity = {}, 0
    for archive, characters in CHARACTERS.items():
        files = result.setdefault(archive, {})
        for character in range(characters):
            identity += 1
            for drawing in range(1, DRAWINGS + 1):
                side = int(rng.choice([28, 105]))
                folder = f"{archive}/Alphabet_{character % 3}{archive[7]}/character{character:02}"
                files[f"{folder}/{identity:04}_{drawing:02}.png"] = rng.random((side, side)) < 0.5
    return result


@pytest.fixture
def zips(pictures, tmp_path):
    for archive, files in pictures.items():
        with zipfile.ZipFile(tmp_path / f"{archive}.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(f"{archive}/", "")
            for name, paper in files.items():
                file.writestr(name, png(paper))
    return tmp_path


@pytest.fixture
def folders(pictures, tmp_path):
    for files in pictures.values():
        for name, paper in files.items():
            path = tmp_path / "unpacked" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(paper))
    return tmp_path / "unpacked"


def test_ink_is_one_and_large_pictures_are_reduced_to_the_nearest_pixel(zips, pictures):
    data = Omniglot(zips, "all")
    assert len(data) == 41
    assert data.sample_shape == (1, 28, 28)
    by_name = {name.split("/", 1)[1].rpartition("/")[0]: [] for files in pictures.values() for name in sorted(files)}
    for files in pictures.values():
        for name in sorted(files):
            paper = files[name]
            # Pixel i of 28 is taken from the middle of its share of 105: (i + 1/2) * 105 / 28.
            at = ((np.arange(28) + 0.5) * len(paper) / 28).astype(int)
            by_name[name.split("/", 1)[1].rpartition("/")[0]].append(~paper[np.ix_(at, at)])
    assert data.names == tuple(sorted(by_name))
    for index, name in enumerate(data.names):
        assert (data.class_samples(index)[:, 0].numpy() == np.array(by_name[name]) * 255).all()


def test_zips_and_folders_hold_the_same(zips, folders):
    packed, unpacked = Omniglot(zips, "all"), Omniglot(folders, "all")
    assert packed.names == unpacked.names
    assert torch.equal(packed.samples, unpacked.samples)


def test_split_and_rotations(zips):
    parts = {split: Omniglot(zips, split, rotations=False) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 28, "validation": 2, "test": 11}
    assert len({name for part in parts.values() for name in part.names}) == 41
    assert sum(len(part.samples) for part in parts.values()) == 41 * DRAWINGS  # nothing is held twice
    turned = Omniglot(zips)
    assert len(turned) == 4 * 28
    assert turned.names[:28] == parts["train"].names
    assert torch.equal(turned.class_samples(30), turned.class_samples(2).rot90(1, (2, 3)))
    assert len(Omniglot(zips, "test")) == 11
    assert len(Omniglot(zips, "test", rotations=True)) == 44
    assert Omniglot(zips, "test", seed=1).names != parts["test"].names


def test_the_archives_own_division(zips, pictures):
    parts = {
        part: Omniglot(zips, part, rotations=False, splits="background") for part in ("train", "validation", "test")
    }
    held = {
        archive: {name.split("/", 1)[1].rpartition("/")[0] for name in files} for archive, files in pictures.items()
    }
    assert set(parts["test"].names) == held["images_evaluation"]
    assert {*parts["train"].names, *parts["validation"].names} == held["images_background"]
    assert [len(part) for part in parts.values()] == [27, 3, 11]
    turned = Omniglot(zips, splits="background", archives=("images_evaluation", "images_background"))
    assert turned.names[:27] == parts["train"].names
    assert len(turned) == 4 * 27
    assert Omniglot(zips, splits="background", seed=1).names != turned.names
    whole = Omniglot(zips, "all", splits="background")
    for part in parts.values():
        for index, name in enumerate(part.names):
            assert torch.equal(part.class_samples(index), whole.class_samples(whole.names.index(name)))


def test_a_division_by_lists(zips, monkeypatch):
    names = Omniglot(zips, "all").names
    lists = {"train": names[7:30:2], "validation": names[:2], "test": names[40:30:-3]}
    monkeypatch.setattr(omniglot, "vinyals_characters", lambda: lists)
    for part, chosen in lists.items():
        assert Omniglot(zips, part, rotations=False, splits="vinyals").names == chosen
    assert Omniglot(zips, splits="vinyals").names[: len(lists["train"])] == lists["train"]
    lists["test"] = ("Alpha/character99", *names[:3])
    with pytest.raises(ValueError, match=r"lacks 1 of 4 classes of splits='vinyals', 'Alpha/character99' the first"):
        Omniglot(zips, "test", splits="vinyals")


def test_episodes(zips):
    batch = next(Episodes(Omniglot(zips), ways=5, shots=1, queries=3, tasks=8))
    assert batch.support_x.shape == (8, 5, 1, 28, 28)
    assert set(batch.query_x.unique().tolist()) == {0.0, 1.0}


def test_second_start_decodes_nothing(zips, monkeypatch):
    first = Omniglot(zips, "all")
    monkeypatch.setattr(omniglot, "_ink", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(Omniglot(zips, "all").samples, first.samples)


@pytest.mark.parametrize("form", ["zips", "folders"])
def test_changed_archive_is_read_again(request, form, rng):
    root = request.getfixturevalue(form)
    before = Omniglot(root, "all")
    if form == "zips":
        with zipfile.ZipFile(root / "images_evaluation.zip", "a") as file:
            file.writestr("images_evaluation/Zeta/character01/9999_01.png", png(rng.random((28, 28)) < 0.5))
    else:
        path = root / "images_evaluation/Zeta/character01/9999_01.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(rng.random((28, 28)) < 0.5))
    after = Omniglot(root, "all")
    assert after.names == (*before.names, "Zeta/character01")


def test_character_in_two_archives_counts_once(zips):
    (zips / "small.zip").write_bytes((zips / "images_background.zip").read_bytes())
    both = Omniglot(zips, "all", archives=("images_background", "small"))
    assert both.names == Omniglot(zips, "all", archives=("images_background",)).names
    assert (both.counts == DRAWINGS).all()


def test_missing_archive(zips):
    (zips / "images_evaluation.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"images_evaluation\.zip is missing.*download=True"):
        Omniglot(zips)


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
def test_damaged_zip(zips, damage):
    path = zips / "images_background.zip"
    content = bytearray(path.read_bytes())
    # Long enough to reach a drawing's data, which are checked, and not a header's date alone, which is not.
    middle = slice(len(content) // 3, len(content) // 3 + 200)
    content[middle] = bytes(byte ^ 0xFF for byte in content[middle])
    path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "flipped": content}[damage])
    with pytest.raises(ValueError, match=r"images_background\.zip cannot be read.*download=True"):
        Omniglot(zips)


def changed(path, change):
    """The archive with other members, `{name: content}` as `change` gives them; whole as a zip."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in change(members).items():
            file.writestr(name, content)


@pytest.mark.parametrize("size", [0, 20, 60])
def test_truncated_member(zips, rng, size):
    path = zips / "images_background.zip"
    name = rng.choice([name for name in zipfile.ZipFile(path).namelist() if name.endswith(".png")])
    changed(path, lambda members: members | {name: members[name][:size]})
    with pytest.raises(
        ValueError, match=r"images_background\.zip cannot be read, at or after .* \(.+\); if it"
    ) as caught:
        Omniglot(zips)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../Alphabet/character01/0001_01.png", "/Alphabet/character01/0001_01.png", "images_background/../x/1.png"]
)
def test_a_member_that_leaves_the_folder(zips, name):
    changed(zips / "images_background.zip", lambda members: members | {name: next(reversed(members.values()))})
    message = rf"images_background\.zip cannot be read, at or after .* \(its member '{name}' leaves the folder\); if it"
    with pytest.raises(ValueError, match=message) as caught:
        Omniglot(zips)
    assert "\n" not in str(caught.value)
    assert not (zips / "Alphabet").exists()


def test_damaged_drawing(folders):
    path = next(folders.glob("images_background/*/*/*.png"))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"images_background cannot be read, at or after .*\.png"):
        Omniglot(folders)


def test_zip_of_something_else(zips):
    with zipfile.ZipFile(zips / "images_background.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"images_background\.zip holds no <alphabet>/<character>/<drawing>\.png"):
        Omniglot(zips)


def test_bad_arguments(zips):
    with pytest.raises(ValueError, match=r"split must be one of train, validation, test, all \(got 'valid'\)"):
        Omniglot(zips, "valid")
    with pytest.raises(ValueError, match=r"size must be >= 1 \(got 0\)"):
        Omniglot(zips, size=0)
    with pytest.raises(ValueError, match=r"splits must be one of papers, vinyals, background \(got 'lake'\)"):
        Omniglot(zips, splits="lake")
    with pytest.raises(ValueError, match=r"splits must be papers or vinyals where archives are not .*'background'"):
        Omniglot(zips, splits="background", archives=("images_background",))


@pytest.fixture
def server(zips):
    """The archives over http: a dict of `{name: content}` that is served, and the address."""
    files = {path.name: path.read_bytes() for path in sorted(zips.glob("*.zip"))}
    served = dict(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            if name not in served:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[name])))
            self.end_headers()
            self.wfile.write(served[name])

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def digests(served):
    return {name: hashlib.md5(content).hexdigest() for name, content in served.items()}


def test_download(server, zips, tmp_path, monkeypatch, capsys):
    served, url = server
    monkeypatch.setattr(omniglot, "download_omniglot", partial(download_omniglot, url=url, md5=digests(served)))
    data = Omniglot(tmp_path / "new", "all", download=True)
    assert torch.equal(data.samples, Omniglot(zips, "all").samples)
    assert "100%" in capsys.readouterr().err
    served.clear()
    Omniglot(tmp_path / "new", download=True)


def test_unpacked_archives_are_not_fetched(folders):
    download_omniglot(folders, "http://127.0.0.1:1", {"images_background.zip": "", "images_evaluation.zip": ""})
    assert not list(folders.glob("*.zip"))


def test_wrong_checksum(server, tmp_path):
    served, url = server
    wanted = digests(served)
    name = "images_evaluation.zip"
    served[name] = bytes(reversed(served[name]))
    with pytest.raises(
        ConnectionError, match=rf"{name}: what came is not the published file \(its digest is not md5:{wanted[name]}\)"
    ):
        download_omniglot(tmp_path / "new", url, wanted)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["images_background.zip"]


def test_interrupted_transfer(server, tmp_path):
    served, url = server
    wanted = digests(served)
    name = "images_background.zip"
    served[name] = served[name][:1000]
    with pytest.raises(ConnectionError, match=rf"{name}: (the download failed|what came is not).*; try again"):
        download_omniglot(tmp_path / "new", url, wanted)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("reason", ["404", "refused"])
def test_no_such_file_or_server(server, tmp_path, reason):
    served, url = server
    wanted = digests(served)
    served.clear()
    with pytest.raises(ConnectionError, match=r"images_.*\.zip: the download failed \(.*\); try again"):
        download_omniglot(tmp_path, url if reason == "404" else "http://127.0.0.1:1", {"images_new.zip": "", **wanted})


def test_official_addresses():
    assert set(omniglot.MD5) == {f"{archive}.zip" for archive in omniglot.ARCHIVES}
    assert omniglot.URL.startswith("https://")


@pytest.mark.slow
def test_real_archives(real_omniglot):
    whole = Omniglot(real_omniglot, "all")
    assert len(whole) == 1623
    assert (whole.counts == 20).all()
    assert len({name.split("/")[0] for name in whole.names}) == 50
    assert len(Omniglot(real_omniglot)) == 4400
    assert len(Omniglot(real_omniglot, "validation")) == 100
    assert len(Omniglot(real_omniglot, "test")) == 423
    # Ink is the smaller part of a drawing.
    assert 0.05 < whole.samples.double().mean() / 255 < 0.2


@pytest.mark.parametrize(("splits", "sizes"), [("vinyals", [1028, 172, 423]), ("background", [864, 100, 659])])
def test_real_divisions(real_omniglot, splits, sizes):
    parts = [Omniglot(real_omniglot, part, False, splits=splits) for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == sizes
    assert len({name for part in parts for name in part.names}) == 1623


@pytest.mark.slow
def test_reduced_official_pictures_are_those_of_the_papers(real_omniglot):
    """The 105x105 originals, reduced here, against the 28x28 pictures reduced elsewhere."""
    originals = Omniglot(real_omniglot, "all", archives=("images_background_small1", "images_background_small2"))
    whole = Omniglot(real_omniglot, "all")
    for index, name in enumerate(originals.names):
        assert torch.equal(originals.class_samples(index), whole.class_samples(whole.names.index(name)))
