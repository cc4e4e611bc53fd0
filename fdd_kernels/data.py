"""Text to distil on: plain text, prompts with completions, and chats, from files to token windows with labels."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fdd_kernels.user_error import UserError

SUFFIXES = (".txt", ".jsonl")
IGNORED = -100
Window = dict[str, list[int]]
# (text, whether its tokens are learned)
Piece = tuple[str, bool]


@dataclass(frozen=True)
class Record:
    """One document as it was read: `value` is a text, a (prompt, completion) pair, or a list of chat messages."""

    source: str
    value: str | tuple[str, str] | list[dict[str, Any]]


@dataclass
class Windows:
    """Token windows (input_ids, attention_mask, labels; at most max_length each) and what did not get in.

    `train_tokens` counts the tokens in the training windows, prompts included.
    """

    train: Sequence[Window] = field(default_factory=list)
    held_out: Sequence[Window] = field(default_factory=list)
    documents: int = 0
    without_labels: list[str] = field(default_factory=list)
    train_tokens: int = 0


def data_files(path: Path) -> list[Path]:
    """The .txt and .jsonl files that `path` is or holds, in a fixed order.

    Raises:
        UserError: nothing there, or a file of another kind.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{path}: no {' or '.join(SUFFIXES)} file in this directory")
        return files
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a {' or '.join(SUFFIXES)} file, or a directory of them")
    return [path]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:
    digest = hashlib.sha256()  # Python 3.10
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_records(path: Path) -> Iterator[Record]:
    """The documents of one file: all of a .txt file, or each line of a .jsonl file that is not empty.

    A line is an object with "text", with "prompt" and "completion", or with "messages", a list of {"role", "content"}.

    Raises:
        UserError: naming the file and the line that is not UTF-8, not JSON, or none of these.
    """
    lines: list[str] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            source = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{source}: not UTF-8 text: {error.reason} at byte {error.start + 1} of the line") from None
            if path.suffix == ".txt":
                lines.append(line)
            elif line.strip():
                yield Record(source, _value(line, source))
    text = "".join(lines)
    if text.strip():
        yield Record(str(path), text)


def _value(line: str, source: str) -> str | tuple[str, str] | list[dict[str, Any]]:
    try:
        entry = json.loads(line.rstrip())
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(entry, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(entry).__name__}")

    def text(name: str) -> str:
        if not isinstance(entry[name], str):
            raise UserError(f'{source}: "{name}" must be a string, got {type(entry[name]).__name__}')
        return entry[name]

    if "messages" in entry:
        return _messages(entry["messages"], source)
    if "prompt" in entry and "completion" in entry:
        return text("prompt"), text("completion")
    if "text" in entry:
        return text("text")
    raise UserError(f'{source}: expected "text", "prompt" and "completion", or "messages"; got {sorted(entry) or "no key"}')


def _messages(messages, source: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{source}: "messages" must be a list of messages')
    for index, message in enumerate(messages):
        named = isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        if not named:
            raise UserError(f'{source}: message {index + 1} must be an object with the strings "role" and "content"')
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{source}: no message has the role assistant, so there is nothing to learn")
    return messages


def chat_pieces(messages: list[dict[str, Any]], tokenizer, source: str) -> list[Piece]:
    """A chat as the tokenizer's template writes it, cut where assistant turns begin and end; only those are learned.

    A turn that the template writes differently once others follow (Qwen3 drops earlier reasoning) is not learned; the
    last one always is.

    Raises:
        UserError: the template refuses the chat, or writes the last turn's prompt differently with and without it.
    """

    def render(count: int, **options) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)
        except Exception as error:  # Jinja's errors, and whatever the template raises
            raise UserError(f"{source}: the tokenizer's chat template refuses this chat: {error}") from None

    whole = render(len(messages))
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    pieces: list[Piece] = []
    at = 0
    for index, message in enumerate(messages[: last + 1]):
        if message["role"] != "assistant":
            continue
        prompt = render(index, add_generation_prompt=True) if index else ""
        until_now = render(index + 1)
        if index == len(messages) - 1:
            until_now = whole
        if whole.startswith(prompt) and whole.startswith(until_now) and at <= len(prompt) <= len(until_now):
            pieces += [(whole[at : len(prompt)], False), (whole[len(prompt) : len(until_now)], True)]
            at = len(until_now)
        elif index == last:
            raise UserError(
                f"{source}: the tokenizer's chat template does not begin the chat with the prompt of its last assistant turn, "
                'so it is not known which tokens to learn; write the line as "prompt" and "completion"'
            )
    return [*pieces, (whole[at:], False)]


