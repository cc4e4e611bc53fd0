"""Options that change during training under FDDTrainer and Lightning: steps, logs, checkpoints."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from fdd_kernels import Distiller, GradientBalance, Stages, TAIDSchedule, WeightSchedule
from tests.support.hf_models import tiny_model
from tests.support.training import CONFIG, examples, pad, same_parameters, trainer

STAGES = Stages(
    [
        ("both", 4, {"alpha": 1.0, "ce_weight": 0.0}),
        ("task", None, {"alpha": 0.1, "ce_weight": 1.0}),
    ]
)
SCHEDULED = replace(
    CONFIG,
    ce_weight=0.0,
    schedules={
        "teacher_mix": TAIDSchedule(60, rate=0.2),
        "temperature": WeightSchedule(1.0, 2.0, 0, 5, "cosine"),
    },
    stages=STAGES,
    gradient_balance=GradientBalance({"output_kd": 1.0, "trajectory": 0.5}, every=2, smoothing=0.5),
    layer_alignment="attention",
    alignment_every=2,
)
NAMES = {"teacher_mix", "temperature", "alpha", "ce_weight", "output_kd_weight"}
ROWS = examples([9, 5, 12, 7] * 6)
RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps without a stop, with evaluations."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(
        folder,
        train=ROWS,
        held_out=ROWS[:4],
        config=SCHEDULED,
        eval_strategy="steps",
        eval_steps=3,
        **RUN,
    )
    run.train()
    return folder, run


def again(folder, **changes):
    options = {"config": SCHEDULED, "eval_strategy": "steps", "eval_steps": 3} | RUN | changes
    student = tiny_model("llama", depth=3, seed=77)
    return trainer(folder, train=ROWS, held_out=ROWS[:4], student=student, **options)


def test_the_trainer_takes_the_steps_of_a_plain_loop(whole, tmp_path):
    """The options are those of the optimizer step, the same for its micro-batches: a distiller that
    is given the same steps follows the same numbers.
    """
    logs = [log for log in whole[1].state.log_history if "trajectory" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4, 5, 6]
    for step, log in enumerate(logs):
        assert log.keys() >= NAMES
        assert log["temperature"] == SCHEDULED_TEMPERATURE.at(step)
        assert log["ce_weight"] == STAGES.at(step)["ce_weight"]
    mixes = [log["teacher_mix"] for log in logs]
    assert mixes[:2] == [0.4, 0.4]  # the first loss is only remembered
    assert mixes == sorted(mixes)
    assert mixes[-1] > 0.4 + 0.6 * 5 / 60 + 0.01  # pushed beyond the line
    assert len({log["output_kd_weight"] for log in logs}) == 3  # measured at steps 0, 2 and 4


SCHEDULED_TEMPERATURE = WeightSchedule(1.0, 2.0, 0, 5, "cosine")


@pytest.mark.parametrize("parts", [1, 2])
def test_the_first_step_has_the_gradient_of_a_plain_call(tmp_path, parts):
    """SGD of rate 1: the parameters show the gradient."""
    config = replace(CONFIG, schedules={"alpha": WeightSchedule(0.25, 1.0, 0, 4)})
    rows = ROWS[: 2 * parts]
    run = trainer(
        tmp_path,
        train=rows,
        config=config,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=parts,
        train_sampling_strategy="sequential",
    )
    run.train()
    student = tiny_model("llama", depth=3, seed=1)
    distiller = Distiller(student, tiny_model("gpt2", depth=3, seed=2), replace(CONFIG, alpha=0.25))
    distiller(pad(rows)).loss.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= parameter.grad
    same_parameters(run.model, student, rtol=1e-4, atol=2e-6)


def test_resumed_equals_uninterrupted(whole, tmp_path):
    """Bit for bit: weights, logs, evaluations and the state in the last checkpoint."""
    folder, run = whole
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    resumed = again(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    same_parameters(resumed.model, run.model, rtol=0, atol=0)
    logs = [
        [
            {k: v for k, v in log.items() if "runtime" not in k and "per_second" not in k}
            for log in r.state.log_history[:-1]
        ]
        for r in (run, resumed)
    ]
    assert logs[0] == logs[1]
    states = [
        json.loads((f / "checkpoint-6" / "fdd_state.json").read_text()) for f in (folder, tmp_path)
    ]
    assert states[0] == states[1] == run.distiller.state_dict()


def test_an_evaluation_after_a_resume_is_that_of_the_last_step(whole, tmp_path):
    folder, run = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    resumed = again(tmp_path)
    resumed.train(resume_from_checkpoint=True)  # no step is left
    assert resumed.distiller.logged() == run.distiller.logged()
    assert resumed.evaluate()["eval_loss"] == run.evaluate()["eval_loss"]


def test_a_second_training_begins_anew(whole, tmp_path):
    run = again(tmp_path, save_strategy="no", eval_strategy="no")
    for _ in range(2):
        run.train()
        mixes = [log["teacher_mix"] for log in run.state.log_history if "teacher_mix" in log]
        assert mixes[:2] == [0.4, 0.4]
        assert mixes[-1] > 0.5
        assert run.distiller.schedules.step == 5


def test_a_checkpoint_without_the_state_is_refused(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "fdd_state.json").unlink()
    run = again(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-3' lacks fdd_state.json \(which a training"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with (
        pytest.warns(UserWarning, match=r"checkpoint-3 lacks fdd_state.json"),
        pytest.raises(ValueError, match="holds no complete checkpoint"),
    ):
        run.train(resume_from_checkpoint=True)
    # Without options that change there is no such file, and none is asked for.
    plain = again(tmp_path, config=CONFIG)
    with pytest.warns(UserWarning, match=r"fdd_state.json is of a training with options that ch"):
        plain.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    plain = again(tmp_path, config=CONFIG)
    plain.train(resume_from_checkpoint=True)
    assert plain.state.global_step == 6
    assert not (tmp_path / "checkpoint-6" / "fdd_state.json").exists()


def test_a_new_student_of_model_init_has_the_state_of_the_checkpoint(whole, tmp_path):
    folder, run = whole
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    resumed = again(tmp_path)
    resumed.model_init = lambda: tiny_model("llama", depth=3, seed=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.distiller.student.model is resumed.model
    found, wanted = (
        next(log for log in r.state.log_history if log["step"] == 4) for r in (resumed, run)
    )
    assert {name: found[name] for name in NAMES} == {name: wanted[name] for name in NAMES}
