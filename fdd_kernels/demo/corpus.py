"""The demo's text: the source of the Python standard library on this machine. Nothing is
downloaded.

A hash of its path puts a file into the training or the validation split. So a file that the teacher
was trained on is in no validation split, on any machine and Python version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# Tables, generated text and vendored copies: long, and not typical code.
SKIPPED_FOLDERS = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "lib2to3",
    "__pycache__",
}
HELD_OUT_EVERY = 25


def is_held_out(relative_path: Path) -> bool:
    """Whether the file with this path below the standard library is in the validation split."""
    digest = hashlib.sha256(relative_path.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0


def standard_library_texts(*, held_out: bool) -> list[str]:
    """The source files of one split, in a fixed order that mixes packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = [path.relative_to(root) for path in root.rglob("*.py")]
    chosen = [
        p
        for p in relative
        if not SKIPPED_FOLDERS.intersection(p.parts) and is_held_out(p) == held_out
    ]
    chosen.sort(key=lambda p: hashlib.sha256(p.as_posix().encode()).digest())
    texts = [(root / p).read_text("utf-8", errors="ignore") for p in chosen]
    return [text for text in texts if text.strip()]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of exactly `vocab_size` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Tokenize all texts into one int64 tensor (tokens,), each text followed by the end-of-text
    token.
    """
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for encoding in encoded for token in (*encoding.ids, end)])


def random_windows(
    stream: torch.Tensor, count: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw windows (count, length) of tokens uniformly from the stream."""
    starts = torch.randint(0, len(stream) - length + 1, (count,), generator=generator)
    return stream[starts[:, None] + torch.arange(length)]
