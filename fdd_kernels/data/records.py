"""Read documents from files: texts, prompts with completions, chats, or token ids."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdd_kernels.common.errors import UserError
from fdd_kernels.data.messages import Chat, Message, chat_of, check_messages, messages_of_share_gpt

TOKEN_WEIGHTS = "token_weights"
_SHAPES = (
    '"text", "prompt" and "completion", "messages", "conversations", "instruction" and "output", '
    'or "input_ids"'
)


@dataclass(frozen=True)
class Tokens:
    """A document that is tokenized already, with its labels."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Record:
    """One document: `value` is a text, a (prompt, completion) pair, a chat, or tokens. `source` is
    its file and line. `weights` are its tokens' `token_weights`: one number for all, or a list.
    """

    source: str
    value: str | tuple[str, str] | Chat | Tokens
    weights: float | list[float] | None = None


def read_records(path: Path) -> Iterator[Record]:
    """Yield the documents of one file.

    A .txt file is one document. A .jsonl file has one on each line that is not empty. A .json file
    is a list of them, or has one on each line. .csv and .parquet files have one in each row. A
    document is an object with one of these, tried in this order:

    - "messages": a chat, a list of {"role", "content"}, perhaps with "tool_calls"; "tools" beside
      it names the functions;
    - "prompt" and "completion": two texts, or two parts of a chat, of which the second is learned;
    - "text";
    - "conversations": a chat of {"from", "value"} (ShareGPT), perhaps with "system" and "tools"
      beside it;
    - "instruction" and "output", perhaps with "input" and "system" (Alpaca): a chat of one question
      and its answer;
    - "input_ids", perhaps with "labels": a document tokenized by the models' tokenizer.

    Beside them may be "token_weights": a number, the weight of all tokens, or beside "input_ids" a
    list of one for each.

    Raises:
        UserError: names the file and the line or row that is not UTF-8, not valid, or none of
            these.
    """
    yield from _READERS[path.suffix](path)


def record_of(entry: Any, source: str) -> Record:
    """Make a document from an object of strings, lists and objects.

    Raises:
        UserError: it has none of the forms that `read_records` lists.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(entry).__name__}")
    value = _value(entry, source)
    return Record(source, value, _weights(entry.get(TOKEN_WEIGHTS), value, source))


def record_of_row(row: dict[str, Any], source: str) -> Record:
    """Make a document from a row of a table, in which None marks a missing key."""
    return record_of(_without_nones(row), source)


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not UTF-8 text: {error.reason} at byte {error.start + 1} of "
                    "the line"
                ) from None


def _read_text(path: Path) -> Iterator[Record]:
    text = "".join(line for _, line in _decoded_lines(path))
    if text.strip():
        yield Record(str(path), text)


def _read_lines(path: Path) -> Iterator[Record]:
    for number, line in _decoded_lines(path):
        if line.strip():
            source = f"{path}:{number}"
            try:
                entry = json.loads(line.rstrip())
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{source}: not valid JSON: {error}") from None
            yield record_of(entry, source)


def _read_json(path: Path) -> Iterator[Record]:
    text = "".join(line for _, line in _decoded_lines(path))
    try:
        entries = json.loads(text) if text.strip() else []
    except RecursionError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):  # an object on each line
            yield from _read_lines(path)
            return
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if isinstance(entries, dict):
        entries = [entries]
    if not isinstance(entries, list):
        raise UserError(
            f"{path}: expected a list of objects, or one on each line, got {type(entries).__name__}"
        )
    for number, entry in enumerate(entries, start=1):
        yield record_of(entry, f"{path}, record {number}")


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # texts may be longer than the default of 128 KiB
    reader = csv.DictReader((line for _, line in _decoded_lines(path)), strict=True)
    try:
        for row in reader:
            source = f"{path}:{reader.line_num}"
            if None in row:
                raise UserError(
                    f"{source}: more fields than the first line has names: quote fields that hold "
                    "a comma"
                )
            yield record_of_row(row, source)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.reader.line_num}: not valid CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f'{path}: Parquet needs pyarrow: pip install "fdd_kernels[hf]"') from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield record_of_row(row, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None


_READERS = {
    ".txt": _read_text,
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _without_nones(value: Any) -> Any:
    """Remove the None entries that a table adds for keys of other rows; the content None of a
    message with tool calls stays.
    """
    if isinstance(value, list):
        return [_without_nones(item) for item in value]
    if isinstance(value, dict):
        return {
            key: _without_nones(item)
            for key, item in value.items()
            if item is not None or (key == "content" and value.get("tool_calls"))
        }
    return value


def _value(entry: dict[str, Any], source: str) -> str | tuple[str, str] | Chat | Tokens:
    def text(name: str) -> str:
        if not isinstance(entry[name], str):
            raise UserError(
                f'{source}: "{name}" must be a string, got {type(entry[name]).__name__}'
            )
        return entry[name]

    if "messages" in entry:
        return chat_of(entry["messages"], source, "messages", entry)
    if "prompt" in entry and "completion" in entry:
        prompt, completion = entry["prompt"], entry["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            check_messages(completion, source, "completion")
            return chat_of([*prompt, *completion], source, "prompt", entry, first=len(prompt))
        return text("prompt"), text("completion")
    if "text" in entry:
        return text("text")
    if "conversations" in entry:
        return chat_of(
            messages_of_share_gpt(entry["conversations"], source), source, "conversations", entry
        )
    if "instruction" in entry and "output" in entry:
        question = [text("instruction"), text("input") if entry.get("input") else ""]
        messages: list[Message] = [
            {"role": "user", "content": "\n\n".join(filter(None, question))},
            {"role": "assistant", "content": text("output")},
        ]
        return chat_of(messages, source, "instruction", entry)
    if "input_ids" in entry:
        return _tokens(entry["input_ids"], entry.get("labels", entry["input_ids"]), source)
    raise UserError(f"{source}: expected {_SHAPES}; got {sorted(map(str, entry)) or 'no key'}")


def _tokens(ids: Any, labels: Any, source: str) -> Tokens:
    for name, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, list) or not all(
            type(value) is int and -(2**31) <= value < 2**31 for value in values
        ):
            raise UserError(f'{source}: "{name}" must be a list of integers of 32 bits')
    if len(ids) != len(labels):
        raise UserError(
            f'{source}: {len(ids)} "input_ids", but {len(labels)} "labels": give each token one, '
            "not shifted"
        )
    return Tokens(ids, labels)


def _weights(given: Any, value: Any, source: str) -> float | list[float] | None:
    if given is None:
        return None
    if isinstance(given, list) and not isinstance(value, Tokens):
        raise UserError(
            f'{source}: "{TOKEN_WEIGHTS}" is a list, but only "input_ids" have known tokens: give '
            "one number for the whole document"
        )
    if isinstance(given, list) and len(given) != len(value.ids):
        raise UserError(
            f'{source}: {len(value.ids)} "input_ids", but {len(given)} "{TOKEN_WEIGHTS}": give '
            "each token one, not shifted, or one number for all"
        )
    numbers = [_number(weight) for weight in (given if isinstance(given, list) else [given])]
    if None in numbers:
        raise UserError(
            f'{source}: "{TOKEN_WEIGHTS}" must be finite numbers of at least 0, got {given!r}'
        )
    return numbers if isinstance(given, list) else numbers[0]


def _number(weight: Any) -> float | None:
    """Return a weight, which tables of text have as text; None if it is none."""
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number < math.inf else None
