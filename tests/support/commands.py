"""Write tiny models to folders; make options of the commands."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fdd_kernels import FDDConfig
from fdd_kernels.cli.cache_teacher import CacheOptions
from fdd_kernels.cli.distill.options import DistillOptions
from fdd_kernels.common import atomic
from tests.support.hf_models import tiny_config, tiny_model, tiny_tokenizer

NUMBERS = ("one", "two", "three")
TEXT = "\n".join(
    f"{a} and {b} is {c}, the word"
    for a in NUMBERS
    for b in ("one", "four")
    for c in ("a", "word", "x")
)


def write_models(folder: Path) -> Path:
    """Write teacher/ and student/ with a tokenizer, bare/ with a config alone, and data.txt."""
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    for name, model in (
        ("teacher", tiny_model("gpt2", depth=3, vocab_size=size, seed=2, spread=2.0)),
        ("student", tiny_model("llama", depth=3, vocab_size=size, seed=1)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tiny_config("llama", depth=3, vocab_size=size).save_pretrained(folder / "bare")
    (folder / "data.txt").write_text(TEXT * 2)
    return folder


def options(inputs, output, **changes):
    defaults = {
        "teacher": str(inputs / "teacher"),
        "student": str(inputs / "student"),
        "data": inputs / "data.txt",
        "output": output,
        "config": FDDConfig.paper(num_layers=2),
        "max_steps": 6,
        "learning_rate": 3e-3,
        "batch_size": 4,
        "max_length": 24,
        "eval_fraction": 0.2,
        "save_steps": 2,
        "log_steps": 1,
        "dtype": "float32",
    }
    return DistillOptions(**(defaults | changes))


def quiet():
    return Console(file=io.StringIO(), width=200)


def cache_options(inputs, output, **changes):
    defaults = {
        "teacher": str(inputs / "teacher"),
        "data": inputs / "data.txt",
        "output": output,
        "num_layers": 2,
        "dtype": "float32",
        "max_length": 24,
        "eval_fraction": 0.2,
        "shard_size": 40_000,
    }
    return CacheOptions(**(defaults | changes))


FROM_CACHE = {"teacher": None, "data": None, "max_length": None, "eval_fraction": None}


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """Mount a file system of `size` bytes at `folder`; skip the test where that is not allowed."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class FullDisk:
    """Fail with "no space left" when a file with `when(path)` is synced, as under delayed
    allocation.
    """

    def __init__(self, monkeypatch, when):
        self.when, self.own = when, atomic._sync
        monkeypatch.setattr(atomic, "_sync", self)

    def __call__(self, path):
        if self.when(str(path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return self.own(path)


def weights(output):
    return load_file(output / "student" / "model.safetensors")


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


COMMAND = [
    "--derivative",
    "cosine",
    "--max-steps",
    "6",
    "--learning-rate",
    "3e-3",
    "--batch-size",
    "4",
    "--max-length",
    "24",
    "--eval-fraction",
    "0.2",
    "--save-steps",
    "2",
    "--log-steps",
    "1",
    "--dtype",
    "float32",
    "--num-layers",
    "2",
]


def command(inputs, output, *more):
    return [
        "distill",
        "--teacher",
        str(inputs / "teacher"),
        "--student",
        str(inputs / "student"),
        "--data",
        str(inputs / "data.txt"),
        "--output",
        str(output),
        *COMMAND,
        *more,
    ]
