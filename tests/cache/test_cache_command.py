"""`fdd-kernels cache-teacher` and `fdd-kernels distill --teacher-cache` end to end on tiny
models.
"""

import json
import shutil

import pytest

from fdd_kernels.cli.cache_teacher import cache_teacher
from fdd_kernels.cli.distill.run import distill
from fdd_kernels.cli.main import main
from fdd_kernels.common.errors import UserError
from fdd_kernels.teacher_cache import TeacherCache
from tests.support.cache_inputs import digests
from tests.support.commands import (
    FROM_CACHE,
    TEXT,
    FullDisk,
    cache_options,
    options,
    quiet,
    small_disk,
)


@pytest.fixture(scope="module")
def cached(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("command") / "cache"
    console = quiet()
    cache_teacher(cache_options(inputs, output, verify=True), console)
    assert "every checksum is right" in console.file.getvalue()
    return output


class TestCommands:
    def test_distilling_from_the_cache_equals_distilling_from_the_teacher(
        self, inputs, cached, tmp_path
    ):
        live = distill(options(inputs, tmp_path / "live"), quiet())
        mine = distill(
            options(inputs, tmp_path / "cache", teacher_cache=cached, **FROM_CACHE), quiet()
        )
        for a, b in zip(mine["history"][:-1], live["history"][:-1], strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() & {
                "loss",
                "output_kd",
                "trajectory",
                "derivative",
                "eval_loss",
                "eval_trajectory",
            }:
                assert a[name] == pytest.approx(b[name], rel=2e-4), name
        for name, value in live["held_out"].items():
            assert mine["held_out"][name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
        assert mine["train_tokens"] == live["train_tokens"]
        console = quiet()
        distill(options(inputs, tmp_path / "cache", teacher_cache=cached, **FROM_CACHE), console)
        assert "finished; nothing to do" in console.file.getvalue()

    def test_weights_in_the_data(self, inputs, tmp_path):
        """Twice the weight of every document is twice the loss, with a live teacher and a cache."""
        found = {}
        for weight in (1, 2):
            data = tmp_path / f"{weight}.jsonl"
            entries = [{"text": line, "token_weights": weight} for line in TEXT.splitlines()]
            data.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
            cache = tmp_path / f"cache-{weight}"
            cache_teacher(cache_options(inputs, cache, data=data), quiet())
            for name, given in (
                ("live", {"data": data}),
                ("cached", {"teacher_cache": cache, **FROM_CACHE}),
            ):
                run = options(inputs, tmp_path / f"{name}-{weight}", max_steps=1, **given)
                history = distill(run, quiet())["history"]
                found[name, weight] = next(log["loss"] for log in history if "loss" in log)
        for name in ("live", "cached"):
            assert found[name, 2] == pytest.approx(2 * found[name, 1], rel=1e-5)

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8"])
    def test_it_learns_from_every_storage(self, inputs, tmp_path, dtype):
        cache_teacher(cache_options(inputs, tmp_path / "cache", dtype=dtype), quiet())
        metrics = distill(
            options(inputs, tmp_path / "run", teacher_cache=tmp_path / "cache", **FROM_CACHE),
            quiet(),
        )
        assert metrics["held_out"]["output_kd"] < 0.95 * metrics["held_out_before"]["output_kd"]

    def test_a_teacher_on_disk_gives_the_same_cache(self, inputs, cached, tmp_path):
        away = {"teacher_device_map": "disk", "teacher_offload_folder": tmp_path / "away"}
        cache_teacher(cache_options(inputs, tmp_path / "cache", **away), quiet())
        found, expected = digests(tmp_path / "cache"), digests(cached)
        # The index identifies the teacher by its weights, which an offloaded one does not give
        # (`describe_model`).
        assert {**found, "index.json": b""} == {**expected, "index.json": b""}

    def test_resume_wants_the_same_cache(self, inputs, cached, tmp_path):
        run = {"teacher_cache": cached, "max_steps": 2, **FROM_CACHE}
        distill(options(inputs, tmp_path / "run", **run), quiet())
        cache_teacher(cache_options(inputs, tmp_path / "other", max_length=20), quiet())
        with pytest.raises(UserError, match=r"holds another run \(teacher_cache was"):
            distill(
                options(inputs, tmp_path / "run", **(run | {"teacher_cache": tmp_path / "other"})),
                quiet(),
            )
        shutil.copytree(cached, tmp_path / "same")
        assert (
            distill(
                options(inputs, tmp_path / "run", **(run | {"teacher_cache": tmp_path / "same"})),
                quiet(),
            )["steps"]
            == 2
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--data", "d.txt"], "--data d.txt was given beside --teacher-cache"),
            (["--max-length", "9"], "--max-length 9 was given beside --teacher-cache"),
            (["--eval-fraction", "0.1"], "--eval-fraction 0.1 was given beside --teacher-cache"),
            (
                ["--student-layers", "1,2", "--teacher-layers", "2,3"],
                "teacher layers [2, 3], but the cache",
            ),
            (["--no-apply-final-norm"], "--no-apply-final-norm, but the cache"),
        ],
    )
    def test_options_that_contradict_the_cache(
        self, inputs, cached, tmp_path, capsys, arguments, message
    ):
        own = ["--num-layers", "2", "--max-steps", "1"]
        code = main(
            [
                "distill",
                "--teacher-cache",
                str(cached),
                "--student",
                str(inputs / "student"),
                "--output",
                str(tmp_path / "o"),
                *own,
                *arguments,
            ]
        )
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 2
        assert error.startswith("fdd-kernels distill: ")
        assert message in error

    def test_teacher_and_cache_exclude_each_other(self, inputs, cached, capsys):
        with pytest.raises(SystemExit):
            main(
                [
                    "distill",
                    "--teacher-cache",
                    str(cached),
                    "--teacher",
                    "t",
                    "--student",
                    "s",
                    "--output",
                    "o",
                ]
            )
        assert "not allowed with argument" in capsys.readouterr().err
        assert main(["distill", "--teacher", "t", "--student", "s", "--output", "o"]) == 2
        assert "--data is missing" in capsys.readouterr().err

    def test_another_tokenizer_is_refused(self, inputs, cached, tmp_path):
        shutil.copytree(inputs / "student", tmp_path / "student")
        file = tmp_path / "student" / "tokenizer.json"
        file.write_text(file.read_text().replace("<end>", "<fin>"))
        student = {"student": str(tmp_path / "student"), "teacher_cache": cached, **FROM_CACHE}
        with pytest.raises(
            UserError,
            match=r"cached text .* holds \d+ tokens that student and teacher do not share",
        ):
            distill(options(inputs, tmp_path / "run", **student), quiet())

    def test_an_unfinished_cache_is_refused_with_the_remedy(self, inputs, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            FullDisk(patch, lambda path: "/.unfinished/shard-00001" in path)
            with pytest.raises(
                UserError,
                match=r"No space left on device.*whole shards are kept.*run the same command",
            ):
                cache_teacher(cache_options(inputs, tmp_path / "cache"), quiet())
        with pytest.raises(
            UserError, match=r"is not complete \(1 shards are written\): run the same"
        ):
            distill(
                options(inputs, tmp_path / "run", teacher_cache=tmp_path / "cache", **FROM_CACHE),
                quiet(),
            )
        cache_teacher(cache_options(inputs, tmp_path / "cache"), quiet()).verify()
        assert {path.name for path in (tmp_path / "cache").glob(".*")} == {".lock"}

    def test_a_really_full_file_system(self, inputs, cached, tmp_path):
        """Fill a small file system: an error, no signal, and a resume elsewhere."""
        largest = max(path.stat().st_size for path in cached.glob("shard-*"))
        once = sum(
            path.stat().st_size + 4096
            for path in cached.rglob("*")
            if path.is_file() and "shard" not in path.name
        )
        with small_disk(tmp_path / "small", once + int(2.5 * largest)) as small:
            with pytest.raises(UserError, match=r"could not be written .*No space left on device"):
                cache_teacher(cache_options(inputs, small / "cache"), quiet())
            assert list((small / "cache").glob("shard-*"))
            with pytest.raises(ValueError, match="is not complete"):
                TeacherCache(small / "cache")
            shutil.copytree(small / "cache", tmp_path / "moved")
        cache_teacher(cache_options(inputs, tmp_path / "moved"), quiet())
        assert digests(tmp_path / "moved") == digests(cached)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--dtype", "int4"], "--dtype int4 is not one of float32, bfloat16, int8, float8"),
            (
                ["--teacher-dtype", "int8"],
                "--teacher-dtype int8 is not one of auto, float32, bfloat16",
            ),
            (["--num-layers", "9"], "needs a deeper model"),
            (["--teacher-layers", "2,1"], "must be increasing layers"),
            (["--max-length", "65"], "has only 64 positions"),
            (["--eval-fraction", "1"], "--eval-fraction 1.0 must be"),
        ],
    )
    def test_bad_options_are_one_line(self, inputs, tmp_path, capsys, arguments, message):
        given = [
            "--teacher",
            str(inputs / "teacher"),
            "--data",
            str(inputs / "data.txt"),
            "--output",
            str(tmp_path / "o"),
        ]
        assert main(["cache-teacher", *given, *arguments]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert message in error.strip().splitlines()[-1]

    def test_what_is_missing_is_named(self, tmp_path, capsys):
        assert main(["cache-teacher", "--output", str(tmp_path / "o"), "--teacher", "t"]) == 2
        assert "--data is missing" in capsys.readouterr().err
        assert main(["cache-teacher", "--output", str(tmp_path / "o"), "--verify"]) == 2
        assert "holds no teacher cache" in capsys.readouterr().err
        (tmp_path / "file").write_text("")
        given = ["--teacher", "t", "--data", "d.txt", "--output", str(tmp_path / "file")]
        assert main(["cache-teacher", *given]) == 2
        assert "cannot be made a directory" in capsys.readouterr().err
