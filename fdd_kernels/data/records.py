"""Documents as files hold them, in any of the usual shapes: a text, a prompt with its completion,
or a chat.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdd_kernels.common.errors import UserError

Message = dict[str, Any]
# ShareGPT's names of who speaks, as chat templates know them.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_SHAPES = (
    '"text", "prompt" and "completion", "messages", "conversations", "instruction" and "output", '
    'or "input_ids"'
)


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Args:
        messages: with "role" and "content": a text, a list of text parts, or None beside
            "tool_calls". Whatever else they have is for the chat template.
        first: assistant turns before this message belong to the prompt and are not learned.
        tools: the functions that may be called, for the template.
    """

    messages: list[Message]
    first: int = 0
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Tokens:
    """A document that was tokenized before, with its labels."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Record:
    """One document as it was read: `value` is a text, a (prompt, completion) pair, a chat, or
    tokens. `source` says where from.
    """

    source: str
    value: str | tuple[str, str] | Chat | Tokens


def read_records(path: Path) -> Iterator[Record]:
    """The documents of one file.

    A .txt file is one. A .jsonl file has one on each line that is not empty, a .json file is a list
    of them (or also has one on each line), .csv and .parquet files have one in each row. A document
    is an object with one of, in this order:

    - "messages": a chat, a list of {"role", "content"}, perhaps with "tool_calls"; "tools" beside
      it names the functions;
    - "prompt" and "completion": two texts, or two parts of a chat, of which the second is learned;
    - "text";
    - "conversations": a chat of {"from", "value"} (ShareGPT), perhaps with "system" and "tools"
      beside it;
    - "instruction" and "output", perhaps with "input" and "system" (Alpaca): a chat of one question
      and its answer;
    - "input_ids", perhaps with "labels": a document that the models' tokenizer has read before.

    Raises:
        UserError: naming the file and the line (or row) that is not UTF-8, not valid, or none of
            these.
    """
    yield from _READERS[path.suffix](path)


def record_of(entry: Any, source: str) -> Record:
    """One document from an object of strings, lists and objects.

    Raises:
        UserError: it has none of the shapes that `read_records` lists.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(entry).__name__}")
    return Record(source, _value(entry, source))


def record_of_row(row: dict[str, Any], source: str) -> Record:
    """One document from a row of a table, where None stands for what other rows have and this one
    has not.
    """
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
    csv.field_size_limit(2**31 - 1)  # texts are longer than its 128 KiB
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
    """Tables give every object the fields of all others, as None; a message without content is the
    exception.
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
        return _chat(entry["messages"], source, "messages", entry)
    if "prompt" in entry and "completion" in entry:
        prompt, completion = entry["prompt"], entry["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            _messages(completion, source, "completion")
            return _chat([*prompt, *completion], source, "prompt", entry, first=len(prompt))
        return text("prompt"), text("completion")
    if "text" in entry:
        return text("text")
    if "conversations" in entry:
        return _chat(
            _from_share_gpt(entry["conversations"], source), source, "conversations", entry
        )
    if "instruction" in entry and "output" in entry:
        question = [text("instruction"), text("input") if entry.get("input") else ""]
        messages = [
            {"role": "user", "content": "\n\n".join(filter(None, question))},
            {"role": "assistant", "content": text("output")},
        ]
        return _chat(messages, source, "instruction", entry)
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


def _from_share_gpt(turns: Any, source: str) -> Any:
    """Messages from {"from", "value"}; what has roles already stays as it is."""
    if not isinstance(turns, list):
        return turns
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or "from" not in turn:
            messages.append(turn)
            continue
        if turn["from"] not in _ROLES:
            raise UserError(
                f'{source}: message {number} is "from" {turn["from"]!r}: expected one of '
                f"{', '.join(_ROLES)}"
            )
        message = {"role": _ROLES[turn["from"]], "content": turn.get("value")}
        if turn["from"] == "function_call":
            call = _json(turn.get("value"), f"{source}: the function call in message {number}")
            message |= {"content": None, "tool_calls": call if isinstance(call, list) else [call]}
        messages.append(message)
    return messages


def _json(value: Any, what: str) -> Any:
    """A value that some data sets write as JSON within JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON: {error}") from None


def _chat(messages: Any, source: str, name: str, entry: dict[str, Any], first: int = 0) -> Chat:
    messages = _messages(messages, source, name)
    tools = _json(entry.get("tools") or None, f'{source}: "tools"') or None
    if not isinstance(tools, list | None):
        raise UserError(
            f'{source}: "tools" must be a list of functions, got {type(tools).__name__}'
        )
    if (
        name in ("conversations", "instruction")
        and isinstance(entry.get("system"), str)
        and entry["system"]
    ):
        messages, first = [{"role": "system", "content": entry["system"]}, *messages], first + 1
    if not any(message["role"] == "assistant" for message in messages[first:]):
        raise UserError(
            f"{source}: no message has the role assistant, so there is nothing to learn"
        )
    return Chat(messages, first, tools)


def _messages(messages: Any, source: str, name: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{source}: "{name}" must be a list of messages')
    return [
        _message(message, f"{source}: message {number}")
        for number, message in enumerate(messages, start=1)
    ]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f'{where} must be an object with the strings "role" and "content"')
    message = dict(message)
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call, where) for call in message["tool_calls"]]
        message.setdefault("content", None)
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [
            _part(part, number, where) for number, part in enumerate(content, start=1)
        ]
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise UserError(
            f'{where} must be an object with the strings "role" and "content", or a list of text '
            "parts as its content, or "
            f'"tool_calls" and content null; got the content {type(content).__name__}'
        )
    return message


def _part(part: Any, number: int, where: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if (
        isinstance(part, dict)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
    ):
        return {"type": "text", "text": part["text"]}
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UserError(
        f"{where}: part {number} of its content is {kind!r}, but only text is learned from"
    )


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call as chat templates expect it: {"type": "function", "function": {"name",
    "arguments"}}.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(
            f'{where}: "tool_calls" must be a list of {{"function": {{"name", "arguments"}}}}'
        )
    return {"type": "function", **(call if function is not call else {"function": function})}