def tokenize(record: Record, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids and labels of one document; labels are -100 where there is nothing to learn.

    Raises:
        UserError: a chat that the tokenizer's template cannot write.
    """
    ids: list[int] = []
    labels: list[int] = []

    def add(tokens: list[int], learned: bool) -> None:
        ids.extend(tokens)
        labels.extend(tokens if learned else [IGNORED] * len(tokens))

    def encode(text: str, special: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    end = tokenizer.eos_token_id
    if isinstance(record.value, list):
        for text, learned in chat_pieces(record.value, tokenizer, record.source):
            add(encode(text, False), learned)
        return ids, labels
    prompt, text = record.value if isinstance(record.value, tuple) else (None, record.value)
    if prompt is None:
        add(encode(text, True), True)
    else:
        before = encode(prompt, True)
        add(before[:-1] if before and before[-1] == end else before, False)
        add(encode(text, False), True)
    if end is not None and (not ids or ids[-1] != end):
        add([end], True)
    return ids, labels


def _windows(ids: list[int], labels: list[int], max_length: int, split: bool) -> list[Window]:
    """Windows with something to learn; a document that may not be split is cut off at max_length."""
    starts = range(0, len(ids), max_length) if split else (0,)
    windows = []
    for start in starts:
        part = slice(start, start + max_length)
        if any(label != IGNORED for label in labels[part][1:]):
            windows.append({"input_ids": ids[part], "attention_mask": [1] * len(ids[part]), "labels": labels[part]})
    return windows


def load_windows(path: Path, tokenizer, *, max_length: int, eval_fraction: float, seed: int,
                 advance: Callable[[int], None] = lambda size: None) -> Windows:  # fmt: skip
    """Read, tokenize, cut into windows and hold a part out.

    Plain texts are cut into windows of `max_length` tokens; prompts with completions and chats are cut off there. Held
    out are whole documents, chosen by `seed`, until `eval_fraction` of the windows is reached, and of a single document
    its last windows.

    Args:
        advance: called with the size in bytes of each file that was read.

    Raises:
        UserError: see `data_files`, `read_records`, `tokenize`; or nothing to learn in all of it.
    """
    result = Windows()
    documents: list[list[Window]] = []
    for file in data_files(path):
        for record in read_records(file):
            windows = _windows(*tokenize(record, tokenizer), max_length, isinstance(record.value, str))
            result.documents += 1
            if windows:
                documents.append(windows)
            else:
                result.without_labels.append(record.source)
        advance(file.stat().st_size)
    if not documents:
        example = f" (for example {result.without_labels[0]})" if result.without_labels else ""
        raise UserError(
            f"{path}: nothing to learn: {result.documents} documents, none with a token to predict within "
            f"max_length={max_length}{example}"
        )
    total = sum(map(len, documents))
    wanted = max(1, round(eval_fraction * total)) if eval_fraction and total > 1 else 0
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    for index in order:
        if len(result.held_out) + len(documents[index]) <= wanted:
            result.held_out += documents[index]
            held.add(index)
    result.train = [window for index, windows in enumerate(documents) if index not in held for window in windows]
    if wanted and not result.held_out:
        result.train, result.held_out = result.train[:-wanted], result.train[-wanted:]
    result.train_tokens = sum(len(window["input_ids"]) for window in result.train)
    return result


def read_windows(path: Path, tokenizer, console: Console, *, max_length: int, eval_fraction: float, seed: int) -> Windows:
    """`load_windows` with a progress bar, and lines that say what was read and what was left out."""
    size = sum(file.stat().st_size for file in data_files(path))
    with Progress(TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console,
                  transient=True) as progress:  # fmt: skip
        task = progress.add_task("", total=size)
        windows = load_windows(
            path, tokenizer, max_length=max_length, eval_fraction=eval_fraction, seed=seed,
            advance=lambda read: progress.advance(task, read),
        )  # fmt: skip
    console.print(
        f"{windows.documents} documents: {len(windows.train)} training windows of at most {max_length} tokens "
        f"({windows.train_tokens} tokens), {len(windows.held_out)} held out"
    )
    if windows.without_labels:
        console.print(
            f"{len(windows.without_labels)} documents have nothing to learn within {max_length} tokens and are left out, "
            f"for example {windows.without_labels[0]}"
        )
    return windows


def pad_windows(windows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch (rows, longest window), padded on the right; padding is neither attended nor learned. A window without
    `attention_mask` is attended throughout.

    Numbers beside the windows, such as a teacher cache's `teacher_index`, become a tensor (rows,).
    """
    windows = [{"attention_mask": [1] * len(window["input_ids"])} | dict(window) for window in windows]
    longest = max(len(window["input_ids"]) for window in windows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    batch = {
        name: torch.tensor([w[name] + [value] * (longest - len(w[name])) for w in windows]) for name, value in fill.items()
    }
    numbers = [name for name, value in windows[0].items() if isinstance(value, int)]
    return batch | {name: torch.tensor([w[name] for w in windows]) for name in numbers}
