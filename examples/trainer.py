"""Train with transformers' Trainer, in one or several processes.

Shows evaluation, early stopping, the best student at the end, reports and resuming.
"""

from __future__ import annotations

import importlib.util

import common
import torch
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from fdd_kernels import FDDConfig
from fdd_kernels.data import pad_windows
from fdd_kernels.integrations import FDDTrainer


def main() -> None:
    options = common.parse(__doc__)
    set_seed(options.seed)
    task = common.load(options)
    trainer = FDDTrainer(
        model=task.student,
        teacher=task.teacher,
        fdd_config=FDDConfig(alpha=1.0, beta=1.0),
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation,
            learning_rate=options.learning_rate,
            bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=options.seed,
            logging_steps=1,
            report_to="tensorboard"
            if importlib.util.find_spec("tensorboard")
            else "none",  # or "wandb"
            eval_strategy="steps",
            eval_steps=options.save_steps,
            save_steps=options.save_steps,
            save_total_limit=2,
            load_best_model_at_end=True,
            # or eval_output_kd, eval_trajectory, eval_derivative
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            # a checkpoint stores how long the loss has not improved
            restore_callback_states_from_checkpoint=True,
        ),
        train_dataset=task.train,
        eval_dataset=task.held_out,
        data_collator=pad_windows,
        processing_class=task.tokenizer,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(options.output) is not None)
    print(trainer.evaluate())
    trainer.save_model(str(options.output / "student"))
    trainer.create_model_card(model_name="student")


if __name__ == "__main__":
    main()
