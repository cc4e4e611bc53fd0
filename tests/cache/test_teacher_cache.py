"""Train from a teacher cache: equal to the live teacher in float32, within the stated error in
others.
"""

import functools
import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.data import pad_windows
from fdd_kernels.integrations import FDDTrainer
from fdd_kernels.teacher_cache import TeacherCache
from fdd_kernels.teacher_cache.codec import CODECS
from tests.support.cache_inputs import (
    CONFIG,
    batch_of,
    loss_and_gradients,
    same_loss_and_gradients,
    student_model,
    teacher_model,
    valid_rows,
    weighted,
    write,
)
from tests.support.hf_models import pad_left, tiny_tokenizer
from tests.support.training import lightning_options


@pytest.mark.parametrize(
    "family", ["gpt2", "gemma2", "phi_head_bias", "granite", "opt_projections"]
)
def test_float32_equals_the_live_teacher(windows, tmp_path, family):
    teacher, student = teacher_model(family), student_model()
    cache = write(tmp_path, windows, teacher)
    assert len(cache.files.index["shards"]) > 2
    assert len(cache) == len(windows.train) + len(windows.held_out)
    cached, live = Distiller(student, cache, CONFIG), Distiller(student, teacher, CONFIG)
    batch = batch_of(cache)
    terms = same_loss_and_gradients(student, cached, live, batch)
    assert min(terms) > 1e-2  # every term is there to be compared
    mask = valid_rows(batch)
    for mine, theirs in zip(cached.teacher_states(batch), live.teacher_states(batch), strict=True):
        torch.testing.assert_close(mine[mask], theirs[mask], rtol=1e-5, atol=1e-5)
        assert mine.dtype == torch.float32
        assert not mine[~mask].any()


@pytest.mark.parametrize(
    "changes",
    [
        {"trajectory": "jsd:0.1", "output_divergence": "alpha_beta:0.2,0.7"},
        {"derivative": "weighted_cosine", "derivative_temperature": 0.5, "temperature": 2.0},
        {"teacher_mix": 0.4, "layer_weights": (0.5, 0.0, 2.0)},
    ],
    ids=str,
)
def test_states_serve_every_objective(caches, changes):
    """One cache for all: nothing of the loss is in its identity."""
    cache, teacher, student = caches["float32"], teacher_model(), student_model()
    config = replace(CONFIG, **changes, backend="torch")
    cached, live = Distiller(student, cache, config), Distiller(student, teacher, config)
    same_loss_and_gradients(student, cached, live, weighted(batch_of(cache)))
    assert "options" not in cache.files.contents


@pytest.mark.parametrize("codec", CODECS)
def test_each_codec_gives_the_states_rounded_as_it_says(caches, codec):
    """Compare with the loss of live states after one round trip through the codec, whose errors the
    index gives.
    """
    cache, teacher, student = caches[codec], teacher_model(), student_model()
    cached, live = Distiller(student, cache, CONFIG), Distiller(student, teacher, CONFIG)
    batch = batch_of(cache)
    mask = valid_rows(batch)
    exact = live.teacher_states(batch)
    stored = cached.teacher_states(batch)
    rounded = []
    for name, state, read in zip(cache.files.arrays, exact, stored, strict=True):
        rows = state[mask]
        expected = CODECS[codec].decode(CODECS[codec].encode(rows), torch.float32)
        error = (read[mask] - rows).norm(dim=1) / rows.norm(dim=1)
        # A state near the border between two stored numbers may be on its other side after the
        # teacher's own rounding.
        assert (error <= cache.relative_error[name]["worst_row"] * 1.01 + 1e-6).all()
        flipped = (
            ((read[mask] - expected).abs() > 1e-5 * rows.abs().amax(dim=1, keepdim=True))
            .float()
            .mean()
        )
        assert flipped < 2e-3
        rounded.append(torch.zeros_like(state).masked_scatter(mask[..., None], read[mask]))
    same_loss_and_gradients(student, cached, live, batch, teacher_states=rounded)


