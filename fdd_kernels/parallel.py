"""Running a function inside the forward of a data-parallel model, where its gradients are made to be exchanged.

DistributedDataParallel prepares the exchange of gradients in its own forward, and FSDP2 gathers the parameters there; a loss
computed from parts of the model beside it would train every process on its own, or meet parameters that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
else:
    FSDPModule = DTensor = ()


def data_parallel(model: nn.Module) -> nn.Module | None:
    """The DistributedDataParallel or FSDP2 module that `model` is, also under torch.compile; None for any other."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, (nn.parallel.DistributedDataParallel, FSDPModule)) else None


@contextmanager
def inside_forward(model: nn.Module, function: Callable) -> Iterator[Callable]:
    """`function`, to be called as often as wanted; if `model` is data-parallel, from inside its forward."""
    wrapper = data_parallel(model)
    if wrapper is None:
        yield function
        return
    inner = wrapper.module if isinstance(wrapper, nn.parallel.DistributedDataParallel) else wrapper
    own = inner.__dict__.get("forward")
    inner.forward = function
    try:
        yield wrapper
    finally:
        if own is None:
            del inner.forward
        else:
            inner.forward = own


def require_gathered(name: str, parameter) -> None:
    """Refuse a head whose rows are spread over processes.

    Raises:
        RuntimeError: says how to keep it in one piece.
    """
    if isinstance(parameter, DTensor):
        raise RuntimeError(
            f"{name} is a DTensor with placements {parameter.placements}: the loss needs it whole. Make the Distiller before "
            "fully_shard, do not fully_shard the LM head by itself (the call on the whole model gathers it during "
            "forward), and pass the sharded model as `distiller(batch, student=model)`"
        )
