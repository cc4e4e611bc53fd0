"""Reading a Hugging Face causal LM along its depth: head, final norm, soft cap and scale, and capture of sampled layers.

Nothing here knows a model family. What follows the last block (norms, projections) is observed in one forward pass over
two tokens, and the whole reading is then compared with the model's own logits, so a model that does something else is
refused instead of being distilled wrongly.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_REMEDY = (
    "call fused_fdd_loss yourself with the hidden states (the last one after the final norm) and the head's weight, bias, "
    "soft cap and logit scale"
)


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to h W^T + b: `softcap * tanh(scale * x / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None


def logit_transform(config) -> LogitTransform:
    """Soft cap and logit scale from the fields of a Hugging Face config that are in use."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        scale *= config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        scale /= config.logits_scaling
    if getattr(config, "lm_head_multiplier", None) is not None:  # Falcon-H1
        scale *= config.lm_head_multiplier
    return LogitTransform(float(scale), getattr(config, "final_logit_softcapping", None))


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DistributedDataParallel and peft wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


class ModelLens:
    """A causal LM's backbone with its head taken off, and the states of chosen layers.

    Args:
        model: a transformers causal LM, also wrapped by peft or torch.compile.
        name: how errors call it.

    Raises:
        TypeError: no plain linear head, backbone or list of blocks can be found; says what was looked for.
        ValueError: head, norm, soft cap and scale as found do not reproduce the model's logits.
    """

    def __init__(self, model: nn.Module, name: str = "model") -> None:
        self.name, self.model = name, unwrap(model)
        self.head = self._find_head()
        self.backbone = self._find_backbone()
        self.blocks = self._find_blocks()
        self.depth = len(self.blocks)
        self.transform = logit_transform(self.model.config)
        self.tail = self._observe_tail()

    @property
    def weight(self) -> Tensor:
        """The head's weight, (V, width)."""
        return self.head.weight

    @property
    def bias(self) -> Tensor | None:
        """The head's bias, (V,)."""
        return getattr(self.head, "bias", None)

    def _find_head(self) -> nn.Module:
        find = getattr(self.model, "get_output_embeddings", None)
        head = find() if find is not None else None
        weight = getattr(head, "weight", None)
        if head is None or not isinstance(weight, Tensor) or weight.ndim != 2:
            raise TypeError(
                f"{self.name}: {type(self.model).__name__}.get_output_embeddings() gives {type(head).__name__}, but an LM "
                f"head with a weight of shape (vocabulary, width) is needed. Pass a causal LM, or {_REMEDY}"
            )
        if not weight.is_floating_point() or hasattr(head, "lora_A") or hasattr(head, "modules_to_save"):
            raise TypeError(
                f"{self.name}: the LM head is a {type(head).__name__} with a {weight.dtype} weight. Quantised heads and "
                "heads with adapters of their own are not read: keep the head out of quantisation and of "
                "target_modules, or merge the adapter"
            )
        return head

    def _find_backbone(self) -> nn.Module:
        backbone = getattr(self.model, "base_model", None)
        if backbone is None or backbone is self.model:
            raise TypeError(
                f"{self.name}: {type(self.model).__name__} has no base_model beside its head (looked for the attribute "
                f"base_model, as transformers' causal LMs have it). {_REMEDY[0].upper()}{_REMEDY[1:]}"
            )
        return backbone

    def _find_blocks(self) -> nn.ModuleList:
        config = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        depth = getattr(config, "num_hidden_layers", None)
        lists = [module for module in self.backbone.modules() if isinstance(module, nn.ModuleList)]
        fitting = [blocks for blocks in lists if len(blocks) == depth]
        if len(fitting) < 1:
            raise TypeError(
                f"{self.name}: looked in {type(self.backbone).__name__} for a ModuleList of config.num_hidden_layers="
                f"{depth} blocks, found lists of {[len(blocks) for blocks in lists]}. {_REMEDY[0].upper()}{_REMEDY[1:]}"
            )
        return fitting[0]

    @torch.no_grad()
    def _observe_tail(self) -> list[nn.Module]:
        """The modules that turn the last block's output into the head's input, in order; checked against the logits."""
        found: list[nn.Module] = []
        state: dict[str, object] = {"after_blocks": False, "depth": 0}

        def before(module, _args):
            if state["after_blocks"]:
                if state["depth"] == 0:
                    found.append(module)
                state["depth"] += 1

        def after(module, _args, _output):
            if state["after_blocks"] and state["depth"]:
                state["depth"] -= 1
            if module is self.blocks[-1]:
                state["after_blocks"] = True

        inner = [m for m in self.backbone.modules() if m is not self.backbone]
        handles = [m.register_forward_pre_hook(before) for m in inner]
        handles += [m.register_forward_hook(after) for m in inner]
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        try:
            tokens = torch.tensor([[0, min(1, len(self.weight) - 1)]], device=self.weight.device)
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            (last_block,), final = self.states(inputs, (self.depth,))
        finally:
            for handle in handles:
                handle.remove()
        try:
            self._check_tail(found, last_block, final, inputs)
        finally:
            for module in training:
                module.training = True
        return found

    def _check_tail(self, tail: list[nn.Module], last_block: Tensor, final: Tensor, inputs: dict[str, Tensor]) -> None:
        read = last_block
        for module in tail:
            read = module(read)
        logits = self.model(**inputs, use_cache=False).logits.float()
        mine = self.logits(read).float()
        # Both come from the same rounding steps in the model's dtype, so they agree within a few of its units.
        tolerance = 32 * torch.finfo(self.weight.dtype).eps * logits.abs().max()
        error = (logits - mine).abs().max() if logits.shape == mine.shape else float("inf")
        if read.shape != final.shape or not error <= tolerance:
            modules = [type(module).__name__ for module in tail]
            raise ValueError(
                f"{self.name}: the last block's output read through {modules or 'no norm'}, the head and {self.transform} "
                f"differs from the logits of {type(self.model).__name__} by {float(error):.3g}: it does something that was "
                f"not found in its modules or config. {_REMEDY[0].upper()}{_REMEDY[1:]}"
            )

    def logits(self, state: Tensor) -> Tensor:
        """The model's logits of a final state (..., width), dense: for tests and checks, not for training."""
        logits = nn.functional.linear(state, self.weight.to(state.dtype), None if self.bias is None else self.bias)
        logits = logits * self.transform.scale
        cap = self.transform.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def states(self, inputs: dict[str, Tensor], layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        """Run the backbone once, without the head.

        Returns the raw states (batch, sequence, width) after the given numbers of blocks (0: the embeddings), and the
        final state, ready for the head. Gradient flows through all of them if it is enabled.
        """
        with self._capture(layers) as captured:
            output = self.backbone(**self._accepted(inputs), use_cache=False)
        final = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        missing = [layer for layer in layers if layer not in captured]
        if missing:
            raise RuntimeError(f"{self.name}: blocks {missing} did not run, so their states could not be captured")
        states = [captured[layer] for layer in layers]
        checkpointing = getattr(self.model, "is_gradient_checkpointing", False)
        if checkpointing and torch.is_grad_enabled() and final.requires_grad:
            detached = [layer for layer in layers if layer and not captured[layer].requires_grad]
            if detached:
                raise RuntimeError(
                    f"{self.name}: the states of layers {detached} carry no gradient under gradient checkpointing: call "
                    'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
                )
        return states, final

    def read(self, state: Tensor, *, apply_final_norm: bool = True) -> Tensor:
        """A raw state as the head would see it: through the final norm and any projection after it.

        Without the norm, projections still apply, since the head's width asks for them.
        """
        for module in self.tail:
            if apply_final_norm or isinstance(module, nn.Linear):
                state = module(state)
        return state

    @contextlib.contextmanager
    def _capture(self, layers: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
        captured: dict[int, Tensor] = {}

        def keep(layer: int, value) -> None:
            # Recomputation under gradient checkpointing runs the hooks again: the first state is the one in the graph.
            captured.setdefault(layer, value[0] if isinstance(value, tuple) else value)

        handles = []
        for layer in layers:
            if layer == 0:
                hook = self.blocks[0].register_forward_pre_hook(
                    lambda _module, args, kwargs: keep(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
                )
            else:
                hook = self.blocks[layer - 1].register_forward_hook(lambda _m, _a, out, layer=layer: keep(layer, out))
            handles.append(hook)
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def _accepted(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs that the backbone takes."""
        parameters = inspect.signature(self.backbone.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return {key: value for key, value in inputs.items() if takes_any or key in parameters}
