"""Groups of positions: all of them, one sequence each, or those with the same id."""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = ("all", "sequence")


def check_groups(groups: Tensor | str, leading_shape: tuple[int, ...], device) -> None:
    """Refuse what does not name groups of the positions of `leading_shape`.

    Raises:
        TypeError, ValueError: naming the value and what is possible.
    """
    choices = f"{' or '.join(map(repr, GROUPS))}, or integers of shape {leading_shape}"
    if isinstance(groups, str):
        if groups not in GROUPS:
            raise ValueError(f"groups={groups!r} is not {choices}")
        return
    if not isinstance(groups, Tensor):
        raise TypeError(f"groups must be {choices}, got {type(groups).__name__}")
    if groups.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"groups has dtype {groups.dtype}: pass int64 or int32 ids, one a position")
    if tuple(groups.shape) != leading_shape:
        raise ValueError(
            f"groups has shape {tuple(groups.shape)}: pass one id for each position, "
            f"{leading_shape}"
        )
    if groups.device != device:
        raise ValueError(f"groups is on {groups.device} and the features on {device}: move it")


def split_into_groups(
    tensors: list[Tensor | None], positions: int, groups: Tensor | str
) -> list[tuple[Tensor | None, ...]]:
    """Split each tensor (*leading shape, ...) into the rows of each group; None stays None.

    `positions` is the number of leading dimensions. Ids need a look at their numbers, for which a
    host waits for the device.
    """
    present = [t for t in tensors if t is not None]
    length = present[0].shape[positions - 1]
    rows = [t.flatten(0, positions - 1) for t in present]
    if isinstance(groups, str):
        parts = [[r] if groups == "all" else r.split(length) for r in rows]
    else:
        order = groups.reshape(-1).argsort(stable=True)
        sizes = groups.reshape(-1)[order].unique_consecutive(return_counts=True)[1].tolist()
        parts = [r[order].split(sizes) for r in rows]
    split = iter(parts)
    columns = [[None] * len(parts[0]) if t is None else next(split) for t in tensors]
    return list(zip(*columns))
