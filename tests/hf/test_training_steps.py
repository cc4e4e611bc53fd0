"""Denominator of a step of FDDTrainer, steps without a valid token, losses that are not finite."""

import json
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from fdd_kernels import Distiller
from fdd_kernels.integrations import FDDTrainerMixin, NonFiniteLossError, require_finite
from fdd_kernels.integrations.sums import StepSums
from tests.support.hf_models import tiny_model
from tests.support.training import CONFIG, TERMS, examples, pad, same_parameters, trainer

# Plain gradient descent: the parameters show the gradient, not only its direction.
PLAIN = {
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
}


def reference(groups, rate=0.1):
    """Students after steps over groups of micro-batches, and the loss of each step: means over all
    positions of a group.
    """
    student = tiny_model("llama", depth=3, seed=1).train()
    distiller, losses = Distiller(student, tiny_model("gpt2", depth=3, seed=2), CONFIG), []
    optimizer = torch.optim.SGD(student.parameters(), lr=rate)
    for group in groups:
        items = sum(distiller.count_positions(batch) for batch in group)
        terms = [distiller(batch, num_items_in_batch=items) for batch in group]
        losses.append(sum(float(part.loss.detach()) for part in terms))
        sum(part.loss for part in terms).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student, losses


@pytest.mark.parametrize("parts", [1, 2])
def test_positions_are_those_of_the_batch_that_is_used(tmp_path, parts):
    used = []

    class OnPolicy(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if len(used) % 2 == 0:
                inputs = pad(examples([15] * len(inputs["input_ids"]), seed=len(used)))
            used.append({name: tensor.clone() for name, tensor in inputs.items()})
            return super().training_step(model, inputs, num_items_in_batch)

    class Mixed(FDDTrainerMixin, OnPolicy):
        pass

    steps = 4 // parts
    run = Mixed(
        model=tiny_model("llama", depth=3, seed=1),
        teacher=tiny_model("gpt2", depth=3, seed=2),
        fdd_config=CONFIG,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=parts,
            logging_steps=1,
            **PLAIN,
        ),
        train_dataset=examples([4, 9, 6, 12, 5, 7, 9, 11]),
        data_collator=pad,
    )
    result = run.train()
    assert len(used) == 4
    student, losses = reference([used[at : at + parts] for at in range(0, 4, parts)])
    same_parameters(run.model, student, rtol=1e-4, atol=2e-6)
    logged = [log for log in run.state.log_history if "loss" in log]
    for log, loss in zip(logged, losses, strict=True):
        assert log["loss"] == pytest.approx(loss, rel=1e-4)
        weighted = log["output_kd"] + log["trajectory"] + log["derivative"] + 0.5 * log["ce"]
        assert weighted == pytest.approx(loss, rel=1e-4)
    assert result.training_loss == pytest.approx(sum(losses) / steps, rel=1e-4)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, lengths):
        self.rows = examples(lengths)

    def __iter__(self):
        return iter(self.rows)


def test_a_stream_that_ends_in_the_middle_of_a_step(tmp_path):
    """Five batches a pass, two a step: the fifth and the next pass's first are one step, with one
    mean.
    """
    stream = Stream([4, 9, 16, 12, 5])
    options = {
        "train": stream,
        "max_steps": 5,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    } | PLAIN
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, **options)
    run.train()
    batches = [pad([row]) for row in stream.rows * 2]
    student, losses = reference([batches[at : at + 2] for at in range(0, 10, 2)])
    same_parameters(run.model, student, rtol=1e-4, atol=2e-6)
    found = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert found == pytest.approx(losses, rel=1e-4)
    assert run.state.global_step == 5
    resumed = trainer(tmp_path, **options)  # in the first epoch, with one batch left
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same_parameters(resumed.model, run.model, rtol=0, atol=0)


def test_a_stream_that_is_shorter_than_a_step_is_refused(tmp_path):
    run = trainer(
        tmp_path,
        train=Stream([4, 9]),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
    )
    with pytest.raises(
        ValueError, match=r"gives 2 batches in a pass.*gradient_accumulation_steps=3"
    ):
        run.train()


def test_labels_that_are_all_ignored_are_warned_of(tmp_path):
    rows = examples([6, 6])
    for row in rows:
        row["labels"] = [-100] * 6
    run = trainer(tmp_path, train=rows, held_out=rows, max_steps=1)
    with pytest.warns(UserWarning, match=r"no position is valid in step 1.*every label is -100"):
        run.train()
    with pytest.warns(UserWarning, match="no position is valid in the data of eval_loss"):
        assert run.evaluate()["eval_trajectory"] == 0


