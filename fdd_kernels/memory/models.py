"""The sizes of a causal LM that its memory depends on, from its config or from three numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdd_kernels.common.errors import UserError
from fdd_kernels.common.model_tasks import saved_task


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal LM that its memory depends on.

    Args:
        vocabulary, width: of its head.
        depth: number of blocks.
        blocks: number of weights outside embedding and head.
        embeddings: number of weights of embedding and head, once if they are tied.
        linear: inputs plus outputs of every matrix of the blocks, summed.
        experts: likewise of the experts of one token.
    """

    vocabulary: int
    width: int
    depth: int
    blocks: int
    embeddings: int
    linear: int
    experts: int = 0
    softcap: bool = False

    @property
    def parameters(self) -> int:
        """The number of all weights."""
        return self.blocks + self.embeddings

    def adapters(self, rank: int) -> int:
        """The number of weights of LoRA adapters on every linear layer of the blocks, as in
        `fdd-kernels distill --lora-rank`.
        """
        return rank * self.linear

    def activations(self, tokens: int, itemsize: int, *, checkpointing: bool) -> int:
        """Estimate the bytes that the blocks save for the backward pass: inputs and outputs of the
        matrices that a token passes.

        Outputs that are inputs of the next matrix are counted twice; norms and nonlinearities save
        about as much. Attention is assumed to save no (tokens x tokens) matrix, a scan no state of
        each token. With checkpointing: those of one block, and the input of every block.
        """
        saved = self.linear + self.experts
        if checkpointing:
            saved = saved // self.depth + self.depth * self.width
        return itemsize * tokens * saved


def read_model(text: str, option: str) -> ModelShape:
    """Get the sizes from "WIDTHxDEPTHxVOCABULARY", a config.json, a directory that holds one, or a
    name that transformers knows.

    Three numbers mean a GPT-2 of that size. From a config the model is built on torch's "meta"
    device, which takes no memory, and its weights are counted.

    Raises:
        UserError: it is none of these.
    """
    numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if numbers:
        width, depth, vocabulary = map(int, numbers.groups())
        if not width * depth * vocabulary:
            raise UserError(
                f"{option} {text}: WIDTHxDEPTHxVOCABULARY must be positive, as in 768x12x50257"
            )
        matrices = 12 * width**2  # query, key and value in one; output; two of the MLP
        return ModelShape(
            vocabulary,
            width,
            depth,
            depth * matrices,
            vocabulary * width,
            linear=depth * 16 * width,
        )
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
    try:
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ModuleNotFoundError as error:
        raise UserError(
            f'{option} {text!r}: to read a config needs pip install "fdd_kernels[hf]"; without it '
            "give WIDTHxDEPTHxVOCABULARY, as in 768x12x50257"
        ) from error
    if path.is_file():
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{option}: {path} is not JSON ({error})") from error
        kind = data.get("model_type") if isinstance(data, dict) else None
        if kind not in CONFIG_MAPPING:
            raise UserError(
                f"{option}: {path} has model_type {kind!r}, which the installed transformers does "
                "not know (code that comes with a model is not run): update it, or give "
                "WIDTHxDEPTHxVOCABULARY, as in 768x12x50257"
            )
        return model_from_config(lambda: CONFIG_MAPPING[kind].from_dict(data), f"{option}: {path}")
    return model_from_config(
        lambda: AutoConfig.from_pretrained(text),
        f"{option} {text!r}, which is no file or directory here",
    )


def model_from_config(make_config: Callable[[], Any], where: str) -> ModelShape:
    """Get the sizes of the causal LM that transformers builds from a config.

    Raises:
        UserError: it cannot build one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        config = make_config()
        if (task := saved_task(config)) != "causal_lm":
            raise TypeError(f"it is of a model of the task {task}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text_config = config.get_text_config()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        vocabulary, width = head.weight.shape
        depth = text_config.num_hidden_layers
        tied = head.weight is embedding.weight
    except Exception as error:  # transformers raises many kinds for a config that fits no model
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{where}: no causal LM can be built from its config ({type(error).__name__}: "
            f"{first}); check it, or give WIDTHxDEPTHxVOCABULARY, as in 768x12x50257"
        ) from error
    embeddings = head.weight.numel() + (0 if tied else embedding.weight.numel())
    linear, experts = _matrices(model, head, _first_number(text_config, _EXPERTS_A_TOKEN))
    return ModelShape(
        vocabulary,
        width,
        depth,
        sum(p.numel() for p in model.parameters()) - embeddings,
        embeddings,
        linear,
        experts,
        softcap=bool(getattr(text_config, "final_logit_softcapping", None)),
    )


_EXPERTS_A_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "top_k_experts",
    "moe_k",
)


def _first_number(config: Any, names: Sequence[str]) -> int | None:
    return next(
        (value for name in names if isinstance(value := getattr(config, name, None), int)), None
    )


def _matrices(model: Any, head: Any, experts_a_token: int | None) -> tuple[int, int]:
    """Sum inputs plus outputs of all matrices outside embeddings and head, and of the experts of
    one token.

    Experts are matrices stacked to three dimensions, or numbered modules of a list of that name.

    Args:
        experts_a_token: None: all of them.
    """
    from torch import nn

    linear, experts = 0, 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            continue
        number = re.search(r"experts\.(\d+)", path)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3 and "expert" in path:
                experts += min(experts_a_token or len(parameter), len(parameter)) * sum(
                    parameter.shape[1:]
                )
            elif parameter.ndim == 2 and number:
                experts += (
                    sum(parameter.shape)
                    if experts_a_token is None or int(number[1]) < experts_a_token
                    else 0
                )
            elif parameter.ndim == 2:
                linear += sum(parameter.shape)
    return linear, experts
