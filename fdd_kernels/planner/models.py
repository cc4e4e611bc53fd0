"""What of a causal LM decides its memory, from its config or from three numbers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdd_kernels.user_error import UserError


@dataclass(frozen=True)
class ModelShape:
    """What of a causal LM decides its memory."""

    vocabulary: int
    width: int
    depth: int
    intermediate: int
    query_width: int
    key_width: int
    gated: bool
    tied: bool
    softcap: bool = False

    @property
    def parameters(self) -> int:
        """Weights of matrices; norms and biases are left out."""
        return self.blocks + self.embeddings

    @property
    def blocks(self) -> int:
        """Weights of the blocks."""
        attention = 2 * self.width * (self.query_width + self.key_width)
        mlp = (3 if self.gated else 2) * self.width * self.intermediate
        return self.depth * (attention + mlp)

    @property
    def embeddings(self) -> int:
        """Weights of the embedding and the head."""
        return (1 if self.tied else 2) * self.vocabulary * self.width

    def adapters(self, rank: int) -> int:
        """Weights of LoRA adapters on the query and value projections of every block, as in the paper."""
        return self.depth * rank * (2 * self.width + self.query_width + self.key_width)

    def activations(self, tokens: int, itemsize: int, *, checkpointing: bool) -> int:
        """What the blocks keep for the backward pass, an estimate: inputs of every product, norm and nonlinearity.

        Attention is taken to keep no (tokens x tokens) matrix. With checkpointing one block's, and every block's input.
        """
        block = 6 * self.width + 2 * (self.query_width + self.key_width) + (4 if self.gated else 2) * self.intermediate
        kept = block + self.depth * self.width if checkpointing else self.depth * block
        return itemsize * tokens * kept


def read_model(text: str, option: str) -> ModelShape:
    """A model from "WIDTHxDEPTHxVOCABULARY", a config.json, a directory that holds one, or a name that transformers knows.

    Raises:
        UserError: it is none of these; says what was tried.
    """
    numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if numbers:
        width, depth, vocabulary = map(int, numbers.groups())
        return ModelShape(vocabulary, width, depth, 4 * width, width, width, gated=False, tied=True)
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{option}: {path} is not JSON ({error})") from error
        return model_from_config(data, f"{option}: {path}")
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise UserError(
            f"{option} {text!r} is no file, no directory and not WIDTHxDEPTHxVOCABULARY; names need "
            'pip install "fdd_kernels[hf]"'
        ) from error
    try:
        data = AutoConfig.from_pretrained(text).to_dict()
    except Exception as error:  # transformers raises many kinds for a name that it cannot resolve
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{option} {text!r} is no file or directory, not WIDTHxDEPTHxVOCABULARY (as 768x12x50257), and no model name "
            f"that can be resolved here: {first}"
        ) from error
    return model_from_config(data, f"{option}: {text}")


def model_from_config(data: dict[str, Any], where: str) -> ModelShape:
    """The shape in a Hugging Face config's fields, under any of the names in use.

    Raises:
        UserError: a field is missing or no positive number.
    """
    data = data | (data.get("text_config") or {}) if isinstance(data, dict) else {}

    def number(*names: str, default: int | None = None) -> int:
        value = next((data[name] for name in names if data.get(name) is not None), default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UserError(f"{where}: {' or '.join(names)} is {value!r}, a positive number is needed")
        return value

    width = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head", "n_heads")
    head_width = number("head_dim", default=max(1, width // heads))
    kind = str(data.get("model_type", ""))
    return ModelShape(
        vocabulary=number("vocab_size"),
        width=width,
        depth=number("num_hidden_layers", "n_layer", "n_layers"),
        intermediate=number("intermediate_size", "n_inner", "ffn_dim", default=4 * width),
        query_width=heads * head_width,
        key_width=number("num_key_value_heads", default=heads) * head_width,
        gated=not kind.startswith(("gpt", "opt", "bloom", "phi-msft", "falcon")),
        tied=bool(data.get("tie_word_embeddings", kind.startswith(("gpt2", "gemma")))),
        softcap=bool(data.get("final_logit_softcapping")),
    )