# float32: exact. bfloat16: half a unit in the last of 8 bits. int8: half of largest / 127 for each
# of 32 numbers, the largest being at most the norm. float8: half a unit in the last of 4 bits, and
# half of the smallest number below them.
BOUNDS = {
    "float32": 0.0,
    "bfloat16": 2.0**-8,
    "int8": 32**0.5 / 254,
    "float8": 2.0**-4 + 32**0.5 * 2.0**-10 / 448,
}


@pytest.mark.parametrize("codec", CODECS)
def test_errors_of_codecs_are_within_their_arithmetic(caches, codec):
    for error in caches[codec].relative_error.values():
        assert error["mean"] <= error["worst_row"] <= BOUNDS[codec] * (1 + 1e-5)
        assert (codec == "float32") == (error["mean"] == 0)


@pytest.mark.parametrize("codec", ["int8", "float8"])
def test_codecs_at_their_limits(codec):
    rows = torch.tensor(
        [
            [0.0, 0.0, 0.0],
            [1e30, -1e30, 1.0],
            [1e-30, 2e-30, -3e-30],
            [1e-44, 0.0, 0.0],
            [5.0, 0.0, -5.0],
        ]
    )
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
    for config in (
        FDDConfig.paper(student_layers=(2,), teacher_layers=(4,)),
        FDDConfig.paper(student_layers=(1, 3), teacher_layers=(1, 4)),
        FDDConfig.paper(alpha=0, beta=0, num_layers=2),
        FDDConfig.paper(num_layers=2, output_in_dynamics=True),
    ):
        cached, live = (
            Distiller(student, caches["float32"], config),
            Distiller(student, teacher, config),
        )
        same_loss_and_gradients(student, cached, live, batch_of(caches["float32"]))


def test_pairs_of_layers_are_found_from_a_cache_as_from_the_teacher(caches):
    student, batch = student_model(), batch_of(caches["float32"])
    config = FDDConfig.paper(
        student_layers=(1, 3), teacher_layers=(1, 2, 4), layer_alignment="attention"
    )
    distillers = [Distiller(student, t, config) for t in (caches["float32"], teacher_model())]
    losses = [loss_and_gradients(student, d, batch, step=0)[0].loss for d in distillers]
    # As in `same_loss_and_gradients`.
    tolerance = {"rtol": 873 * 2.0**-23, "atol": 0.0}
    torch.testing.assert_close(*losses, **tolerance)
    torch.testing.assert_close(*[torch.tensor(d.alignment.costs) for d in distillers], **tolerance)


def test_padding_on_the_left(caches):
    """Positions follow the tokens wherever the padding is; the label of the first token is not
    valid.
    """
    cache, student = caches["float32"], student_model()
    rows = [cache.dataset("train")[index] for index in (0, 5, 2)]
    right = pad_windows(rows)
    left = pad_left(right)
    padded = left["attention_mask"][:, 0] == 0
    assert (left["labels"][padded, left["attention_mask"].argmax(dim=1)[padded]] != -100).any()
    distiller, live = Distiller(student, cache, CONFIG), Distiller(student, teacher_model(), CONFIG)
    assert distiller.count_positions(left) == distiller.count_positions(right)
    for a, b in zip(distiller.teacher_states(left), distiller.teacher_states(right)):
        torch.testing.assert_close(a[valid_rows(left)], b[valid_rows(right)], rtol=0, atol=0)
    terms = same_loss_and_gradients(student, distiller, live, left)
    torch.testing.assert_close(
        torch.stack(terms), torch.stack(distiller(right)), rtol=1e-5, atol=1e-6
    )


def test_fewer_labels_than_were_cached(caches):
    student, teacher, cache = student_model(), teacher_model(), caches["float32"]
    batch = batch_of(cache)
    batch["labels"][:, :6] = -100
    same_loss_and_gradients(
        student, Distiller(student, cache, CONFIG), Distiller(student, teacher, CONFIG), batch
    )


