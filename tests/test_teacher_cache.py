"""The teacher cache: equal to the live teacher, refused where it does not fit, whole after kills and full disks."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess

import pytest
import torch
from hf_models import one_thread, tiny_model, tiny_tokenizer  # noqa: F401
from test_distill import FullDisk, inputs, options, quiet  # noqa: F401
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from fdd_kernels import Distiller, FDDConfig, atomic
from fdd_kernels.cli import main
from fdd_kernels.data import load_windows, pad_windows
from fdd_kernels.distill_command.run import distill
from fdd_kernels.integrations import FDDTrainer
from fdd_kernels.teacher_cache import TeacherCache, write_teacher_cache
from fdd_kernels.teacher_cache.codec import CODECS
from fdd_kernels.teacher_cache.command import CacheOptions, cache_teacher
from fdd_kernels.teacher_cache.index import ArraySpec
from fdd_kernels.teacher_cache.reader import CacheReader
from fdd_kernels.teacher_cache.windows import WindowTable
from fdd_kernels.teacher_cache.writer import CachedQuantity, write_cache
from fdd_kernels.user_error import UserError

LAYERS = (1, 2, 4)
CONFIG = FDDConfig(student_layers=(1, 2, 3), teacher_layers=LAYERS, ce_weight=0.5)
VOCAB = len(tiny_tokenizer())
CHAT = [{"role": "user", "content": "one and two"}, {"role": "assistant", "content": "three is the word"}]


def teacher_model(family="gpt2", **changes):
    return tiny_model(family, depth=5, vocab_size=VOCAB, seed=2, spread=2.0, **changes)


def student_model(**changes):
    return tiny_model("llama", depth=4, vocab_size=VOCAB, seed=1, **changes)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Windows of unequal length; some begin with a prompt that does not count."""
    path = tmp_path_factory.mktemp("text") / "data.jsonl"
    numbers = ("one", "two", "three", "four")
    entries = [{"text": f"{a} and {b} is " + "the word " * length} for a in numbers for length, b in enumerate(numbers)]
    entries += [{"prompt": f"{a} words ", "completion": f"the {a} and a word"} for a in numbers]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, {"messages": CHAT}]))
    return load_windows(path, tiny_tokenizer(), max_length=24, eval_fraction=0.2, seed=0)


def write(folder, windows, teacher=None, **changes):
    defaults = {"layers": LAYERS, "codec": "float32", "batch_size": 4, "shard_size": 20_000, "tokenizer": tiny_tokenizer()}
    return write_teacher_cache(folder, teacher or teacher_model(), windows, **(defaults | changes))


@pytest.fixture(scope="module")
def caches(windows, tmp_path_factory):
    """One cache for each codec; in float32 of several shards."""
    folder = tmp_path_factory.mktemp("caches")
    return {codec: write(folder / codec, windows, codec=codec) for codec in CODECS}


def batch_of(cache, rows=5, start=0):
    """A batch from the middle of the training windows, in another order than they were cached."""
    dataset = cache.dataset("train")
    return pad_windows([dataset[(start + 3 * row) % len(dataset)] for row in range(rows)])


def counted(batch):
    mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
    mask[:, :-1] = batch["labels"][:, 1:] != -100
    return mask


def loss_and_gradients(student, distiller, batch, **options):
    student.zero_grad()
    terms = distiller(batch, **options)
    terms.loss.backward()
    return terms, {name: p.grad.clone() for name, p in student.named_parameters()}


