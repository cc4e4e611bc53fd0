"""Reading a Hugging Face causal LM along its depth: head, final norm, soft cap and scale, and
capture of sampled layers.

Nothing here knows a model family. What follows the last block (norms, projections, scales, the
transform of a head) is recorded in one forward pass over two tokens (`tail.py`); soft cap and scale
are measured by putting known numbers in the place of the head's output; and the whole reading is
then compared with the model's own logits on other tokens, so a model that does something else is
refused instead of being distilled wrongly.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdd_kernels.hf.capture import capture_states
from fdd_kernels.hf.heads import Head, read_head
from fdd_kernels.hf.offload import device_of
from fdd_kernels.hf.tail import Recording, Slot, Steps
from fdd_kernels.hf.wrappers import refuse_flattened, refuse_partitioned, whole

_REMEDY = (
    "Call fused_fdd_loss yourself with the hidden states (the last one after the final norm) and "
    "the head's weight, bias, "
    "soft cap and logit scale"
)
_SUPPORTED = (
    "Supported are models that predict the next token: transformers' causal LMs, and "
    "vision-language models that write text. "
    "Not supported are masked LMs (encoders), sequence-to-sequence models and classifiers"
)
# How inputs beside text begin.
_MEDIA = ("pixel_", "image_", "video_", "audio_", "input_features", "input_audio")
# By how much of its largest logit a prediction must change with the tokens after it to be called no
# causal LM's.
_LOOKING_AHEAD = 0.02
# Numbers to put in place of a head's output: a small one shows the scale, a large one the soft cap,
# the rest check both.
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
    """Soft cap and logit scale from the config fields that are in use; what a model does with them
    is measured.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def number(*names: str) -> float | None:
        values = [getattr(config, name, None) for name in names]
        return next(
            (
                float(v)
                for v in values
                if isinstance(v, (int, float)) and not isinstance(v, bool) and v
            ),
            None,
        )

    # Cohere, Falcon-H1
    scale = (number("logit_scale") or 1.0) * (number("lm_head_multiplier") or 1.0)
    scale /= number("logits_scaling") or 1.0  # Granite
    return LogitTransform(
        scale, number("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DistributedDataParallel and peft wrappers.

    Raises:
        TypeError: a peft model with virtual tokens, which its base model alone would not see;
            FSDP1.
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
                    f"{type(model).__name__} uses {model.active_peft_config.peft_type}: prompt, "
                    "prefix and p-tuning put "
                    "virtual tokens before the text, and positions of student and teacher would no "
                    "longer match. Use an "
                    "adapter that changes weights, such as LoRA"
                )
            model = model.get_base_model()
        else:
            return model


class ModelLens:
    """A causal LM's backbone with its head taken off, and the states of chosen layers.

    The backbone is what transformers calls the model's `base_model`, where the model runs that
    beside its head; otherwise (Llama 4 with images, whose text model holds the head) the model
    itself, which then ends where the head begins.

    Args:
        model: a transformers causal LM, also wrapped by peft or torch.compile.
        name: how errors call it.
        split_head: the head may be a DTensor, and so may the logits; every process of its mesh
            makes the lens.

    Warns:
        UserWarning: a causal LM whose config lets it look at later tokens.

    Raises:
        TypeError: no causal LM (a masked LM, an encoder-decoder, a classifier); no head that can be
            read (see `read_head`), no list of blocks; says what was looked for.
        ValueError: what was found does not reproduce the model's logits, as where the head's input
            is made of more than the last block's state; says how far off it is.
    """

    def __init__(self, model: nn.Module, name: str = "model", *, split_head: bool = False) -> None:
        self.name, self.model, self.split_head = name, unwrap(model), split_head
        self._find_head()  # first: a model without one is told so
        self._refuse_encoder_decoder()
        self.backbone = self.model  # until more is known
        with evaluating(self.model), torch.no_grad():
            self.vocabulary = len(self.weight)
            self._find_reading()
        self.depth = len(self.blocks)

    def read_head(self) -> Head:
        """The head's effective weight (V, width) and bias (V,) at this moment; read it once a step,
        and let it go after.
        """
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
        """The LM head, looked up anew: it may have been resized, replaced or adapted since the lens
        was made.
        """
        return self._find_head()

    def _find_head(self) -> nn.Module:
        find = getattr(self.model, "get_output_embeddings", None)
        head = find() if find is not None else None
        weight = getattr(head, "weight", None)
        refuse_partitioned(f"the {self.name}'s head", weight)
        if head is None or not isinstance(weight, Tensor) or weight.ndim != 2:
            raise TypeError(
                f"{self.name}: {type(self.model).__name__}.get_output_embeddings() gives "
                f"{type(head).__name__}, but an LM "
                "head with a weight of shape (vocabulary, width) is needed. Pass a causal LM. "
                f"{_SUPPORTED}. {_REMEDY}"
            )
        return head

    def _refuse_encoder_decoder(self) -> None:
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise TypeError(
                f"{self.name}: {type(self.model).__name__} is an encoder-decoder "
                f"(config.is_encoder_decoder). {_SUPPORTED}. "
                f"{_REMEDY}"
            )

    def _tokens(self, ids: list[list[int]]) -> dict[str, Tensor]:
        """A small batch to watch the model with; of a smaller vocabulary its last token stands for
        those that are missing.
        """
        tokens = torch.tensor(ids, device=self.device).clamp(max=self.vocabulary - 1)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def _own_logits(self, tokens: dict[str, Tensor]) -> Tensor:
        parameters = inspect.signature(self.model.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return self.model(
            **tokens, **{"use_cache": False} if takes_any or "use_cache" in parameters else {}
        ).logits

    def _observe(self, lists: list[nn.ModuleList]) -> tuple[Recording, LogitTransform]:
        """One forward pass: what follows the blocks, and what the model does to its head's output.

        The latter is seen by putting known numbers in the place of that output.
        """
        configured, numbers = (
            configured_transform(self.model.config),
            torch.tensor(_PROBE, dtype=torch.float64),
        )
        # No float64, or no room for the numbers: the comparison with the model's logits still
        # follows.
        measurable = not str(self.device).startswith("mps") and 2 * self.vocabulary >= len(numbers)
        seen: list[Tensor] = []

        def replace(_module, _args, output: Tensor) -> Tensor:
            cycles = output.numel() // len(numbers) + 1
            seen.append(
                numbers.repeat(cycles)[: output.numel()].view(output.shape).to(output.device)
            )
            return seen[-1].clone()

        head = self.head
        base = getattr(self.model, "base_model", None)
        recording = Recording(self.model, head, lists, None if base is self.model else base)
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(recording.watching())
            if measurable:
                hooks.enter_context(head.register_forward_hook(replace))
            answer = self._own_logits(self._tokens([[0, 1]]))
        if len(seen) != 1 or seen[0].shape != answer.shape:
            return recording, configured
        probe, answer = seen[0].flatten().cpu(), answer.double().flatten().cpu()
        scale, largest = float(answer[0] / probe[0]), float(answer[1])
        capped = abs(largest - scale * _PROBE[1]) > 1e-3 * abs(scale * _PROBE[1])
        measured = LogitTransform(scale, largest if capped else None)
        for transform in (configured, measured):
            if torch.allclose(transform(probe), answer, rtol=1e-5, atol=0):
                return recording, transform
        raise ValueError(
            f"{self.name}: {type(self.model).__name__} turns {_PROBE} at its head into "
            f"{answer[: len(_PROBE)].tolist()}, "
            f"which is no scale and soft cap (read from its config: {configured}). {_REMEDY}"
        )

    def _lists_of_blocks(self) -> list[nn.ModuleList]:
        """Every list of modules that is as long as the model is deep; or, as some count their
        blocks' parts, a part of that.
        """
        config = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        depth = getattr(config, "num_hidden_layers", None)
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        fitting = [blocks for blocks in lists if len(blocks) == depth]
        if not fitting and isinstance(depth, int):
            inner = {id(m) for blocks in lists for m in blocks.modules() if m is not blocks}
            fitting = [
                blocks
                for blocks in lists
                if len(blocks) > 1 and depth % len(blocks) == 0 and id(blocks) not in inner
            ]
        if not fitting:
            raise TypeError(
                f"{self.name}: looked in {type(self.model).__name__} for a ModuleList of "
                f"config.num_hidden_layers={depth} "
                f"blocks, found lists of {[len(blocks) for blocks in lists]}. {_REMEDY}"
            )
        return fitting

    def _find_reading(self) -> None:
        """Find what is run for states, the blocks, and the steps from a block's state to the head;
        all tried out.
        """
        tokens = self._tokens([[1, 0, 1], [1, 0, 0]])
        logits = whole(self._own_logits(tokens)).float()
        self._require_causal(logits)
        recording, self.transform = self._observe(self._lists_of_blocks())
        failures = []
        for self.blocks, source in reversed(recording.ended.items()):  # those that run last first
            kind = type(self.blocks[-1]).__name__
            failure = self._take_apart(recording, source)
            if failure is None:
                try:
                    failure = self._compare(tokens, logits)
                # whatever a strange model does with a state that is not what it expects
                except Exception as error:
                    failure = f"raises {type(error).__name__}: {error}"
                failure = failure and f"read through {self._read_steps} {failure}"
            if failure is None:
                return
            failures.append(f"the last {kind} {failure}")
        raise ValueError(
            f"{self.name}: looked for the blocks whose output alone, through final norm, head and "
            f"{self.transform}, gives the "
            f"logits of {type(self.model).__name__}: "
            f"{'; '.join(failures) or 'none of their lists ran'}. {_REMEDY}"
        )

    def _take_apart(self, recording: Recording, source: Slot) -> str | None:
        """Set what is run and the steps after it for one list of blocks; says why not, if it cannot
        be.
        """
        backbone = recording.steps(source, recording.output)
        # A head that is not called as a module leaves no trace; then nothing is taken to stand
        # between it and the backbone.
        after = (
            Steps()
            if recording.head_input is None
            else recording.steps(recording.output, recording.head_input)
        )
        if backbone is not None and after is not None and self._base_takes_media():
            self.backbone, self._backbone_steps, self._head_steps, self._whole = (
                self.model.base_model,
                backbone,
                after,
                False,
            )
            return None
        steps = recording.steps(source, recording.head_input)
        if steps is None:
            return "is not all that the head's input is made of"
        self.backbone, self._backbone_steps, self._head_steps, self._whole = (
            self.model,
            steps,
            Steps(),
            True,
        )
        return None

    def _base_takes_media(self) -> bool:
        """Whether the base model takes what the model takes beside text; otherwise the model does
        something with it first.
        """
        model, base = (
            inspect.signature(module.forward).parameters
            for module in (self.model, self.model.base_model)
        )
        return not any(name.startswith(_MEDIA) and name not in base for name in model)

    @property
    def _read_steps(self) -> str:
        return (
            f"{self._backbone_steps}"
            if not self._head_steps.steps
            else f"{self._backbone_steps} and {self._head_steps}"
        )

    def _compare(self, tokens: dict[str, Tensor], logits: Tensor) -> str | None:
        """Read the last block's state and the final one of other tokens; says how the logits
        differ, if they do.
        """
        (state,), final = self.states(tokens, (len(self.blocks),))
        for reading in (self.read(state), final):
            mine = self.logits(reading).float()
            if logits.shape != mine.shape:
                return f"has shape {tuple(mine.shape)} instead of {tuple(logits.shape)}"
            error = (logits - mine).abs().max()
            if not error <= self._rounding(reading, logits):
                return f"differs by {float(error):.3g}"
        return None

    def _rounding(self, state: Tensor, logits: Tensor) -> Tensor:
        """How far apart two readings of one state may be: both come from the same steps in the
        model's dtype, and agree within a few of its units.
        """
        head = self.read_head()
        eps = max(torch.finfo(head.weight.dtype).eps, torch.finfo(state.dtype).eps)
        tolerance = 32 * eps * logits.abs().max()
        if head.storage == "quantised":
            # The layer may round its input too, to 8 bits a row: independent errors of up to half a
            # step of max|h| / 127 through a row of W have a standard deviation of max|h| / 440
            # times the row's length; allow for seven of them.
            tolerance += state.float().abs().max() / 64 * head.weight.float().norm(dim=1).max()
        return tolerance

    def _require_causal(self, logits: Tensor) -> None:
        """Refuse masked LMs, by the logits of two rows that differ in their last token alone and by
        transformers' own lists.

        Warns of a model for causal LM whose configuration lets it look ahead.
        """
        from transformers.models.auto import modeling_auto as auto

        causal = {
            *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
            *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
        }
        kind, largest = type(self.model).__name__, logits.abs().max()
        masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and not getattr(
            self.model.config, "is_decoder", False
        )
        bound = max(_LOOKING_AHEAD, 8 * torch.finfo(self.weight.dtype).eps) * largest
        looks_ahead = (logits[0, :2] - logits[1, :2]).abs().max() > bound
        if kind not in causal and (masked or looks_ahead):
            why = (
                "its predictions change with the tokens after them"
                if looks_ahead
                else "transformers lists it as a masked LM"
            )
            raise TypeError(f"{self.name}: {kind} is no causal LM ({why}). {_SUPPORTED}. {_REMEDY}")
        if looks_ahead:
            warnings.warn(
                f"{self.name}: the predictions of {kind}, as its config is (is_decoder, "
                "attn_type), change with the tokens "
                "after them. It is compared all the same, but at every position it has seen what "
                "it is to predict",
                stacklevel=2,
            )

    def logits(self, state: Tensor) -> Tensor:
        """The model's logits of a final state (..., width), dense: for tests and checks, not for
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
        """Run the backbone once, without the head.

        Returns the raw states (batch, sequence, width) after the given numbers of blocks (0: the
        embeddings), each through `read` if given, and the final state, ready for the head. With
        `final=False` that is None, and the backbone stops after the last of `layers`. Gradient
        flows through all of them if it is enabled.
        """
        device = self.device
        if device is not None:
            inputs = {
                key: value.to(device) if isinstance(value, Tensor) else value
                for key, value in inputs.items()
            }
        # Without gradient nothing else holds the raw states. With it, a block's output may only get
        # its graph when the block is done (reentrant checkpointing), so they are read after the
        # forward.
        at_once = read is not None and not torch.is_grad_enabled()
        captured, state = capture_states(
            self.backbone,
            self.blocks,
            inputs,
            layers,
            final=final,
            read=read if at_once else None,
            head=self.head if self._whole else None,
        )
        if state is not None:
            state = self._head_steps(state)
        missing = [layer for layer in layers if layer not in captured]
        if missing:
            raise RuntimeError(
                f"{self.name}: blocks {missing} did not run, so their states could not be captured"
            )
        if torch.is_grad_enabled():
            detached = [
                layer
                for layer in layers
                if not captured[layer].requires_grad and self._trains_up_to(layer)
            ]
            if detached:
                raise RuntimeError(
                    f"{self.name}: the states of layers {detached} carry no gradient although "
                    "blocks before them train: "
                    "something detaches them (no_grad inside the model, or reentrant gradient "
                    "checkpointing: use "
                    'gradient_checkpointing_kwargs={"use_reentrant": False})'
                )
        states = [captured[layer] for layer in layers]
        return states if at_once or read is None else [read(raw) for raw in states], state

    def _trains_up_to(self, layer: int) -> bool:
        return any(p.requires_grad for block in self.blocks[:layer] for p in block.parameters())

    def read(self, state: Tensor, *, apply_final_norm: bool = True) -> Tensor:
        """A raw state as the head would see it: through all that the model does between its last
        block and the head.

        Without the norm, the rest still applies (projections, scales), since the head's width asks
        for it.
        """
        return self._head_steps(self._backbone_steps(state, norms=apply_final_norm))
