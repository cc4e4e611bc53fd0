"""Turn databricks-dolly-15k.jsonl into prompts with completions, split by a seed."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from fdd_kernels.common.atomic import write_text
from fdd_kernels.common.errors import UserError
from fdd_kernels.common.progress import Activity
from fdd_kernels.data.files import file_digest

# Ours: the paper's template is not known.
QUESTION = "Instruction:\n{instruction}\n\nAnswer:\n"
QUESTION_WITH_CONTEXT = "Instruction:\n{instruction}\n\nContext:\n{context}\n\nAnswer:\n"
FIELDS = ("instruction", "context", "response")
RECORD = "data.json"
_BATCH = 512  # prompts tokenized at once


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The data of all stages.

    Args:
        file: databricks-dolly-15k.jsonl: on each line an object with the texts instruction,
            context and response.
        validation, test: numbers of documents in these splits; the others are for training.
        max_prompt_length: documents whose prompt has more tokens are left out.
        max_length: tokens of prompt and completion together; what is beyond is cut off.
    """

    file: str
    validation: int
    test: int
    max_prompt_length: int
    max_length: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name != "file" and (type(value) is not int or value < 1):
                raise UserError(f"{name}={value!r} must be a whole number of at least 1")
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"max_prompt_length={self.max_prompt_length} must be below "
                f"max_length={self.max_length}: a prompt must leave room for its answer"
            )


def is_prepared(folder: Path, options: DataOptions, seed: int) -> bool:
    """Whether `folder` holds the splits of these options.

    Raises:
        UserError: it holds splits of other options, or of another file.
    """
    if not (folder / RECORD).is_file():
        return False
    before, now = json.loads((folder / RECORD).read_text("utf-8")), _record(options, seed)
    different = [f"{n} was {before.get(n)!r}, is {v!r}" for n, v in now.items() if before[n] != v]
    file = Path(options.file)
    if file.is_file() and file_digest(file) != before["sha256"]:
        different.append(f"{file} has another content")
    if different:
        raise UserError(
            f"{folder} was made otherwise ({'; '.join(different)}): give another --output"
        )
    return True


def prepare(folder: Path, options: DataOptions, seed: int, tokenizer, console: Console) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl into `folder`, and data.json last.

    Raises:
        UserError: the file is missing, or no such data, or has too few documents.
    """
    file = Path(options.file)
    if not file.is_file():
        raise UserError(
            f"{file}: no such file: download databricks-dolly-15k.jsonl, and give its path as "
            "--data or as data.file"
        )
    documents = list(_documents(file))
    with Activity(console, "tokenizing prompts", len(documents)) as activity:
        kept = []
        for start in range(0, len(documents), _BATCH):
            part = documents[start : start + _BATCH]
            ids = tokenizer([document["prompt"] for document in part], verbose=False)["input_ids"]
            kept += [d for d, i in zip(part, ids) if len(i) <= options.max_prompt_length]
            activity.update(start + len(part))
    random.Random(seed).shuffle(kept)
    held_out = options.test + options.validation
    if len(kept) <= held_out:
        raise UserError(
            f"{file}: {len(kept)} documents have a prompt of at most max_prompt_length="
            f"{options.max_prompt_length} tokens, too few for test={options.test}, "
            f"validation={options.validation} and training"
        )
    splits = {
        "test": kept[: options.test],
        "validation": kept[options.test : held_out],
        "train": kept[held_out:],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        lines = (json.dumps(document, ensure_ascii=False) + "\n" for document in part)
        write_text(folder / f"{name}.jsonl", "".join(lines))
    record = _record(options, seed) | {"sha256": file_digest(file)}
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    sizes = ", ".join(f"{len(part)} {name}" for name, part in splits.items())
    left_out = len(documents) - len(kept)
    console.print(f"{folder}: {sizes}; {left_out} left out for their long prompts", soft_wrap=True)


def _record(options: DataOptions, seed: int) -> dict[str, object]:
    """Return what the splits depend on, but for the file's content."""
    names = ("validation", "test", "max_prompt_length")
    chosen = {name: getattr(options, name) for name in names}
    return chosen | {"seed": seed, "templates": [QUESTION, QUESTION_WITH_CONTEXT]}


def _documents(file: Path) -> Iterator[dict[str, str]]:
    """Yield prompt and completion of each line that is not empty.

    Raises:
        UserError: names the line that is not such a document.
    """
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                texts = {name: entry[name].strip() for name in FIELDS}
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(
                    f"{file}:{number}: expected an object with the texts {', '.join(FIELDS)}"
                ) from None
            question = QUESTION_WITH_CONTEXT if texts["context"] else QUESTION
            yield {"prompt": question.format(**texts), "completion": texts["response"]}