def same_loss_and_gradients(student, distiller, live, batch, **live_options):
    """Two distillers of one student, up to rounding in float32."""
    terms, gradients = loss_and_gradients(student, distiller, batch)
    expected_terms, expected = loss_and_gradients(student, live, batch, **live_options)
    for name, term, value in zip(terms._fields, terms, expected_terms):
        torch.testing.assert_close(term, value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")
    return expected_terms


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi_head_bias", "granite", "opt_projections"])
def test_float32_equals_the_live_teacher(windows, tmp_path, family):
    teacher, student = teacher_model(family), student_model()
    cache = write(tmp_path, windows, teacher)
    assert len(cache.reader.index["shards"]) > 2
    assert len(cache) == len(windows.train) + len(windows.held_out)
    cached, live = Distiller(student, cache, CONFIG), Distiller(student, teacher, CONFIG)
    batch = batch_of(cache)
    terms = same_loss_and_gradients(student, cached, live, batch)
    assert min(terms) > 1e-2  # every term is there to be compared
    mask = counted(batch)
    for mine, theirs in zip(cached.teacher_states(batch), live.teacher_states(batch), strict=True):
        torch.testing.assert_close(mine[mask], theirs[mask], rtol=1e-5, atol=1e-5)
        assert mine.dtype == torch.float32
        assert not mine[~mask].any()


@pytest.mark.parametrize("codec", CODECS)
def test_each_codec_gives_the_states_rounded_as_it_says(caches, codec):
    """The cache's loss is that of the live states after one round trip through the codec; errors are those in the index."""
    cache, teacher, student = caches[codec], teacher_model(), student_model()
    cached, live = Distiller(student, cache, CONFIG), Distiller(student, teacher, CONFIG)
    batch = batch_of(cache)
    mask = counted(batch)
    exact = live.teacher_states(batch)
    stored = cached.teacher_states(batch)
    rounded = []
    for name, state, read in zip(cache.reader.arrays, exact, stored, strict=True):
        rows = state[mask]
        expected = CODECS[codec].decode(CODECS[codec].encode(rows), torch.float32)
        error = (read[mask] - rows).norm(dim=1) / rows.norm(dim=1)
        # A state near the border between two stored numbers may be on its other side after the teacher's own rounding.
        assert (error <= cache.relative_error[name]["worst_row"] * 1.01 + 1e-6).all()
        flipped = ((read[mask] - expected).abs() > 1e-5 * rows.abs().amax(dim=1, keepdim=True)).float().mean()
        assert flipped < 2e-3
        rounded.append(torch.zeros_like(state).masked_scatter(mask[..., None], read[mask]))
    same_loss_and_gradients(student, cached, live, batch, teacher_states=rounded)


# float32: exact. bfloat16: half a unit in the last of 8 bits. int8: half of largest / 127 for each of 32 numbers, where the
# largest is at most the norm. float8: half a unit in the last of 4 bits, and half of the smallest number below those.
BOUNDS = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 32**0.5 / 254, "float8": 2.0**-4 + 32**0.5 * 2.0**-10 / 448}


@pytest.mark.parametrize("codec", CODECS)
def test_errors_of_codecs_are_within_their_arithmetic(caches, codec):
    for error in caches[codec].relative_error.values():
        assert error["mean"] <= error["worst_row"] <= BOUNDS[codec] * (1 + 1e-5)
        assert (codec == "float32") == (error["mean"] == 0)


@pytest.mark.parametrize("codec", ["int8", "float8"])
def test_codecs_at_their_limits(codec):
    rows = torch.tensor([[0.0, 0.0, 0.0], [1e30, -1e30, 1.0], [1e-30, 2e-30, -3e-30], [1e-44, 0.0, 0.0], [5.0, 0.0, -5.0]])
    decoded = CODECS[codec].decode(CODECS[codec].encode(rows), torch.float32)
    assert decoded.isfinite().all()
    assert not decoded[0].any()
    for row in (1, 2, 4):
        assert (decoded[row] - rows[row]).norm() <= 0.07 * rows[row].norm()


def test_a_teacher_in_bfloat16_is_read_in_bfloat16(windows, tmp_path):
    teacher, student = teacher_model(dtype=torch.bfloat16), student_model(dtype=torch.bfloat16)
    cache = write(tmp_path, windows, teacher, codec="bfloat16")
    batch = batch_of(cache)
    states = Distiller(student, cache, CONFIG).teacher_states(batch)
    assert {state.dtype for state in states} == {cache.weight.dtype} == {torch.bfloat16}
    assert all(error["mean"] == 0 for error in cache.relative_error.values())


