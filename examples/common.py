"""Arguments of the examples, and tiny models and data where none are named."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from fdd_kernels.cli.loading import load_model, load_student, load_vocabulary
from fdd_kernels.cli.vocabulary import shared_vocabulary
from fdd_kernels.data import load_windows, pad_windows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORDS = [f"w{number}" for number in range(94)]


def parse(description: str, **defaults) -> argparse.Namespace:
    """Parse the arguments of an example.

    Without --teacher, --student and --data it trains tiny random models for seconds.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--teacher", metavar="DIR_OR_NAME", help="a transformers causal LM")
    parser.add_argument(
        "--student", metavar="DIR_OR_NAME", help="another one with the same tokenizer"
    )
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="as `fdd-kernels distill` takes it"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=Path("runs") / Path(sys.argv[0]).stem
    )
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps")
    parser.add_argument("--save-steps", type=int, default=4, help="steps between checkpoints")
    parser.add_argument(
        "--batch-size", type=int, default=4, help="windows in a batch of one process"
    )
    parser.add_argument(
        "--gradient-accumulation", type=int, default=2, help="batches of one process in a step"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=48, help="tokens in a window")
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16; trained weights stay float32"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    if len({options.teacher is None, options.student is None, options.data is None}) > 1:
        parser.error(
            "give --teacher, --student and --data together, or none of them for tiny random models"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    return options


@dataclass
class Task:
    """Two models that share a tokenizer, and windows of tokens.

    A window has input_ids, attention_mask and labels with -100.
    """

    student: nn.Module
    teacher: nn.Module
    tokenizer: PreTrainedTokenizerFast
    data: Path
    train: Dataset
    held_out: Dataset


def load(options: argparse.Namespace) -> Task:
    """Load the models and the text that the options name.

    Without names: tiny models of five layers, and prompts with completions of random words.
    """
    if options.teacher is None:
        vocabulary = shared_vocabulary(tiny_tokenizer(), tiny_tokenizer())
        student, teacher = tiny_model(1, width=32), tiny_model(2, width=64)
        # one for each process
        data = tiny_data(options.output / f"tiny-{os.environ.get('RANK', 0)}.jsonl")
    else:
        vocabulary, data = load_vocabulary(options.teacher, options.student), options.data
        student, teacher = load_student(options.student)[0], load_model(options.teacher, "teacher")
    windows = load_windows(
        data,
        vocabulary.tokenizer,
        unshared=vocabulary.unshared,
        max_length=options.max_length,
        eval_fraction=0.1,
        seed=options.seed,
    )
    return Task(
        student.to(DEVICE),
        teacher.to(DEVICE),
        vocabulary.tokenizer,
        data,
        windows.train,
        windows.held_out,
    )


def tiny_model(seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(
        models.WordLevel(
            {word: index for index, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}, "<unk>"
        )
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def tiny_data(path: Path) -> Path:
    """Write 160 prompts with completions of unequal length, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def words(least: int, most: int) -> str:
        count = int(torch.randint(least, most + 1, (), generator=generator))
        return " ".join(
            WORDS[index] for index in torch.randint(len(WORDS), (count,), generator=generator)
        )

    lines = [
        json.dumps({"prompt": words(2, 6) + " ", "completion": words(4, 20)}) for _ in range(160)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def batches_of_step(
    windows: Dataset, options: argparse.Namespace, step: int
) -> list[dict[str, Tensor]]:
    """Build the micro-batches of an optimizer step.

    They follow from the step alone, so a loop that resumes has nothing to skip.
    """
    size, parts = options.batch_size, options.gradient_accumulation
    epoch, index = divmod(step, len(windows) // (size * parts))
    order = _order(len(windows), options.seed + epoch)[index * size * parts :]
    rows = [
        [windows[row] for row in order[part * size : (part + 1) * size]] for part in range(parts)
    ]
    return [
        {name: tensor.to(DEVICE) for name, tensor in pad_windows(part).items()} for part in rows
    ]
