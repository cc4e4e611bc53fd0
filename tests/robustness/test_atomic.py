"""Files are complete or absent: kill before each change of the file system and look for a whole
one.
"""

import errno
import multiprocessing
import os
import shutil
import signal

import pytest

from fdd_kernels.common import atomic

CHANGES = ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync")
OLD, NEW = {"x": "old", "y": "old"}, {"x": "new", "z": "new"}


class Killed(BaseException):
    """From the moment of its death on a process changes nothing more, whatever its handlers try."""


class Mortal:
    """Die before change number `moment` of the file system, or let that one fail and survive.

    `os` is patched for the whole process: shutil and safetensors change files through it too.
    """

    def __init__(self, patch, moment, survives=False):
        self.moment, self.survives, self.calls = moment, survives, []
        for name in CHANGES:
            patch.setattr(os, name, self.change(name, getattr(os, name)))

    def change(self, name, own):
        def changed(*args, **kwargs):
            self.calls.append(name)
            if self.survives and len(self.calls) == self.moment + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if not self.survives and len(self.calls) > self.moment:
                raise Killed
            return own(*args, **kwargs)

        return changed


def fill(folder, contents):
    for name, text in contents.items():
        (folder / name).write_text(text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else None


def replace(target):
    with atomic.atomic_directory(target) as folder:
        fill(folder, NEW)


def start(tmp_path, there=True):
    """A fresh place with or without an old directory in it."""
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    target = tmp_path / "run" / "a"
    target.parent.mkdir()
    if there:
        target.mkdir()
        fill(target, OLD)
    return target


def killed_at(moment, function, *args):
    """Whether `function` was killed before its change number `moment`; False if it had come to its
    end.
    """
    with pytest.MonkeyPatch.context() as patch:
        Mortal(patch, moment)
        try:
            function(*args)
        except Killed:
            return True
    return False


def moments(function):
    """Number and process of each kill, until the function comes to its end."""
    moment = 0
    while function(moment):
        moment += 1
    return moment


class TestKilled:
    @pytest.mark.parametrize("there", [True, False])
    def test_while_a_directory_is_replaced(self, tmp_path, there):
        """At every moment the old one or the new one is whole, and the next start finds it under
        its name.
        """
        old, seen = OLD if there else None, []

        def at(moment):
            target = start(tmp_path, there)
            died = killed_at(moment, replace, target)
            assert contents(target) in (old, NEW, None)
            atomic.clear_unfinished(target.parent)
            seen.append(contents(target))
            assert seen[-1] in (old, NEW)
            assert [path.name for path in target.parent.iterdir()] == ["a"] * (seen[-1] is not None)
            return died

        assert moments(at) > 8
        assert (seen[0], seen[-1]) == (old, NEW)
        # first the old one, then the new one
        assert seen == sorted(seen, key=lambda found: found == NEW)

    def test_while_the_next_start_puts_it_right(self, tmp_path):
        def at(moment):
            def again(second):
                target = start(tmp_path)
                killed_at(moment, replace, target)
                died = killed_at(second, atomic.clear_unfinished, target.parent)
                atomic.clear_unfinished(target.parent)
                assert contents(target) in (OLD, NEW)
                return died

            moments(again)
            return killed_at(moment, replace, start(tmp_path))

        assert moments(at) > 8

    def test_when_the_next_writer_fails_or_dies(self, tmp_path):
        """Written again without `clear_unfinished`, and the filling fails."""

        def at(moment):
            target = start(tmp_path)
            died = killed_at(moment, replace, target)
            with pytest.raises(NotADirectoryError), atomic.atomic_directory(target) as folder:
                fill(folder, {"half": "", "half/of it": ""})
            assert contents(target) in (OLD, NEW)
            assert [path.name for path in target.parent.iterdir()] == ["a"]
            return died

        moments(at)

    def test_while_a_directory_is_removed(self, tmp_path):
        """Also of a target replaced before with its old version still there: nothing old
        returns, nothing is partial.
        """

        def at(moment, left_over=False):
            target = start(tmp_path)
            if left_over:
                shutil.copytree(target, target.parent / atomic.UNFINISHED / "a.replaced")
            died = killed_at(moment, atomic.remove_directory, target)
            assert contents(target) in (OLD, None)
            gone = contents(target) is None
            atomic.clear_unfinished(target.parent)
            assert contents(target) == (None if gone else OLD)
            return died

        moments(at)
        assert moments(lambda moment: at(moment, left_over=True)) > 8

    def test_while_a_file_is_written(self, tmp_path):
        def at(moment):
            target = start(tmp_path, there=False)
            target.write_text("old")
            died = killed_at(moment, atomic.write_text, target, "new")
            assert target.read_text() in ("old", "new")
            atomic.clear_unfinished(target.parent)
            assert target.read_text() in ("old", "new")
            assert [path.name for path in target.parent.iterdir()] == ["a"]
            return died

        assert moments(at) > 3

    def test_by_a_signal(self, tmp_path):
        """Really, between the two renames."""
        target = start(tmp_path)

        def work():
            own = atomic._sync
            atomic._sync = lambda path: (
                os.kill(os.getpid(), signal.SIGKILL) if not target.exists() else own(path)
            )
            replace(target)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not target.exists()
        atomic.clear_unfinished(target.parent)
        assert contents(target) == NEW


@pytest.mark.parametrize("there", [True, False])
def test_a_disk_that_fails_once_leaves_the_old_directory(tmp_path, there):
    """After an error the old one is there and nothing else; without one the new one, even where the
    old cannot be deleted.
    """
    old, moment, outcomes = OLD if there else None, 0, set()
    while True:
        target = start(tmp_path, there)
        with pytest.MonkeyPatch.context() as patch:
            mortal = Mortal(patch, moment, survives=True)
            try:
                replace(target)
            except OSError:
                expected = old
            else:
                expected = NEW
        assert contents(target) == expected
        outcomes.add(expected is NEW)
        atomic.clear_unfinished(target.parent)
        assert [path.name for path in target.parent.iterdir()] == ["a"] * (expected is not None)
        if len(mortal.calls) <= moment:
            break
        moment += 1
    assert outcomes == {True, False}


def test_a_directory_appears_at_once(tmp_path):
    with atomic.atomic_directory(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "x").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_everything_is_synced_before_it_appears(tmp_path, monkeypatch):
    synced = []
    own = atomic._sync

    def note(path):
        synced.append((path.name, (tmp_path / "a").exists()))
        own(path)

    monkeypatch.setattr(atomic, "_sync", note)
    with atomic.atomic_directory(tmp_path / "a") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "x").write_text("1")
    assert {name for name, there in synced if not there} == {"x", "deep", "a"}
    assert synced[-1] == (tmp_path.name, True)


def test_a_text_file_on_a_full_disk_is_left_as_it_was(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    atomic.write_text(tmp_path / "m.json", "old")
    monkeypatch.setattr(atomic, "_sync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text(tmp_path / "m.json", "new")
    assert (tmp_path / "m.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]
