"""The parameters that a loss gives no gradient: DistributedDataParallel would wait for theirs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fdd_kernels.hf.wrappers import data_parallel


def parameters_outside(
    model: nn.Module, idle: Iterable[nn.Module], unused: Iterable[nn.Parameter] = ()
) -> list[str]:
    """Return the names of the parameters that train and belong to modules in `idle` only.

    Args:
        unused: parameters of `idle` that other modules hold too, but do not use.
    """
    idle = {module for part in idle for module in part.modules()}
    if not idle:
        return []
    reached = {
        id(p)
        for module in model.modules()
        if module not in idle
        for p in module.parameters(recurse=False)
    } - set(map(id, unused))
    return [
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached
    ]


def waits_for_all(model: nn.Module) -> bool:
    """Whether `model` is DistributedDataParallel that waits for every gradient of a backward pass
    to come.
    """
    wrapper = data_parallel(model)
    is_ddp = isinstance(wrapper, nn.parallel.DistributedDataParallel)
    return (
        is_ddp
        and torch.is_grad_enabled()
        and not (wrapper.find_unused_parameters or wrapper.static_graph)
    )


def is_static(model: nn.Module) -> bool:
    """Whether `model` is DistributedDataParallel that expects the gradients of its first backward
    pass in every other.
    """
    return getattr(data_parallel(model), "static_graph", False) and torch.is_grad_enabled()


def refuse_changes(names: Iterable[Sequence[str]]) -> None:
    """Raise ValueError if other parameters are without gradient at one step than at another.

    Args:
        names: of those parameters, at each step at which they may change.
    """
    if len(set(map(tuple, names))) > 1:
        raise ValueError(
            "static_graph=True, but schedules or stages leave out other parameters at one step "
            "than at another: wrap the student with find_unused_parameters=True instead"
        )


def refuse_unreached(names: Sequence[str], why: str) -> None:
    """Raise ValueError if there are parameters that DistributedDataParallel would wait for.

    Args:
        names: of the parameters.
        why: the options that leave them out, for the error.
    """
    if names:
        raise ValueError(
            f"{len(names)} parameters that train, {names[0]} for one, get no gradient from this "
            f"loss ({why}), and DistributedDataParallel would wait for it: wrap the student with "
            "find_unused_parameters=True (TrainingArguments(ddp_find_unused_parameters=True), "
            "accelerate's DistributedDataParallelKwargs, Lightning's "
            'strategy="ddp_find_unused_parameters_true"), or freeze them with '
            "requires_grad_(False) before"
        )
