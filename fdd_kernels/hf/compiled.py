"""Compile each block of a model that came from torch.compile: its own forward, which computes
logits, never runs.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def compile_blocks(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """If `model` came from `torch.compile`, compile each block's forward in place, once, with the
    same options.

    It compiles the forward and not the module's call: the hooks that capture states must stay
    outside.
    """
    # An attribute of OptimizedModule: compiles a function with the options of torch.compile.
    compiler = getattr(model, "dynamo_ctx", None)
    if compiler is None:
        return
    for block in blocks:
        if not hasattr(block.forward, "_torchdynamo_orig_callable"):
            block.forward = compiler(block.forward)
