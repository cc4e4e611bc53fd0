"""Run a Hugging Face language model without its head: the states of chosen layers, and the head's
weight, bias, soft cap and scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fdd_kernels.hf.capture import capture_states, require_gradient
from fdd_kernels.hf.discovery import (
    REMEDY,
    ModelParts,
    candidates,
    find_head,
    lists_of_blocks,
    observe,
    own_logits,
    require_causal,
    require_lens,
)
from fdd_kernels.hf.heads import Head, read_head, with_logits_bias
from fdd_kernels.hf.offload import device_of
from fdd_kernels.hf.tasks import CAUSAL_LM, task_of
from fdd_kernels.hf.transform import LogitTransform
from fdd_kernels.hf.wrappers import evaluating, unwrap, whole

if TYPE_CHECKING:
    from fdd_kernels.hf.encoder import EncoderReader


class ModelReader:
    """A language model without its head: `states` runs it for the states of chosen layers; of an
    encoder-decoder those of its decoder.

    What runs is the model's `base_model` (transformers' name), if the model calls it beside its
    head. Otherwise (Llama 4 with images, whose text model holds the head) it is the model itself,
    and its forward ends where the head begins.

    Args:
        model: a transformers causal LM, masked LM or encoder-decoder, also wrapped by peft or
            torch.compile.
        name: the model's name in errors.
        split_head: the head may be a DTensor, and so may the logits. Every process of its mesh
            makes the reader.

    Attributes:
        model: the transformers model inside wrappers.
        task: what it predicts.
        vocabulary: V, the rows of its head.
        depth: number of blocks, as often as they run.
        width: of `features`.
        parts: the backbone, its blocks, and the steps between them and the head.
        transform: soft cap and scale of its logits.
        encoder: what stores the states of the encoder's blocks too, in every run; None without one.

    Warns:
        UserWarning: a causal LM whose config lets it look at later tokens.

    Raises:
        TypeError: another kind of model (a classifier), a head of an unknown kind (see
            `read_head`), no list of blocks; says what was looked for.
        ValueError: what was found does not reproduce the model's logits, as where the head's input
            is made of more than the last block's state; says how far off it is.
    """

    parts: ModelParts
    transform: LogitTransform
    width: int
    # Makes the final state from the result of a model that runs with its head.
    _result: Callable[[Any], Tensor] | None = None
    encoder: EncoderReader | None = None

    def __init__(self, model: nn.Module, name: str = "model", *, split_head: bool = False) -> None:
        self.name, self.model, self.split_head = name, unwrap(model), split_head
        self.task = task_of(self.model)
        require_lens(name, self.model, self.task)
        find_head(name, self.model)
        with evaluating(self.model), torch.no_grad():
            self._find_parts()
        self.depth = len(self.blocks)

    @property
    def backbone(self) -> nn.Module:
        """The module that runs: the base model, or the model itself."""
        return self.parts.backbone

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's blocks in the order in which they run; layer k is the state after k of them.
        A block that runs several times (ALBERT) is there as often.
        """
        return self.parts.blocks

    @functools.cached_property
    def all_blocks(self) -> list[nn.Module]:
        """The blocks, and those of the encoder before a decoder."""
        if not getattr(self.model.config, "is_encoder_decoder", False):
            return list(self.blocks)
        encoder = self.model.get_encoder()
        of_encoder = lists_of_blocks(self.name, encoder, encoder.config.num_hidden_layers)
        return [*of_encoder[0], *self.blocks]

    @property
    def head(self) -> nn.Module:
        """The LM head, looked up at each use: it may have been resized, replaced or adapted."""
        return find_head(self.name, self.model)

    def read_head(self) -> Head:
        """Return the head's effective weight (V, width) and bias (V,). Call it once a step and do
        not store the result.
        """
        return with_logits_bias(read_head(self.head, self.name, split=self.split_head), self.model)

    @property
    def weight(self) -> Tensor:
        """The head's effective weight (V, width), computed at each use."""
        return self.read_head().weight

    @property
    def bias(self) -> Tensor | None:
        """The head's effective bias (V,), computed at each use."""
        return self.read_head().bias

    @property
    def device(self) -> torch.device | None:
        """The device of the model's inputs; None if FSDP decides."""
        return device_of(self.backbone)

    def _find_parts(self) -> None:
        """Set `vocabulary`, `transform`, and `parts` that reproduce the model's logits."""
        weight, device = self.weight, device_of(self.model)
        self.vocabulary, eps = len(weight), torch.finfo(weight.dtype).eps
        del weight  # perhaps a dequantised copy

        def batch(ids: list[list[int]]) -> dict[str, Tensor]:
            # The last token replaces those that a smaller vocabulary does not have.
            tokens = torch.tensor(ids, device=device).clamp(max=self.vocabulary - 1)
            return self.task.example(tokens)

        tokens = batch([[1, 0, 1], [1, 0, 0]])
        logits = whole(own_logits(self.model, tokens)).float()
        if self.task is CAUSAL_LM:
            require_causal(self.name, self.model, logits, eps)
        recording, self.transform = observe(
            self.name, self.model, self.head, batch([[0, 1]]), self.vocabulary
        )
        failures = []
        for blocks, parts in candidates(self.model, recording):
            failure = "is not all that the head's input is made of"
            if parts is not None:
                self.parts = parts
                try:
                    difference = self._difference(tokens, logits)
                except Exception as error:  # an unknown model may raise anything on such a state
                    difference = f"raises {type(error).__name__}: {error}"
                if difference is None:
                    return
                failure = f"read through {parts} {difference}"
            failures.append(f"the last {type(blocks[-1]).__name__} {failure}")
        raise ValueError(
            f"{self.name}: looked for the blocks whose output alone, through final norm, head and "
            f"{self.transform}, gives the logits of {type(self.model).__name__}: "
            f"{'; '.join(failures) or 'none of their lists ran'}. {REMEDY}"
        )

    def _difference(self, tokens: dict[str, Tensor], logits: Tensor) -> str | None:
        """Say how the logits of the last block's state, and of the final state, differ from the
        model's own; None if they agree.
        """
        (state,), final = self.states(tokens, (len(self.blocks),))
        self.width = self.features(state).shape[-1]
        for found in (self.read(state), final):
            mine = self.logits(found).float()
            if logits.shape != mine.shape:
                return f"has shape {tuple(mine.shape)} instead of {tuple(logits.shape)}"
            error = (logits - mine).abs().max()
            if not error <= self._rounding(found, logits):
                return f"differs by {float(error):.3g}"
        return None

    def _rounding(self, state: Tensor, logits: Tensor) -> Tensor:
        """Bound the difference of logits that come from one state: both take the same steps in the
        model's dtype, so they agree within a few of its units.
        """
        head = self.read_head()
        eps = max(torch.finfo(head.weight.dtype).eps, torch.finfo(state.dtype).eps)
        tolerance = 32 * eps * logits.abs().max()
        if head.storage == "quantised":
            # The layer may round its input too, to 8 bits per row. Independent errors of up to half
            # a step of max|h| / 127, multiplied by a row of W, have a standard deviation of
            # max|h| / 440 times the row's norm. The bound is seven of them.
            tolerance += state.float().abs().max() / 64 * head.weight.float().norm(dim=1).max()
        return tolerance

    def logits(self, state: Tensor) -> Tensor:
        """Compute the dense logits (..., V) of a final state (..., width): for checks, not for
        training.
        """
        head = self.read_head()
        bias = None if head.bias is None else whole(head.bias).to(state)
        return self.transform(nn.functional.linear(state, whole(head.weight).to(state), bias))

    def states(
        self,
        inputs: dict[str, Tensor],
        layers: tuple[int, ...],
        *,
        final: bool = True,
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Run the backbone once, without the head. Gradient flows through all states if enabled.

        Args:
            layers: numbers of blocks, 0 for the embeddings.
            final: False stops the backbone after the last of `layers`.
            read: applied to each raw state.

        Returns:
            The states (batch, sequence, width) of `layers`, and the final state, ready for the
            head, or None without `final`.

        Raises:
            RuntimeError: a block did not run, or its state has no gradient although blocks train.
        """
        device = self.device
        if device is not None:
            inputs = {
                key: value.to(device) if isinstance(value, Tensor) else value
                for key, value in inputs.items()
            }
        # Without gradient, apply `read` at once, which frees the raw state. With gradient, apply it
        # after the forward: under reentrant checkpointing a block's output gets its graph only
        # when the block has ended.
        at_once = read is not None and not torch.is_grad_enabled()
        captured, state = capture_states(
            self.backbone,
            self.blocks,
            inputs,
            layers,
            final=final,
            read=read if at_once else None,
            head=self.head if self.parts.ends_at_head else None,
            result=self._result,
            always=self.encoder is not None,
        )
        if state is not None:
            state = self.parts.head_steps(state)
        missing = [layer for layer in layers if layer not in captured]
        if missing:
            raise RuntimeError(
                f"{self.name}: blocks {missing} did not run, so their states could not be captured"
            )
        require_gradient(self.name, self.blocks, captured)
        states = [captured[layer] for layer in layers]
        return states if at_once or read is None else [read(raw) for raw in states], state

    def read(self, state: Tensor, *, apply_final_norm: bool = True) -> Tensor:
        """Make a raw state ready for the head: apply all steps between the last block and the head.

        Without the norm the other steps still apply (projections, scales): they give the state the
        head's width.
        """
        return self.parts.head_steps(self.features(state, apply_final_norm=apply_final_norm))

    def features(self, state: Tensor, *, apply_final_norm: bool = True) -> Tensor:
        """Make a raw state what the backbone would return for it: apply the steps between the last
        block and the backbone's output, but none of the head's.
        """
        return self.parts.backbone_steps(state, norms=apply_final_norm)


ModelLens = ModelReader  # its name in earlier releases
