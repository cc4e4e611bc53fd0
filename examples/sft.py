"""Train with TRL's SFTTrainer: its data preparation, completion-only labels, a LoRA student."""

from __future__ import annotations

import json

import common
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from fdd_kernels.integrations import FDDSFTTrainer


def main() -> None:
    options = common.parse(__doc__)
    task = common.load(options)
    rows = Dataset.from_list(
        [json.loads(line) for line in task.data.read_text("utf-8").splitlines() if line.strip()]
    )
    parts = rows.train_test_split(test_size=0.1, seed=options.seed)
    trainer = FDDSFTTrainer(
        model=task.student,
        teacher=task.teacher,
        args=SFTConfig(
            output_dir=str(options.output),
            max_steps=options.steps,
            max_length=options.max_length,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation,
            learning_rate=options.learning_rate,
            completion_only_loss=True,
            bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=options.seed,
            logging_steps=1,
            save_steps=options.save_steps,
            report_to="none",
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=task.tokenizer,
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(options.output) is not None)
    print(trainer.evaluate())
    trainer.model.merge_and_unload().save_pretrained(options.output / "student")
    task.tokenizer.save_pretrained(options.output / "student")


if __name__ == "__main__":
    main()