def test_a_run_may_use_some_of_the_layers(caches):
    student, teacher = student_model(), teacher_model()
    for config in (FDDConfig(student_layers=(2,), teacher_layers=(4,)), FDDConfig(student_layers=(1, 3), teacher_layers=(1, 4)),
                   FDDConfig(alpha=0, beta=0, num_layers=2), FDDConfig(num_layers=2, output_in_dynamics=True)):  # fmt: skip
        cached, live = Distiller(student, caches["float32"], config), Distiller(student, teacher, config)
        same_loss_and_gradients(student, cached, live, batch_of(caches["float32"]))


def test_padding_on_the_left(caches):
    """Positions follow the tokens wherever the padding is."""
    cache, student = caches["float32"], student_model()
    rows = [cache.dataset("train")[index] for index in (0, 5, 2)]
    right = pad_windows(rows)
    longest = right["input_ids"].shape[1]
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    left = {key: torch.tensor([[value] * (longest - len(row[key])) + row[key] for row in rows]) for key, value in fill.items()}
    left["teacher_index"] = right["teacher_index"]
    distiller = Distiller(student, cache, CONFIG)
    with pytest.raises(ValueError, match=r"has a label at position .*padding is on the left, -100 for the first token"):
        distiller(left)  # padding would predict the first token
    left["labels"][torch.arange(3), left["attention_mask"].argmax(dim=1)] = -100
    for a, b in zip(distiller.teacher_states(left), distiller.teacher_states(right)):
        torch.testing.assert_close(a[counted(left)], b[counted(right)], rtol=0, atol=0)


def test_fewer_labels_than_were_cached(caches):
    student, teacher, cache = student_model(), teacher_model(), caches["float32"]
    batch = batch_of(cache)
    batch["labels"][:, :6] = -100
    same_loss_and_gradients(student, Distiller(student, cache, CONFIG), Distiller(student, teacher, CONFIG), batch)


class TokenNumbers(CachedQuantity):
    """Another kind: what is stored are numbers made of the tokens, of two widths, each with its own codec."""

    kind, dtype = "numbers", torch.float32
    arrays = {"token": ArraySpec(1, "float32"), "angles": ArraySpec(5, "int8")}  # noqa: RUF012
    contents, once = {"scale": 0.1}, {"offset": {"offset": torch.tensor([3.0])}}

    def rows(self, batch, places):
        tokens = batch["input_ids"].flatten()[places].float()
        return {"token": tokens[:, None], "angles": (tokens[:, None] * torch.arange(1, 6) * 0.1).sin()}


def test_storage_holds_other_kinds(windows, tmp_path):
    write_cache(tmp_path, TokenNumbers(), windows, batch_size=3, shard_size=500, tokenizer=None, data=None, resume=True,
                advance=lambda done, total: None)  # fmt: skip
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
    for name, rows in TokenNumbers().rows(batch, places).items():
        stored = reader.rows(name, indices, table.rows, dtype=torch.float32, device=torch.device("cpu"))
        torch.testing.assert_close(stored, rows, rtol=0, atol=0 if name == "token" else 0.5 / 127 * 1.001)