def test_a_batch_that_context_parallelism_will_split_is_counted_once(tmp_path, monkeypatch):
    run = trainer(tmp_path, train=examples([4, 9]))
    whole = run.get_batch_samples(iter(run.get_train_dataloader()), 1, run.args.device)[1]
    monkeypatch.setattr(run, "get_cp_size", lambda: 2)
    part = run.get_batch_samples(iter(run.get_train_dataloader()), 1, run.args.device)[1]
    assert 2 * part == whole - whole % 2  # of one process here; two processes have twice as many


class Ruin(TrainerCallback):
    """After a step the student's weights give no finite loss."""

    def __init__(self, step, value=1e30):
        self.step, self.value = step, value

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.lm_head.weight.fill_(self.value)
                model.model.norm.weight.fill_(self.value)


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "save_total_limit": 1}


def saved(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, parts):
    """The weights after step 2 are saved, and nothing is wrong with them yet: the last good
    checkpoint is the one before.
    """
    rows = examples([9] * 32)
    run = trainer(
        tmp_path, train=rows, callbacks=[Ruin(2)], gradient_accumulation_steps=parts, **SAVING
    )
    with pytest.raises(
        NonFiniteLossError,
        match=r"step 3 is not finite \(loss .*checkpoint-1 is the last good.*learning rate",
    ):
        run.train()
    assert saved(tmp_path) == ["checkpoint-1", "checkpoint-2-not-finite"]
    again = trainer(tmp_path, train=rows, gradient_accumulation_steps=parts, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert [path for path in saved(tmp_path) if path[-1].isdigit()] == ["checkpoint-4"]


def test_float16s_scaler_may_skip_some_steps(tmp_path, monkeypatch):
    run = trainer(tmp_path, train=examples([9] * 4))
    monkeypatch.setattr(Trainer, "training_step", lambda *_arguments: torch.tensor(math.nan))
    run.accelerator.scaler, run.current_gradient_accumulation_steps = object(), 1

    def step(loss):
        run._sums = StepSums()
        run._sums.add({"loss": torch.tensor(loss)}, torch.tensor(1), torch.tensor(1))
        run.training_step(run.model, {}, torch.tensor(1))

    for _ in range(20):
        step(math.nan)
    step(1.0)
    for _ in range(20):
        step(math.nan)
    with pytest.raises(NonFiniteLossError):
        step(math.nan)


def test_an_evaluation_that_is_no_number_stops_before_saving(tmp_path):
    rows = examples([9] * 32)
    run = trainer(
        tmp_path,
        train=rows,
        held_out=rows[:4],
        callbacks=[Ruin(2)],
        eval_strategy="steps",
        eval_steps=1,
        **SAVING,
    )
    with pytest.raises(
        NonFiniteLossError, match=r"evaluation after step 2 .*checkpoint-1 is the last good"
    ):
        run.train()
    assert saved(tmp_path) == ["checkpoint-1"]


def test_a_checkpoint_of_another_run_is_left_alone(tmp_path):
    rows = examples([9] * 32)
    trainer(tmp_path, train=rows, **(SAVING | {"max_steps": 2, "save_steps": 2})).train()
    run = trainer(tmp_path, train=rows, callbacks=[Ruin(2)], **(SAVING | {"save_steps": 3}))
    with pytest.raises(NonFiniteLossError, match=r"step 3 .*nothing was saved before"):
        run.train()
    assert saved(tmp_path) == ["checkpoint-2"]


def test_weights_that_are_no_numbers_in_the_end(tmp_path):
    run = trainer(tmp_path, train=examples([9] * 32), callbacks=[Ruin(4, math.nan)], **SAVING)
    with pytest.raises(
        NonFiniteLossError,
        match=r"weights after step 4 are not finite; checkpoint-3 is the last good",
    ):
        run.train()
    assert saved(tmp_path) == ["checkpoint-3", "checkpoint-4-not-finite"]


def test_a_state_with_numbers_that_json_does_not_know(tmp_path):
    class Unbounded(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            state.log_history[-1] |= {"grad_norm": math.inf, "other": [math.nan, 1.0]}

    run = trainer(
        tmp_path, train=examples([9] * 8), callbacks=[Unbounded()], **(SAVING | {"max_steps": 1})
    )
    run.train()

    def refuse(name):
        raise AssertionError(name)

    run.save_state()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        text = (folder / "trainer_state.json").read_text()
        first = json.loads(text, parse_constant=refuse)["log_history"][0]
        assert (first["grad_norm"], first["other"]) == (None, [None, 1.0])


def test_require_finite_names_the_terms():
    distiller = Distiller(
        tiny_model("llama", depth=3, seed=1), tiny_model("gpt2", depth=3, seed=2), CONFIG
    )
    terms = distiller(pad(examples([5, 7])))
    require_finite("step 1", terms.named())
    with pytest.raises(
        NonFiniteLossError, match=r"loss of step 7 is not finite \(loss nan, output_kd"
    ):
        require_finite(
            "step 7", {"loss": math.nan, **{name: getattr(terms, name) for name in TERMS}}
        )
