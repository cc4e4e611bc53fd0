"""The tokens that two models share, and where their tokenizers differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fdd_kernels.common.errors import UserError

_SHOWN = 3


@dataclass(frozen=True)
class Vocabulary:
    """What a student and a teacher read text with.

    Attributes:
        tokenizer: the student's, if it has one, else the teacher's.
        size: so many tokens from the first one on are compared.
        partial: whether one of them has tokens beyond those.
        unshared: tokens that only one of them has, or that are another to the other; text that
            holds one is left out.
        notes: what a user should know.
    """

    tokenizer: Any
    size: int
    partial: bool = False
    unshared: frozenset[int] = frozenset()
    notes: list[str] = field(default_factory=list)


def shared_vocabulary(student, teacher, vocab_size: int | None = None) -> Vocabulary:
    """The vocabulary of two tokenizers of which one may have tokens that the other has not.

    Where the longer one goes on, the shorter one's tokens are compared. Tokens that were added to a
    vocabulary (reserved and control tokens: Llama 3 and 3.1 name some of the same ids differently)
    may differ; they are compared as they are, and text that holds one is left out. A student's
    tokenizer without a chat template gets the teacher's.

    Args:
        vocab_size: compare so many tokens only; then only these must agree.

    Raises:
        UserError: other tokens differ; names the first ones.
    """
    ours, theirs = _tokens(student), _tokens(teacher)
    end = min(max(ours), max(theirs)) + 1
    differing = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    # Below `end` only tokens that were added may differ.
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
            f"the tokenizers of teacher ({len(teacher)} tokens) and student ({len(student)}) "
            f"differ in {len(differing)} "
            f"entries: {_named(others, ours, theirs)}. Predictions can only be compared over one "
            "vocabulary: take models that "
            f"share one{remedy}"
        )
    size = end if first is None else vocab_size
    beyond = {i for i in ours.keys() | theirs.keys() if i >= size} if first is not None else set()
    notes = []
    if differing:
        notes.append(
            f"the tokenizers of teacher and student differ in {len(differing)} entries "
            f"({_named(differing, ours, theirs)}): "
            f"the first {size} tokens are compared, and text that holds one that differs is left "
            "out"
        )
    if student.chat_template is None and teacher.chat_template is not None:
        student.chat_template = teacher.chat_template
        notes.append("the student's tokenizer has no chat template: the teacher's is taken")
    partial = any(i >= size for i in differing)
    return Vocabulary(student, size, partial, frozenset(differing) | beyond, notes)


def _tokens(tokenizer) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _named(differing: Sequence[int], ours: dict[int, str], theirs: dict[int, str]) -> str:
    """The first tokens that differ, as both sides have them."""

    def side(tokens: dict[int, str], token_id: int) -> str:
        return repr(tokens[token_id]) if token_id in tokens else "nothing"

    shown = [
        f"{i} is {side(theirs, i)} to the teacher and {side(ours, i)} to the student"
        for i in differing[:_SHOWN]
    ]
    return "; ".join(shown) + (
        f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    )
