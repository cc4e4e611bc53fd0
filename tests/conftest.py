"""Choose the backends under test and their device.

FDD_TEST_BACKENDS=torch,cpu,triton names the backends. By default every backend available here runs,
except an interpreted Triton, which takes long: tests/kernels/test_triton_interpreter.py runs it in
a process of its own.
"""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

import fdd_kernels
from fdd_kernels.backends import BACKENDS, why_unavailable
from tests.support.options import INTERPRETED

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: never ask it
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

hypothesis.settings.register_profile(
    "fdd", derandomize=True, deadline=None, max_examples=60, print_blob=False
)
# --hypothesis-profile=search
hypothesis.settings.register_profile("search", deadline=None, max_examples=1500)
hypothesis.settings.load_profile("fdd")


if INTERPRETED:
    from tests.support.interpreter import speed_up

    speed_up()

# tests/tools/sanitize.py: fail if another package than the sanitised one would be tested
if "FDD_TEST_PACKAGE" in os.environ:
    assert os.path.dirname(fdd_kernels.__file__) == os.environ["FDD_TEST_PACKAGE"]


def chosen_backends() -> list[str]:
    """The backends under test, in the order of the registry."""
    named = os.environ.get("FDD_TEST_BACKENDS")
    if named is None:
        return [
            b
            for b in BACKENDS
            if why_unavailable(b, DEVICE) is None and not (b == "triton" and INTERPRETED)
        ]
    for name in named.split(","):
        reason = why_unavailable(name, DEVICE)
        if reason is not None:
            raise pytest.UsageError(
                f"FDD_TEST_BACKENDS={named}: {name} cannot run on {DEVICE}: {reason}"
            )
    return named.split(",")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # float64 is the torch backend's own: the others hand it over
    if "precision" in metafunc.fixturenames:
        pairs = [
            (b, p)
            for b in chosen_backends()
            for p in (torch.float32, torch.float64)
            if b == "torch" or p is torch.float32
        ]
        metafunc.parametrize(
            ("backend", "precision"),
            pairs,
            ids=[f"{b}-{str(p).removeprefix('torch.')}" for b, p in pairs],
        )
    elif "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", chosen_backends())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Those with a time limit of their own are the longest: first, so that no process is left alone
    # with one at the end.
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA or HIP device, and this machine has none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The problems here are tiny: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with a tiny teacher, a student and text: see `write_models`."""
    from tests.support.commands import write_models  # imports transformers, as few tests need

    return write_models(tmp_path_factory.mktemp("inputs"))
