"""The effective weight and bias of an LM head, as plain floating-point tensors.

A head may be more than a parameter: adapted or copied by peft, quantised, or offloaded by
accelerate. `read_head` returns the weight and bias that its forward would use now. Nothing is
stored between calls; call it once a step.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fdd_kernels.hf.offload import is_offloaded, materialised
from fdd_kernels.hf.wrappers import DTensor, refuse_partitioned, require_gathered

_READABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# In peft.tuners.lora; all have get_delta_weight.
_LORA_LINEAR = ("Linear", "Linear8bitLt", "Linear4bit", "TorchaoLoraLinear")


class Head(NamedTuple):
    """A head's effective weight and bias.

    Attributes:
        weight: (V, width); the parameter itself where possible. Gradient flows through it to the
            parameters that train.
        bias: (V,) or None.
        storage: "parameter", "quantised" or "offloaded". Gradient reaches a parameter only.
        requires_grad: whether the stored weight, without adapters, requires gradient.
    """

    weight: Tensor
    bias: Tensor | None
    storage: str
    requires_grad: bool


def read_head(module: nn.Module, name: str, *, split: bool = False) -> Head:
    """Return the effective weight and bias of an LM head.

    Supports modules with a floating-point `weight` and perhaps a `bias`; peft's LoRA and DoRA
    adapters, modules_to_save and trainable tokens; tensors that dequantise themselves (torchao);
    bitsandbytes' 8-bit and 4-bit layers; and each of them offloaded by accelerate.

    Args:
        module: the result of the model's `get_output_embeddings()`.
        name: the model's name in errors.
        split: the weight may be a DTensor, which is returned as it is.

    Raises:
        TypeError: a head of another kind; names it and what to do.
        RuntimeError: the head is sharded over processes.
    """
    if hasattr(module, "modules_to_save"):  # peft: trained copies beside the original
        return read_head(_active_copy(module), name, split=split)
    if hasattr(module, "base_layer"):  # peft: an adapter around a layer
        return _read_adapted(module, name)
    offloaded = is_offloaded(module)
    with materialised(module):
        stored, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(stored, Tensor):
            raise _unreadable(name, module, "no weight")
        (refuse_partitioned if split else require_gathered)(f"the {name}'s head", stored)
        weight = _dequantised(module, stored, name)
    if weight.ndim != 2 or weight.dtype not in _READABLE or weight.is_meta:
        raise _unreadable(
            name,
            module,
            f"a {weight.dtype} weight of shape {tuple(weight.shape)} on {weight.device} "
            f"({type(stored).__name__})",
        )
    storage = "quantised" if weight is not stored else "offloaded" if offloaded else "parameter"
    if storage != "parameter":
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return Head(weight, bias, storage, stored.requires_grad)


def with_logits_bias(head: Head, model: nn.Module) -> Head:
    """Return a head whose bias includes what the model adds to its logits: `logits_bias`."""
    more = logits_bias(model)
    if more is None:
        return head
    more = more.to(head.weight)
    return head._replace(bias=more if head.bias is None else head.bias + more)


def logits_bias(model: nn.Module) -> Tensor | None:
    """Return `final_logits_bias` (V,), which BART and models like it add to their head's output;
    None without one.
    """
    bias = getattr(model, "final_logits_bias", None)
    return bias.flatten() if isinstance(bias, Tensor) else None


def head_digest(weight: Tensor, bias: Tensor | None) -> str:
    """Return the SHA-256 of a head's numbers in float32: the same for a wider dtype of the same
    numbers.
    """
    digest = hashlib.sha256()
    for tensor in (weight, bias):
        if tensor is not None:
            digest.update(repr(tuple(tensor.shape)).encode())
            for part in tensor.detach().split(2**16):
                digest.update(part.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _dequantised(module: nn.Module, stored: Tensor, name: str) -> Tensor:
    """Dequantise a quantised weight; return any other as it is."""
    if isinstance(stored, DTensor):
        return stored
    try:
        if _is_bitsandbytes(stored):
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight

            return dequantize_bnb_weight(stored, state=getattr(module, "state", None))
        if (
            is_traceable_wrapper_subclass(stored)
            or type(stored).dequantize is not Tensor.dequantize
        ):
            return stored.dequantize()
    except (ImportError, NotImplementedError, RuntimeError, TypeError) as error:
        raise _unreadable(
            name, module, f"a {type(stored).__name__} weight, which cannot be dequantised ({error})"
        ) from error
    return stored


def _is_bitsandbytes(stored: Tensor) -> bool:
    """Whether a weight of bitsandbytes' Linear4bit or Linear8bitLt is quantised. Before its first
    move, and in 8-bit training that stores floating point, it is an ordinary parameter.
    """
    kind = type(stored).__name__
    return (kind == "Params4bit" and stored.quant_state is not None) or (
        kind == "Int8Params" and stored.dtype == torch.int8
    )


def _active_copy(module: nn.Module) -> nn.Module:
    """Return the module that peft's ModulesToSaveWrapper passes its input to."""
    active = module.active_adapters[:1]
    if module.disable_adapters or not active or active[0] not in module.modules_to_save:
        return module.original_module
    return module.modules_to_save[active[0]]


