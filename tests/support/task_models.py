"""Tiny models without a vocabulary's head, by family and task, and their batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.hf_models import VOCAB

TASKS = {
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "embedding": AutoModel,
}
_BERT = {"num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 40}
# Fields of the config, and the module that the base model applies to its last block's state.
FAMILIES: dict[str, tuple[str, dict, str | None]] = {
    "bert": ("bert", _BERT, None),
    "roberta": ("roberta", _BERT, None),
    "distilbert": (
        "distilbert",
        {"n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 40},
        None,
    ),
    "modernbert": ("modernbert", _BERT, "final_norm"),
    "deberta_v2": (
        "deberta-v2",
        {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        None,
    ),
    "albert": ("albert", {**_BERT, "embedding_size": 16}, None),
    "electra": ("electra", {**_BERT, "embedding_size": 16}, None),
    "gpt2": ("gpt2", {"n_head": 4, "n_positions": 40}, "ln_f"),
    "llama": (
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40},
        "norm",
    ),
}


def task_model(
    family: str,
    task: str,
    *,
    depth: int = 3,
    width: int = 32,
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
    **changes,
) -> nn.Module:
    """Make a randomly initialised model without dropout, every parameter with noise of 0.1."""
    name, fields, _ = FAMILIES[family]
    config = CONFIG_MAPPING[name](
        **{
            "hidden_size": width,
            "num_hidden_layers": depth,
            "vocab_size": VOCAB,
            "pad_token_id": 0,
            "num_labels": 2 if task == "question_answering" else 3,
            **fields,
            **changes,
        }
    )
    for option in ("dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, option):
            setattr(config, option, 0.0)
    for option in [o for o in vars(config) if "dropout" in o]:
        if isinstance(getattr(config, option), float):
            setattr(config, option, 0.0)
    torch.manual_seed(seed)
    model = TASKS[task].from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def pair(family: str, task: str, **changes) -> tuple[nn.Module, nn.Module]:
    """A student and a wider, deeper teacher."""
    teacher = task_model(family, task, depth=6, width=48, seed=2, **changes)
    return task_model(family, task, **changes), teacher


def task_batch(task: str, *, seed: int = 1, side: str = "right") -> dict[str, Tensor]:
    """Three sequences of 8, 5 and 6 tokens, padded to 8; one row has no label where it can."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (3, 8), generator=generator)
    place = torch.arange(8)
    lengths = torch.tensor([8, 5, 6])[:, None]
    attention = (place < lengths) if side == "right" else (place >= 8 - lengths)
    batch = {
        "input_ids": ids.masked_fill(~attention, 0),
        "attention_mask": attention.long(),
    }
    first = attention.int().argmax(1)
    labels = {
        "sequence_classification": {"labels": torch.tensor([2, -100, 1])},
        "token_classification": {
            "labels": (ids % 3).masked_fill(~attention | (place % 3 == 1), -100)
        },
        "question_answering": {"start_positions": first + 1, "end_positions": first + 3},
        "embedding": {},
    }
    return batch | labels[task]


def hidden_states(model: nn.Module, family: str, inputs: dict, layers: tuple[int, ...]):
    """Run a model; return the states of blocks after the last norm of its base, and its result."""
    output = model(**inputs, output_hidden_states=True)
    norm, base = FAMILIES[family][2], model.base_model
    states = []
    for layer in layers:
        is_normed = layer == model.config.num_hidden_layers
        raw = output.hidden_states[layer]
        states.append(raw if norm is None or is_normed else getattr(base, norm)(raw))
    return states, output
