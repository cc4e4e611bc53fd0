"""What an LM head multiplies by, as plain floating-point tensors.

A head may be more than a parameter: adapted or copied by peft, quantised, or offloaded by
accelerate. `read_head` gives the weight and bias that its forward would use now. Nothing is kept
from one reading to the next: each step reads once.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fdd_kernels.hf.offload import is_offloaded, materialised
from fdd_kernels.hf.wrappers import DTensor, refuse_partitioned, require_gathered

_READABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LORA_LINEAR = (
    "Linear",
    "Linear8bitLt",
    "Linear4bit",
    "TorchaoLoraLinear",
)  # in peft.tuners.lora, all with get_delta_weight


class Head(NamedTuple):
    """A head as its forward would use it.

    Attributes:
        weight: (V, width); the parameter itself where the head is one. Gradient flows through it to
            whatever trains.
        bias: (V,) or None.
        storage: "parameter", "quantised" or "offloaded". Gradient cannot reach a weight that is not
            a parameter.
        requires_grad: whether the stored weight, without adapters, asks for gradient.
    """

    weight: Tensor
    bias: Tensor | None
    storage: str
    requires_grad: bool


def read_head(module: nn.Module, name: str, *, split: bool = False) -> Head:
    """The effective weight and bias of an LM head.

    Read are: modules with a floating-point `weight` and perhaps a `bias`; peft's LoRA and DoRA
    adapters, modules_to_save and trainable tokens; tensors that dequantise themselves (torchao);
    bitsandbytes' 8-bit and 4-bit layers; and each of them offloaded by accelerate.

    Args:
        module: what the model's `get_output_embeddings()` gives.
        name: how errors call the model.
        split: the weight may be a DTensor, which is given as it is.

    Raises:
        TypeError: a head of another kind, by its name, and what to do.
        RuntimeError: the head is spread over processes.
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


def _dequantised(module: nn.Module, stored: Tensor, name: str) -> Tensor:
    """A quantised weight in floating point; any other as it is."""
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
    """A weight of bitsandbytes' Linear4bit or Linear8bitLt that has been quantised; before, and
    where 8-bit training keeps it in floating point, it is a parameter like any other.
    """
    kind = type(stored).__name__
    return (kind == "Params4bit" and stored.quant_state is not None) or (
        kind == "Int8Params" and stored.dtype == torch.int8
    )


def _active_copy(module: nn.Module) -> nn.Module:
    """The module that peft's ModulesToSaveWrapper passes its input to."""
    active = module.active_adapters[:1]
    if module.disable_adapters or not active or active[0] not in module.modules_to_save:
        return module.original_module
    return module.modules_to_save[active[0]]


def _read_adapted(module: nn.Module, name: str) -> Head:
    """W + scaling * B A for each active adapter, and DoRA's rescaling of it: what peft's own
    forward multiplies by.
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
                f"{name}: lora_dropout={dropout} of the LM head's adapter is not applied: the loss "
                "reads the head as one "
                "weight. Set lora_dropout=0 for the head to make this warning go away",
                stacklevel=2,
            )
        weight, bias_change = _add(module, adapter, head.weight, weight, bias_change, name)
    bias = (
        head.bias
        if bias_change is None
        else bias_change
        if head.bias is None
        else head.bias + bias_change
    )
    return head._replace(weight=weight, bias=bias)


def _add(
    module: nn.Module,
    adapter: str,
    base: Tensor,
    weight: Tensor,
    bias_change: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor | None]:
    """The weight (V, width) and the change of the bias (V,) with one adapter more; `base` is the
    weight without any.
    """
    down, up = module.lora_A[adapter], module.lora_B[adapter]
    for part in (down, up):
        require_gathered(f"the adapter of the {name}'s head", part.weight)
    with materialised(down), materialised(up):
        change = module.get_delta_weight(adapter)
        weight = weight + change
        if up.bias is not None:
            bias_change = up.bias * module.scaling[adapter] + (
                0 if bias_change is None else bias_change
            )
    if adapter not in module.lora_magnitude_vector:
        return weight, bias_change
    # DoRA scales each row by m / |base + BA|, with the length held constant, as the paper has it.
    # peft scales what adapters before it added, too.
    dora = module.lora_magnitude_vector[adapter]
    length = dora.get_weight_norm(base, change.detach(), scaling=1).detach()
    with materialised(dora):
        factor = dora.weight / length
    return weight * factor.unsqueeze(1), None if bias_change is None else bias_change * factor


def _unreadable(name: str, module: nn.Module, what: str) -> TypeError:
    return TypeError(
        f"{name}: the LM head is a {type(module).__module__}.{type(module).__name__} with {what}. "
        "Quantised heads are read if "
        "they come from torchao or bitsandbytes, adapters on the head if they are LoRA, DoRA or "
        "modules_to_save (peft). Keep "
        "the head out of quantisation (modules_to_not_convert, llm_int8_skip_modules) or of "
        "target_modules, or merge the "
        "adapter (merge_and_unload)"
    )
