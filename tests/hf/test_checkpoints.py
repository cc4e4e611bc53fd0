"""FDDTrainer's checkpoints: complete or not there, after kills, full disks and in several
processes; best and last.
"""

import errno
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer

from fdd_kernels.common import atomic
from fdd_kernels.integrations import CheckpointError
from tests.support.hf_models import tiny_model
from tests.support.training import (
    CONFIG,
    Ruin,
    examples,
    lora_student,
    require_same,
    same_parameters,
    trainer,
    weights,
)

ROOT = Path(__file__).parents[2]
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def saved(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps without a stop: (folder, student)."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, train=examples([9] * 28), **SAVING)
    run.train()
    return folder, run.model


def test_a_resume_with_other_options_is_warned_and_continues(whole, tmp_path):
    """Also of a checkpoint without its config, if FDDConfig's default is another since then."""
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(whole[0] / "checkpoint-6", checkpoint)
    changed = replace(
        CONFIG, derivative="weighted_cosine", student_layers=(1,), teacher_layers=(2,)
    )

    def warnings_of(config):
        run = trainer(tmp_path, train=examples([9] * 28), config=config, **SAVING)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.train(resume_from_checkpoint=str(checkpoint))
        assert run.state.global_step == 6
        return [str(one.message) for one in caught if "has derivative" in str(one.message)]

    assert not warnings_of(replace(CONFIG, backend="reference"))
    (found,) = warnings_of(changed)
    assert found == (
        f"{checkpoint} has derivative='cosine', student_layers=None, teacher_layers=None, and "
        "fdd_config has derivative='weighted_cosine', student_layers=[1], teacher_layers=[2]: the "
        "training continues with fdd_config, another loss than before. Give FDDConfig the options "
        "of the checkpoint to continue with its loss"
    )
    (checkpoint / "fdd_config.json").unlink()
    (found,) = warnings_of(replace(CONFIG, derivative="weighted_cosine"))
    assert "has derivative='cosine', if it was trained with FDDConfig's default, and fdd" in found
    assert not warnings_of(CONFIG)


@pytest.mark.slow
def test_killed_at_random_moments():
    """Compare every checkpoint and result bit for bit with a run without kills: see
    crash_many.py.
    """
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.robustness.crash_many",
            "--kills",
            "2",
            "--seed",
            "5",
            "--only",
            "train",
            "command",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert [line.split(":")[0] for line in found.stdout.splitlines()] == ["train", "command"]
    assert found.stdout.count("2 kills") == 2


@pytest.mark.parametrize(
    "moment",
    ["moving", *[pytest.param(m, marks=pytest.mark.slow) for m in ("model", "optimizer", "state")]],
)
def test_a_checkpoint_that_was_not_finished_is_not_seen(tmp_path, monkeypatch, whole, moment):
    """Stopped for good in the middle of saving, as by a kill: no clean-up of ours runs."""

    class Killed(BaseException):
        pass

    run = trainer(tmp_path / "run", train=examples([9] * 28), **SAVING)
    names = {
        "model": "_save",
        "optimizer": "_save_optimizer_and_scheduler",
        "state": "_save_rng_state",
    }

    def die(*args, **kwargs):
        if run.state.global_step == 4:
            raise Killed

    with monkeypatch.context() as patch:
        # of this module alone: a dead process cleans nothing up
        patch.setattr(atomic, "shutil", SimpleNamespace(rmtree=lambda *args, **kwargs: None))
        if moment == "moving":
            patch.setattr(atomic, "_sync_tree", die)
        else:
            own = getattr(run, names[moment])
            patch.setattr(run, names[moment], lambda *a, **k: (own(*a, **k), die()))
        with pytest.raises(Killed):
            run.train()
    assert saved(tmp_path / "run") == ["checkpoint-2"]
    assert (tmp_path / "run" / ".unfinished" / "checkpoint-4").is_dir()
    again = trainer(
        tmp_path / "run",
        train=examples([9] * 28),
        student=tiny_model("llama", depth=3, seed=9),
        **SAVING,
    )
    again.train(resume_from_checkpoint=True)
    same_parameters(again.model, whole[1], rtol=0, atol=0)
    assert not (tmp_path / "run" / ".unfinished").exists()


LOST = {
    name: name for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")
}


@pytest.mark.parametrize(("lost", "named"), [*LOST.items(), ("model.safetensors", "weights")])
def test_incomplete_checkpoints_are_refused_or_left_out(tmp_path, whole, lost, named):
    """As a killed plain Trainer leaves them: transformers resumes from most of these, silently
    wrong.
    """
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-6" / lost).unlink()
    run = trainer(tmp_path, train=examples([9] * 28), **SAVING)
    with pytest.raises(ValueError, match=f"checkpoint-6' lacks {named}"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    with pytest.warns(UserWarning, match=f"checkpoint-6 lacks {named}"):
        run.train(resume_from_checkpoint=True)
    same_parameters(run.model, whole[1], rtol=0, atol=0)
    # written again, replacing the incomplete one
    assert (tmp_path / "checkpoint-6" / lost).exists()


@pytest.mark.parametrize("named", [False, True])
def test_resumes_from_a_checkpoint_that_was_being_replaced(tmp_path, whole, named):
    """Killed between the two renames: its name is free, and both the old and the new one lie beside
    it.
    """
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoint-6"
    (tmp_path / ".unfinished").mkdir()
    shutil.copytree(last, tmp_path / ".unfinished" / "checkpoint-6.replaced")
    last.rename(tmp_path / ".unfinished" / "checkpoint-6")
    (tmp_path / ".unfinished" / "checkpoint-6" / "new").touch()
    run = trainer(
        tmp_path, train=examples([9] * 28), student=tiny_model("llama", depth=3, seed=9), **SAVING
    )
    run.train(resume_from_checkpoint=str(last) if named else True)
    same_parameters(run.model, whole[1], rtol=0, atol=0)
    assert (last / "new").exists()  # not written again
    assert not (tmp_path / ".unfinished").exists()


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer(tmp_path, train=examples([9] * 28), **SAVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("step", [2, 6])
def test_a_full_disk(tmp_path, monkeypatch, whole, step):
    def full(path):
        if f"checkpoint-{step}" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    run = trainer(tmp_path, train=examples([9] * 28), **SAVING)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_sync", full)
        kept = "nothing was saved before" if step == 2 else "checkpoint-4 is complete"
        with pytest.raises(
            CheckpointError,
            match=rf"checkpoint-{step} could not be written \(.*No space left.*{kept}",
        ):
            run.train()
    assert saved(tmp_path) == ([] if step == 2 else ["checkpoint-2", "checkpoint-4"])
    assert not (tmp_path / ".unfinished").exists()
    again = trainer(tmp_path, train=examples([9] * 28), **SAVING)
    again.train(resume_from_checkpoint=step != 2)
    same_parameters(again.model, whole[1], rtol=0, atol=0)


def stopping_early(folder, **changes):
    rows = examples([9] * 28)
    options = {
        "max_steps": 20,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_trajectory",
        "greater_is_better": False,
    }
    callbacks = [Ruin(), EarlyStoppingCallback(early_stopping_patience=3)]
    return trainer(
        folder, train=rows, held_out=rows[:4], callbacks=callbacks, **(options | changes)
    )


def test_the_oldest_are_removed_but_not_the_best(tmp_path):
    run = stopping_early(tmp_path, save_total_limit=2)
    run.train()
    best = tmp_path / "checkpoint-2"
    assert run.state.global_step == 8  # stopped early
    assert run.state.best_model_checkpoint == str(best)
    assert saved(tmp_path) == ["checkpoint-2", "checkpoint-8"]
    require_same(
        weights(best),
        {f"model.safetensors:{n}": t for n, t in run.model.state_dict().items()},
        "best",
    )
    trajectories = {
        log["step"]: log["eval_trajectory"]
        for log in run.state.log_history
        if "eval_trajectory" in log
    }
    assert sorted(trajectories, key=trajectories.get) == [2, 4, 6, 8]
    assert run.evaluate()["eval_trajectory"] == pytest.approx(trajectories[2])


def test_patience_is_resumed(tmp_path):
    options = {"restore_callback_states_from_checkpoint": True, "metric_for_best_model": "loss"}
    stopping_early(tmp_path, max_steps=6, **options).train()
    again = stopping_early(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8


def test_only_a_folder_in_its_place_is_pushed(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Trainer,
        "_push_from_checkpoint",
        lambda self, folder: pushed.append((folder, Path(folder).is_dir())),
    )
    run = trainer(tmp_path, train=examples([9] * 28), **SAVING)
    run.args.push_to_hub = True
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    run.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), True) for step in (2, 4, 6)]


def test_the_same_seed_gives_the_same_student(tmp_path, backend):
    """With dropout and shuffled data, bit for bit; another seed gives another."""
    rows = examples([9, 5, 12, 7] * 5)
    students = []
    for seed in (3, 3, 4):
        run = trainer(
            tmp_path,
            train=rows,
            student=lora_student(),
            config=replace(CONFIG, backend=backend),
            max_steps=4,
            learning_rate=1e-2,
            seed=seed,
        )
        run.train()
        students.append(run.model)
    same_parameters(students[0], students[1], rtol=0, atol=0)
    moved = [(n, p) for n, p in students[2].named_parameters() if p.requires_grad]
    assert not any(torch.equal(p, dict(students[0].named_parameters())[n]) for n, p in moved)


def test_a_finished_run_that_is_resumed_takes_no_step(tmp_path, whole):
    """transformers would take one more, with the learning rate left."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    run = trainer(tmp_path, train=examples([9] * 28), **SAVING)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6
    same_parameters(run.model, whole[1], rtol=0, atol=0)
    assert saved(tmp_path) == saved(whole[0])
