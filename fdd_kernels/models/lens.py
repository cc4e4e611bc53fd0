"""Reading a Hugging Face causal LM along its depth: head, final norm, soft cap and scale, and capture of sampled layers.

Nothing here knows a model family. What follows the last block (norms, projections) is observed in one forward pass over
two tokens; soft cap and scale are measured by putting known numbers in the place of the head's output; and the whole
reading is then compared with the model's own logits, so a model that does something else is refused instead of being
distilled wrongly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdd_kernels.models.capture import capture_states
from fdd_kernels.models.heads import Head, read_head
from fdd_kernels.models.offload import device_of
from fdd_kernels.models.parallel import refuse_flattened, refuse_partitioned, whole

_REMEDY = (
    "Call fused_fdd_loss yourself with the hidden states (the last one after the final norm) and the head's weight, bias, "
    "soft cap and logit scale"
)
# Numbers to put in place of a head's output: a small one shows the scale, a large one the soft cap, the rest check both.
_PROBE = (2.0**-10, 6e4, 0.5, -3.0, 25.0, -200.0, 0.0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and every module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to h W^T + b: `softcap * tanh(scale * x / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


def configured_transform(config) -> LogitTransform:
    """Soft cap and logit scale from the config fields that are in use; what a model does with them is measured."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def number(*names: str) -> float | None:
        values = [getattr(config, name, None) for name in names]
        return next((float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and v), None)

    scale = (number("logit_scale") or 1.0) * (number("lm_head_multiplier") or 1.0)  # Cohere, Falcon-H1
    scale /= number("logits_scaling") or 1.0  # Granite
    return LogitTransform(scale, number("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DistributedDataParallel and peft wrappers.

    Raises:
        TypeError: a peft model with virtual tokens, which its base model alone would not see; FSDP1.
    """
    while True:
        refuse_flattened(model)
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise TypeError(
                    f"{type(model).__name__} uses {model.active_peft_config.peft_type}: prompt, prefix and p-tuning put "
                    "virtual tokens before the text, and positions of student and teacher would no longer match. Use an "
                    "adapter that changes weights, such as LoRA"
                )
            model = model.get_base_model()
        else:
            return model


class ModelLens:
    """A causal LM's backbone with its head taken off, and the states of chosen layers.

    Args:
        model: a transformers causal LM, also wrapped by peft or torch.compile.
        name: how errors call it.
        split_head: the head may be a DTensor, and so may the logits; every process of its mesh makes the lens.

    Raises:
        TypeError: no head that can be read (see `read_head`), backbone or list of blocks is found; says what was looked for.
        ValueError: head, norm, soft cap and scale as found do not reproduce the model's logits; says how far off they are.
    """

    def __init__(self, model: nn.Module, name: str = "model", *, split_head: bool = False) -> None:
        self.name, self.model, self.split_head = name, unwrap(model), split_head
        self._find_head()  # first: a model without one is told so
        self.backbone = self._find_backbone()
        with evaluating(self.model), torch.no_grad():
            self.vocabulary = len(self.weight)
            self.transform = self._measure_transform()
            self.blocks, self.tail = self._find_blocks_and_tail()
        self.depth = len(self.blocks)

    def read_head(self) -> Head:
        """The head's effective weight (V, width) and bias (V,) at this moment; read it once a step, and let it go after."""
        return read_head(self.head, self.name, split=self.split_head)

    @property
    def weight(self) -> Tensor:
        """The head's effective weight, (V, width), read anew."""
        return self.read_head().weight

    @property
    def bias(self) -> Tensor | None:
        """The head's effective bias, (V,), read anew."""
        return self.read_head().bias

    @property
    def device(self) -> torch.device | None:
        """Where the model takes its inputs; None if FSDP decides."""
        return device_of(self.backbone)

    @property
    def head(self) -> nn.Module:
        """The LM head, looked up anew: it may have been resized, replaced or adapted since the lens was made."""
        return self._find_head()

    def _find_head(self) -> nn.Module:
        find = getattr(self.model, "get_output_embeddings", None)
        head = find() if find is not None else None
        weight = getattr(head, "weight", None)
        refuse_partitioned(f"the {self.name}'s head", weight)
        if head is None or not isinstance(weight, Tensor) or weight.ndim != 2:
            raise TypeError(
                f"{self.name}: {type(self.model).__name__}.get_output_embeddings() gives {type(head).__name__}, but an LM "
                f"head with a weight of shape (vocabulary, width) is needed. Pass a causal LM. {_REMEDY}"
            )
        return head

    def _find_backbone(self) -> nn.Module:
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise TypeError(
                f"{self.name}: {type(self.model).__name__} is an encoder-decoder (config.is_encoder_decoder); only causal LMs "
                f"are read. {_REMEDY}"
            )
        backbone = getattr(self.model, "base_model", None)
        if backbone is None or backbone is self.model:
            raise TypeError(
                f"{self.name}: {type(self.model).__name__} has no base_model beside its head (looked for the attribute "
                f"base_model, as transformers' causal LMs have it). {_REMEDY}"
            )
        return backbone

    @property
    def _tokens(self) -> dict[str, Tensor]:
        """A batch of two tokens, to watch the model with."""
        tokens = torch.tensor([[0, min(1, self.vocabulary - 1)]], device=self.device)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def _own_logits(self) -> Tensor:
        return self.model(**self._tokens, use_cache=False).logits

    def _measure_transform(self) -> LogitTransform:
        """What the model does to its head's output, seen by putting known numbers in that output's place."""
        configured, numbers = configured_transform(self.model.config), torch.tensor(_PROBE, dtype=torch.float64)
        if str(self.device).startswith("mps") or 2 * self.vocabulary < len(numbers):
            return configured  # no float64, or no room; the comparison with the model's logits still follows
        seen: list[Tensor] = []

        def replace(_module, _args, output: Tensor) -> Tensor:
            cycles = output.numel() // len(numbers) + 1
            seen.append(numbers.repeat(cycles)[: output.numel()].view(output.shape).to(output.device))
            return seen[-1].clone()

        with self.head.register_forward_hook(replace):
            answer = self._own_logits()
        if len(seen) != 1 or seen[0].shape != answer.shape:
            return configured
        probe, answer = seen[0].flatten().cpu(), answer.double().flatten().cpu()
        scale, largest = float(answer[0] / probe[0]), float(answer[1])
        capped = abs(largest - scale * _PROBE[1]) > 1e-3 * abs(scale * _PROBE[1])
        measured = LogitTransform(scale, largest if capped else None)
        for transform in (configured, measured):
            if torch.allclose(transform(probe), answer, rtol=1e-5, atol=0):
                return transform
        raise ValueError(
            f"{self.name}: {type(self.model).__name__} turns {_PROBE} at its head into {answer[: len(_PROBE)].tolist()}, "
            f"which is no scale and soft cap (read from its config: {configured}). {_REMEDY}"
        )

    def _find_blocks_and_tail(self) -> tuple[nn.ModuleList, list[nn.Module]]:
        """The list of blocks, and what follows it, that reproduce the model's logits."""
        config = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        depth = getattr(config, "num_hidden_layers", None)
        lists = [module for module in self.backbone.modules() if isinstance(module, nn.ModuleList)]
        fitting = [blocks for blocks in lists if len(blocks) == depth]
        if not fitting:
            raise TypeError(
                f"{self.name}: looked in {type(self.backbone).__name__} for a ModuleList of config.num_hidden_layers="
                f"{depth} blocks, found lists of {[len(blocks) for blocks in lists]}. {_REMEDY}"
            )
        failures = []
        for self.blocks in fitting:
            tail: list[nn.Module] = []
            try:
                failure = self._compare(tail)
            except Exception as error:  # whatever a strange model does with a state that is not what it expects
                failure = f"raises {type(error).__name__}: {error}"
            if failure is None:
                return self.blocks, tail
            modules = [type(module).__name__ for module in tail]
            failures.append(f"the last {type(self.blocks[-1]).__name__} read through {modules or 'no norm'} {failure}")
        raise ValueError(
            f"{self.name}: looked for the blocks whose output, through final norm, head and {self.transform}, gives the "
            f"logits of {type(self.model).__name__}: {'; '.join(failures)}. {_REMEDY}"
        )

    def _compare(self, tail: list[nn.Module]) -> str | None:
        """Collect in `tail` the modules between the last block and the head; says how their reading differs, if it does."""
        after_blocks, nesting = False, 0

        def before(module, _args):
            nonlocal nesting
            if after_blocks:
                if nesting == 0:
                    tail.append(module)
                nesting += 1

        def after(module, _args, _output):
            nonlocal after_blocks, nesting
            if after_blocks and nesting:
                nesting -= 1
            if module is self.blocks[-1]:
                after_blocks = True

        with contextlib.ExitStack() as hooks:
            for module in self.backbone.modules():
                if module is not self.backbone:
                    hooks.enter_context(module.register_forward_pre_hook(before))
                    hooks.enter_context(module.register_forward_hook(after))
            (read,), final = self.states(self._tokens, (len(self.blocks),))
        for module in tail:
            read = module(read)
        logits, mine = whole(self._own_logits()).float(), self.logits(read).float()
        if read.shape != final.shape or logits.shape != mine.shape:
            return f"has shape {tuple(mine.shape)} instead of {tuple(logits.shape)}"
        # Both come from the same rounding steps in the model's dtype, so they agree within a few of its units.
        head = self.read_head()
        eps = max(torch.finfo(head.weight.dtype).eps, torch.finfo(read.dtype).eps)
        tolerance = 32 * eps * logits.abs().max()
        if head.storage == "quantised":
            # The layer may round its input too, to 8 bits a row: independent errors of up to half a step of max|h| / 127
            # through a row of W have a standard deviation of max|h| / 440 times the row's length; allow for seven of them.
            tolerance += read.float().abs().max() / 64 * head.weight.float().norm(dim=1).max()
        error = (logits - mine).abs().max()
        return None if error <= tolerance else f"differs by {float(error):.3g}"

    def logits(self, state: Tensor) -> Tensor:
        """The model's logits of a final state (..., width), dense: for tests and checks, not for training."""
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
        """Run the backbone once, without the head.

        Returns the raw states (batch, sequence, width) after the given numbers of blocks (0: the embeddings), each through
        `read` if given, and the final state, ready for the head. With `final=False` that is None, and the backbone stops
        after the last of `layers`. Gradient flows through all of them if it is enabled.
        """
        device = self.device
        if device is not None:
            inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        # Without gradient nothing else holds the raw states. With it, a block's output may only get its graph when the block
        # is done (reentrant checkpointing), so they are read after the forward.
        at_once = read is not None and not torch.is_grad_enabled()
        captured, state = capture_states(
            self.backbone, self.blocks, inputs, layers, final=final, read=read if at_once else None
        )
        missing = [layer for layer in layers if layer not in captured]
        if missing:
            raise RuntimeError(f"{self.name}: blocks {missing} did not run, so their states could not be captured")
        if torch.is_grad_enabled():
            detached = [layer for layer in layers if not captured[layer].requires_grad and self._trains_up_to(layer)]
            if detached:
                raise RuntimeError(
                    f"{self.name}: the states of layers {detached} carry no gradient although blocks before them train: "
                    "something detaches them (no_grad inside the model, or reentrant gradient checkpointing: use "
                    'gradient_checkpointing_kwargs={"use_reentrant": False})'
                )
        states = [captured[layer] for layer in layers]
        return states if at_once or read is None else [read(raw) for raw in states], state

    def _trains_up_to(self, layer: int) -> bool:
        return any(p.requires_grad for block in self.blocks[:layer] for p in block.parameters())

    def read(self, state: Tensor, *, apply_final_norm: bool = True) -> Tensor:
        """A raw state as the head would see it: through the final norm and any projection after it.

        Without the norm, projections still apply, since the head's width asks for them.
        """
        for module in self.tail:
            if apply_final_norm or isinstance(module, nn.Linear) or hasattr(module, "base_layer"):  # peft's linear layers
                state = module(state)
        return state
