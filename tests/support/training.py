"""A tiny FDDTrainer, its data, and comparisons of students."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, set_seed

from fdd_kernels import FDDConfig
from fdd_kernels.integrations import FDDTrainer
from tests.support.hf_models import VOCAB, tiny_model

CONFIG = FDDConfig.paper(num_layers=2, ce_weight=0.5)
TERMS = ("output_kd", "trajectory", "derivative", "ce")


def examples(lengths, *, seed=0, labels=True):
    """Token sequences of unequal length with a masked prompt of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        prompt = index % 3
        rows.append({"input_ids": ids, "attention_mask": [1] * length})
        if labels:
            rows[-1]["labels"] = [-100] * prompt + ids[prompt:]
    return rows


def pad(rows):
    """A batch padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [fill[key]] * (longest - len(row[key])) for row in rows])
        for key in rows[0]
    }


def lightning_options(folder: Path) -> dict[str, object]:
    """Options of a Lightning trainer: one process on the CPU that shows and stores nothing."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    place = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return place | dict.fromkeys(quiet, False)


def trainer(
    output,
    *,
    train=None,
    held_out=None,
    student=None,
    teacher=None,
    config=CONFIG,
    data_collator=pad,
    callbacks=None,
    compute_metrics=None,
    **arguments,
):
    student = student if student is not None else tiny_model("llama", depth=3, seed=1)
    defaults = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 4,
        "seed": 3,
    }
    return FDDTrainer(
        model=student,
        args=TrainingArguments(output_dir=str(output), **(defaults | arguments)),
        teacher=teacher if teacher is not None else tiny_model("gpt2", depth=3, seed=2),
        fdd_config=config,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=data_collator,
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


def same_parameters(a, b, **tolerance):
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters()):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


class Ruin(TrainerCallback):
    """Every step makes the student worse: its logits grow."""

    def on_step_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)


def lora_student() -> torch.nn.Module:
    lora = LoraConfig(
        r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    set_seed(1)
    return get_peft_model(tiny_model("llama", depth=3, seed=1), lora)


def weights(folder: Path) -> dict[str, Tensor]:
    """Load the weights in a checkpoint's or student's folder into one dictionary."""
    return {
        f"{file.name}:{name}": t
        for file in folder.glob("*.safetensors")
        for name, t in load_file(file).items()
    }


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found, f"{what}: no weights"
    assert found.keys() == expected.keys(), f"{what}: other tensors"
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{what}: {name} differs"
