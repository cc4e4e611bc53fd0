"""Find a language model's blocks, and what it does between the last block and its head.

No model family is known here. What follows the last block (norms, projections, scales, the
transform of a head) is recorded in one forward pass over two tokens (`tail.py`); soft cap and scale
are measured by replacing the head's output by known numbers (`transform.py`). `ModelReader` then
compares the result with the model's own logits of other tokens, and refuses a model that does
something else.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fdd_kernels.hf.heads import logits_bias
from fdd_kernels.hf.tail import Recording, Steps
from fdd_kernels.hf.tasks import Task
from fdd_kernels.hf.transform import (
    PROBE,
    LogitTransform,
    configured_transform,
    measured_transform,
    probing,
)
from fdd_kernels.hf.wrappers import refuse_partitioned

REMEDY = (
    "Call fused_fdd_loss yourself with the hidden states (the last one after the final norm) and "
    "the head's weight, bias, soft cap and logit scale"
)
SUPPORTED = (
    "Supported are models that predict tokens: transformers' causal LMs, masked LMs, "
    "encoder-decoders, and vision-language models that write text. Not supported are classifiers "
    "and base models without a head"
)
# Prefixes of the names of inputs other than text.
_MEDIA = ("pixel_", "image_", "video_", "audio_", "input_features", "input_audio")
# A model is no causal LM if a prediction changes with later tokens by this part of its largest
# logit.
_LOOKING_AHEAD = 0.02


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model that give its states.

    Attributes:
        backbone: the module to run: the base model, or the model itself.
        blocks: its blocks, in the order of their calls.
        backbone_steps: from a block's state to the backbone's output.
        head_steps: from the backbone's output to the head's input.
        ends_at_head: the backbone is the whole model, and its forward ends where the head begins.
    """

    backbone: nn.Module
    blocks: nn.ModuleList
    backbone_steps: Steps
    head_steps: Steps
    ends_at_head: bool

    def __str__(self) -> str:
        steps = (self.backbone_steps, self.head_steps)
        return f"{steps[0]} and {steps[1]}" if steps[1].steps else f"{steps[0]}"


