"""Whether two runs use the same models: by what is in their folders, not by where they lie or when
they were touched.
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
    """The name of a model on the hub, or size and digest of each file of a folder that makes the
    model or its tokenizer.

    Of a safetensors file the digest is of its header, and of the beginning, middle and end of every
    tensor: training that reaches every row differs there, and a large model is not read twice. Rows
    trained in between alone are not seen.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(
        {file for pattern in _PATTERNS for file in folder.glob(pattern) if file.is_file()}
    )
    return {file.name: f"{file.stat().st_size} bytes, sha256 {_digest(file)}" for file in files}


def same_model(before: Any, now: Any, name: str) -> bool:
    """Whether a record is of the model `now`, also a record of earlier versions: size and time of
    each file.
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
    """Where the header and each tensor of a safetensors file begin and end; the whole file if it is
    none.
    """
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
