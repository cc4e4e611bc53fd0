"""The teacher cache on disk: refused where it does not fit, found out where it is damaged, whole
after kills.
"""

import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.cli.main import main
from fdd_kernels.common import atomic
from fdd_kernels.common.errors import UserError
from fdd_kernels.data import pad_windows
from fdd_kernels.teacher_cache import TeacherCache, writer
from fdd_kernels.teacher_cache.format import ArraySpec
from fdd_kernels.teacher_cache.reader import CacheReader
from fdd_kernels.teacher_cache.windows import WindowTable
from fdd_kernels.teacher_cache.writer import CachedQuantity, write_cache
from tests.support.cache_inputs import (
    CONFIG,
    VOCAB,
    batch_of,
    digests,
    student_model,
    teacher_model,
    write,
)
from tests.support.commands import FullDisk
from tests.support.hf_models import tiny_model


def token_numbers(batch, places):
    tokens = batch["input_ids"].flatten()[places].float()
    return {
        "token": tokens[:, None],
        "angles": (tokens[:, None] * torch.arange(1, 6) * 0.1).sin(),
    }


# Another kind: numbers made of the tokens, in arrays of two widths, each with its own codec.
NUMBERS = CachedQuantity(
    kind="numbers",
    arrays={"token": ArraySpec(1, "float32"), "angles": ArraySpec(5, "int8")},
    dtype=torch.float32,
    contents={"scale": 0.1},
    once={"offset": {"offset": torch.tensor([3.0])}},
    rows=token_numbers,
)


def test_storage_holds_other_kinds(windows, tmp_path):
    write_cache(
        tmp_path,
        NUMBERS,
        windows,
        batch_size=3,
        shard_size=500,
        tokenizer=None,
        data=None,
        resume=True,
        advance=lambda done, total: None,
    )
    with pytest.raises(ValueError, match="is a cache of numbers, but one of states is needed"):
        TeacherCache(tmp_path)
    reader = CacheReader(tmp_path, "numbers")
    assert len(reader.index["shards"]) > 3
    assert reader.once("offset")["offset"] == 3
    table = WindowTable(reader.once("windows"), reader.contents["windows"]["train"])
    chosen = [7, 2, 11]
    batch = pad_windows([table.dataset("train")[index] for index in chosen])
    indices, places = table.match(batch)
    assert indices == chosen
    for name, rows in NUMBERS.rows(batch, places).items():
        stored = reader.rows(
            name, indices, table.rows, dtype=torch.float32, device=torch.device("cpu")
        )
        torch.testing.assert_close(
            stored, rows, rtol=0, atol=0 if name == "token" else 0.5 / 127 * 1.001
        )


