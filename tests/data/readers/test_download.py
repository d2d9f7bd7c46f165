import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from metaaug_fast.data import Cifar10, Cifar100, Idx
from metaaug_fast.data.download import fetch
from metaaug_fast.data.readers import cifar, idx

pytestmark = pytest.mark.filterwarnings("ignore:.*published pictures")


def cifar_archive(classes, rng):
    """A Python archive of one batch, a picture a class."""
    key = b"labels" if classes == 10 else b"fine_labels"
    batch = {b"data": rng.integers(0, 256, (classes, 3072), dtype=np.uint8), key: list(range(classes))}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        packed = pickle.dumps(batch, 2)
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1" if classes == 10 else "cifar-100-python/train")
        member.size = len(packed)
        archive.addfile(member, io.BytesIO(packed))
    return content.getvalue()


@pytest.fixture
def published(tmp_path, rng):
    """A folder with small files under the official names."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name in idx.SHA256:
        shape = (10, 4, 4) if "images" in name else (10,)
        values = rng.integers(0, 256, shape, dtype=np.uint8) if "images" in name else np.arange(10, dtype=np.uint8)
        header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
        (folder / name).write_bytes(gzip.compress(header + values.tobytes()))
    for classes in (10, 100):
        (folder / f"cifar-{classes}-python.tar.gz").write_bytes(cifar_archive(classes, rng))
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(published, monkeypatch):
    """The folder over http, in place of the official addresses."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=published))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for module in (idx, cifar):
        monkeypatch.setattr(module, "URL", f"http://127.0.0.1:{http.server_port}")
        digests = {name: hashlib.sha256((published / name).read_bytes()).hexdigest() for name in module.SHA256}
        monkeypatch.setattr(module, "SHA256", digests)
    yield http
    http.shutdown()
    thread.join()
    http.server_close()


READERS = {Idx: list(idx.SHA256), Cifar10: ["cifar-10-python.tar.gz"], Cifar100: ["cifar-100-python.tar.gz"]}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_missing_is_fetched_once(server, published, tmp_path, reader):
    root = tmp_path / "new" / "folder"
    data = reader(root, "all", download=True)
    assert sorted(path.name for path in root.iterdir()) == sorted(READERS[reader])
    assert (data.samples == reader(published, "all").samples).all()
    for path in published.iterdir():
        path.unlink()
    assert (reader(root, "all", download=True).samples == data.samples).all()


@pytest.mark.parametrize("reader", READERS)
def test_another_digest(server, published, tmp_path, reader):
    name = READERS[reader][0]
    (published / name).write_bytes(b"something else")
    with pytest.raises(ConnectionError, match=rf"/{name}: what came is not the published file \(.*try again, or put"):
        reader(tmp_path / "new", download=True)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("reason", ["404", "refused"])
def test_no_such_file_or_server(server, published, tmp_path, monkeypatch, reader, reason):
    for path in published.iterdir():
        path.unlink()
    if reason == "refused":
        for module in (idx, cifar):
            monkeypatch.setattr(module, "URL", "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r": the download failed \(.*\); try again"):
        reader(tmp_path / "new", download=True)
    assert not list((tmp_path / "new").glob("*"))


def test_files_that_lie_there_are_kept(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    fetch("http://127.0.0.1:1/mine", tmp_path / "mine", "0" * 64)
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_unpacked_files_are_not_fetched(server, published, tmp_path):
    for name in idx.SHA256:
        (tmp_path / name.removesuffix(".gz")).write_bytes(gzip.decompress((published / name).read_bytes()))
        (published / name).unlink()
    assert len(Idx(tmp_path, "all", download=True)) == 10


def test_only_mnist_itself_is_fetched(tmp_path):
    with pytest.raises(ValueError, match=r"download must not be given with prefix: .*\(got 'emnist-'\)"):
        Idx(tmp_path, prefix="emnist-", download=True)


def test_the_real_files_have_the_digests(real_mnist):
    for name, digest in idx.SHA256.items():
        assert hashlib.sha256((real_mnist / name).read_bytes()).hexdigest() == digest


def test_official_addresses():
    for module in (idx, cifar):
        assert module.URL.startswith("https://")
        assert all(len(digest) == 64 for digest in module.SHA256.values())