class TestRefusals:
    """What does not fit is refused, naming both sides, before anything is computed."""

    @pytest.mark.parametrize(("config", "message"), [
        (FDDConfig(student_layers=(1, 2), teacher_layers=(2, 3)), r"teacher layers \[2, 3\], but the cache .* \[1, 2, 4\]"),
        (FDDConfig(num_layers=3), r"teacher layers \[1, 2, 3\], but the cache"),
        (FDDConfig(num_layers=2, apply_final_norm=False), "apply_final_norm=False, but the cache .*apply_final_norm=True"),
        (FDDConfig(num_layers=2, vocab_size=5000), rf"vocab_size=5000 is larger .*teacher {VOCAB}"),
        (FDDConfig(num_layers=2, ignore_index=-1), "ignore_index=-1"),
    ])  # fmt: skip
    def test_configs(self, caches, config, message):
        with pytest.raises(ValueError, match=message):
            Distiller(student_model(), caches["float32"], config)

    def test_another_vocabulary(self, caches):
        with pytest.raises(ValueError, match=f"student's vocabulary has 97 entries and the teacher's {VOCAB}"):
            Distiller(tiny_model("llama", depth=4), caches["float32"], CONFIG)

    def test_batches(self, caches):
        cache = caches["float32"]
        distiller, batch = Distiller(student_model(), cache, CONFIG), batch_of(cache)
        window = int(batch["teacher_index"][1])

        def refused(message, **changes):
            with pytest.raises(ValueError, match=message):
                distiller({key: value for key, value in (batch | changes).items() if value is not None})

        refused("no teacher_index", teacher_index=None)
        refused("no labels", labels=None)
        refused(r"teacher_index\[0\]=1000, but the cache has windows 0 to", teacher_index=torch.tensor([1000, 0, 0, 0, 0]))
        refused("teacher_index has 2 entries for 5 rows", teacher_index=torch.tensor([0, 1]))
        refused("row 0 of the batch should be window", teacher_index=batch["teacher_index"].roll(1))
        other = batch["input_ids"].clone()
        other[1, 4] += 1
        refused(f"row 1 of the batch should be window {window} of the cache, but input_ids differ", input_ids=other)
        short = {key: batch[key][:, :6] for key in ("input_ids", "attention_mask", "labels")}
        refused("input_ids differ", **short)
        prompt = next(index for index, row in enumerate(cache.dataset("train")) if row["labels"][2] == -100)
        masked = pad_windows([cache.dataset("train")[prompt]])
        more = masked | {"labels": masked["input_ids"]}
        with pytest.raises(ValueError, match=f"has a label at position 1, for which window {prompt} of the cache holds no"):
            distiller(more)

    def test_something_else_as_a_teacher(self, tmp_path):
        with pytest.raises(TypeError, match="must be a causal LM or a TeacherCache, got str"):
            Distiller(student_model(), "teacher")
        with pytest.raises(FileNotFoundError, match="holds no teacher cache"):
            TeacherCache(tmp_path)

    @pytest.mark.parametrize(("change", "message"), [
        ({"version": 9}, "has version 9, this fdd_kernels reads version 1"),
        ({"format": "other"}, "is not the index of a teacher cache"),
        ({"complete": False}, "is not complete .*run the same fdd-kernels cache-teacher again"),
        ({"contents": {"kind": "statistics"}}, "is a cache of statistics, but one of states is needed"),
        ({"files": {"../secret": {"bytes": 1, "sha256": ""}}}, "../secret lies outside"),
    ])  # fmt: skip
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
        before = {path: path.read_bytes() for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()}
        other = load_like(windows, drop=1)
        for changes, message in (
            ({"layers": (1, 2)}, r"layers was \[1, 2, 4\], is \[1, 2\]"),
            ({"codec": "int8"}, "codec was 'float32', is 'int8'"),
            ({"apply_final_norm": False}, "apply_final_norm was True, is False"),
            ({"teacher": tiny_model("gpt2", depth=5, vocab_size=VOCAB, seed=3)}, "teacher.sha256 was"),
            ({"windows": other}, "windows.train was"),
            ({"data": {"a.txt": "0"}}, "data was None"),
        ):
            with pytest.raises(ValueError, match=f"holds another cache .*{message}.*--no-resume"):
                write(tmp_path / "a", **({"windows": windows} | changes))
        assert {path: path.read_bytes() for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()} == before
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
            ({"codec": "int4"}, "codec='int4' is not one of 'float32', 'bfloat16', 'int8', 'float8'"),
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
        with pytest.raises(ValueError, match="windows 0 to 3: layer_1 has values that are not finite"):
            write(tmp_path, windows, teacher)
        with pytest.raises(ValueError, match="is not complete"):
            TeacherCache(tmp_path)


def load_like(windows, drop):
    return type(windows)(windows.train[:-drop], windows.held_out)


