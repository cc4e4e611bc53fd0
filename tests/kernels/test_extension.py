"""Where the C++ kernels come from: compiled ahead, compiled at first use into a cache, or a reason
why not.
"""

import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from fdd_kernels import _build, backends, fused_fdd_loss
from fdd_kernels.backends.cpu import extension
from fdd_kernels.common.heartbeat import EVERY, Heartbeat

Missing = extension._Missing


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FDD_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FDD_KERNELS_BUILD", raising=False)
    monkeypatch.setenv("CXX", "some-c++")
    return tmp_path / "cache"


class Compiler:
    """Replace the compiler's process: write a file, or fail with a message."""

    def __init__(self, monkeypatch, message=None):
        self.calls, self.message = 0, message
        named = {name: getattr(subprocess, name) for name in ("DEVNULL", "PIPE", "STDOUT")}
        monkeypatch.setattr(extension, "subprocess", SimpleNamespace(run=self, **named))

    def __call__(self, command, **options):
        self.calls += 1
        if self.message is not None:
            return subprocess.CompletedProcess(command, 1, stdout=self.message)
        built = Path(command[-1]) / "built" / "fdd_kernels" / "_C.so"
        built.parent.mkdir(parents=True)
        built.write_text("kernels")
        return subprocess.CompletedProcess(command, 0, stdout="")


@pytest.fixture
def loaded(monkeypatch):
    """Record the files to load."""
    files = []
    monkeypatch.setattr(extension, "_loaded", lambda file: (files.append(file), str(file)))
    return files


def test_compiled_once_into_the_cache(cache, monkeypatch, loaded, capsys):
    compiler = Compiler(monkeypatch)
    for _ in range(2):
        extension._at_first_use()
    assert compiler.calls == 1
    assert loaded[0] == loaded[1]
    assert cache in loaded[0].parents
    assert {path.name for path in loaded[0].parent.iterdir()} <= {loaded[0].name, ".lock"}
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(
        f"fdd_kernels: compiling the C++ kernels for torch {torch.__version__}, once, with some-c++"
    )
    assert last.startswith("fdd_kernels: compiled the C++ kernels in ")


def test_other_sources_and_flags_are_compiled_anew(monkeypatch, tmp_path):
    (tmp_path / "a.cpp").write_text("one")
    before = extension._key([tmp_path / "a.cpp"])
    (tmp_path / "a.cpp").write_text("two")
    changed = extension._key([tmp_path / "a.cpp"])
    monkeypatch.setattr(_build, "FLAGS", ("-O0",))
    assert len({before, changed, extension._key([tmp_path / "a.cpp"])}) == 3


def test_a_failure_is_remembered_with_its_reason(cache, monkeypatch):
    compiler = Compiler(monkeypatch, "building\nx.cpp:3:1: error: no such thing\nmore")
    for _ in range(3):
        with pytest.raises(
            Missing,
            match=r"x.cpp:3:1: error: no such thing; all messages: "
            r".*build.log.*BUILD=1 tries again",
        ):
            extension._at_first_use()
    assert compiler.calls == 1
    monkeypatch.setenv("FDD_KERNELS_BUILD", "1")
    with pytest.raises(Missing):
        extension._at_first_use()
    monkeypatch.delenv("FDD_KERNELS_BUILD")
    monkeypatch.setenv("CXX", "another-c++")
    with pytest.raises(Missing):
        extension._at_first_use()
    assert compiler.calls == 3


def test_reasons_name_the_remedy(cache, monkeypatch, tmp_path):
    Compiler(monkeypatch)
    monkeypatch.setenv("FDD_KERNELS_BUILD", "0")
    with pytest.raises(Missing, match="FDD_KERNELS_BUILD=0 forbids compiling them: leave it unset"):
        extension._at_first_use()
    monkeypatch.delenv("FDD_KERNELS_BUILD")
    monkeypatch.delenv("CXX")
    without = SimpleNamespace(which=lambda name: None, rmtree=shutil.rmtree)
    monkeypatch.setattr(extension, "shutil", without)
    with pytest.raises(Missing, match=r"there is no C.. compiler .* install a C.. compiler"):
        extension._at_first_use()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FDD_KERNELS_CACHE", str(tmp_path / "file"))
    with pytest.raises(Missing, match="set FDD_KERNELS_CACHE to a folder of your own"):
        extension._at_first_use()


