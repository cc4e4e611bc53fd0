"""Test the checks of tests/tools/cross_compile.py on text: no compiler runs."""

import sys
from importlib.machinery import ModuleSpec

import pytest

from fdd_kernels import _build
from tests.tools import cross_compile
from tests.tools.cross_compile import TOLERANCE, differences, neon


@pytest.mark.parametrize(
    "lines",
    [
        "\tfmla\tv0.4s, v1.4s, v2.4s\n\tfcmgt\tv0.4s, v1.4s, #0.0\n\tfcmpe\ts0, s1\n",
        "\tfmls.4s\tv0, v1, v2\n\tfcmeq.4s\tv0, v1, v2\n\tfcmp\ts0, #0.0\n",
    ],
    ids=["Linux", "macOS"],
)
def test_neon_is_counted_in_both_syntaxes(lines):
    assert neon(lines) == (1, 1, 1)
    assert neon("\tfmla\tv0.2d, v1.2d, v2.2d\n\tfmadd\ts0, s1, s2, s3\n") == (0, 0, 0)


def test_differences_are_parts_of_the_tolerance():
    here = "kl 2 1.0 -4.0\ntranspose 1 3.0\n"
    assert differences(here, here) == {"kl": 0, "transpose": 0}
    off = f"kl 2 1.0 {-4.0 * (1 + TOLERANCE / 2)}\ntranspose 1 3.0\n"
    assert differences(here, off)["kl"] == pytest.approx(0.5)
    assert differences(here, here.replace("3.0", "3.0000001"))["transpose"] == float("inf")
    assert differences(here, here.replace("-4.0", "nan"))["kl"] == float("inf")
    with pytest.raises(AssertionError):
        differences(here, here.replace("kl", "tv"))


def test_a_target_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(cross_compile.shutil, "which", lambda _: None)
    monkeypatch.setattr(cross_compile.importlib.util, "find_spec", lambda _: None)
    missing = {target.name: target.missing for target in cross_compile.targets()}
    assert "g++-aarch64-linux-gnu" in missing["Linux, g++"]
    assert "ziglang" in missing["Linux, clang"]
    assert "ziglang" in missing["macOS, clang"]


def test_openmp_on_macos_is_that_of_torch(monkeypatch, tmp_path):
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _build.openmp() == ([], [])
    header = tmp_path / "torch" / "include" / "omp.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert _build.openmp() == (["-Xclang", "-fopenmp"], [])
    monkeypatch.setattr(sys, "platform", "linux")
    assert _build.openmp() == (["-fopenmp"], ["-fopenmp"])