class TestDamage:
    @pytest.fixture
    def copied(self, caches, tmp_path):
        shutil.copytree(caches["float32"].path, tmp_path / "cache")
        return tmp_path / "cache"

    def test_a_truncated_or_missing_shard_is_found_at_once_and_written_again(self, copied, windows, caches):
        for damage, message in ((lambda shard: os.truncate(shard, 100), "has 100 bytes instead of"), (os.unlink, "is missing")):
            damage(copied / "shard-00001.safetensors")
            with pytest.raises(ValueError, match=f"shard-00001.safetensors {message}.*cache-teacher again"):
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
        """Two shards changed places: sizes may be equal, shapes are compared when a shard is opened."""
        index = json.loads((copied / "index.json").read_text())
        shard = index["shards"]["shard-00001.safetensors"]
        shard["rows"] += 1
        (copied / "index.json").write_text(json.dumps(index))
        cache = TeacherCache(copied)
        row = shard["windows"][0]
        with pytest.raises(ValueError, match=r"shard-00001.safetensors holds tensors of shapes"):
            Distiller(student_model(), cache, CONFIG)(pad_windows([cache.dataset("train")[row]]))


def digests(folder):
    """Content of everything in a cache."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def forked(function):
    """Run in a process of its own, which ends however it likes; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def unusable_or_whole(folder, whole):
    """A cache that opens is the whole one; another is refused because it is not complete."""
    if json.loads((folder / "index.json").read_text())["complete"] if (folder / "index.json").exists() else False:
        assert digests(TeacherCache(folder).path) == whole
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=r"is not complete|holds no teacher cache"):
            TeacherCache(folder)


def test_a_kill_before_or_after_any_write_loses_only_unfinished_shards(windows, caches, tmp_path):
    """Everything that is written goes through `atomic._sync`: die at each of its calls, then go on."""
    teacher, whole = teacher_model(), digests(caches["float32"].path)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        own = atomic._sync
        patch.setattr(atomic, "_sync", lambda path: calls.append(path.name) or own(path))
        write(tmp_path / "counted", windows, teacher)
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
            write(folder, windows, teacher)

        assert forked(work) == -signal.SIGKILL
        unusable_or_whole(folder, whole)
        written = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
        listed = json.loads((folder / "index.json").read_text())["shards"] if (folder / "index.json").exists() else {}
        write(folder, windows, teacher)
        assert digests(folder) == whole
        for name in listed:  # what was reported as written is not written again
            assert (folder / name).stat().st_mtime_ns == written[name]
        shutil.rmtree(folder)


def test_kills_at_random_moments(windows, caches, tmp_path):
    teacher, whole, generator = teacher_model(), digests(caches["float32"].path), random.Random(0)
    killed = 0
    for attempt in range(6):
        process = multiprocessing.get_context("fork").Process(target=write, args=(tmp_path / str(attempt), windows, teacher))
        process.start()
        process.join(generator.uniform(0.02, 0.3))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        unusable_or_whole(tmp_path / str(attempt), whole)
        assert digests(write(tmp_path / str(attempt), windows, teacher).path) == whole
    assert killed > 0


def test_two_writers_do_not_share_a_directory(windows, tmp_path):
    tmp_path.joinpath("a").mkdir()
    with atomic.only_process(tmp_path / "a"), pytest.raises(UserError, match="another process is at work"):
        write(tmp_path / "a", windows)


def test_a_complete_cache_is_left_alone(windows, caches, monkeypatch):
    before = digests(caches["float32"].path)
    FullDisk(monkeypatch, lambda path: True)  # nothing may be written
    steps = []
    write(caches["float32"].path, windows, advance=lambda done, total: steps.append((done, total)))
    assert digests(caches["float32"].path) == before
    assert steps == [(len(caches["float32"]),) * 2]


