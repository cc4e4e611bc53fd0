"""Tiny randomly initialised Hugging Face models, one factory per family, and batches for them;
nothing is downloaded.
"""

from __future__ import annotations

import os

import huggingface_hub.constants
import tokenizers
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# Never ask the hub, here or in processes that tests start; set before the first import of its
# library.
os.environ["HF_HUB_OFFLINE"] = "1"
huggingface_hub.constants.HF_HUB_OFFLINE = True

VOCAB = 97


_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "is_decoder": True,
}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

# model_type and config fields by family; `depth` is filled in under the family's own name for it.
FAMILIES: dict[str, tuple[str, dict]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_positions": 64}),
    "llama": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "llama_tied": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 8}),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 8}),
    # A cap small enough to bend the logits of a randomly initialised model.
    "gemma2": (
        "gemma2",
        {**_LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    ),
    "gemma3": ("gemma3_text", {**_LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 0.7}),
    "phi3": ("phi3", {**_LLAMA_LIKE, "original_max_position_embeddings": 64}),
    "phi_head_bias": ("phi", {**_LLAMA_LIKE, "num_key_value_heads": 4}),
    "opt_projections": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
        },
    ),
    "opt_post_norm": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
            "do_layer_norm_before": False,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    ),
    "gptj": ("gptj", {"n_embd": 32, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "bloom": ("bloom", {"hidden_size": 32, "n_head": 4}),
    "falcon": ("falcon", {"hidden_size": 32, "num_attention_heads": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "max_seq_len": 64}),
    "cohere": ("cohere", {**_LLAMA_LIKE, "logit_scale": 0.0625}),
    "granite": ("granite", {**_LLAMA_LIKE, "logits_scaling": 6.0, "residual_multiplier": 0.5}),
    "mixtral": ("mixtral", {**_LLAMA_LIKE, "num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "mamba": ("mamba", {"hidden_size": 32, "state_size": 4, "expand": 2, "time_step_rank": 4}),
    "stablelm": ("stablelm", {**_LLAMA_LIKE}),
    "olmo2": ("olmo2", {**_LLAMA_LIKE}),
    "nemotron": ("nemotron", {**_LLAMA_LIKE}),
    # More than a final norm precedes the head.
    "bert": ("bert", {**_BERT_LIKE}),
    "roberta": ("roberta", {**_BERT_LIKE}),
    "electra": ("electra", {**_BERT_LIKE, "embedding_size": 16}),
    "rembert": ("rembert", {**_BERT_LIKE, "input_embedding_size": 16, "output_embedding_size": 24}),
    "modernbert_decoder": (
        "modernbert-decoder",
        {**_BERT_LIKE, "sliding_window": 8, "local_attention": 8},
    ),
    "minicpm3": (
        "minicpm3",
        {
            **_LLAMA_LIKE,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "dim_model_base": 8,
        },
    ),
    "openai_gpt": ("openai-gpt", {"n_embd": 32, "n_head": 4, "n_positions": 64}),
    "xlnet": ("xlnet", {"d_model": 32, "n_head": 4, "d_inner": 48}),
    "llama4": (
        "llama4_text",
        {**_LLAMA_LIKE, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 97,
            "final_logit_softcapping": 0.7,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**_LLAMA_LIKE, "lru_width": 32, "logits_soft_cap": 0.5, "head_dim": 8},
    ),
}


def tiny_config(family: str, *, depth: int = 6, vocab_size: int = VOCAB, **changes):
    """The config of a tiny model of one family."""
    model_type, fields = FAMILIES[family]
    return AutoConfig.for_model(
        model_type,
        **{"num_hidden_layers": depth, "vocab_size": vocab_size, **_TOKENS, **fields, **changes},
    )


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    **changes,
):
    """Make a randomly initialised causal LM in evaluation mode, without dropout.

    Every parameter gets noise of standard deviation 0.1 * spread: norms and biases leave their
    initial 1 and 0.
    """
    config = tiny_config(family, **changes)
    for name in (
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "dropout",
        "attention_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    ):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * spread)
    return model.to(dtype).eval()


def tiny_batch(
    *, rows: int = 2, length: int = 9, vocab_size: int = VOCAB, seed: int = 1, labels: bool = True
) -> dict:
    """input_ids, attention_mask with some padding on the right, and labels with a masked prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab_size, (rows, length), generator=generator)
    attention = torch.ones_like(ids)
    attention[-1, length - 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": attention}
    if labels:
        batch["labels"] = ids.masked_fill(attention == 0, -100)
        batch["labels"][0, :3] = -100
    return batch


def pad_left(batch: dict) -> dict:
    """Move padding to the left, positions unchanged; as Trainers' collators do, the first token
    has a label.
    """
    right = batch["attention_mask"].bool()
    left = right.flip(1)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    moved = {key: torch.full_like(batch[key], value) for key, value in fill.items() if key in batch}
    for key, values in moved.items():
        values[left] = batch[key][right]
    rest = {key: value for key, value in batch.items() if key not in fill}
    return {**moved, **rest, "position_ids": (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)}


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last and THOUGHTS "
    "%}(thinking){% endif %}"
    "{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(*, thoughts: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of single bytes, words of letters as far as it has seen them, and an
    end token.
    """
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["one two three four word words the and a is " * 3], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = CHAT_TEMPLATE.replace("THOUGHTS", "true" if thoughts else "false")
    return fast
