"""Run a Hugging Face model with its task's head: states of chosen layers, and predictions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fdd_kernels.hf.discovery import candidates, observe_backbone
from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.offload import device_of
from fdd_kernels.hf.tail import final_state
from fdd_kernels.hf.tasks import task_of
from fdd_kernels.hf.transform import LogitTransform
from fdd_kernels.hf.wrappers import evaluating, unwrap


class TaskReader(ModelReader):
    """A classifier or a model for question answering, with its head, or a base model: `states` runs
    it for the states of chosen layers and, as the final state, what it predicts.

    Args:
        model, name: see `ModelReader`.

    Attributes:
        vocabulary: number of its labels.

    Raises:
        TypeError: an encoder-decoder, or no list of blocks.
        ValueError: the base model's output is made of more than the last block's state.
    """

    transform = LogitTransform()

    def __init__(self, model: nn.Module, name: str = "model") -> None:
        self.name, self.model = name, unwrap(model)
        self.task = task_of(self.model)
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise TypeError(
                f"{name}: {type(self.model).__name__} is an encoder-decoder of the task "
                f"{self.task}. Supported for this task are models with one stack of blocks; give "
                "encoder-decoders with a language model's head"
            )
        self.vocabulary = getattr(self.model.config, "num_labels", 0)
        self._result = self.task.output
        with evaluating(self.model), torch.no_grad():
            self._find_parts()
        self.depth = len(self.blocks)

    def example(self) -> dict[str, Tensor]:
        """Return arguments of a forward pass over three tokens."""
        tokens = torch.tensor([[3, 2, 4]], device=device_of(self.model))
        return self.task.example(
            tokens.clamp(max=self.model.get_input_embeddings().num_embeddings - 1)
        )

    def _find_parts(self) -> None:
        """Set `width`, and `parts` that reproduce the base model's output."""
        tokens, base = self.example(), self.model.base_model
        expected = final_state(base(**tokens))
        failures = []
        for blocks, parts in candidates(base, observe_backbone(self.name, base, tokens)):
            if parts is not None:
                self.parts = replace(parts, backbone=self.model, ends_at_head=False)
                (state,), _ = self.states(tokens, (len(blocks),))
                found = self.features(state)
                error = (
                    (found - expected).abs().max() if found.shape == expected.shape else torch.inf
                )
                # Both take the same steps in the model's dtype.
                if error <= 32 * torch.finfo(expected.dtype).eps * expected.abs().max():
                    self.width = found.shape[-1]
                    return
            failures.append(type(blocks[-1]).__name__)
        raise ValueError(
            f"{self.name}: looked for the blocks whose last state gives the output of "
            f"{type(base).__name__}, found {', '.join(failures) or 'none that ran'}, whose state "
            "is not all that it is made of. Call fused_fdd_loss yourself with hidden states"
        )


def make_reader(model: nn.Module, name: str, *, split_head: bool = False) -> ModelReader:
    """Make the reader for a model's task."""
    if task_of(unwrap(model)).has_lens:
        return ModelReader(model, name, split_head=split_head)
    return TaskReader(model, name)
