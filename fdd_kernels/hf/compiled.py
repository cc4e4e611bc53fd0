"""torch.compile of a model of which only the backbone runs: its blocks are compiled, as the whole
was asked to be.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def compile_blocks(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """If `model` came from `torch.compile`, compile each block's forward in place with the same
    options; once.

    The compiled whole never runs, since it computes logits; and hooks, which capture states, must
    stay outside of what is compiled, so it is each forward and not the module's call.
    """
    # of the OptimizedModule: applies torch.compile's options to a function
    compiler = getattr(model, "dynamo_ctx", None)
    if compiler is None:
        return
    for block in blocks:
        if not hasattr(block.forward, "_torchdynamo_orig_callable"):
            block.forward = compiler(block.forward)