def _read_adapted(module: nn.Module, name: str) -> Head:
    """Return W + scaling * B A for each active adapter, rescaled for DoRA: the effective weight of
    peft's own forward.
    """
    if type(module).__name__ not in _LORA_LINEAR or not hasattr(module, "lora_A"):
        raise _unreadable(
            name,
            module,
            f"an adapter that is not LoRA, around a {type(module.base_layer).__name__}",
        )
    if module.disable_adapters and module.merged:
        module.unmerge()  # as its own forward does
    head = read_head(module.base_layer, name)
    if module.disable_adapters or module.merged:
        return head
    weight, bias_change = head.weight, None
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        variant = type(getattr(module, "lora_variant", {}).get(adapter)).__name__
        if variant not in ("NoneType", "DoraLinearVariant"):
            raise _unreadable(name, module, f"an adapter of the kind {variant}")
        dropout = getattr(module.lora_dropout[adapter], "p", 0.0)
        if module.training and dropout:
            warnings.warn(
                f"{name}: lora_dropout={dropout} of the LM head's adapter is not applied: the "
                "loss reads the head as one weight. Set lora_dropout=0 for the head to make this "
                "warning go away",
                stacklevel=2,
            )
        weight, bias_change = _add(module, adapter, head.weight, weight, bias_change, name)
    if bias_change is not None and head.bias is not None:
        bias_change = head.bias + bias_change
    return head._replace(weight=weight, bias=head.bias if bias_change is None else bias_change)


def _add(
    module: nn.Module,
    adapter: str,
    base: Tensor,
    weight: Tensor,
    bias_change: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor | None]:
    """Add one adapter to the weight (V, width) and to the change of the bias (V,); `base` is the
    weight without adapters.
    """
    down, up = module.lora_A[adapter], module.lora_B[adapter]
    for part in (down, up):
        require_gathered(f"the adapter of the {name}'s head", part.weight)
    with materialised(down), materialised(up):
        change = module.get_delta_weight(adapter)
        weight = weight + change
        if up.bias is not None:
            own = up.bias * module.scaling[adapter]
            bias_change = own if bias_change is None else own + bias_change
    if adapter not in module.lora_magnitude_vector:
        return weight, bias_change
    # DoRA scales each row by m / |base + BA|, the norm without gradient (Liu et al. 2024, section
    # 4.3). peft scales the change of earlier adapters too.
    dora = module.lora_magnitude_vector[adapter]
    norm = dora.get_weight_norm(base, change.detach(), scaling=1).detach()
    with materialised(dora):
        factor = dora.weight / norm
    return weight * factor.unsqueeze(1), None if bias_change is None else bias_change * factor


def _unreadable(name: str, module: nn.Module, what: str) -> TypeError:
    return TypeError(
        f"{name}: the LM head is a {type(module).__module__}.{type(module).__name__} with {what}. "
        "Quantised heads are read if they come from torchao or bitsandbytes, adapters on the head "
        "if they are LoRA, DoRA or modules_to_save (peft). Keep the head out of quantisation "
        "(modules_to_not_convert, llm_int8_skip_modules) or of target_modules, or merge the "
        "adapter (merge_and_unload)"
    )
