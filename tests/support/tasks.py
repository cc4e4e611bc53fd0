"""Tiny masked LMs and encoder-decoders, their batches, and the loss from their own logits."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from tests.support.dense import terms_of_logits
from tests.support.hf_models import VOCAB

_BERT = {"num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 40}
_BART = {
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def _with_bias(model: nn.Module, state: Tensor) -> Tensor:
    return model.lm_head(state) + model.final_logits_bias


# By family: the class, its config's fields, and how a reader of its source would turn a state
# (batch, sequence, width) into logits.
MASKED_LMS = {
    "bert": ("BertForMaskedLM", _BERT, lambda m, h: m.cls(h)),
    "roberta": ("RobertaForMaskedLM", _BERT, lambda m, h: m.lm_head(h)),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 40},
        lambda m, h: m.vocab_projector(m.vocab_layer_norm(m.activation(m.vocab_transform(h)))),
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        _BERT,
        lambda m, h: m.decoder(m.head(m.model.final_norm(h))),
    ),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        lambda m, h: m.cls(h),
    ),
    "albert": ("AlbertForMaskedLM", {**_BERT, "embedding_size": 16}, lambda m, h: m.predictions(h)),
    "electra": (
        "ElectraForMaskedLM",
        {**_BERT, "embedding_size": 16},
        lambda m, h: m.generator_lm_head(m.generator_predictions(h)),
    ),
}
ENCODER_DECODERS = {
    "t5": (
        "T5ForConditionalGeneration",
        {"num_heads": 4, "d_ff": 40, "d_kv": 8, "decoder_start_token_id": 0},
        lambda m, h: m.lm_head(m.decoder.final_layer_norm(h) * m.config.d_model**-0.5),
    ),
    "bart": ("BartForConditionalGeneration", _BART, _with_bias),
    "marian": ("MarianMTModel", _BART, _with_bias),
}
FAMILIES = MASKED_LMS | ENCODER_DECODERS


def task_model(
    family: str,
    *,
    depth: int = 4,
    width: int = 32,
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
    **changes,
) -> nn.Module:
    """Make a randomly initialised model without dropout, every parameter with noise of 0.1.

    Args:
        depth: number of blocks; an encoder before a decoder has one less.
    """
    name, fields, _ = FAMILIES[family]
    kind = getattr(transformers, name)
    sizes = {"hidden_size": width, "num_hidden_layers": depth}
    if family in ENCODER_DECODERS:
        sizes = {"d_model": width, "encoder_layers": depth - 1, "decoder_layers": depth}
    if family == "t5":
        sizes = {"d_model": width, "num_layers": depth - 1, "num_decoder_layers": depth}
    config = kind.config_class(
        **{
            **sizes,
            "vocab_size": VOCAB,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            **fields,
            **changes,
        }
    )
    for option in vars(config):
        if "dropout" in option and isinstance(getattr(config, option), float):
            setattr(config, option, 0.0)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in [*model.parameters(), *_logits_bias(model)]:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def _logits_bias(model: nn.Module) -> list[Tensor]:
    bias = getattr(model, "final_logits_bias", None)
    return [] if bias is None else [bias]


def pair(family: str, **changes) -> tuple[nn.Module, nn.Module]:
    """A student and a wider, deeper teacher."""
    teacher = task_model(family, depth=6, width=48, seed=2, **changes)
    return task_model(family, **changes), teacher


def masked_batch(seed: int = 1) -> dict[str, Tensor]:
    """Two rows of 8 tokens; labels where a token was replaced by token 3."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, VOCAB, (2, 8), generator=generator)
    chosen = torch.rand(labels.shape, generator=generator) < 0.4
    chosen[:, 1] = True
    attention = torch.ones_like(labels)
    attention[1, 6:] = 0
    chosen &= attention.bool()
    ids = torch.where(chosen, 3, labels).masked_fill(attention == 0, 0)
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "labels": labels.masked_fill(~chosen, -100),
    }


def translation_batch(seed: int = 1) -> dict[str, Tensor]:
    """Two texts of 7 tokens and targets of 5, both padded; decoder tokens are left to the model."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (2, 7), generator=generator)
    labels = torch.randint(4, VOCAB, (2, 5), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, 5:] = 0
    labels[1, 3:] = -100
    return {
        "input_ids": ids.masked_fill(attention == 0, 0),
        "attention_mask": attention,
        "labels": labels,
    }


def batch_of(family: str, seed: int = 1) -> dict[str, Tensor]:
    return (masked_batch if family in MASKED_LMS else translation_batch)(seed)


def logits_of_layers(family: str, model: nn.Module, layers, batch) -> list[Tensor]:
    """A model's logits at layers and at the output, from its own forward."""
    read, labels = FAMILIES[family][2], batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if family in ENCODER_DECODERS:  # by the model's own forward
        inputs["labels"] = labels
    output = model(**inputs, output_hidden_states=True)
    which = "decoder_hidden_states" if family in ENCODER_DECODERS else "hidden_states"
    states = getattr(output, which)
    return [*(read(model, states[layer]) for layer in layers), output.logits]


def dense_terms_of(family: str, student_layers, teacher_layers):
    """Return a function (student, teacher, batch, config) -> terms, from the models' own logits and
    `output_hidden_states`.
    """

    def terms(student, teacher, batch, config):
        ours = logits_of_layers(family, student, student_layers, batch)
        with torch.no_grad():
            theirs = logits_of_layers(family, teacher, teacher_layers, batch)
        return terms_of_logits(ours, theirs, config, batch["labels"])

    return terms
