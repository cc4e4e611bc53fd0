"""The tokens that two models share, and the ones where their tokenizers differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fdd_kernels.common.errors import UserError

_SHOWN = 3


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer and the shared vocabulary of a student and a teacher.

    Attributes:
        tokenizer: the student's if it has one, else the teacher's.
        size: tokens 0 to size - 1 are compared.
        partial: whether one of the models has tokens beyond those.
        unshared: ids that one model lacks, or that mean another token to the other model; windows
            with one of them are left out.
        notes: lines to show to the user.
    """

    tokenizer: Any
    size: int
    partial: bool = False
    unshared: frozenset[int] = frozenset()
    notes: list[str] = field(default_factory=list)


def shared_vocabulary(
    student,
    teacher,
    vocab_size: int | None = None,
    roles: tuple[str, str] = ("student", "teacher"),
) -> Vocabulary:
    """Find the vocabulary that two tokenizers share; one of them may have more tokens.

    If one is longer, the tokens of the shorter one are compared. Added tokens (reserved and control
    tokens: Llama 3 and 3.1 name some of the same ids differently) may differ. They are compared by
    id, and windows that hold one are left out. A student's tokenizer without a chat template gets
    the teacher's.

    Args:
        vocab_size: compare so many tokens only; then only these must agree.
        roles: what the two are called in messages.

    Raises:
        UserError: other tokens differ; names the first ones.
    """
    ours, theirs = _tokens(student), _tokens(teacher)
    end = min(max(ours), max(theirs)) + 1
    differing = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    # Below `end` only added tokens may differ.
    sides = [
        (ours, student.added_tokens_decoder.keys()),
        (theirs, teacher.added_tokens_decoder.keys()),
    ]
    ordinary = (
        i
        for i in differing
        if i < end and any(i in tokens and i not in added for tokens, added in sides)
    )
    first = next(ordinary, None)
    if first is not None and (vocab_size is None or vocab_size > first):
        others = [i for i in differing if i >= first]
        remedy = f", or compare only the tokens before with vocab_size={first}" if first else ""
        raise UserError(
            f"the tokenizers of {roles[1]} ({len(teacher)} tokens) and {roles[0]} ({len(student)}) "
            f"differ in {len(differing)} entries: {_named(others, ours, theirs, roles)}. "
            "Predictions can only be compared over one vocabulary: take models that share one"
            f"{remedy}"
        )
    size = end if first is None else vocab_size
    beyond = {i for i in ours.keys() | theirs.keys() if i >= size} if first is not None else set()
    notes = []
    if differing:
        notes.append(
            f"the tokenizers of {roles[1]} and {roles[0]} differ in {len(differing)} entries "
            f"({_named(differing, ours, theirs, roles)}): the first {size} tokens are compared, "
            "and windows with a token that differs are left out"
        )
    if student.chat_template is None and teacher.chat_template is not None:
        student.chat_template = teacher.chat_template
        notes.append(f"the {roles[0]}'s tokenizer has no chat template: the {roles[1]}'s is taken")
    partial = any(i >= size for i in differing)
    return Vocabulary(student, size, partial, frozenset(differing) | beyond, notes)


def _tokens(tokenizer) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _named(
    differing: Sequence[int], ours: dict[int, str], theirs: dict[int, str], roles: tuple[str, str]
) -> str:
    """The first tokens that differ, with their text in both tokenizers."""

    def side(tokens: dict[int, str], token_id: int) -> str:
        return repr(tokens[token_id]) if token_id in tokens else "nothing"

    shown = [
        f"{i} is {side(theirs, i)} to the {roles[1]} and {side(ours, i)} to the {roles[0]}"
        for i in differing[:_SHOWN]
    ]
    return "; ".join(shown) + (
        f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    )
