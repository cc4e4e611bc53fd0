"""Questions of a data set, the answers that a model generates, and their ROUGE-L."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig

from fdd_kernels.common.errors import UserError
from fdd_kernels.data import IGNORED, Chat, Record, tokenize


class Question(NamedTuple):
    """A prompt in tokens, and the text that should follow it."""

    source: str
    prompt: list[int]
    reference: str


class Sampling(NamedTuple):
    """How answers are generated.

    Attributes:
        seeds: one pass over all questions each; none: the most probable token each time.
    """

    max_new_tokens: int = 256
    seeds: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0


def question_of(record: Record, tokenizer) -> Question | None:
    """Return the prompt before a document's last answer, and the answer; None for a text without
    any.

    The last run of learned tokens is the answer: a completion, or the last assistant turn of a
    chat, whose reference is its own text without the template's.

    Raises:
        UserError: see `tokenize`.
    """
    if isinstance(record.value, str):
        return None
    ids, labels = tokenize(record, tokenizer)
    end = next((i for i in reversed(range(len(labels))) if labels[i] != IGNORED), -1) + 1
    start = next((i for i in reversed(range(end)) if labels[i] == IGNORED), -1) + 1
    if not 0 < start < end:
        return None
    reference = tokenizer.decode(ids[start:end], skip_special_tokens=True)
    if isinstance(record.value, tuple):
        reference = record.value[1]
    elif isinstance(record.value, Chat):
        turns = [m["content"] for m in record.value.messages if m["role"] == "assistant"]
        reference = turns[-1] if isinstance(turns[-1], str) else reference
    return Question(record.source, ids[:start], reference.strip())


def questions_of(records: Iterable[Record], tokenizer, name: str, limit: int) -> list[Question]:
    """Return the first `limit` questions whose answers have words.

    Raises:
        UserError: there is none; `name` is the data's.
    """
    from rouge_score.tokenizers import DefaultTokenizer

    split, found, count, wordless = DefaultTokenizer(use_stemmer=False), [], 0, 0
    for record in records:
        count += 1
        question = question_of(record, tokenizer)
        if question is not None and not split.tokenize(question.reference):
            wordless += 1
        elif question is not None:
            found.append(question)
        if len(found) == limit:
            break
    if found:
        return found
    if wordless:
        raise UserError(
            f"{name}: the references of {wordless} answers have no word that ROUGE knows, which "
            "are of the letters a to z and digits: evaluate without generate"
        )
    raise UserError(
        f"{name}: ROUGE-L needs answers, and none of {count} documents has a prompt with one: give "
        '"prompt" and "completion", or chats with an assistant turn, or evaluate without generate'
    )


def that_fit(questions: Sequence[Question], model: nn.Module, length: int) -> list[Question]:
    """Return the questions whose prompt and `length` new tokens have positions in the model."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return list(questions)
    return [question for question in questions if len(question.prompt) + length <= positions]


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer,
    questions: Sequence[Question],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda amount: None,
) -> list[list[str]]:
    """Generate an answer to each question, for each seed or once; lists by pass.

    Prompts of a batch are padded on the left. A sampled answer depends on the seed and on the
    batch size. Nothing of the model's own generation defaults applies but its end tokens.
    """
    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id
    options = {"max_new_tokens": sampling.max_new_tokens, "do_sample": bool(sampling.seeds)}
    if sampling.seeds:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        eos_token_id=ends or None, pad_token_id=ends[0] if pad is None and ends else pad, **options
    )
    own, model.generation_config = model.generation_config, config
    device, passes = model.get_input_embeddings().weight.device, []
    try:
        for seed in sampling.seeds or (0,):
            torch.manual_seed(seed)
            answers: list[str] = []
            for start in range(0, len(questions), batch_size):
                part = [question.prompt for question in questions[start : start + batch_size]]
                ids, mask = (t.to(device) for t in _padded_left(part, config.pad_token_id or 0))
                found = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :]
                texts = tokenizer.batch_decode(found, skip_special_tokens=True)
                answers += [text.strip() for text in texts]
                advance(len(part))
            passes.append(answers)
    finally:
        model.generation_config = own
    return passes


def _end_tokens(model: nn.Module, tokenizer) -> list[int]:
    own = model.generation_config.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    last = tokenizer.eos_token_id
    return own if last is None or last in own else [*own, last]


def _padded_left(prompts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the F-measure of ROUGE-L of each answer, from 0 to 100 (Lin, "ROUGE: A Package for
    Automatic Evaluation of Summaries", 2004), with words as they stand: no stemming.

    Raises:
        ModuleNotFoundError: rouge-score is not installed: it is in the extra "evaluate".
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [
        100 * scorer.score(reference, answer)["rougeL"].fmeasure
        for reference, answer in zip(references, answers, strict=True)
    ]
