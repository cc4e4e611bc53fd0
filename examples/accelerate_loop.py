"""Train with accelerate: one loop for one process, DistributedDataParallel and FSDP2.

Shows gradient accumulation, clipping and save_state.

python examples/accelerate_loop.py
accelerate launch --config_file examples/launch/accelerate_ddp.yaml examples/accelerate_loop.py
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import common
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup, set_seed

from fdd_kernels import Distiller
from fdd_kernels.data import pad_windows
from fdd_kernels.integrations import require_finite


def save(accelerator: Accelerator, target: Path) -> None:
    """Save the state in `target`, complete or not at all: write beside it, then rename."""
    part = target.with_name(f".{target.name}.part")
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        part.rename(target)
    accelerator.wait_for_everyone()


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, distiller: Distiller, student, windows: list, size: int
) -> dict[str, float]:
    """Compute each term's mean over the valid tokens of all processes.

    Every process computes as many batches as the others.
    """
    batches = [pad_windows(windows[at : at + size]) for at in range(0, len(windows), size)]
    sums = 0.0
    student.eval()
    for first in range(0, len(batches), accelerator.num_processes):
        index = first + accelerator.process_index
        batch = {
            name: value.to(accelerator.device)
            for name, value in batches[min(index, len(batches) - 1)].items()
        }
        with accelerator.autocast():
            terms = distiller(batch, student=student).named()
        # a repeated batch has weight 0
        count = distiller.count_positions(batch) * (index < len(batches))
        sums = (
            sums + torch.stack([*terms.values(), torch.ones_like(terms["loss"])]).double() * count
        )
    student.train()
    *sums, count = accelerator.reduce(sums, "sum").tolist()
    return {name: value / count for name, value in zip(terms, sums)}


def main() -> None:
    options = common.parse(__doc__)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if options.bf16 else "no",
        step_scheduler_with_optimizer=False,  # or it steps once for each process
    )
    set_seed(options.seed)
    task = common.load(options)
    distiller = Distiller(task.student, task.teacher)  # before the student is sharded
    optimizer = torch.optim.AdamW(task.student.parameters(), lr=options.learning_rate)
    # A generator of its own: the loader does not change the random numbers of dropout.
    loader = DataLoader(
        task.train,
        options.batch_size,
        shuffle=True,
        collate_fn=pad_windows,
        drop_last=True,
        generator=torch.Generator().manual_seed(options.seed),
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    # Prepare the scheduler, do not register it: registered objects are loaded from pickles.
    student, optimizer, loader, scheduler = accelerator.prepare(
        task.student, optimizer, loader, scheduler
    )
    student.train()

    parts = options.gradient_accumulation
    steps_an_epoch = len(loader) // parts
    saved = sorted(options.output.glob("step-*"))
    step = int(saved[-1].name.removeprefix("step-")) if saved else 0
    if saved:
        accelerator.print(f"resuming from {saved[-1]}")
        accelerator.load_state(str(saved[-1]))
    while step < options.steps:
        epoch, done = divmod(step, steps_an_epoch)
        rest = accelerator.skip_first_batches(loader, done * parts)
        rest.set_epoch(epoch)
        batches = iter(rest)
        for _ in range(min(steps_an_epoch - done, options.steps - step)):
            micro_batches = list(itertools.islice(batches, parts))
            items = accelerator.reduce(
                sum(distiller.count_positions(batch) for batch in micro_batches), "sum"
            )
            shares = 0.0
            for index, batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(student):
                    # prepare() wraps the student's own forward, which is not called
                    with accelerator.autocast():
                        # Gradients are averaged over processes: divide the tokens of the step.
                        terms = distiller(
                            batch,
                            student=student,
                            num_items_in_batch=items / accelerator.num_processes,
                        )
                    accelerator.backward(terms.loss)
                shares = shares + torch.stack(list(terms.named().values())).detach()
            values = accelerator.reduce(shares, "mean").tolist()
            # raises in all processes or in none
            require_finite(f"step {step + 1}", dict(zip(terms.named(), values)))
            accelerator.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step % options.save_steps == 0:
                save(accelerator, options.output / f"step-{step:06d}")
                means = evaluate(accelerator, distiller, student, task.held_out, options.batch_size)
                accelerator.print(
                    f"step {step} validation",
                    *(f"{name} {value:.4f}" for name, value in means.items()),
                )
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(student).save_pretrained(
        options.output / "student",
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(student),
    )


if __name__ == "__main__":
    main()
