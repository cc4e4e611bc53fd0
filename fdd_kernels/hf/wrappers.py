"""Wrappers around models: run the loss inside a data-parallel forward, take local parts of a head.

DistributedDataParallel prepares the all-reduce of gradients in its own forward, and FSDP2 gathers
the parameters there. A loss that is computed outside of it would not reduce gradients, or would
find no parameters. So the loss runs inside that forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Shard
else:
    FSDPModule = FullyShardedDataParallel = DTensor = ()


def refuse_flattened(model: nn.Module) -> None:
    """Refuse a model under FSDP1.

    Raises:
        TypeError: naming what to use instead.
    """
    if isinstance(model, FullyShardedDataParallel):
        raise TypeError(
            "FullyShardedDataParallel (FSDP1) flattens parameters, and the loss cannot find the "
            "head among them: use FSDP2 (torch.distributed.fsdp.fully_shard; in accelerate "
            "fsdp_version=2) or DistributedDataParallel"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the transformers model inside torch.compile, DistributedDataParallel and peft.

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
                    "prefix and p-tuning put virtual tokens before the text, and positions of "
                    "student and teacher would no longer match. Use an adapter that changes "
                    "weights, such as LoRA"
                )
            model = model.get_base_model()
        else:
            return model


def data_parallel(model: nn.Module) -> nn.Module | None:
    """Return `model`, also inside torch.compile, if it is DistributedDataParallel or FSDP2; else
    None.
    """
    model = getattr(model, "_orig_mod", model)
    refuse_flattened(model)
    return model if isinstance(model, (nn.parallel.DistributedDataParallel, FSDPModule)) else None


def all_processes() -> torch.distributed.ProcessGroup | None:
    """Return the group of all processes of this run; None if there is one alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = torch.distributed.group.WORLD
    return group if group.size() > 1 else None


@contextmanager
def inside_forward(model: nn.Module, function: Callable) -> Iterator[Callable]:
    """Yield a callable that runs `function`, inside the forward of a data-parallel `model`."""
    wrapper = data_parallel(model)
    if wrapper is None:
        yield function
        return
    inner = wrapper.module if isinstance(wrapper, nn.parallel.DistributedDataParallel) else wrapper
    own = inner.forward

    def inside(*args, **kwargs):
        with forward_replaced(inner, own):  # the function may run the whole model
            return function(*args, **kwargs)

    with forward_replaced(inner, inside):
        yield wrapper


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Replace a module's forward; its hooks still run."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode, and without the autocast that accelerate's mixed precision
    has put around its forward: checks compare its output with its parts, which have none. All is as
    before afterwards.
    """
    training = [module for module in model.modules() if module.training]
    own = model.__dict__.get("_original_forward", model.forward)  # accelerate's name
    model.eval()
    try:
        with forward_replaced(model, own):
            yield
    finally:
        for module in training:
            module.training = True


def require_gathered(name: str, parameter) -> None:
    """Refuse a head whose rows are sharded over processes.

    Raises:
        RuntimeError: says how to have it whole.
    """
    if isinstance(parameter, DTensor):
        raise RuntimeError(
            f"{name} is a DTensor with placements {parameter.placements}: the loss needs it whole. "
            "Under FSDP2, make the Distiller before fully_shard, do not fully_shard the LM head by "
            "itself (the call on the whole model gathers it during forward), and pass the sharded "
            "model as `distiller(batch, student=model)`. If tensor parallelism has split its rows, "
            "so that all processes of the group see the same batch, pass Distiller(..., "
            "vocab_group=group)"
        )
    refuse_partitioned(name, parameter)


def refuse_partitioned(name: str, parameter) -> None:
    """Refuse a head that DeepSpeed ZeRO-3 has partitioned and not gathered: it has a `ds_id` and no
    elements.

    Raises:
        RuntimeError: says how to gather it.
    """
    if hasattr(parameter, "ds_id") and parameter.numel() == 0:
        raise RuntimeError(
            f"{name} is partitioned by DeepSpeed ZeRO-3, and none of it is here: make the "
            "Distiller before deepspeed.initialize, and keep the partitioned heads gathered for "
            "both passes: `with deepspeed.zero.GatheredParameters([head.weight]): terms = "
            "distiller(...); engine.backward(terms.loss)`"
        )


def own_rows(name: str, head: Tensor | None, group, vocabulary: int) -> Tensor | None:
    """Return this process's rows of a head's weight or bias under vocabulary parallelism.

    Of a DTensor split over its rows they are the local part. Of a tensor that is whole on every
    process they are the rows that the same split of `vocabulary` rows gives, so that both models'
    shards match.

    Raises:
        RuntimeError: a DTensor on other processes, or in another layout; a whole head that needs a
            gradient.
    """
    if head is None:
        return None
    if isinstance(head, DTensor):
        mesh = head.device_mesh
        ranks = torch.distributed.get_process_group_ranks(group)
        if mesh.ndim != 1 or mesh.mesh.tolist() != ranks or tuple(head.placements) != (Shard(0),):
            raise RuntimeError(
                f"{name} is a DTensor on {mesh} with placements {head.placements}, but vocab_group "
                f"has the ranks {ranks}: its rows must be split over that group alone (Shard(0) on "
                "a mesh of one dimension)"
            )
        return head.to_local()
    if torch.is_grad_enabled() and head.requires_grad:
        raise RuntimeError(
            f"{name} is whole on every process of vocab_group and requires grad, but each would "
            "get the gradient of its own rows alone: split it (parallelize_module with "
            "ColwiseParallel), freeze it, or set FDDConfig(train_head=False)"
        )
    rows = -(-vocabulary // group.size())
    return head[group.rank() * rows : (group.rank() + 1) * rows]


def whole(tensor: Tensor) -> Tensor:
    """Gather a DTensor from all processes; return any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