def find_head(name: str, model: nn.Module) -> nn.Module:
    """Return the LM head of a model.

    Raises:
        TypeError: it has none with a weight (V, width).
        RuntimeError: DeepSpeed ZeRO-3 has partitioned it.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    weight = getattr(head, "weight", None)
    refuse_partitioned(f"the {name}'s head", weight)
    if head is None or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TypeError(
            f"{name}: {type(model).__name__}.get_output_embeddings() gives {type(head).__name__}, "
            "but an LM head with a weight of shape (vocabulary, width) is needed. Pass a causal "
            f"LM, a masked LM or an encoder-decoder. {SUPPORTED}. {REMEDY}"
        )
    return head


def require_lens(name: str, model: nn.Module, task: Task) -> None:
    """Raise TypeError for a model whose head gives no distribution over a vocabulary, and for an
    encoder-decoder of sound or images.
    """
    if not task.has_lens:
        raise TypeError(
            f"{name}: {type(model).__name__} is of the task {task}. {SUPPORTED}. {REMEDY}"
        )
    takes = getattr(model, "main_input_name", "input_ids")
    if task.name == "seq2seq_lm" and takes != "input_ids":
        raise TypeError(
            f"{name}: {type(model).__name__} is an encoder-decoder of {takes}: only those from "
            f"text to text are supported. {REMEDY}"
        )


def own_logits(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Return the logits that the model's own forward computes, without making a cache.

    Raises:
        TypeError: it gives none.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    options = {"use_cache": False} if takes_any or "use_cache" in parameters else {}
    output = model(**tokens, **options)
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise TypeError(
            f"{type(model).__name__} gives a {type(output).__name__} without logits: load its "
            "weights with the class of one task, such as AutoModelForMaskedLM"
        )
    return output.logits


def require_causal(name: str, model: nn.Module, logits: Tensor, eps: float) -> None:
    """Refuse a model that transformers does not list as a causal LM and that looks ahead.

    Args:
        logits: (2, 3, V) of two rows of tokens that differ in their last token alone.
        eps: of the head's dtype.

    Warns:
        UserWarning: a model for causal LM whose config lets it look ahead.

    Raises:
        TypeError: a model whose predictions change with later tokens.
    """
    from transformers.models.auto import modeling_auto as auto

    causal = {
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    }
    kind, largest = type(model).__name__, logits.abs().max()
    bound = max(_LOOKING_AHEAD, 8 * eps) * largest
    looks_ahead = (logits[0, :2] - logits[1, :2]).abs().max() > bound
    if looks_ahead and kind not in causal:
        raise TypeError(
            f"{name}: {kind} is no causal LM (its predictions change with the tokens after them), "
            f"and transformers lists it under no other task. {SUPPORTED}. {REMEDY}"
        )
    if looks_ahead:
        warnings.warn(
            f"{name}: the predictions of {kind}, as its config is (is_decoder, attn_type), change "
            "with the tokens after them. It is compared all the same, but at every position it "
            "has seen what it is to predict",
            stacklevel=2,
        )


def observe(
    name: str, model: nn.Module, head: nn.Module, tokens: dict[str, Tensor], vocabulary: int
) -> tuple[Recording, LogitTransform]:
    """Run one forward pass to record the steps between blocks and head, and to measure soft cap
    and scale.

    Args:
        tokens: a batch of two tokens.

    Raises:
        TypeError: no list of modules that may be the model's blocks.
        ValueError: the model does something else to its head's output.
    """
    # Neither on mps, which has no float64, nor with less room than numbers. The comparison with the
    # model's own logits follows in any case.
    device = tokens["input_ids"].device
    measurable = device.type != "mps" and 2 * vocabulary >= len(PROBE)
    base = getattr(model, "base_model", None)
    lists = lists_of_blocks(name, *_stack(model))

    def record(probed: contextlib.AbstractContextManager) -> tuple[Recording, list, Tensor]:
        recording = Recording(model, head, lists, None if base is model else base)
        with recording.watching(), probed as seen:
            return recording, seen, own_logits(model, tokens)

    try:
        recording, seen, logits = record(
            probing(head) if measurable else contextlib.nullcontext([])
        )
    except RuntimeError:  # what follows the module does not take float64: it is no head
        recording, seen, logits = record(contextlib.nullcontext([]))
    configured = configured_transform(model.config)
    if len(seen) != 1 or seen[0].shape != logits.shape:
        return recording, configured
    probe, logits, more = seen[0].flatten().cpu(), logits.double(), logits_bias(model)
    if more is not None:
        logits = logits - more.to(logits)
    logits = logits.flatten().cpu()
    transform = measured_transform(configured, probe, logits)
    if transform is None:
        raise ValueError(
            f"{name}: {type(model).__name__} turns {PROBE} at its head into "
            f"{logits[: len(PROBE)].tolist()}, which is no scale and soft cap (read from its "
            f"config: {configured}). {REMEDY}"
        )
    return recording, transform


def observe_backbone(name: str, base: nn.Module, tokens: dict[str, Tensor]) -> Recording:
    """Run a base model to record the steps between its blocks and its output.

    Raises:
        TypeError: no list of modules that may be the model's blocks.
    """
    recording = Recording(base, nn.Identity(), lists_of_blocks(name, *_stack(base)), base)
    with recording.watching():
        base(**tokens)
    return recording


def lists_of_blocks(name: str, stack: nn.Module, depth: int | None) -> list[nn.ModuleList]:
    """Return every list of `depth` modules; without one, outermost lists whose length divides the
    depth: some models count the parts of their blocks, and some blocks run several times. ALBERT's
    groups of blocks run unequally often where it does not.

    Args:
        stack: the module that has the blocks.

    Raises:
        TypeError: there is none.
    """
    lists = [module for module in stack.modules() if isinstance(module, nn.ModuleList)]
    fitting = [blocks for blocks in lists if len(blocks) == depth]
    if not fitting and isinstance(depth, int):
        inner = {id(m) for blocks in lists for m in blocks.modules() if m is not blocks}
        outer = [blocks for blocks in lists if id(blocks) not in inner and len(blocks)]
        groups = getattr(getattr(stack, "config", None), "num_hidden_groups", None)
        fitting = [b for b in outer if depth % len(b) == 0 or len(b) == groups < depth]
    if not fitting:
        raise TypeError(
            f"{name}: looked in {type(stack).__name__} for a ModuleList of "
            f"config.num_hidden_layers={depth} blocks, found lists of "
            f"{[len(blocks) for blocks in lists]}. {REMEDY}"
        )
    return fitting


def _stack(model: nn.Module) -> tuple[nn.Module, int | None]:
    """Return the module that has the model's blocks, and how many there are by the config: those of
    the decoder, if it has an encoder too.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        decoder = model.get_decoder()
        names = (name for name in ("num_decoder_layers", "decoder_layers") if hasattr(config, name))
        own = next(names, None)
        return decoder, getattr(config, own) if own else decoder.config.num_hidden_layers
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return model, getattr(config, "num_hidden_layers", None)


def candidates(
    model: nn.Module, recording: Recording
) -> Iterator[tuple[nn.ModuleList, ModelParts | None]]:
    """Yield each list of blocks, the last to run first, and the parts of a model with these blocks;
    None if the head's input is computed from more than their last state.
    """
    depth = _stack(model)[1]
    for listed, source in reversed(recording.ended.items()):
        calls = recording.calls[listed]
        # Blocks that share their weights run as often as the model is deep.
        blocks = nn.ModuleList(calls) if len(listed) < len(calls) == depth else listed
        backbone = recording.steps(source, recording.output)
        # A head that is not called as a module leaves no record: assume no step before it.
        after = (
            Steps()
            if recording.head_input is None
            else recording.steps(recording.output, recording.head_input)
        )
        if backbone is not None and after is not None and _base_takes_media(model):
            yield blocks, ModelParts(model.base_model, blocks, backbone, after, ends_at_head=False)
            continue
        steps = recording.steps(source, recording.head_input)
        if steps is None:
            yield blocks, None
        else:
            yield blocks, ModelParts(model, blocks, steps, Steps(), ends_at_head=True)


def _base_takes_media(model: nn.Module) -> bool:
    """Whether the base model takes all inputs beside text that the model takes; otherwise the model
    processes them first.
    """
    own, base = (inspect.signature(m.forward).parameters for m in (model, model.base_model))
    return not any(name.startswith(_MEDIA) and name not in base for name in own)
