"""Models with a placement of their own: accelerate's device maps and offloading, and quantisation.

accelerate stores weights on the CPU or on disk and leaves the modules on the meta device. A hook on
the module (`_hf_hook`) loads them before its forward and removes them after it. Code that uses a
weight outside of the forward, or ends a forward early, calls the same hook. accelerate's own
`has_offloaded_params` and `align_module_device` do not see a module with several hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fdd_kernels.hf.wrappers import DTensor


def has_place(model: nn.Module) -> bool:
    """Whether `.to(device)` must not move a model: it is spread over devices, offloaded or
    quantised.
    """
    if getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None):
        return True
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device that a module computes on: its hook's execution device, otherwise that of
    its first weight.

    None if FSDP shards every weight: it may gather them on another device than that of the shards.
    """
    for part in module.modules():
        for hook in _hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
        for parameter in part.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                return parameter.device
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's own weights are offloaded and not loaded now."""
    return bool(_hooks(module)) and any(
        parameter.is_meta for parameter in module.parameters(recurse=False)
    )


@contextmanager
def materialised(module: nn.Module) -> Iterator[None]:
    """Load an offloaded module's own weights, as during its forward; afterwards the module is back
    on the meta device. Tensors that were taken inside stay valid.
    """
    if not is_offloaded(module):
        yield
        return
    module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        module._hf_hook.post_forward(module, None)


def end_forward(root: nn.Module, interrupted: nn.Module) -> None:
    """Run the post-forward hooks of all modules around `interrupted`, after an exception ended
    their forward: they remove loaded weights.
    """
    path = next(name for name, module in root.named_modules() if module is interrupted)
    while path:
        path = path.rpartition(".")[0]
        around = root.get_submodule(path)
        if _hooks(around):
            around._hf_hook.post_forward(around, None)


def _hooks(module: nn.Module) -> tuple:
    """Return accelerate's hooks on a module itself; a SequentialHook has several."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
