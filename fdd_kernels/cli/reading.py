"""Read text into windows with a progress bar."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fdd_kernels.common.progress import Activity
from fdd_kernels.common.sizes import show
from fdd_kernels.data.sources import Source, open_source
from fdd_kernels.data.windows import Windows, load_windows


def read_windows(
    data: str | Path | Source,
    tokenizer,
    console: Console,
    *,
    max_length: int,
    eval_fraction: float,
    seed: int,
    unshared: frozenset[int] = frozenset(),
    split: str = "training",
) -> Windows:
    """Call `load_windows` with a progress bar; print what was read and what was left out.

    Args:
        split: what `Windows.train` is called in messages.
    """
    source = open_source(data)
    with Activity(
        console, "reading text", source.size, count=show if source.files else str
    ) as activity:
        windows = load_windows(
            source,
            tokenizer,
            max_length=max_length,
            eval_fraction=eval_fraction,
            seed=seed,
            unshared=unshared,
            advance=lambda amount: activity.update(activity.done + amount),
        )
    console.print(
        f"{windows.documents} documents: {len(windows.train)} {split} windows of at most "
        f"{max_length} tokens ({windows.train_tokens} tokens)"
        + (f", {len(windows.held_out)} validation windows" if split == "training" else "")
    )
    if windows.without_labels:
        console.print(
            f"{len(windows.without_labels)} documents have nothing to learn within {max_length} "
            f"tokens and are left out, for example {windows.without_labels[0]}"
        )
    if windows.not_shared:
        console.print(
            f"{len(windows.not_shared)} documents hold tokens that only one model has, and their "
            f"windows with them are left out, for example {windows.not_shared[0]}"
        )
    return windows
