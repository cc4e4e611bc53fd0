"""Train in plain PyTorch: a LoRA student (rank 16 on q and v, as in the FDD paper).

Shows gradient accumulation, checkpoints and resuming.
"""

from __future__ import annotations

from pathlib import Path

import common
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup, set_seed

from fdd_kernels import Distiller
from fdd_kernels.common.atomic import atomic_directory
from fdd_kernels.integrations import require_finite


def save(folder: Path, student, optimizer, scheduler) -> None:
    with atomic_directory(folder) as part:  # complete or absent, also after a kill
        student.save_pretrained(part)  # the adapters alone
        state = {
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "random": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        torch.save(state, part / "training.pt")


def restore(folder: Path, student, optimizer, scheduler) -> None:
    set_peft_model_state_dict(student, load_file(folder / "adapter_model.safetensors"))
    state = torch.load(folder / "training.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def main() -> None:
    options = common.parse(__doc__)
    task = common.load(options)
    set_seed(options.seed)
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    student = get_peft_model(task.student, lora).train()
    distiller = Distiller(student, task.teacher)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate)
    scheduler = get_cosine_schedule_with_warmup(optimizer, options.steps // 10, options.steps)

    saved = sorted(options.output.glob("step-*"))
    start = int(saved[-1].name.removeprefix("step-")) if saved else 0
    if saved:
        print(f"resuming from {saved[-1]}")
        restore(saved[-1], student, optimizer, scheduler)
    for step in range(start, options.steps):
        batches = common.batches_of_step(task.train, options, step)
        # the mean is over all valid tokens of the step
        items = sum(distiller.count_positions(batch) for batch in batches)
        shares = []
        for batch in batches:
            with torch.autocast(common.DEVICE.type, torch.bfloat16, enabled=options.bf16):
                terms = distiller(batch, num_items_in_batch=items)
            terms.loss.backward()
            shares.append(torch.stack(list(terms.named().values())).detach())
        values = dict(zip(terms.named(), torch.stack(shares).sum(0).tolist()))
        require_finite(f"step {step + 1}", values)  # raise before the optimizer takes the step
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        print(f"step {step + 1}", *(f"{name} {value:.4f}" for name, value in values.items()))
        if (step + 1) % options.save_steps == 0:
            save(options.output / f"step-{step + 1:06d}", student, optimizer, scheduler)
    student.merge_and_unload().save_pretrained(options.output / "student")
    task.tokenizer.save_pretrained(options.output / "student")


if __name__ == "__main__":
    main()
