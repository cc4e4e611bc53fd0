"""Tell whether two runs use the same models: by the content of their folders, not by path or
time.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fdd_kernels.cli.loading import TOKENIZER_FILES, WEIGHTS

SAMPLE = 4096
_PATTERNS = (
    "config.json",
    *WEIGHTS,
    *TOKENIZER_FILES,
    "merges.txt",
    "*.jinja",
    "special_tokens_map.json",
    "adapter_config.json",
)


def model_identity(name: str) -> str | dict[str, str]:
    """Identify a model: its name on the hub, or size and digest of each file in a local folder.

    Only files of the model and its tokenizer count. The digest of a safetensors file is that of its
    header and of the beginning, middle and end of every tensor. Training that changes
    every row changes these, and a large model is not read twice. A change of some rows in between
    is missed.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(
        {file for pattern in _PATTERNS for file in folder.glob(pattern) if file.is_file()}
    )
    return {file.name: f"{file.stat().st_size} bytes, sha256 {_digest(file)}" for file in files}


def same_model(before: Any, now: Any, name: str) -> bool:
    """Whether a record describes the model `now`; earlier versions recorded size and time of each
    file.
    """
    if (
        isinstance(before, dict)
        and isinstance(now, dict)
        and all(isinstance(value, list) for value in before.values())
    ):
        return all(
            file in before and before[file][0] == (Path(name) / file).stat().st_size for file in now
        )
    return before == now


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for start, end in (
            _tensors(file) if file.suffix == ".safetensors" else [(0, file.stat().st_size)]
        ):
            if file.suffix != ".safetensors" or end - start <= 3 * SAMPLE:
                stream.seek(start)
                left = end - start
                while left and (block := stream.read(min(left, 1 << 20))):
                    digest.update(block)
                    left -= len(block)
                continue
            for at in (start, (start + end - SAMPLE) // 2, end - SAMPLE):
                stream.seek(at)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:32]


def _tensors(file: Path) -> list[tuple[int, int]]:
    """The byte ranges of header and tensors of a safetensors file; one range if it is not valid."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            data = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(data - 8)) if data <= size else {}
            spans = [
                entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"
            ]
        return (
            [(0, data), *sorted((data + a, data + b) for a, b in spans)] if spans else [(0, size)]
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return [(0, size)]  # loading it will say what is wrong
