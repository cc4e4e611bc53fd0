"""Resume `fdd-kernels distill`: kills, full disks, other configurations, earlier records."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fdd_kernels import FDDConfig
from fdd_kernels.cli.distill.identity import model_identity
from fdd_kernels.cli.distill.run import distill
from fdd_kernels.common.errors import RunStopped, UserError
from fdd_kernels.integrations import FDDTrainer
from fdd_kernels.integrations.checkpoints import checkpoints
from tests.support.commands import (
    TEXT,
    FullDisk,
    command,
    options,
    quiet,
    same,
    small_disk,
    weights,
)
from tests.support.hf_models import tiny_model, tiny_tokenizer

# Hang while writing the second checkpoint, or within a step after the first.
STUCK = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from fdd_kernels.cli.distill import trainer as distill
from fdd_kernels.cli.main import main

def hang():
    Path(sys.argv[2]).touch()
    time.sleep(600)

if sys.argv[1] == "saving":
    own = distill.ResumableTrainer._save_optimizer_and_scheduler
    def save(self, folder):
        if self.state.global_step == 4:
            hang()
        own(self, folder)
    distill.ResumableTrainer._save_optimizer_and_scheduler = save
else:
    own = distill.ResumableTrainer.compute_loss
    def loss(self, *args, **kwargs):
        if self.state.global_step == 3 and self.model.training:
            hang()
        return own(self, *args, **kwargs)
    distill.ResumableTrainer.compute_loss = loss
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["saving", "computing"])
def test_kill_9_loses_nothing_that_was_reported_as_saved(inputs, whole, tmp_path, moment):
    output, stuck = tmp_path / "run", tmp_path / "stuck"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", STUCK, moment, str(stuck), *command(inputs, output)],
            stderr=stderr,
            env=environment,
        )
        try:
            deadline = time.monotonic() + 240
            while not stuck.exists():
                assert process.poll() is None, (tmp_path / "stderr").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            # While it lives, nobody else may work there.
            with pytest.raises(UserError, match="another process"):
                distill(options(inputs, output), quiet())
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    told = (tmp_path / "stderr").read_text()
    reported = [line.split()[-1] for line in told.splitlines() if line.startswith("saved ")]
    assert reported == ["checkpoint-2"]
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (output / "metrics.json").exists()
    console = quiet()
    distill(options(inputs, output), console)
    assert "resuming from checkpoint-2" in console.file.getvalue()
    same(weights(output), weights(whole))
    assert not (output / ".unfinished").exists()
    mine, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (output, whole))
    assert mine["held_out"] == theirs["held_out"]
    assert [e["loss"] for e in mine["history"] if "loss" in e] == [
        e["loss"] for e in theirs["history"] if "loss" in e
    ]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("checkpoint-4", "checkpoint-2"),
        *[
            pytest.param(where, kept, marks=pytest.mark.slow)
            for where, kept in (
                ("checkpoint-2", None),
                ("student", "checkpoint-6"),
                (".unfinished/metrics.json", "checkpoint-6"),
            )
        ],
    ],
)
def test_a_full_disk_loses_nothing(inputs, whole, tmp_path, monkeypatch, where, kept):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        FullDisk(patch, lambda path: f"/{where}" in path)
        with pytest.raises(UserError, match="No space left on device") as error:
            distill(options(inputs, output), quiet())
    assert (f"{kept} is complete" if kept else "nothing was saved before") in str(
        error.value
    ).replace("\n", " ")
    assert "\n" not in str(error.value)
    saved = sorted(path.name for path in output.glob("checkpoint-*"))
    assert (saved[-1] if saved else None) == kept
    assert not (output / ".unfinished").exists()
    assert not (output / "metrics.json").exists()
    distill(options(inputs, output), quiet())
    same(weights(output), weights(whole))


def test_a_really_full_file_system(inputs, whole, tmp_path):
    """Fill a small file system: it has no room for two checkpoints."""
    checkpoint = sum(path.stat().st_size for path in (whole / "checkpoint-6").rglob("*"))
    with small_disk(tmp_path / "small", int(checkpoint * 1.5)) as small:
        with pytest.raises(
            UserError, match=r"checkpoint-4 could not be written.*checkpoint-2 is complete"
        ):
            distill(options(inputs, small / "run"), quiet())
        assert [path.name for path in (small / "run").glob("checkpoint-*")] == ["checkpoint-2"]
        assert not (small / "run" / ".unfinished").exists()
        moved = tmp_path / "moved"
        shutil.copytree(small / "run", moved)
    distill(options(inputs, moved), quiet())
    same(weights(moved), weights(whole))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-4}, "learning_rate was 0.003, is 0.0001"),
        ({"config": FDDConfig.paper(num_layers=2, beta=0.5)}, "config.beta was 1.0, is 0.5"),
        ({"seed": 4}, "seed was 0, is 4"),
    ],
)
def test_another_configuration_is_refused(inputs, whole, changes, named):
    before = weights(whole)
    with pytest.raises(UserError, match=f"holds another run .*{named}.*--no-resume"):
        distill(options(inputs, whole, **changes), quiet())
    same(weights(whole), before)


def test_other_data_or_models_are_refused(inputs, whole, tmp_path):
    (tmp_path / "data.txt").write_text(TEXT)
    with pytest.raises(UserError, match=r"holds another run \(data was"):
        distill(options(inputs, whole, data=tmp_path / "data.txt"), quiet())
    with pytest.raises(UserError, match=r"holds another run \(student was"):
        distill(options(inputs, whole, student=str(inputs / "bare")), quiet())


def test_how_often_it_saves_may_change(inputs, whole):
    assert distill(options(inputs, whole, save_steps=3, log_steps=5), quiet())["steps"] == 6


def test_no_resume_starts_again(inputs, whole, tmp_path):
    output = tmp_path / "run"
    distill(options(inputs, output, max_steps=2), quiet())
    distill(options(inputs, output, resume=False), quiet())
    same(weights(output), weights(whole))


def test_checkpoints_of_somebody_else_are_not_touched(inputs, tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(UserError, match=r"holds checkpoint-7 but no run.json"):
        distill(options(inputs, tmp_path), quiet())
    assert (tmp_path / "checkpoint-7").is_dir()


def test_a_finished_run_can_be_made_longer(inputs, tmp_path):
    """Also from checkpoints of a release that did not write the config: run.json has the same."""
    output = tmp_path / "run"
    config = FDDConfig(num_layers=2, derivative="weighted_cosine")

    def run(folder, console=None, **changes):
        about = {"scheduler": "constant", "config": config} | changes
        return distill(options(inputs, folder, **about), console or quiet())

    run(output, max_steps=2)
    (output / "checkpoint-2" / "fdd_config.json").unlink()
    console = quiet()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = run(output, console, max_steps=6)
    assert not [one for one in caught if "fdd_config" in str(one.message)]
    assert "resuming from checkpoint-2" in console.file.getvalue()
    assert metrics["steps"] == 6
    run(tmp_path / "at-once")
    same(weights(output), weights(tmp_path / "at-once"))
    # By epochs too: 13 windows are four steps. Fewer steps than were done are refused: they would
    # be lost.
    assert run(output, max_steps=None, epochs=1.5)["steps"] == 6
    with pytest.raises(
        UserError,
        match=r"holds this run after 6 steps, and 4 are wanted: give more --steps or --epochs",
    ):
        run(output, max_steps=None, epochs=1.0)
    assert json.loads((output / "metrics.json").read_text())["steps"] == 6


def test_copied_and_touched_models_are_the_same_run(inputs, whole, tmp_path):
    for name in ("teacher", "student"):
        shutil.copytree(inputs / name, tmp_path / name)
        for file in (tmp_path / name).iterdir():
            os.utime(file, (1, 1))
        (tmp_path / name / "README.md").write_text("notes")
    models = {name: str(tmp_path / name) for name in ("teacher", "student")}
    console = quiet()
    distill(options(inputs, whole, **models), console)
    assert "finished; nothing to do" in console.file.getvalue()
    # Another training of the same shape has other weights, though its files have the same sizes.
    model = tiny_model("llama", depth=3, vocab_size=len(tiny_tokenizer()), seed=7)
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match=r"\(student was another: model.safetensors differs\)"):
        distill(options(inputs, whole, **models), quiet())


def test_records_of_earlier_versions_are_understood(inputs, whole, tmp_path):
    """They have sizes and times of the models' files, and do not know newer options."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    record = json.loads((output / "run.json").read_text())
    for name in (
        "warmup",
        "scheduler",
        "weight_decay",
        "eval_data",
        "lora_alpha",
        "lora_targets",
        "teacher_dtype",
    ):
        del record[name]
    for name in (
        "output_divergence",
        "layer_weights",
        "derivative_temperature",
        "teacher_mix",
        "schedules",
        "stages",
        "gradient_balance",
        "layer_alignment",
        "alignment_every",
        "alignment_epsilon",
        "num_teacher_layers",
    ):
        del record[f"config.{name}"]
    for role in ("teacher", "student"):
        record[role] = {file.name: [file.stat().st_size, 0] for file in (inputs / role).iterdir()}
    (output / "run.json").write_text(json.dumps(record))
    console = quiet()
    distill(options(inputs, output), console)
    assert "finished; nothing to do" in console.file.getvalue()
    with pytest.raises(UserError, match=r"scheduler was 'cosine', is 'linear'"):
        distill(options(inputs, output, scheduler="linear"), quiet())
    for changes, named in (
        ({"output_divergence": "jsd:0.1"}, r"output_divergence was 'kl', is 'jsd:0\.1'"),
        ({"layer_weights": (1, 0.5)}, r"layer_weights was None, is \[1, 0\.5\]"),
        ({"derivative_temperature": 2.0}, r"derivative_temperature was None, is 2\.0"),
        ({"teacher_mix": 0.5}, r"teacher_mix was 1\.0, is 0\.5"),
        ({"stages": "a:beta=1"}, r"stages was None, is 'a:beta=1'"),
        ({"layer_alignment": "emd"}, r"layer_alignment was 'rank', is 'emd'"),
    ):
        with pytest.raises(UserError, match=named):
            distill(
                options(inputs, output, config=FDDConfig.paper(num_layers=2, **changes)), quiet()
            )


