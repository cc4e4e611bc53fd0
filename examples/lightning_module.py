"""Train with Lightning: accumulation, clipping, validation, early stopping, checkpoints."""

from __future__ import annotations

import functools

import common
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from fdd_kernels.data import pad_windows
from fdd_kernels.integrations import FDDLightningModule


def main() -> None:
    options = common.parse(__doc__)
    pl.seed_everything(options.seed)
    task = common.load(options)
    module = FDDLightningModule(
        task.student,
        task.teacher,
        optimizer=functools.partial(torch.optim.AdamW, lr=options.learning_rate),
    )
    loader = functools.partial(DataLoader, batch_size=options.batch_size, collate_fn=pad_windows)
    trainer = pl.Trainer(
        max_steps=options.steps,
        accumulate_grad_batches=options.gradient_accumulation,
        gradient_clip_val=1.0,
        val_check_interval=options.save_steps * options.gradient_accumulation,  # in batches
        check_val_every_n_epoch=None,
        precision="bf16-mixed" if options.bf16 else "32-true",
        log_every_n_steps=1,
        default_root_dir=options.output,
        callbacks=[
            ModelCheckpoint(options.output, monitor="val_loss", save_last=True),
            EarlyStopping("val_loss", patience=3),
        ],
    )
    last = options.output / "last.ckpt"
    trainer.fit(
        module,
        loader(task.train, shuffle=True),
        loader(task.held_out),
        ckpt_path=last if last.exists() else None,
        weights_only=True,
    )
    if trainer.is_global_zero:
        module.student.save_pretrained(options.output / "student")
        task.tokenizer.save_pretrained(options.output / "student")


if __name__ == "__main__":
    main()
