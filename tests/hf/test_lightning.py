"""FDDLightningModule: optimisation, logs and checkpoints, in one process and in two."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import torch

from tests.support.hf_models import tiny_model

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from fdd_kernels import Distiller, FDDConfig  # noqa: E402
from fdd_kernels.integrations import NonFiniteLossError  # noqa: E402
from fdd_kernels.integrations.streamed_metrics import watching  # noqa: E402
from tests.hf.lightning_worker import CONFIG, batches, fit, module, trainer_of  # noqa: E402
from tests.support.training import examples, pad  # noqa: E402

ROOT = Path(__file__).parents[2]
TERMS = ("loss", "output_kd", "trajectory", "derivative", "ce")
# of Lightning, about workers and loggers
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def expected(parts: int, clip: float | None = None, data=None) -> dict[str, torch.Tensor]:
    """Plain gradient descent on the mean over all tokens of each group of micro-batches."""
    student = tiny_model("llama", depth=3, seed=1).train()
    distiller = Distiller(student, tiny_model("gpt2", depth=3, seed=2), CONFIG)
    data = data or batches()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for first in range(0, len(data), parts):
        group = data[first : first + parts]
        items = sum(distiller.count_positions(batch) for batch in group)
        for batch in group:
            distiller(batch, num_items_in_batch=items).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return dict(student.named_parameters())


def assert_same(found, wanted, **tolerance):
    for name, parameter in wanted.items():
        torch.testing.assert_close(
            found[name], parameter.detach(), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("parts", "clip"), [(1, None), (4, None), (4, 0.05)])
def test_a_step_is_the_mean_over_all_its_tokens(tmp_path, parts, clip):
    """Also in the last step of an epoch, with fewer micro-batches, and before clipping of
    gradients.
    """
    model = module()
    fit(model, tmp_path, accumulate_grad_batches=parts, gradient_clip_val=clip)
    start = tiny_model("llama", depth=3, seed=1)
    assert float((model.student.lm_head.weight - start.lm_head.weight).abs().max()) > 1e-3
    assert_same(dict(model.student.named_parameters()), expected(parts, clip), rtol=1e-4, atol=2e-6)


def test_token_weights_of_the_data(tmp_path):
    """The denominator is the number of valid tokens."""
    model, data = module(), batches()[:4]
    for index, batch in enumerate(data):
        generator = torch.Generator().manual_seed(index)
        batch["token_weights"] = 2 * torch.rand(batch["input_ids"].shape, generator=generator)
    fit(model, tmp_path, train=data, accumulate_grad_batches=2)
    wanted = expected(2, data=data)
    assert_same(dict(model.student.named_parameters()), wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """DistributedDataParallel as Lightning's own strategy wraps it; accumulation over 2 x 2, the
    last step over 1 x 2.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
    }
    found = subprocess.run(
        [sys.executable, str(ROOT / "tests/hf/lightning_worker.py"), str(tmp_path), "2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    student = load_file(tmp_path / "student.safetensors")
    assert_same(student, expected(4), rtol=1e-4, atol=2e-6)
    # Evaluated: the mean over the tokens of both processes, of the student at the end.
    model, teacher = tiny_model("llama", depth=3, seed=1), tiny_model("gpt2", depth=3, seed=2)
    model.load_state_dict(student)
    distiller, data, metrics = (
        Distiller(model, teacher, CONFIG),
        batches()[1:4],
        load_file(tmp_path / "metrics.safetensors"),
    )
    counts = torch.tensor([float(distiller.count_positions(batch)) for batch in data])
    with torch.no_grad(), watching(distiller) as watched:
        for batch in data:
            distiller(batch)
    for name, value in watched.results(lambda sums, _: sums).items():
        assert float(metrics[f"val_{name}"]) == pytest.approx(value, rel=1e-4), name
    with torch.no_grad():
        for name in TERMS:
            values = torch.stack([getattr(distiller(batch), name) for batch in data])
            assert float(metrics[f"val_{name}"]) == pytest.approx(
                float((values * counts).sum() / counts.sum()), rel=1e-4
            )


def test_logs_checkpoints_and_stops_early(tmp_path):
    model = module()
    # ruins the student: it only gets worse
    model._optimizer = lambda p: torch.optim.SGD(p, lr=200.0)
    best = ModelCheckpoint(tmp_path / "saved", monitor="val_loss")
    trainer = fit(
        model,
        tmp_path,
        held_out=batches()[:3],
        max_epochs=8,
        enable_checkpointing=True,
        log_every_n_steps=1,
        callbacks=[EarlyStopping("val_loss", patience=2), best],
        logger=TensorBoardLogger(tmp_path, version=0),
    )
    assert trainer.current_epoch < 7
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(trainer.logger.log_dir).Reload()
    assert len(events.Scalars("train_trajectory")) == trainer.global_step
    assert {f"{stage}_{name}" for stage in ("train", "val") for name in TERMS} <= set(
        events.Tags()["scalars"]
    )
    # The first step's terms equal the Distiller's.
    fresh = Distiller(
        tiny_model("llama", depth=3, seed=1), tiny_model("gpt2", depth=3, seed=2), CONFIG
    )
    for name in TERMS:
        first = events.Scalars(f"train_{name}")[0].value
        assert first == pytest.approx(float(getattr(fresh(batches()[0]), name).detach()), rel=1e-5)
    # A checkpoint holds the student alone and loads without pickle.
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"student"}
    assert len(state) == len(model.student.state_dict())


def test_resumes_from_a_checkpoint(tmp_path):
    whole = module()
    fit(whole, tmp_path, max_epochs=4)
    first = module()
    fit(first, tmp_path, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    second = module()
    fit(second, tmp_path, max_epochs=4, resume=tmp_path / "half.ckpt")
    assert_same(
        dict(second.student.named_parameters()),
        dict(whole.student.named_parameters()),
        rtol=0,
        atol=0,
    )


CHANGING = replace(
    CONFIG,
    ce_weight=0.0,
    schedules="teacher_mix=taid:60,0.4,1,0.2;temperature=linear:1,2,0,5",
    stages="both=4:alpha=1,ce_weight=0;task:alpha=0.1,ce_weight=1",
    gradient_balance="output_kd=1,trajectory=0.5;every=2;smoothing=0.5",
    layer_alignment="sinkhorn",
    alignment_every=2,
)


def changing():
    model = module()
    model.distiller = Distiller(model.student, *model._teacher, CHANGING)
    return model


def test_options_that_change_are_logged_and_resumed(tmp_path):
    """Six steps, without a stop and with one after three; bit for bit."""
    logs = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            logs.append({k: float(v) for k, v in trainer.logged_metrics.items()})

    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 1}
    whole, first, second = changing(), changing(), changing()
    data = batches()[:6]  # three steps in a pass
    fit(whole, tmp_path, train=data, max_epochs=2, callbacks=[Watch()], **options)
    assert logs[0]["teacher_mix"] == pytest.approx(0.4)
    assert logs[-1]["teacher_mix"] > 0.46
    layers = [log["aligned_layer/1"] for log in logs[::2]]  # at each step
    assert [layers[i] == layers[i - 1] for i in range(1, 6)] == [True, False, True, False, True]
    assert [log["ce_weight"] for log in logs] == [0.0] * 8 + [1.0] * 4
    trainer = fit(first, tmp_path, train=data, max_epochs=1, **options)
    trainer.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["fdd_config"]
    assert FDDConfig(**saved) == first.distiller.config
    options |= {"train": data, "max_epochs": 2}
    trainer = fit(second, tmp_path, resume=tmp_path / "half.ckpt", **options)
    assert trainer.global_step == 6
    wanted = dict(whole.student.named_parameters())
    assert_same(dict(second.student.named_parameters()), wanted, rtol=0, atol=0)
    assert second.distiller.state_dict() == whole.distiller.state_dict()
    # A second training begins anew; a checkpoint without the state is refused.
    fit(second, tmp_path, max_steps=1, **options)
    assert second.distiller.schedules.step == 0
    fit(module(), tmp_path, max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(
        ValueError, match=r"lacks 'fdd_state', the state of schedules, stages, grad"
    ):
        fit(changing(), tmp_path, resume=tmp_path / "plain.ckpt", **options)


def test_the_teacher_is_no_part_of_the_module(tmp_path):
    model = module()
    teacher = {name: p.clone() for name, p in model.distiller.teacher.model.named_parameters()}
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"student"}
    assert {name.split(".")[0] for name in model.state_dict()} == {"student"}
    model.train()
    assert not model.distiller.teacher.model.training
    fit(model, tmp_path)
    assert model.student.training
    assert all(
        torch.equal(p, teacher[name])
        for name, p in model.distiller.teacher.model.named_parameters()
    )
    model.student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert_same(
        dict(loaded.named_parameters()), dict(model.student.named_parameters()), rtol=0, atol=0
    )


def test_bfloat16_is_that_of_the_trainer(tmp_path):
    model, seen = module(), []
    model.student.model.layers[0].mlp.register_forward_hook(
        lambda _m, _a, output: seen.append(output.dtype)
    )
    model.distiller.teacher.model.transformer.h[0].mlp.register_forward_hook(
        lambda _m, _a, out: seen.append(out.dtype)
    )
    fit(model, tmp_path, precision="bf16-mixed", limit_train_batches=1)
    assert set(seen) == {torch.bfloat16}


def test_a_teacher_that_has_a_place_stays_there(tmp_path):
    """Offloaded by accelerate: `to` would refuse it, or bring it back."""
    plain, model = module(), module()
    (teacher,) = model._teacher
    accelerate.cpu_offload(teacher, execution_device=torch.device("cpu"))
    for one in (plain, model):
        fit(one, tmp_path, held_out=batches()[:2])
    assert all(parameter.is_meta for parameter in teacher.parameters())
    assert_same(
        dict(model.student.named_parameters()),
        dict(plain.student.named_parameters()),
        rtol=0,
        atol=0,
    )


def test_a_plain_teacher_is_moved_and_one_with_a_place_is_not(tmp_path, monkeypatch):
    for has_place, expected in ((False, [torch.device("cpu")]), (True, [])):
        model, moved = module(), []
        (teacher,) = model._teacher
        teacher.is_quantized = has_place
        monkeypatch.setattr(teacher, "to", moved.append)
        fit(model, tmp_path, limit_train_batches=1)
        assert moved == expected


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(batches())


def test_the_last_step_of_a_stream_is_a_mean_too(tmp_path):
    model = module()
    fit(model, tmp_path, train=Stream(), accumulate_grad_batches=4)
    assert_same(dict(model.student.named_parameters()), expected(4), rtol=1e-4, atol=2e-6)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model = module()
    model._optimizer = lambda p: torch.optim.SGD(p, lr=1e30)
    with pytest.raises(NonFiniteLossError, match=r"loss of step 2 is not finite"):
        fit(model, tmp_path, accumulate_grad_batches=2)


def test_labels_that_are_all_ignored_are_warned_of(tmp_path):
    nothing = batches()[0]
    nothing["labels"] = torch.full_like(nothing["labels"], -100)
    with pytest.warns(UserWarning, match="no position is valid in step 1"):
        fit(module(), tmp_path, train=[nothing])


@pytest.mark.parametrize("count", [5, 6, 7])
def test_rows_that_are_repeated_for_other_processes_do_not_count(tmp_path, count):
    """Each of two processes in turn, as Lightning shares out a validation set between them."""
    rows, found = examples([4, 17, 6, 12, 5, 9, 13][:count]), []
    for rank in range(2):
        model = module()
        sampler = torch.utils.data.DistributedSampler(
            rows, num_replicas=2, rank=rank, shuffle=False
        )
        loader = torch.utils.data.DataLoader(rows, batch_size=2, sampler=sampler, collate_fn=pad)
        (metrics,) = trainer_of(tmp_path).validate(model, loader, verbose=False)
        found.append(metrics)
    distiller = module().distiller
    counts = [float(distiller.count_positions(pad(rows[rank::2]))) for rank in range(2)]
    with torch.no_grad():
        whole = distiller(pad(rows))
    for name in TERMS:
        mean = sum(count * metrics[f"val_{name}"] for count, metrics in zip(counts, found)) / sum(
            counts
        )
        assert mean == pytest.approx(float(getattr(whole, name)), rel=1e-4), name


def test_metrics_of_several_validation_sets(tmp_path):
    """As FDDTrainer's; and none if they are not wanted."""
    rows = examples([4, 17, 6, 12, 5])
    loaders = [
        torch.utils.data.DataLoader(part, batch_size=2, collate_fn=pad)
        for part in (rows[:3], rows[3:])
    ]
    trainer, distiller = trainer_of(tmp_path), module().distiller
    trainer.validate(module(), loaders, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for index, part in enumerate((rows[:3], rows[3:])):
        with torch.no_grad(), watching(distiller) as watched:
            distiller(pad(part))
        for name, value in watched.results(lambda sums, _: sums).items():
            key = f"val_{name}/dataloader_idx_{index}"
            assert found[key] == pytest.approx(value, rel=1e-5), key
    (alone,) = trainer_of(tmp_path).test(module(), loaders[0], verbose=False)
    assert alone["test_kl"] == pytest.approx(found["val_kl/dataloader_idx_0"])
    model = module(evaluation_metrics=False)
    (plain,) = trainer_of(tmp_path).validate(model, loaders[0], verbose=False)
    assert "val_loss" in plain
    assert "val_kl" not in plain


def test_gradients_that_ddp_would_wait_for_are_told_of():
    model = module()
    model.distiller = Distiller(model.student, *model._teacher, replace(CONFIG, train_head=False))
    strategy = pl.strategies.DDPStrategy()

    class Trainer:
        pass

    model._trainer = Trainer()
    model._trainer.strategy = strategy
    with pytest.raises(
        ValueError,
        match=r"1 parameters that train, lm_head.weight.*ddp_find_unused_parameters_true",
    ):
        model.setup("fit")


def test_other_strategies_are_refused():
    class FSDPStrategy:
        pass

    class Trainer:
        strategy = FSDPStrategy()

    model = module()
    model._trainer = Trainer()
    with pytest.raises(ValueError, match=r"strategy=FSDPStrategy.*DDPStrategy"):
        model.setup("fit")
