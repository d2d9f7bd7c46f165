import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from metaaug_fast.data import Cifar10, Cifar100, Clinc150, FashionMnist, Kmnist, Mnist
from metaaug_fast.data.download import fetch
from metaaug_fast.data.readers import cifar, clinc150

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
    for name in Mnist.digests:
        shape = (10, 4, 4) if "images" in name else (10,)
        values = rng.integers(0, 256, shape, dtype=np.uint8) if "images" in name else np.arange(10, dtype=np.uint8)
        header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
        (folder / name).write_bytes(gzip.compress(header + values.tobytes()))
    for classes in (10, 100):
        (folder / f"cifar-{classes}-python.tar.gz").write_bytes(cifar_archive(classes, rng))
    pairs = [[f"word {number}", str(number % 10)] for number in rng.integers(0, 10**6, 99).tolist()]
    (folder / "data_full.json").write_text(json.dumps({"train": pairs}))
    return folder


MNISTS = (Mnist, FashionMnist, Kmnist)
ADDRESSES = [*((reader, "url") for reader in MNISTS), (cifar, "URL"), (clinc150, "URL")]
DIGESTS = [*((reader, "digests") for reader in MNISTS), (cifar, "DIGESTS"), (clinc150, "DIGESTS")]


def move(monkeypatch, url):
    """All that is published, to another address."""
    for holder, name in ADDRESSES:
        monkeypatch.setattr(holder, name, url)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(published, monkeypatch):
    """The folder over http, in place of the official addresses."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=published))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    move(monkeypatch, f"http://127.0.0.1:{http.server_port}")
    for holder, name in DIGESTS:
        algorithm = getattr(holder, name)[next(iter(getattr(holder, name)))].partition(":")[0]
        digests = {
            each: f"{algorithm}:{hashlib.new(algorithm, (published / each).read_bytes()).hexdigest()}"
            for each in getattr(holder, name)
        }
        monkeypatch.setattr(holder, name, digests)
    yield http
    http.shutdown()
    thread.join()
    http.server_close()


READERS = {
    **{reader: list(reader.digests) for reader in MNISTS},
    Cifar10: ["cifar-10-python.tar.gz"],
    Cifar100: ["cifar-100-python.tar.gz"],
    Clinc150: ["data_full.json"],
}


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
        move(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r": the download failed \(.*\); try again"):
        reader(tmp_path / "new", download=True)
    assert not list((tmp_path / "new").glob("*"))


def test_files_that_lie_there_are_kept(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    fetch("http://127.0.0.1:1/mine", tmp_path / "mine", f"sha256:{'0' * 64}")
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_unpacked_files_are_not_fetched(server, published, tmp_path):
    for name in Mnist.digests:
        (tmp_path / name.removesuffix(".gz")).write_bytes(gzip.decompress((published / name).read_bytes()))
        (published / name).unlink()
    assert len(Mnist(tmp_path, "all", download=True)) == 10


def test_the_real_files_have_the_digests(real_mnist):
    for name, digest in Mnist.digests.items():
        algorithm, _, value = digest.partition(":")
        assert hashlib.new(algorithm, (real_mnist / name).read_bytes()).hexdigest() == value


def test_the_real_sentences_have_the_digest(real_clinc150):
    for name, digest in clinc150.DIGESTS.items():
        assert "sha256:" + hashlib.sha256((real_clinc150 / name).read_bytes()).hexdigest() == digest


def test_official_addresses():
    for holder, name in ADDRESSES:
        assert getattr(holder, name).startswith(("https://", "http://"))
        assert not getattr(holder, name).endswith("/")
    for holder, name in DIGESTS:
        for digest in getattr(holder, name).values():
            algorithm, _, value = digest.partition(":")
            assert len(bytes.fromhex(value)) == hashlib.new(algorithm).digest_size
    assert len({digest for reader in MNISTS for digest in reader.digests.values()}) == 12
