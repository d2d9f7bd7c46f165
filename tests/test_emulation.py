"""The GPU engine's device code in the host emulation (tests/native/emulation.h), by the tests of the CPU engine.

What is imported here is collected here too, and runs with an extension whose every call goes through the device code.
"""

from pathlib import Path

import pytest
from test_fused import (  # noqa: F401
    test_a_loss_of_ones_own_on_predictions_of_adapted_weights,
    test_random_networks,
    test_single_precision,
    test_sizes_at_the_edge,
    test_what_is_not_finite_is_named_by_task_and_step,
)
from test_inner_loop import test_weights_and_gradients_are_the_references  # noqa: F401
from torch.utils import cpp_extension

from metaaug_fast import fused

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "tests" / "native"

pytestmark = pytest.mark.usefixtures("fresh_numbers", "emulation")


@pytest.fixture(scope="module")
def extension():
    """The extension with the emulation in the CPU engine's place."""
    sources = [ROOT / "csrc" / name for name in ("ops.cpp", "bindings.cpp", "call.cpp", "flow.cpp", "cpu/pool.cpp")]
    sources += [NATIVE / "emulated.cpp", NATIVE / "emulation.cpp"]
    folder = ROOT / "build" / "native" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        "_C",
        [str(source) for source in sources],
        extra_cflags=["-O1", "-g1", "-fvisibility=hidden"],
        extra_include_paths=[str(ROOT / "csrc"), str(NATIVE)],
        build_directory=str(folder),
    )


# Next to nothing in shared memory, some of a task's buffers, or all.
@pytest.fixture(params=[1 << 10, 9000, 200_000], ids="shared={}".format)
def emulation(request, extension, monkeypatch):
    assert extension.instruction_set() == "emulation"
    monkeypatch.setattr(fused, "_C", extension)
    monkeypatch.setenv("METAAUG_EMULATION_SHARED", str(request.param))
