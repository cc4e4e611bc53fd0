"""FDDTrainer with masked LMs and encoder-decoders, over the collators of transformers."""

import copy
import dataclasses

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

from fdd_kernels import Distiller, FDDConfig
from tests.support.hf_models import VOCAB, tiny_tokenizer
from tests.support.tasks import dense_terms_of, pair
from tests.support.training import same_parameters, trainer

CONFIG = FDDConfig.paper(num_layers=2, alpha=0.7, ce_weight=0.5)
LAYERS = (1, 2), (2, 4)
FAMILIES = ["bert", "t5"]


class Collator:
    """A collator of transformers that remembers its batches."""

    def __init__(self, family: str, student) -> None:
        tokenizer, self.batches = tiny_tokenizer(), []
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
        if family == "bert":
            self._collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)
        else:
            self._collate = DataCollatorForSeq2Seq(tokenizer, student)

    def __call__(self, rows):
        self.batches.append(self._collate(rows))
        return self.batches[-1]


def rows_of(family: str, lengths=(4, 12, 6, 9)):
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(4, VOCAB, (length,), generator=generator).tolist()

    rows = [{"input_ids": tokens(n), "attention_mask": [1] * n} for n in lengths]
    if family == "t5":
        rows = [row | {"labels": tokens(2 + i)} for i, row in enumerate(rows)]
    return rows


def run_of(family: str, folder, **arguments):
    student, teacher = pair(family, vocab_size=310)
    given = {
        "data_collator": Collator(family, student),
        "train": rows_of(family),
        "config": CONFIG,
        "per_device_train_batch_size": 2,
    }
    return trainer(folder, student=student, teacher=teacher, **given | arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_a_plain_loops(family, tmp_path):
    """Of two micro-batches with unlike numbers of valid positions, by plain gradient descent."""
    options = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.5}
    run = run_of(
        family,
        tmp_path,
        gradient_accumulation_steps=2,
        max_steps=1,
        lr_scheduler_type="constant",
        **options,
    )
    student, terms = copy.deepcopy(run.model), dense_terms_of(family, *LAYERS)
    run.train()
    batches = run.data_collator.batches[:2]
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert counts[0] != counts[1]
    for batch, count in zip(batches, counts):
        loss = terms(student, run.teacher, dict(batch), CONFIG).loss
        (loss * count / sum(counts)).backward()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    same_parameters(run.model, student, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.slow), "t5"])
def test_training_evaluates_saves_and_resumes(family, tmp_path):
    """An encoder-decoder with its encoder, whose projection is trained, saved and resumed too."""
    config = dataclasses.replace(CONFIG, encoder_weight=0.5 if family == "t5" else 0.0)
    options = {
        "config": config,
        "held_out": rows_of(family, (5, 8, 3)),
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_eval_batch_size": 2,
    }
    whole = run_of(family, tmp_path / "whole", **options)
    whole.train()
    resumed = run_of(family, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    same_parameters(resumed.model, whole.model, rtol=0, atol=0)
    if family == "t5":
        same_parameters(resumed.distiller.projection, whole.distiller.projection, rtol=0, atol=0)
        assert whole.state.log_history[0]["encoder"] > 0

    start = len(resumed.data_collator.batches)
    metrics = resumed.evaluate()
    batches = resumed.data_collator.batches[start:]
    distiller = Distiller(resumed.model, resumed.teacher, config)
    if family == "t5":
        distiller.projection.load_state_dict(resumed.distiller.projection.state_dict())
    counts = [distiller.count_positions(batch) for batch in batches]
    with torch.no_grad():
        losses = [distiller(batch, num_items_in_batch=sum(counts)).loss for batch in batches]
    assert metrics["eval_loss"] == pytest.approx(float(sum(losses)), rel=1e-6)

    resumed.save_model(tmp_path / "saved")
    again = type(resumed.model).from_pretrained(tmp_path / "saved", dtype=torch.float64)
    same_parameters(again, resumed.model, rtol=0, atol=0)
