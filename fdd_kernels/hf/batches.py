"""Refuse batches that no model can run, before any work: wrong shapes, unknown tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fdd_kernels.hf.positions import SHIFT_LABELS, TOKEN_WEIGHTS
from fdd_kernels.objectives.validation import check_row_weights


def check_batch(batch: Mapping[str, Any], prefix: str = "") -> None:
    """Check that a batch has the tensors and shapes that a model takes.

    Args:
        prefix: of the names of the tokens that labels and weights belong to and of their mask:
            "decoder_" for an encoder-decoder.

    Raises:
        TypeError: not a mapping, or its tokens, labels or token weights are not tensors.
        ValueError: no tokens, tokens that are not (batch, sequence), labels, token weights or a 2-D
            mask of another shape, or weights out of range.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            "batch must be a mapping with input_ids, attention_mask and labels, got "
            f"{type(batch).__name__}"
        )
    tokens = next((name for name in _token_names(prefix) if batch.get(name) is not None), None)
    if tokens is None:
        raise ValueError(
            f"the batch has neither {' nor '.join(_token_names(prefix))}; it has "
            f"{', '.join(map(str, batch)) or 'nothing'}"
        )
    for name in (tokens, "labels", SHIFT_LABELS, TOKEN_WEIGHTS):
        if batch.get(name) is not None and not isinstance(batch[name], Tensor):
            raise TypeError(
                f"{name} is a {type(batch[name]).__name__}, but a tensor (batch, sequence) is "
                "needed: collate windows with fdd_kernels.data.pad_windows, or tokenize with "
                'return_tensors="pt"'
            )
    wanted = 2 if tokens.endswith("input_ids") else 3
    if batch[tokens].ndim != wanted:
        shape = "(batch, sequence)" if wanted == 2 else "(batch, sequence, width)"
        raise ValueError(f"{tokens} has shape {tuple(batch[tokens].shape)}, but {shape} is needed")
    rows, masking = batch[tokens].shape[:2], f"{prefix}attention_mask"
    mask, ignored = batch.get(masking), "and -100 where there is nothing to learn"
    for name, remedy in (
        ("labels", f"a label of its own, not shifted, {ignored}"),
        (SHIFT_LABELS, f"the label of its prediction, {ignored}"),
        (TOKEN_WEIGHTS, "the factor of its own position's terms, not shifted"),
    ):
        if batch.get(name) is not None and batch[name].shape != rows:
            raise ValueError(
                f"{name} has shape {tuple(batch[name].shape)}, but {tokens} is of {tuple(rows)} "
                f"(batch, sequence): give every token {remedy}"
            )
    if batch.get(TOKEN_WEIGHTS) is not None:
        check_row_weights(batch[TOKEN_WEIGHTS], rows, batch[TOKEN_WEIGHTS].device)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape != rows:
        raise ValueError(
            f"{masking} has shape {tuple(mask.shape)}, but {tokens} is of {tuple(rows)} "
            "(batch, sequence): give every token a 1, and padding a 0"
        )


def _token_names(prefix: str) -> tuple[str, str]:
    return f"{prefix}input_ids", f"{prefix}inputs_embeds"


def check_tokens(name: str, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse tokens that a model has no embedding for, without a host sync on devices other than
    the CPU.

    Args:
        inputs: the arguments of its forward.

    A model of more than text may take other ids, which stand for images or sound. It checks them
    itself.

    Raises:
        ValueError: on a CPU; on other devices an assertion fails at run time.
    """
    find = getattr(model, "get_input_embeddings", None)
    rows = getattr(find() if find is not None else None, "num_embeddings", None)
    is_text_only = model.config.get_text_config() is model.config
    for which in ("input_ids", "decoder_input_ids"):
        ids = inputs.get(which)
        if not isinstance(ids, Tensor) or rows is None or not is_text_only:
            continue
        legal = (ids >= 0) & (ids < rows)
        if ids.device.type != "cpu":
            torch._assert_async(
                legal.all(), f"{which} outside [0, {rows}), for which the {name} has no embedding"
            )
        elif not legal.all():
            raise ValueError(
                f"{which} contains {int(ids[~legal][0])}, but the {name} has embeddings for the "
                f"tokens [0, {rows}) only: tokenize for a vocabulary that student and teacher "
                "share, and pad with a token that both have"
            )


def check_positions(name: str, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError if the arguments of a model's forward are longer than its positions. Call it
    after an IndexError: some models have no limit.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    names = (*_token_names(""), *_token_names("decoder_"))
    length = max(inputs[name].shape[1] for name in names if inputs.get(name) is not None)
    if isinstance(positions, int) and length > positions:
        raise ValueError(
            f"the batch has {length} tokens a row, but the {name} has only {positions} positions "
            f"(config.max_position_embeddings): cut windows at {positions} tokens"
        )