def trained(trainer, folder, cache, teacher=None, *, arguments=TrainingArguments, **data):
    """Three steps of gradient descent on the cache's windows, from it or from a live teacher."""
    options = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "seed": 3,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 1,
    }
    datasets = {"train_dataset": cache.dataset("train"), "eval_dataset": cache.dataset("held_out")}
    run = trainer(
        model=student_model(),
        teacher=teacher or cache,
        fdd_config=CONFIG,
        args=arguments(**options),
        data_collator=pad_windows,
        **(datasets | data),
    )
    run.train()
    return run


def losses(run):
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def same_students(found, expected, **tolerance):
    """Equal to each other, and changed by the training."""
    start = dict(student_model().named_parameters())
    for (name, a), b in zip(found.named_parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, **tolerance, msg=name)
    assert (
        max(float((p - start[name]).detach().abs().max()) for name, p in found.named_parameters())
        > 1e-2
    )


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
            DataLoader(
                cache.dataset("train"),
                batch_size=3,
                shuffle=True,
                collate_fn=pad_windows,
                num_workers=workers,
                generator=torch.Generator().manual_seed(1),
            )
            for workers in (0, 2)
        ]
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

    def test_weights_of_windows_are_kept(self, caches, windows, tmp_path):
        """1 in windows without."""
        train = [dict(window) for window in windows.train]
        for number, window in enumerate(train[1:], 1):
            window["token_weights"] = [number + 0.5 * (at % 2) for at in window["input_ids"]]
        cache = write(tmp_path, replace(windows, train=train))
        train[0]["token_weights"] = [1.0] * len(train[0]["input_ids"])
        for row, window in zip(cache.dataset("train"), train, strict=True):
            assert row["token_weights"] == window["token_weights"]
        held_out = cache.dataset("held_out")
        assert {weight for row in held_out for weight in row["token_weights"]} == {1.0}
        batch, student = batch_of(cache), student_model()
        live = Distiller(student, teacher_model(), CONFIG)
        same_loss_and_gradients(student, Distiller(student, cache, CONFIG), live, batch)
        assert "token_weights" not in caches["float32"].dataset("train")[0]
        train[2]["token_weights"].pop()
        with pytest.raises(
            ValueError, match="window 2 must have as many labels, and token_weights"
        ):
            write(tmp_path / "b", replace(windows, train=train))

    def test_the_shares_of_processes_add_up_to_the_whole(self, caches):
        """Two ranks with the usual sampler take each window once; their gradients add up to one
        process's.
        """
        cache, student = caches["float32"], student_model()
        dataset = torch.utils.data.Subset(
            cache.dataset("train"), range(len(cache.dataset("train")) // 2 * 2)
        )
        distiller = Distiller(student, cache, CONFIG)
        whole = pad_windows(list(dataset))
        items = distiller.count_positions(whole)
        expected_terms, expected = loss_and_gradients(student, distiller, whole)
        student.zero_grad()
        losses, seen = [], []
        for rank in range(2):
            sampler = torch.utils.data.DistributedSampler(
                dataset, num_replicas=2, rank=rank, shuffle=True
            )
            for batch in DataLoader(dataset, batch_size=3, sampler=sampler, collate_fn=pad_windows):
                loss = distiller(batch, num_items_in_batch=items).loss
                loss.backward()
                losses.append(loss.detach())
                seen += batch["teacher_index"].tolist()
        assert sorted(seen) == list(range(len(dataset)))
        torch.testing.assert_close(sum(losses), expected_terms.loss.detach(), rtol=1e-5, atol=0)
        for name, parameter in student.named_parameters():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name
            )

    def test_a_cache_is_opened_again_where_it_is_sent(self, caches):
        cache = pickle.loads(pickle.dumps(caches["int8"]))
        batch = batch_of(cache)
        for a, b in zip(
            *(
                Distiller(student_model(), c, CONFIG).teacher_states(batch)
                for c in (cache, caches["int8"])
            )
        ):
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
        cached, live = (
            trained(FDDTrainer, tmp_path, caches["float32"], teacher)
            for teacher in (None, teacher_model())
        )
        assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
        metrics, expected = cached.evaluate(), live.evaluate()
        for name in (
            "eval_loss",
            "eval_trajectory",
            "eval_derivative",
            "eval_output_kd",
            "eval_ce",
        ):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4)
        same_students(cached.model, live.model, rtol=1e-4, atol=1e-5)
        for run, teacher in (
            (cached, "a cached GPT2LMHeadModel of 5 blocks"),
            (live, "GPT2LMHeadModel"),
        ):
            run.create_model_card(model_name="small")
            assert f"Teacher: {teacher}\n" in (tmp_path / "README.md").read_text()

    def test_trl(self, caches, tmp_path):
        """TRL leaves prepared windows unchanged, so results equal FDDTrainer's."""
        trl = pytest.importorskip("trl")
        from datasets import Dataset

        from fdd_kernels.integrations import FDDSFTTrainer

        cache, expected = caches["float32"], trained(FDDTrainer, tmp_path, caches["float32"])
        options = {
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "gradient_checkpointing": False,
            "bf16": False,
        }
        found = trained(
            FDDSFTTrainer,
            tmp_path,
            cache,
            arguments=functools.partial(trl.SFTConfig, **options),
            processing_class=tiny_tokenizer(),
            train_dataset=Dataset.from_list(cache.dataset("train")),
            eval_dataset=Dataset.from_list(cache.dataset("held_out")),
        )
        assert losses(found) == losses(expected)
        assert found.evaluate()["eval_trajectory"] == expected.evaluate()["eval_trajectory"]
        same_students(found.model, expected.model, rtol=0, atol=0)

    def test_trl_must_not_prepare_the_windows_again(self, caches, tmp_path):
        trl = pytest.importorskip("trl")
        from fdd_kernels.integrations import FDDSFTTrainer

        options = {
            "model": student_model(),
            "teacher": caches["float32"],
            "train_dataset": caches["float32"].dataset("train"),
        }
        skip = trl.SFTConfig(
            output_dir=str(tmp_path),
            dataset_kwargs={"skip_prepare_dataset": True},
            bf16=False,
            use_cpu=True,
        )
        for more in ({}, {"args": skip}, {"data_collator": pad_windows}):
            with pytest.raises(
                ValueError,
                match=r"does not hold.*skip_prepare_dataset.*pad_windows.*Dataset.from_list",
            ):
                FDDSFTTrainer(**options, **more)

    @pytest.mark.filterwarnings("ignore::UserWarning")  # of Lightning, about workers and loggers
    def test_lightning(self, caches, tmp_path):
        pl = pytest.importorskip("lightning.pytorch")
        from fdd_kernels.integrations import FDDLightningModule

        cache, modules, metrics = caches["float32"], [], []
        for teacher in (cache, teacher_model()):
            module = FDDLightningModule(
                student_model(),
                teacher,
                CONFIG,
                optimizer=functools.partial(torch.optim.SGD, lr=0.1),
            )
            trainer = pl.Trainer(
                max_steps=3,
                accumulate_grad_batches=2,
                **lightning_options(tmp_path),
            )
            loaders = [
                DataLoader(cache.dataset(split), batch_size=2, collate_fn=pad_windows)
                for split in ("train", "held_out")
            ]
            trainer.fit(module, loaders[0])
            modules.append(module)
            metrics += trainer.validate(module, loaders[1], verbose=False)
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
        assert {"val_trajectory", "val_derivative"} < metrics[0].keys()
        same_students(modules[0].student, modules[1].student, rtol=1e-4, atol=1e-5)
        assert {name.split(".")[0] for name in modules[0].state_dict()} == {"student"}