def test_options_in_other_words_are_the_same_run(inputs, whole, tmp_path):
    """Such as a record of an earlier release, in whose texts weights stood as they were given."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    record = json.loads((output / "run.json").read_text())
    record |= {"config.trajectory": "jsd", "config.output_divergence": "jsd:1e-1"}
    record["config.stages"] = "both=9:beta=1,alpha=1;late:beta=0,alpha=1"
    record["config.gradient_balance"] = "trajectory=2,output_kd=1"
    (output / "run.json").write_text(json.dumps(record))

    def resumed(**changes) -> str:
        console = quiet()
        distill(options(inputs, output, config=FDDConfig.paper(num_layers=2, **changes)), console)
        return console.file.getvalue()

    same = {"trajectory": "jsd:0.5", "output_divergence": "jsd:0.1"}
    same["stages"] = "both=9:alpha=1,beta=1;late:alpha=1,beta=0"
    same["gradient_balance"] = "output_kd=1,trajectory=2"
    assert "finished; nothing to do" in resumed(**same)
    for name, other in (
        ("trajectory", "jsd:0.4"),
        ("trajectory", "mse"),
        ("output_divergence", "kl"),
    ):
        with pytest.raises(UserError, match=f"{name} was 'jsd.*', is '{other}'"):
            resumed(**(same | {name: other}))
    with pytest.raises(UserError, match=r"stages was .both=9:.*, is .both=9:alpha=1;late"):
        resumed(**(same | {"stages": "both=9:alpha=1;late:alpha=0"}))


CHANGING = FDDConfig.paper(
    num_layers=2,
    schedules="teacher_mix=taid:60,0.4,1,0.2;alpha=linear:0,1,0,5",
    stages="both=3:ce_weight=0;task:ce_weight=1",
    gradient_balance="output_kd=1,trajectory=0.5;every=2;smoothing=0.5",
)


def test_options_that_change_are_resumed(inputs, tmp_path):
    """Bit for bit, with their state; the run's record holds their texts."""
    config = {"config": CHANGING, "gradient_accumulation": 2, "save_steps": 3}
    distill(options(inputs, tmp_path / "whole", **config), quiet())
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, lambda path: "/checkpoint-6" in path)
        with pytest.raises(UserError, match="checkpoint-3 is complete"):
            distill(options(inputs, tmp_path / "parts", **config), quiet())
    console = quiet()
    distill(options(inputs, tmp_path / "parts", **config), console)
    assert "resuming from checkpoint-3" in console.file.getvalue()
    same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    whole, parts = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts")
    )
    assert whole["held_out"] == parts["held_out"]
    names = ("teacher_mix", "alpha", "ce_weight", "output_kd_weight", "loss")
    found = [
        [[log[name] for name in names] for log in run["history"] if "loss" in log]
        for run in (whole, parts)
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 6
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    for name in CHANGING.changes:
        assert record[f"config.{name}"] == getattr(CHANGING, name)
    card = (tmp_path / "parts" / "student" / "README.md").read_text()
    assert "alpha · trajectory + 1 · derivative + ce_weight · cross-entropy" in card
    assert f"stages={CHANGING.stages!r}" in card
    config["config"] = replace(CHANGING, stages=None)
    with pytest.raises(UserError, match=r"config.stages was 'both=3:.*', is None"):
        distill(options(inputs, tmp_path / "parts", **config), quiet())


def test_a_tensor_that_differs_is_found(tmp_path):
    tensors = {"a": torch.zeros(5000), "b": torch.arange(7.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = model_identity(str(tmp_path))
    for name, index in (("a", 0), ("a", 4999), ("a", 2500), ("b", 3)):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed[name][index] += 1
        save_file(changed, tmp_path / "model.safetensors")
        assert model_identity(str(tmp_path)) != before
    save_file(tensors, tmp_path / "model.safetensors")
    assert model_identity(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_text("no safetensors at all")
    assert model_identity(str(tmp_path)) != before
    assert model_identity("gpt2-of-nobody") == "gpt2-of-nobody"


def test_the_last_good_checkpoint_is_kept_and_resumed_from(inputs, whole, tmp_path, monkeypatch):
    own = FDDTrainer.training_step

    def ruined(self, model, *arguments, **named):
        if self.state.global_step == 3:
            with torch.no_grad():
                model.lm_head.weight.fill_(torch.inf)
        return own(self, model, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(FDDTrainer, "training_step", ruined)
        with pytest.raises(
            RunStopped,
            match=r"loss of step 4 is not finite .*checkpoint-2 is the last good checkpoint",
        ) as stop:
            distill(options(inputs, tmp_path / "run"), quiet())
    assert stop.value.exit_status == 1
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    distill(options(inputs, tmp_path / "run"), quiet())
    same(weights(tmp_path / "run"), weights(whole))


def test_lora_resumes_and_is_merged(inputs, tmp_path):
    lora = {"lora_rank": 2, "max_steps": 4}
    distill(options(inputs, tmp_path / "whole", **lora), quiet())
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, lambda path: "/checkpoint-4" in path)
        with pytest.raises(UserError):
            distill(options(inputs, tmp_path / "parts", **lora), quiet())
    distill(options(inputs, tmp_path / "parts", **lora), quiet())
    same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    start = load_file(inputs / "student" / "model.safetensors")
    merged = weights(tmp_path / "whole")
    assert merged.keys() == start.keys()
    same({"lm_head.weight": merged["lm_head.weight"]}, {"lm_head.weight": start["lm_head.weight"]})
    assert not torch.equal(
        merged["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"]
    )
    base = AutoModelForCausalLM.from_pretrained(inputs / "student")
    adapted = peft.PeftModel.from_pretrained(
        base, tmp_path / "whole" / "adapter"
    ).merge_and_unload()
    torch.testing.assert_close(
        adapted.state_dict()["model.layers.0.mlp.up_proj.weight"],
        merged["model.layers.0.mlp.up_proj.weight"],
    )
