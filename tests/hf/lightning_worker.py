"""A Lightning run of test_lightning.py on several processes: python lightning_worker.py FOLDER
PROCESSES
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from safetensors.torch import save_file

from fdd_kernels import FDDConfig
from fdd_kernels.integrations import FDDLightningModule
from tests.support.hf_models import tiny_model
from tests.support.training import examples, lightning_options, pad

CONFIG = FDDConfig.paper(num_layers=2, ce_weight=0.5)
# Micro-batches of very unequal numbers of tokens: two optimizer steps of 2 x 2, and half a step at
# the end of the epoch.
LENGTHS = ([4, 5], [17, 16], [6, 18], [5, 4], [12, 13], [7, 4], [9, 3], [18, 17], [6, 6], [14, 4])


def batches() -> list[dict]:
    return [pad(examples(lengths, seed=index)) for index, lengths in enumerate(LENGTHS)]


def module(**options) -> FDDLightningModule:
    student, teacher = tiny_model("llama", depth=3, seed=1), tiny_model("gpt2", depth=3, seed=2)
    # Plain gradient descent: the parameters show the gradient, not only its direction.
    return FDDLightningModule(
        student, teacher, CONFIG, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), **options
    )


def trainer_of(folder, **options) -> pl.Trainer:
    """A trainer of one epoch by default, whose data this file divides over processes itself."""
    own = {"max_epochs": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    return pl.Trainer(**(lightning_options(folder) | own | options))


def fit(model, folder, *, train=None, held_out=None, resume=None, **options):
    """Train, from the checkpoint `resume` if there is one; return the trainer."""
    loader = lambda data: torch.utils.data.DataLoader(data, batch_size=None)  # noqa: E731
    trainer = trainer_of(folder, **options)
    trainer.fit(
        model,
        loader(train or batches()),
        None if held_out is None else loader(held_out),
        **({} if resume is None else {"ckpt_path": resume, "weights_only": True}),
    )
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])

    class Shared(FDDLightningModule):
        """Each process takes every `processes`-th micro-batch."""

        def train_dataloader(self):
            return torch.utils.data.DataLoader(
                batches()[self.global_rank :: processes], batch_size=None
            )

        def val_dataloader(self):
            # Of unequal numbers of tokens, and one process has a batch without a single label.
            found = batches()[: 2 * processes]
            found[0]["labels"] = torch.full_like(found[0]["labels"], -100)
            return torch.utils.data.DataLoader(
                found[self.global_rank :: processes], batch_size=None
            )

    model = module()
    model.__class__ = Shared
    trainer = trainer_of(folder, devices=processes, strategy="ddp", accumulate_grad_batches=2)
    trainer.fit(model)
    if trainer.is_global_zero:
        metrics = {name: value.clone() for name, value in trainer.callback_metrics.items()}
        save_file(
            {n: p.detach().contiguous() for n, p in model.student.named_parameters()},
            folder / "student.safetensors",
        )
        save_file(metrics, folder / "metrics.safetensors")
