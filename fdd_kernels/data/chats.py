"""Write chats with the tokenizer's own template, cut into pieces that are learned or not."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from fdd_kernels.common.errors import UserError
from fdd_kernels.data.messages import Chat, Message

# (text, whether its tokens are learned)
Piece = tuple[str, bool]
_PROBE = "probe of a part"


def chat_pieces(chat: Chat, tokenizer, source: str) -> list[Piece]:
    """Write a chat with the tokenizer's template and cut it where assistant turns begin and end;
    only these turns are learned.

    A turn that the template writes differently once others follow (Qwen3 drops earlier reasoning)
    is not learned; the last turn always is. Text parts are joined for a template that takes texts
    only. Tool calls must appear in the output of the template.

    Raises:
        UserError: the template refuses the chat, writes the prompt of the last turn differently
            with and without that turn, or leaves tool calls out.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{source}: a chat, but the tokenizer has no chat template: take one that has, or "
            'write the chat as "prompt" and "completion"'
        )
    failure = None
    for messages in _forms([_in_template_form(m, tokenizer) for m in chat.messages]):
        try:
            return _cut(messages, chat, tokenizer, source)
        except _NotWritten as error:
            failure = error
    raise failure


class _NotWritten(UserError):
    """The template cannot write a chat from these messages; other forms of them may work."""


def _in_template_form(message: Message, tokenizer) -> Message:
    """Give a message its content as a text or as parts, whichever the template can write."""
    content = message["content"]
    if content is None:
        return message
    texts, parts = (
        _writes(kind, tokenizer, str(tokenizer.chat_template)) for kind in ("text", "parts")
    )
    if isinstance(content, list) and not parts:
        return message | {"content": "".join(part["text"] for part in content)}
    if isinstance(content, str) and parts and not texts:
        return message | {"content": [{"type": "text", "text": content}]}
    return message


@functools.lru_cache(maxsize=16)
def _writes(kind: str, tokenizer, template: str) -> bool:
    """Whether a template writes the words of content given as "text" or as "parts": not nothing,
    and not the list in Python's or JSON's notation.
    """
    content = _PROBE if kind == "text" else [{"type": "text", "text": _PROBE}]
    try:
        written = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}, {"role": "assistant", "content": content}],
            tokenize=False,
        )
    except Exception:  # Jinja's errors, and whatever the template raises
        return False
    return _PROBE in written and not re.search("""['"]text['"]""", written)


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the forms of the same messages to try. Without tool calls there is one.

    Some templates expect the arguments of a call as an object, others as JSON text. The content of
    a message that calls may be None or empty: transformers 5 drops None, and earlier versions write
    it.
    """
    calling = any(message.get("tool_calls") for message in messages)
    for as_object, without in (
        itertools.product((True, False), (None, "")) if calling else ((True, None),)
    ):
        yield [
            _with_calls(m, as_object) | ({"content": without} if m["content"] is None else {})
            for m in messages
        ]


def _with_calls(message: Message, as_object: bool) -> Message:
    if not message.get("tool_calls"):
        return message
    return message | {
        "tool_calls": [_with_arguments(call, as_object) for call in message["tool_calls"]]
    }


def _with_arguments(call: dict[str, Any], as_object: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments", {})
    if as_object and isinstance(arguments, str):
        # text that is not JSON is left to the template
        with contextlib.suppress(json.JSONDecodeError):
            arguments = json.loads(arguments)
    elif not as_object and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


def _cut(messages: list[Message], chat: Chat, tokenizer, source: str) -> list[Piece]:
    def render(turns: list[Message], **options) -> str:
        try:
            return tokenizer.apply_chat_template(turns, tools=chat.tools, tokenize=False, **options)
        except Exception as error:  # Jinja's errors, and whatever the template raises
            raise _NotWritten(
                f"{source}: the tokenizer's chat template refuses this chat: {error}"
            ) from None

    def start_of_turn(index: int) -> int | None:
        """Position in `whole` where the prompt of an assistant turn ends; None if `whole` does not
        begin with that prompt.
        """
        if index == 0:
            return 0
        before = messages[:index]
        prompt = render(before, add_generation_prompt=True)
        if whole.startswith(prompt):
            return len(prompt)
        # A prompt may already begin the reasoning (DeepSeek, Nemotron), and finished turns are
        # written without it. Then the prompt ends where the two differ, but not beyond the text
        # that comes before every answer.
        answers = [
            _in_template_form({"role": "assistant", "content": text}, tokenizer)
            for text in ("A", "B")
        ]
        common = _common([whole, prompt, *(render([*before, answer]) for answer in answers)])
        asked = render(before)
        return common if whole.startswith(asked) and common > len(asked) else None

    whole = render(messages)
    for index, message in enumerate(messages):
        _require_calls(message, whole, f"{source}: message {index + 1}")
    if any(m["content"] is None for m in messages) and whole.count("None") > str(
        _texts(messages)
    ).count("None"):
        raise _NotWritten(
            f"{source}: the tokenizer's chat template writes a content of null as None"
        )
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    pieces: list[Piece] = []
    at = 0
    for index, message in enumerate(messages[: last + 1]):
        if message["role"] != "assistant" or index < chat.first:
            continue
        begin, until_now = start_of_turn(index), render(messages[: index + 1])
        if index == len(messages) - 1:
            until_now = whole
        if begin is not None and whole.startswith(until_now) and at <= begin <= len(until_now):
            pieces += [(whole[at:begin], False), (whole[begin : len(until_now)], True)]
            at = len(until_now)
            _require_calls(message, pieces[-1][0], f"{source}: message {index + 1}")
        elif index == last:
            raise UserError(
                f"{source}: the tokenizer's chat template does not begin the chat with the prompt "
                "of its last assistant turn, so it is not known which tokens to learn; write the "
                'line as "prompt" and "completion"'
            )
    return [*pieces, (whole[at:], False)]


def _common(texts: list[str]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts)))


def _texts(messages: list[Message]) -> list[Any]:
    """All values of the messages that are not None."""
    return [value for message in messages for value in message.values() if value is not None]


def _require_calls(message: Message, written: str, where: str) -> None:
    for call in message.get("tool_calls") or ():
        if call["function"]["name"] not in written:
            raise _NotWritten(
                f"{where} calls {call['function']['name']}, which the tokenizer's chat template "
                "leaves out: take a tokenizer whose template writes tool calls, or write the chat "
                'as "prompt" and "completion"'
            )