class TestTraining:
    def test_dataset_and_workers(self, caches, windows):
        cache = caches["float32"]
        for split, own in (("train", windows.train), ("held_out", windows.held_out)):
            dataset = cache.dataset(split)
            assert len(dataset) == len(own)
            for row, window in zip(dataset, own, strict=True):
                assert {key: row[key] for key in window} == window
        assert cache.windows.train_tokens == windows.train_tokens
        loaders = [
            DataLoader(cache.dataset("train"), batch_size=3, shuffle=True, collate_fn=pad_windows, num_workers=workers,
                       generator=torch.Generator().manual_seed(1)) for workers in (0, 2)
        ]  # fmt: skip
        distiller = Distiller(student_model(), cache, CONFIG)
        seen = []
        for one, two in zip(*loaders, strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one)
            assert distiller(two).loss.isfinite()
            seen += two["teacher_index"].tolist()
        assert sorted(seen) == list(range(len(windows.train)))
        with pytest.raises(ValueError, match="split='test' is not one of 'train', 'held_out'"):
            cache.dataset("test")

    def test_the_shares_of_processes_add_up_to_the_whole(self, caches):
        """Two ranks with the usual sampler: each window once, and their gradients add up to those of one process."""
        cache, student = caches["float32"], student_model()
        dataset = torch.utils.data.Subset(cache.dataset("train"), range(len(cache.dataset("train")) // 2 * 2))
        distiller = Distiller(student, cache, CONFIG)
        whole = pad_windows(list(dataset))
        items = distiller.count_positions(whole)
        expected_terms, expected = loss_and_gradients(student, distiller, whole)
        student.zero_grad()
        losses, seen = [], []
        for rank in range(2):
            sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=True)
            for batch in DataLoader(dataset, batch_size=3, sampler=sampler, collate_fn=pad_windows):
                loss = distiller(batch, num_items_in_batch=items).loss
                loss.backward()
                losses.append(loss.detach())
                seen += batch["teacher_index"].tolist()
        assert sorted(seen) == list(range(len(dataset)))
        torch.testing.assert_close(sum(losses), expected_terms.loss.detach(), rtol=1e-5, atol=0)
        for name, parameter in student.named_parameters():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name)

    def test_trl_prepares_data_of_its_own(self, caches):
        pytest.importorskip("trl")
        from fdd_kernels.integrations import FDDSFTTrainer

        with pytest.raises(TypeError, match=r"FDDSFTTrainer prepares windows of its own.*use FDDTrainer"):
            FDDSFTTrainer(model=student_model(), teacher=caches["float32"], train_dataset=caches["float32"].dataset("train"))

    def test_a_cache_is_opened_again_where_it_is_sent(self, caches):
        cache = pickle.loads(pickle.dumps(caches["int8"]))
        batch = batch_of(cache)
        for a, b in zip(*(Distiller(student_model(), c, CONFIG).teacher_states(batch) for c in (cache, caches["int8"]))):
            assert torch.equal(a, b)

    def test_a_cache_may_be_moved(self, caches, tmp_path):
        shutil.copytree(caches["float32"].path, tmp_path / "moved")
        batch = batch_of(caches["float32"])
        moved = TeacherCache(tmp_path / "moved")
        Distiller(student_model(), moved, CONFIG)(batch)
        assert moved.digest == caches["float32"].digest
        text = (moved.path / "index.json").read_text()
        assert str(caches["float32"].path) not in text
        assert "/" not in json.dumps(json.loads(text)["contents"])

    def test_trainer(self, caches, tmp_path):
        cache = caches["float32"]

        def run(teacher):
            arguments = TrainingArguments(
                output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=3,
                optim="sgd", learning_rate=0.1, max_grad_norm=0.0, per_device_train_batch_size=2, logging_steps=1, seed=3,
                gradient_accumulation_steps=2, dataloader_num_workers=1,
            )  # fmt: skip
            trainer = FDDTrainer(
                model=student_model(), teacher=teacher, fdd_config=CONFIG, args=arguments, data_collator=pad_windows,
                train_dataset=cache.dataset("train"), eval_dataset=cache.dataset("held_out"),
            )  # fmt: skip
            trainer.train()
            return trainer.model, [log["loss"] for log in trainer.state.log_history if "loss" in log], trainer.evaluate()

        (mine, losses, metrics), (theirs, expected, expected_metrics) = run(cache), run(teacher_model())
        assert losses == pytest.approx(expected, rel=1e-5)
        for name in ("eval_loss", "eval_trajectory", "eval_derivative", "eval_output_kd", "eval_ce"):
            assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4)
        start = dict(student_model().named_parameters())
        for (name, a), b in zip(mine.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
        assert max(float((a - start[name]).detach().abs().max()) for name, a in mine.named_parameters()) > 1e-2


def cache_options(inputs, output, **changes):  # noqa: F811
    defaults = {"teacher": str(inputs / "teacher"), "data": inputs / "data.txt", "output": output, "num_layers": 2,
                "dtype": "float32", "max_length": 24, "eval_fraction": 0.2, "shard_size": 40_000}  # fmt: skip
    return CacheOptions(**(defaults | changes))


FROM_CACHE = {"teacher": None, "data": None, "max_length": None, "eval_fraction": None}


@pytest.fixture(scope="module")
def cached(inputs, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("command") / "cache"
    console = quiet()
    cache_teacher(cache_options(inputs, output, verify=True), console)
    assert "every checksum is right" in console.file.getvalue()
    return output


class TestCommands:
    def test_distilling_from_the_cache_equals_distilling_from_the_teacher(self, inputs, cached, tmp_path):  # noqa: F811
        live = distill(options(inputs, tmp_path / "live"), quiet())
        mine = distill(options(inputs, tmp_path / "cache", teacher_cache=cached, **FROM_CACHE), quiet())
        for a, b in zip(mine["history"][:-1], live["history"][:-1], strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() & {"loss", "output_kd", "trajectory", "derivative", "eval_loss", "eval_trajectory"}:
                assert a[name] == pytest.approx(b[name], rel=2e-4), name
        for name, value in live["held_out"].items():
            assert mine["held_out"][name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
        assert mine["train_tokens"] == live["train_tokens"]
        console = quiet()
        distill(options(inputs, tmp_path / "cache", teacher_cache=cached, **FROM_CACHE), console)
        assert "finished; nothing to do" in console.file.getvalue()

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8"])
    def test_it_learns_from_every_storage(self, inputs, tmp_path, dtype):  # noqa: F811
        cache_teacher(cache_options(inputs, tmp_path / "cache", dtype=dtype), quiet())
        metrics = distill(options(inputs, tmp_path / "run", teacher_cache=tmp_path / "cache", **FROM_CACHE), quiet())
        assert metrics["held_out"]["output_kd"] < 0.95 * metrics["held_out_before"]["output_kd"]

    def test_resume_wants_the_same_cache(self, inputs, cached, tmp_path):  # noqa: F811
        run = {"teacher_cache": cached, "max_steps": 2, **FROM_CACHE}
        distill(options(inputs, tmp_path / "run", **run), quiet())
        cache_teacher(cache_options(inputs, tmp_path / "other", max_length=20), quiet())
        with pytest.raises(UserError, match=r"holds another run \(teacher_cache was"):
            distill(options(inputs, tmp_path / "run", **(run | {"teacher_cache": tmp_path / "other"})), quiet())
        shutil.copytree(cached, tmp_path / "same")
        assert distill(options(inputs, tmp_path / "run", **(run | {"teacher_cache": tmp_path / "same"})), quiet())["steps"] == 2

    @pytest.mark.parametrize(("arguments", "message"), [
        (["--data", "d.txt"], "data=d.txt was given beside teacher_cache"),
        (["--max-length", "9"], "max_length=9 was given beside teacher_cache"),
        (["--eval-fraction", "0.1"], "eval_fraction=0.1 was given beside teacher_cache"),
        (["--student-layers", "1,2", "--teacher-layers", "2,3"], "teacher layers [2, 3], but the cache"),
        (["--no-apply-final-norm"], "apply_final_norm=False, but the cache"),
    ])  # fmt: skip
    def test_options_that_contradict_the_cache(self, inputs, cached, tmp_path, capsys, arguments, message):  # noqa: F811
        own = ["--num-layers", "2", "--max-steps", "1"]
        code = main(["distill", "--teacher-cache", str(cached), "--student", str(inputs / "student"), "--output",
                     str(tmp_path / "o"), *own, *arguments])  # fmt: skip
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 2
        assert error.startswith("fdd-kernels distill: ")
        assert message in error

    def test_teacher_and_cache_exclude_each_other(self, inputs, cached, capsys):  # noqa: F811
        with pytest.raises(SystemExit):
            main(["distill", "--teacher-cache", str(cached), "--teacher", "t", "--student", "s", "--output", "o"])
        assert "not allowed with argument" in capsys.readouterr().err
        assert main(["distill", "--teacher", "t", "--student", "s", "--output", "o"]) == 2
        assert "--data is missing" in capsys.readouterr().err

    def test_another_tokenizer_is_refused(self, inputs, cached, tmp_path):  # noqa: F811
        shutil.copytree(inputs / "student", tmp_path / "student")
        file = tmp_path / "student" / "tokenizer.json"
        file.write_text(file.read_text().replace("<end>", "<fin>"))
        student = {"student": str(tmp_path / "student"), "teacher_cache": cached, **FROM_CACHE}
        with pytest.raises(UserError, match=r"tokenizers of teacher .* differ in"):
            distill(options(inputs, tmp_path / "run", **student), quiet())

    def test_an_unfinished_cache_is_refused_with_the_remedy(self, inputs, tmp_path, monkeypatch):  # noqa: F811
        with monkeypatch.context() as patch:
            FullDisk(patch, lambda path: "/.shard-00001" in path)
            with pytest.raises(UserError, match=r"No space left on device.*whole shards are kept.*run the same command"):
                cache_teacher(cache_options(inputs, tmp_path / "cache"), quiet())
        with pytest.raises(UserError, match=r"is not complete \(1 shards are written\): run the same"):
            distill(options(inputs, tmp_path / "run", teacher_cache=tmp_path / "cache", **FROM_CACHE), quiet())
        cache_teacher(cache_options(inputs, tmp_path / "cache"), quiet()).verify()
        assert not list((tmp_path / "cache").glob(".*.part"))

    def test_a_really_full_file_system(self, inputs, cached, tmp_path):  # noqa: F811
        """On a file system of its own that has no room for all shards: an error, no signal, and a resume elsewhere."""
        small, sizes = tmp_path / "small", sorted(path.stat().st_size for path in cached.glob("shard-*"))
        small.mkdir()
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a small file system needs root")
        once = sum(path.stat().st_size + 4096 for path in cached.rglob("*") if path.is_file() and "shard" not in path.name)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={once + int(2.5 * sizes[-1])}", "tmpfs", str(small)], capture_output=True
        )
        if mounted.returncode:
            pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
        try:
            with pytest.raises(UserError, match=r"could not be written .*No space left on device"):
                cache_teacher(cache_options(inputs, small / "cache"), quiet())
            assert list((small / "cache").glob("shard-*"))
            with pytest.raises(ValueError, match="is not complete"):
                TeacherCache(small / "cache")
            shutil.copytree(small / "cache", tmp_path / "moved")
        finally:
            subprocess.run(["umount", str(small)], check=True)
        cache_teacher(cache_options(inputs, tmp_path / "moved"), quiet())
        assert digests(tmp_path / "moved") == digests(cached)

    @pytest.mark.parametrize(("arguments", "message"), [
        (["--dtype", "int4"], "dtype='int4' is not one of float32, bfloat16, int8, float8"),
        (["--teacher-dtype", "int8"], "teacher_dtype='int8' is not one of auto, float32, bfloat16"),
        (["--num-layers", "9"], "needs a deeper model"),
        (["--teacher-layers", "2,1"], "must be increasing layers"),
        (["--max-length", "65"], "has only 64 positions"),
        (["--shard-size", "lots"], "'lots' is not an amount of memory"),
        (["--eval-fraction", "1"], "eval_fraction=1.0 must be"),
    ])  # fmt: skip
    def test_bad_options_are_one_line(self, inputs, tmp_path, capsys, arguments, message):  # noqa: F811
        given = ["--teacher", str(inputs / "teacher"), "--data", str(inputs / "data.txt"), "--output", str(tmp_path / "o")]
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