class TestRefusals:
    """Refuse models and configs that do not fit, naming both sides, before any work."""

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                FDDConfig.paper(student_layers=(1, 2), teacher_layers=(2, 3)),
                r"teacher layers \[2, 3\], but the cache .* \[1, 2, 4\]",
            ),
            (FDDConfig.paper(num_layers=3), r"teacher layers \[1, 2, 3\], but the cache"),
            (
                FDDConfig.paper(num_layers=2, apply_final_norm=False),
                "apply_final_norm=False, but the cache .*apply_final_norm=True",
            ),
            (
                FDDConfig.paper(num_layers=2, vocab_size=5000),
                rf"vocab_size=5000 is larger .*teacher {VOCAB}",
            ),
            (FDDConfig.paper(num_layers=2, ignore_index=-1), "ignore_index=-1"),
            (
                FDDConfig.paper(num_layers=2, space="feature", trajectory="mse"),
                'space="feature" compares the states of the teacher itself, .* is a TeacherCache',
            ),
        ],
    )
    def test_configs(self, caches, config, message):
        with pytest.raises(ValueError, match=message):
            Distiller(student_model(), caches["float32"], config)

    def test_another_vocabulary(self, caches):
        with pytest.raises(
            ValueError, match=f"student's vocabulary has 97 entries and the teacher's {VOCAB}"
        ):
            Distiller(tiny_model("llama", depth=4), caches["float32"], CONFIG)

    def test_batches(self, caches):
        cache = caches["float32"]
        distiller, batch = Distiller(student_model(), cache, CONFIG), batch_of(cache)
        window = int(batch["teacher_index"][1])

        def refused(message, **changes):
            with pytest.raises(ValueError, match=message):
                distiller(
                    {key: value for key, value in (batch | changes).items() if value is not None}
                )

        refused("no teacher_index", teacher_index=None)
        refused("no labels", labels=None)
        refused(
            r"teacher_index\[0\]=1000, but the cache has windows 0 to",
            teacher_index=torch.tensor([1000, 0, 0, 0, 0]),
        )
        refused("teacher_index has 2 entries for 5 rows", teacher_index=torch.tensor([0, 1]))
        refused("row 0 of the batch should be window", teacher_index=batch["teacher_index"].roll(1))
        other = batch["input_ids"].clone()
        other[1, 4] += 1
        refused(
            f"row 1 of the batch should be window {window} of the cache, but input_ids differ",
            input_ids=other,
        )
        short = {key: batch[key][:, :6] for key in ("input_ids", "attention_mask", "labels")}
        refused("input_ids differ", **short)
        prompt = next(
            index for index, row in enumerate(cache.dataset("train")) if row["labels"][2] == -100
        )
        masked = pad_windows([cache.dataset("train")[prompt]])
        more = masked | {"labels": masked["input_ids"]}
        with pytest.raises(
            ValueError,
            match=f"has a label at position 1, for which window {prompt} of the cache holds no",
        ):
            distiller(more)

    def test_something_else_as_a_teacher(self, tmp_path):
        with pytest.raises(
            TypeError, match="must be a model or a teacher cache, got the string 'teacher'"
        ):
            Distiller(student_model(), "teacher")
        with pytest.raises(FileNotFoundError, match="holds no teacher cache"):
            TeacherCache(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 9}, "has version 9, this fdd_kernels reads version 1"),
            ({"format": "other"}, "is not the index of a teacher cache"),
            ({"complete": False}, "is not complete .*run the same fdd-kernels cache-teacher again"),
            (
                {"contents": {"kind": "statistics"}},
                "is a cache of statistics, but one of states is needed",
            ),
            ({"files": {"../secret": {"bytes": 1, "sha256": ""}}}, "../secret lies outside"),
        ],
    )
    def test_indices(self, caches, tmp_path, change, message):
        shutil.copytree(caches["float32"].path, tmp_path / "cache")
        index = tmp_path / "cache" / "index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            TeacherCache(tmp_path / "cache")

    def test_an_index_that_is_no_json(self, caches, tmp_path):
        shutil.copytree(caches["float32"].path, tmp_path / "cache")
        with (tmp_path / "cache" / "index.json").open("r+") as file:
            file.truncate(100)
        with pytest.raises(ValueError, match=r"index.json cannot be read"):
            TeacherCache(tmp_path / "cache")

    def test_other_contents_are_not_mixed(self, windows, tmp_path):
        write(tmp_path / "a", windows)
        before = {
            path: path.read_bytes()
            for path in sorted((tmp_path / "a").rglob("*"))
            if path.is_file()
        }
        other = load_like(windows, drop=1)
        for changes, message in (
            ({"layers": (1, 2)}, r"layers was \[1, 2, 4\], is \[1, 2\]"),
            ({"codec": "int8"}, "codec was 'float32', is 'int8'"),
            ({"apply_final_norm": False}, "apply_final_norm was True, is False"),
            (
                {"teacher": tiny_model("gpt2", depth=5, vocab_size=VOCAB, seed=3)},
                "teacher.sha256 was",
            ),
            ({"windows": other}, "windows.train was"),
            ({"data": {"a.txt": "0"}}, "data was None"),
        ):
            with pytest.raises(ValueError, match=f"holds another cache .*{message}.*--no-resume"):
                write(tmp_path / "a", **({"windows": windows} | changes))
        assert {
            path: path.read_bytes()
            for path in sorted((tmp_path / "a").rglob("*"))
            if path.is_file()
        } == before
        replaced = write(tmp_path / "a", windows, layers=(1, 2), resume=False)
        assert replaced.layers == (1, 2)

    def test_a_directory_of_something_else_is_not_touched(self, windows, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"mine")
        for resume in (True, False):
            with pytest.raises(ValueError, match=r"holds model.safetensors and no cache"):
                write(tmp_path, windows, resume=resume)
        assert (tmp_path / "model.safetensors").read_bytes() == b"mine"

    def test_arguments_of_the_writer(self, windows, tmp_path):
        for changes, message in (
            ({"layers": (1, 9)}, r"layers=\[1, 9\] must be increasing layers between 0 .* and 5"),
            (
                {"codec": "int4"},
                "codec='int4' is not one of 'float32', 'bfloat16', 'int8', 'float8'",
            ),
            ({"batch_size": 0}, "batch_size=0 must be at least 1"),
            ({"shard_size": 0}, "shard_size=0 must be at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                write(tmp_path / "o", windows, **changes)
            assert not (tmp_path / "o").exists()

    def test_windows_that_are_padded_or_count_nothing(self, windows, tmp_path):
        window = windows.train[0]
        padded = window | {"attention_mask": [1] * (len(window["input_ids"]) - 1) + [0]}
        empty = window | {"labels": [-100] * len(window["labels"])}
        for bad, message in ((padded, "no padding"), (empty, "no token to predict")):
            with pytest.raises(ValueError, match=f"window 1 .*{message}"):
                write(tmp_path, type(windows)([window, bad]))

    def test_states_that_are_not_finite(self, windows, tmp_path):
        teacher = teacher_model("llama")
        with torch.no_grad():
            teacher.model.embed_tokens.weight[windows.train[2]["input_ids"][0]] = float("nan")
        with pytest.raises(
            ValueError, match="windows 0 to 3: layer_1 has values that are not finite"
        ):
            write(tmp_path, windows, teacher)
        with pytest.raises(ValueError, match="is not complete"):
            TeacherCache(tmp_path)


def load_like(windows, drop):
    return type(windows)(list(windows.train)[:-drop], windows.held_out)


class TestDamage:
    @pytest.fixture
    def copied(self, caches, tmp_path):
        shutil.copytree(caches["float32"].path, tmp_path / "cache")
        return tmp_path / "cache"

    def test_a_truncated_or_missing_shard_is_found_at_once_and_written_again(
        self, copied, windows, caches
    ):
        for damage, message in (
            (lambda shard: os.truncate(shard, 100), "has 100 bytes instead of"),
            (os.unlink, "is missing"),
        ):
            damage(copied / "shard-00001.safetensors")
            with pytest.raises(
                ValueError, match=f"shard-00001.safetensors {message}.*cache-teacher again"
            ):
                TeacherCache(copied)
            write(copied, windows)
            assert digests(copied) == digests(caches["float32"].path)

    def test_a_flipped_bit_is_found_by_verify(self, copied, capsys):
        cache = TeacherCache(copied)
        cache.verify()
        assert main(["cache-teacher", "--output", str(copied), "--verify"]) == 0
        with (copied / "shard-00001.safetensors").open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            byte = file.read(1)
            file.seek(-100, os.SEEK_END)
            file.write(bytes([byte[0] ^ 4]))
        TeacherCache(copied)  # same size
        with pytest.raises(ValueError, match=r"shard-00001.safetensors has another SHA-256"):
            cache.verify()
        capsys.readouterr()
        assert main(["cache-teacher", "--output", str(copied), "--verify"]) == 2
        assert "shard-00001.safetensors has another SHA-256" in capsys.readouterr().err

    def test_a_damaged_head_needs_a_new_cache(self, copied, windows):
        os.truncate(copied / "head.safetensors", 100)
        with pytest.raises(ValueError, match=r"head.safetensors has 100 bytes.*--no-resume"):
            TeacherCache(copied)
        with pytest.raises(ValueError, match=r"head.safetensors has 100 bytes.*--no-resume"):
            write(copied, windows)
        write(copied, windows, resume=False).verify()

    def test_a_shard_of_other_shapes(self, copied, caches):
        """Two shards changed places: sizes may be equal, shapes are compared when a shard is
        opened.
        """
        index = json.loads((copied / "index.json").read_text())
        shard = index["shards"]["shard-00001.safetensors"]
        shard["rows"] += 1
        (copied / "index.json").write_text(json.dumps(index))
        cache = TeacherCache(copied)
        row = shard["windows"][0]
        with pytest.raises(ValueError, match=r"shard-00001.safetensors holds tensors of shapes"):
            Distiller(student_model(), cache, CONFIG)(pad_windows([cache.dataset("train")[row]]))


def forked(function):
    """Run in another process, whatever ends it; return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def unusable_or_whole(folder, whole):
    """A cache opens only if it is complete."""
    if (
        json.loads((folder / "index.json").read_text())["complete"]
        if (folder / "index.json").exists()
        else False
    ):
        assert digests(TeacherCache(folder).path) == whole
    else:
        with pytest.raises(
            (ValueError, FileNotFoundError), match=r"is not complete|holds no teacher cache"
        ):
            TeacherCache(folder)


@pytest.mark.slow
def test_a_kill_before_or_after_any_write_loses_only_unfinished_shards(windows, tmp_path):
    """Every write goes through `atomic._sync`: die at each of its calls, then resume."""
    teacher, calls, shards = teacher_model(), [], {"shard_size": 60_000}
    with pytest.MonkeyPatch.context() as patch:
        own = atomic._sync
        patch.setattr(atomic, "_sync", lambda path: calls.append(path.name) or own(path))
        whole = digests(write(tmp_path / "whole", windows, teacher, **shards).path)
    assert len(calls) > 20
    for moment in range(len(calls)):
        folder = tmp_path / str(moment)
        left = [moment]

        def sync(path, left=left):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            own(path)

        def work(folder=folder, sync=sync):
            atomic._sync = sync
            write(folder, windows, teacher, **shards)

        assert forked(work) == -signal.SIGKILL
        unusable_or_whole(folder, whole)
        written = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
        listed = (
            json.loads((folder / "index.json").read_text())["shards"]
            if (folder / "index.json").exists()
            else {}
        )
        write(folder, windows, teacher, **shards)
        assert digests(folder) == whole
        for name in listed:  # shards reported as written are not written again
            assert (folder / name).stat().st_mtime_ns == written[name]
        shutil.rmtree(folder)


def test_a_kill_in_the_middle_of_a_file_leaves_nothing_behind(windows, caches, tmp_path):
    """Kill safetensors while its temporary file lies beside the target: nothing is left behind."""

    def work():
        def save(tensors, path):
            path.with_name(".tmp123").write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)

        writer.save_file = save
        write(tmp_path, windows)

    assert forked(work) == -signal.SIGKILL
    assert list(tmp_path.rglob(".tmp123"))
    assert digests(write(tmp_path, windows).path) == digests(caches["float32"].path)


def test_others_may_read_a_cache_as_they_may_read_other_files(windows, tmp_path):
    before = os.umask(0o022)
    try:
        files = [path for path in write(tmp_path, windows).path.rglob("*") if path.is_file()]
    finally:
        os.umask(before)
    assert len(files) > 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_kills_at_random_moments(windows, caches, tmp_path):
    """Moments of a whole write's duration, as it was seen here: on a fast machine fixed ones would
    come after its end. Where one came too late nevertheless, the next ones are earlier."""
    teacher, whole, generator = teacher_model(), digests(caches["float32"].path), random.Random(0)

    def write_until(folder, seconds):
        process = multiprocessing.get_context("fork").Process(
            target=write, args=(folder, windows, teacher)
        )
        began = time.perf_counter()
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode, time.perf_counter() - began

    status, duration = write_until(tmp_path / "whole", None)
    assert status == 0
    killed, attempt = 0, 0
    while killed < 3 and attempt < 50:
        attempt += 1
        status, took = write_until(tmp_path / str(attempt), generator.uniform(0, duration))
        killed += status == -signal.SIGKILL
        duration = duration if status == -signal.SIGKILL else min(duration, took)
        unusable_or_whole(tmp_path / str(attempt), whole)
        assert digests(write(tmp_path / str(attempt), windows, teacher).path) == whole
    assert killed == 3


def test_two_writers_do_not_share_a_directory(windows, tmp_path):
    tmp_path.joinpath("a").mkdir()
    with (
        atomic.only_process(tmp_path / "a"),
        pytest.raises(UserError, match="another process is at work"),
    ):
        write(tmp_path / "a", windows)


def test_directories_are_locked_where_there_is_no_fcntl(tmp_path, monkeypatch):
    """As on Windows, where its import made FDDTrainer unimportable."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("atomic_without_fcntl", atomic.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with (
        module.only_process(tmp_path),
        pytest.raises(UserError, match="another process"),
        atomic.only_process(tmp_path),
    ):
        pass


def test_a_complete_cache_is_left_alone(windows, caches, monkeypatch):
    before = digests(caches["float32"].path)
    FullDisk(monkeypatch, lambda path: True)  # nothing may be written
    steps = []
    write(caches["float32"].path, windows, advance=lambda done, total: steps.append((done, total)))
    assert digests(caches["float32"].path) == before
    assert steps == [(len(caches["float32"]),) * 2]
