"""Check the messages of a chat: roles, texts and tool calls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fdd_kernels.common.errors import UserError

Message = dict[str, Any]
# ShareGPT's names of the speakers: the roles of chat templates.
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


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Args:
        messages: with "role" and "content": a text, a list of text parts, or None beside
            "tool_calls". Other keys are passed to the chat template.
        first: assistant turns before this message belong to the prompt and are not learned.
        tools: the functions that may be called, passed to the template.
    """

    messages: list[Message]
    first: int = 0
    tools: list[Any] | None = None


def messages_of_share_gpt(turns: Any, source: str) -> Any:
    """Convert {"from", "value"} to messages; entries that have roles already stay unchanged.

    Raises:
        UserError: the speaker is unknown, or a function call is not JSON.
    """
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
    """Parse a value that some data sets write as JSON within JSON; others stay unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON: {error}") from None


def chat_of(messages: Any, source: str, name: str, entry: dict[str, Any], first: int = 0) -> Chat:
    """Make a chat of checked messages, with "tools" and "system" of its record.

    Args:
        source: file and line, for errors.
        name: the key that holds the messages.
        entry: the record.
        first: see `Chat`.

    Raises:
        UserError: the messages or the tools are malformed, or no assistant turn is learned.
    """
    messages = check_messages(messages, source, name)
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


def check_messages(messages: Any, source: str, name: str) -> list[Message]:
    """Check a list of messages and bring texts and tool calls to one form.

    Raises:
        UserError: names the message that is malformed.
    """
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
            'parts as its content, or "tool_calls" and content null; got the content '
            f"{type(content).__name__}"
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
        f"{where}: part {number} of its content is {kind!r}, but only text can be learned"
    )


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Bring a call to the form of chat templates: {"type": "function", "function": {"name",
    "arguments"}}.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(
            f'{where}: "tool_calls" must be a list of {{"function": {{"name", "arguments"}}}}'
        )
    return {"type": "function", **(call if function is not call else {"function": function})}
