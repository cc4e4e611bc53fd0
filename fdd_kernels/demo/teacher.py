"""Train the demo's teacher: a small Llama-style model of Python source. The result is in the
repository, in assets/teacher.

python -m fdd_kernels.demo.teacher --output DIR --steps 6000
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_with_min_lr_schedule_with_warmup,
)

from fdd_kernels.common.progress import Activity
from fdd_kernels.demo.corpus import (
    random_windows,
    standard_library_texts,
    token_stream,
    train_tokenizer,
)

SHIPPED_TEACHER = Path(__file__).parent / "assets" / "teacher"
VOCAB_SIZE = 2048
CONTEXT = 256
RECORD_FILE = "record.json"


def llama(
    hidden_size: int, num_layers: int, num_heads: int, vocab_size: int = VOCAB_SIZE
) -> LlamaForCausalLM:
    """Make a random Llama-style model with tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3 // 16 * 16,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, windows: torch.Tensor, batch_size: int = 16) -> float:
    """Mean next-token cross-entropy in nats over windows (count, length), all of one length."""
    was_training = model.training
    model.eval()
    losses = [
        model(input_ids=batch, labels=batch).loss.item() * len(batch)
        for batch in windows.split(batch_size)
    ]
    model.train(was_training)
    return sum(losses) / len(windows)


def held_out_windows(stream: torch.Tensor, count: int) -> torch.Tensor:
    """Draw validation windows (count, CONTEXT), the same at every call."""
    return random_windows(stream, count, CONTEXT, torch.Generator().manual_seed(7))


def train_teacher(
    output: Path,
    steps: int,
    batch_size: int = 8,
    learning_rate: float = 3e-3,
    seed: int = 0,
    start_from: Path | None = None,
) -> dict:
    """Train tokenizer and teacher on the training split and write both, with a record, to `output`.

    Args:
        start_from: a teacher written earlier, whose weights and tokenizer are used; the optimizer
            starts anew.

    Returns:
        The record: sizes, steps, tokens seen, validation loss in nats per token, seconds, versions.
    """
    torch.manual_seed(seed)
    progress = Console(stderr=True)
    with Activity(progress, "reading the standard library"):
        train_texts, held_out_texts = (
            standard_library_texts(held_out=False),
            standard_library_texts(held_out=True),
        )
        if start_from is None:
            earlier = None
            tokenizer, model = (
                train_tokenizer(train_texts, VOCAB_SIZE),
                llama(hidden_size=192, num_layers=10, num_heads=3),
            )
        else:
            earlier = json.loads((start_from / RECORD_FILE).read_text())
            tokenizer = AutoTokenizer.from_pretrained(start_from)
            model = LlamaForCausalLM.from_pretrained(start_from, dtype=torch.float32).train()
        train_stream, held_out_stream = (
            token_stream(tokenizer, train_texts),
            token_stream(tokenizer, held_out_texts),
        )
    evaluation = held_out_windows(held_out_stream, 128)

    forward = torch.compile(model) if shutil.which("c++") or shutil.which("g++") else model
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=min(200, steps // 10),
        num_training_steps=steps,
        min_lr_rate=0.02,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    curve, started = [], time.monotonic()
    with Activity(progress, "training the teacher", steps) as activity:
        for step in range(1, steps + 1):
            batch = random_windows(train_stream, batch_size, CONTEXT, generator)
            loss = forward(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if step % 250 == 0 or step == steps:
                curve.append({"step": step, "held_out_loss": held_out_loss(model, evaluation)})
                save_teacher(output, model, tokenizer)
                print(
                    json.dumps(curve[-1] | {"seconds": round(time.monotonic() - started)}),
                    flush=True,
                )
            activity.update(
                step, terms=[f"loss {loss.item():.3f}"] if step % 10 == 0 or step == steps else None
            )
    record = {} if earlier is None else {"before": earlier}
    record |= {
        "command": f"python -m fdd_kernels.demo.teacher --steps {steps} --batch-size {batch_size} "
        f"--learning-rate {learning_rate} --seed {seed} --output DIR"
        + (" --start-from BEFORE" if earlier else ""),
        "text": f"source of the Python {platform.python_version()} standard library",
        "train_tokens": len(train_stream),
        "held_out_tokens": len(held_out_stream),
        "tokens_seen": steps * batch_size * CONTEXT + (earlier["tokens_seen"] if earlier else 0),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_loss": curve[-1]["held_out_loss"],
        "curve": curve,
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
    }
    (output / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    return record


def save_teacher(output: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a bfloat16 copy of the weights, and the tokenizer, in Hugging Face's layout
    (safetensors, no pickle).
    """
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="a teacher to train further")
    arguments = parser.parse_args()
    print(json.dumps(train_teacher(**vars(arguments)), indent=1))
