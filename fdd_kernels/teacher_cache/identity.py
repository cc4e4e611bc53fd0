"""Describe the teacher and the tokenizer of a cache, to tell them from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdd_kernels.hf.layers import require_layers
from fdd_kernels.hf.teachers import LiveTeacher


def describe_teacher(
    teacher: LiveTeacher, layers: Sequence[int], apply_final_norm: bool
) -> dict[str, Any]:
    """Return what every kind of cache says of its teacher in `contents`. Hashes all weights.

    Raises:
        ValueError: layers that the model does not have.
    """
    require_layers("layers", layers, teacher.depth)
    return {
        "layers": list(layers),
        "depth": teacher.depth,
        "apply_final_norm": apply_final_norm,
        "vocab_size": teacher.vocabulary,
        "softcap": teacher.transform.softcap,
        "logit_scale": teacher.transform.scale,
        "teacher": describe_model(teacher.model),
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return a model's class, its config, and a SHA-256 of its weights.

    Weights that are not plain tensors in memory (offloaded, quantised) enter the hash by name and
    shape only.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.device.type != "meta" and type(tensor.data) is Tensor:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = json.loads(model.config.to_json_string())
    # Leave out the path, the version that wrote the config, and the attention implementation.
    config = {k: v for k, v in config.items() if k[0] != "_" and k != "transformers_version"}
    return {"class": type(model).__name__, "config": config, "sha256": digest.hexdigest()}


def tokenizer_digest(tokenizer) -> str:
    """Return the SHA-256 of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
