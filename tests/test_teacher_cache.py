"""The teacher cache in training: equal to the live teacher in float32, as far off as it says in other storages."""
# ruff: noqa: F811 (fixtures are imported, and asked for by name)

import json
import pickle
import shutil

import pytest
import torch
from cache_inputs import (  # noqa: F401
    CONFIG,
    batch_of,
    caches,
    counted,
    loss_and_gradients,
    same_loss_and_gradients,
    student_model,
    teacher_model,
    windows,
    write,
)  # fmt: skip
from hf_models import one_thread  # noqa: F401
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.data import pad_windows
from fdd_kernels.integrations import FDDTrainer
from fdd_kernels.teacher_cache import TeacherCache
from fdd_kernels.teacher_cache.codec import CODECS


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
    assert {state.dtype for state in states} == {cache.head()[0].dtype} == {torch.bfloat16}
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
