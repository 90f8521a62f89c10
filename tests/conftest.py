"""What must be set before torch and Triton are imported, since they read it once: threads, and who runs the kernels.

One thread for every test, and for the processes that tests start: on tensors this small a second one only waits, and
beside another busy process two threads take ten times as long. Without a GPU, Triton's interpreter runs the kernels, on
CPU tensors; with one, the GPU does. One process cannot do both.
"""

import gc
import importlib.util
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import profiles

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from tests import triton_bf16, triton_speed

    triton_bf16.install()
    triton_speed.install()

profiles.register()

# Until tests run there is no garbage, but two million objects that live to the end. To look for it among them takes a
# third of the time that collecting tests takes, and half a second later on.
gc.disable()

# A shell lets its background jobs ignore Ctrl-C, which some tests are about.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse property tests that do not follow the profile: a deadline fails them now and then on a busy machine."""
    for item in items:
        profiles.check(item.nodeid, getattr(item, "obj", None))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """From here on there is garbage, though none among what is there."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
