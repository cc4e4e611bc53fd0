"""Train on answers that the student generates, with TRL's DistillationTrainer."""

from __future__ import annotations

import json

import common
import torch
from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import DistillationConfig

from fdd_kernels import FDDConfig
from fdd_kernels.integrations import FDDDistillationTrainer


def main() -> None:
    options = common.parse(__doc__)
    task = common.load(options)
    lines = task.data.read_text("utf-8").splitlines()
    # Of the data only the prompts are used.
    prompts = [{"prompt": json.loads(line)["prompt"]} for line in lines if line.strip()]
    parts = Dataset.from_list(prompts).train_test_split(test_size=0.1, seed=options.seed)
    trainer = FDDDistillationTrainer(
        model=task.student,
        teacher=task.teacher,
        fdd_config=FDDConfig(output_divergence="reverse_kl"),
        args=DistillationConfig(
            output_dir=str(options.output),
            max_steps=options.steps,
            max_completion_length=options.max_length // 2,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation,
            learning_rate=options.learning_rate,
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
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(options.output) is not None)
    print(trainer.evaluate())
    trainer.save_model(str(options.output / "student"))
    task.tokenizer.save_pretrained(options.output / "student")


if __name__ == "__main__":
    main()
