"""Models that have been given their place: accelerate's device maps and offloading, and quantised
models.

accelerate keeps weights on the CPU or on disk, leaves their modules on the meta device, and brings
them in before a module's forward and out after it, by a hook on the module (`_hf_hook`). What reads
a weight beside the module's forward, or leaves a forward before its end, goes through the same
hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fdd_kernels.hf.wrappers import DTensor


def has_place(model: nn.Module) -> bool:
    """Whether a model must not be moved by `.to(device)`: spread over devices, offloaded, or
    quantised.
    """
    if getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None):
        return True
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module computes: its hook's execution device, otherwise where its first weight is.

    None if FSDP shards every weight: it gathers them where it computes, which need not be where the
    shards are.
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
    """Whether a module's own weights are elsewhere until its hook brings them in."""
    return bool(_hooks(module)) and any(
        parameter.is_meta for parameter in module.parameters(recurse=False)
    )


@contextmanager
def materialised(module: nn.Module) -> Iterator[None]:
    """An offloaded module's own weights in their place, as they are during its forward.

    A tensor that was read inside stays valid; the module is back on the meta device afterwards.
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
    """Let the hooks of the modules around `interrupted` take their weights out, after an exception
    ended their forward.
    """
    path = next(name for name, module in root.named_modules() if module is interrupted)
    while path:
        path = path.rpartition(".")[0]
        around = root.get_submodule(path)
        if _hooks(around):
            around._hf_hook.post_forward(around, None)


def _hooks(module: nn.Module) -> tuple:
    """accelerate's hooks on a module itself."""
    hook = getattr(module, "_hf_hook", None)
    # a SequentialHook has several
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