def test_one_process_compiles_and_others_wait(cache, monkeypatch, tmp_path):
    compiler, file = Compiler(monkeypatch), tmp_path / "_C.so"
    other = FileLock(tmp_path / ".lock")
    other.acquire()
    waiting = threading.Thread(target=extension._compile_once, args=(tmp_path, file), daemon=True)
    waiting.start()
    file.write_text("kernels of the other process")
    other.release()
    waiting.join(60)
    assert not waiting.is_alive()
    assert compiler.calls == 0


TORCH = re.match(r"[0-9.]+", torch.__version__)[0]


@pytest.mark.parametrize(
    ("marker", "found"),
    [
        (f"2.1.7; interface {extension.INTERFACE};", ("2.1.7", extension.INTERFACE)),
        (f"{TORCH};", (TORCH, 1)),
        (f"{TORCH}; interface 99;", (TORCH, 99)),
    ],
)
def test_kernels_of_another_torch_or_interface_are_not_loaded(monkeypatch, tmp_path, marker, found):
    """The last two are of an installation in place whose sources changed since it was built."""
    file = tmp_path / "_C.so"
    file.write_bytes(f"\x7fELF ... fdd_kernels built for torch {marker} ...".encode("latin-1"))
    assert extension.built_for(file) == found
    spec = type("Spec", (), {"origin": str(file)})
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.delenv("FDD_KERNELS_BUILD", raising=False)
    assert extension._ahead_of_time() is None  # compiles them next
    monkeypatch.setenv("FDD_KERNELS_BUILD", "0")
    message = rf"compiled for torch {found[0]}, interface {found[1]}, .* install the package again"
    with pytest.raises(Missing, match=message):
        extension._ahead_of_time()


@pytest.mark.skipif(extension.kernels is None, reason="no C++ kernels here")
def test_the_kernels_say_what_they_were_built_for():
    assert extension.built_for(Path(extension.origin)) == (TORCH, extension.INTERFACE)


def test_a_broken_file_is_a_reason(tmp_path):
    (tmp_path / "_C.so").write_text("not a library")
    with pytest.raises(Missing, match=r"do not load .*: remove "):
        extension._loaded(tmp_path / "_C.so")


def test_first_use_under_torch_compile(monkeypatch):
    """torch.compile does not trace the search for the kernels, which may compile them."""
    found = []

    def find():
        found.append(True)
        vars(extension).update(kernels=None, origin=None, why_missing="none, for a test")

    monkeypatch.setattr(extension, "_find", find)
    for name in ("kernels", "origin", "why_missing"):
        monkeypatch.setitem(vars(extension), name, None)
        del vars(extension)[name]

    @torch.compile(backend="eager", fullgraph=True)
    def missing(x):
        return x + 1 if extension.missing_reason() is None else x + 2

    assert missing(torch.zeros(())) == 2
    assert found == [True]


def test_the_sources_compile_in_one_place():
    """setup.py and the first use compile the same csrc."""
    names = {path.name for path in _build.sources(_build.source_folder())}
    assert {"module.cpp", "problem.h", "row_kernels_impl.h"} <= names


def test_a_sign_of_life_every_ten_seconds():
    waits, beats, now = [], [], [0.0]

    def wait(seconds):
        waits.append(seconds)
        now[0] += seconds
        return len(waits) > 3

    heartbeat = Heartbeat(beats.append, wait=wait, clock=lambda: now[0])
    with heartbeat:
        heartbeat._thread.join()
    assert waits == [EVERY] * 4
    assert beats == [10.0, 20.0, 30.0]


def test_auto_does_without_and_says_why(monkeypatch):
    monkeypatch.setattr(extension, "missing_reason", lambda: "no compiler here: install one")
    monkeypatch.setattr(backends, "_warned", set())
    hidden, head = [torch.randn(3, 4) for _ in range(3)], torch.randn(11, 4)
    with pytest.warns(
        UserWarning, match='"cpu" backend is not used on "cpu": no compiler here: install one'
    ):
        fused_fdd_loss(hidden, head, hidden, head)
