"""Checkpoints of a Trainer that count as good only after the next loss was finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fdd_kernels.common.atomic import remove_directory
from fdd_kernels.integrations.checkpoints import NOT_FINITE, PREFIX, AtomicCheckpoints, checkpoints
from fdd_kernels.integrations.finite import NonFiniteLossError, all_finite, require_finite


class ProvenCheckpoints(AtomicCheckpoints):
    """`AtomicCheckpoints` that remove old checkpoints only when the newest has proved good.

    A finite loss proves the weights that gave it. Until then `save_total_limit` waits. If the loss
    is not finite, the checkpoint of these weights is renamed, and nothing resumes from it.
    """

    # The run's folder, while its newest checkpoint has not proved good.
    _unproven: Path | None = None

    def _rotate(self, run: Path) -> None:
        self._unproven = run  # `_remove_oldest` does it, after the next finite loss

    def _remove_oldest(self) -> None:
        run, self._unproven = self._unproven, None
        if run is not None:
            super()._rotate(run)

    def _stop(self, when: str, means: Mapping[str, float | Tensor]) -> None:
        """Set the checkpoint of the weights aside and raise NonFiniteLossError."""
        require_finite(when, means, kept=self._put_last_aside())

    def _put_last_aside(self) -> str:
        """Rename the checkpoint of the current weights, if this run wrote one; say which checkpoint
        is left to resume from.
        """
        run = Path(self._get_output_dir(None))
        bad = run / f"{PREFIX}{self.state.global_step}"
        aside = bad.with_name(bad.name + NOT_FINITE)
        self.accelerator.wait_for_everyone()
        if self._unproven is not None and bad.is_dir():
            if aside.exists():
                remove_directory(aside)
            bad.rename(aside)
        self.accelerator.wait_for_everyone()
        good = [folder.name for folder in checkpoints(run) if folder != bad]
        left = f"{good[-1]} is the last good checkpoint" if good else "nothing was saved before"
        renamed = f" ({bad.name}, of these weights, is now {aside.name})"
        return left + (renamed if aside.is_dir() else "")

    def train(self, *args, **kwargs):
        """As `AtomicCheckpoints.train`.

        Raises:
            NonFiniteLossError: a loss, or in the end a weight, is not finite; says which checkpoint
                is the last good one.
        """
        result = super().train(*args, **kwargs)
        finite = torch.tensor(float(all_finite(self.model.parameters())), device=self.args.device)
        if self.accelerator.reduce(finite, "sum") < self.accelerator.num_processes:
            raise NonFiniteLossError(
                f"the student's weights after step {self.state.global_step} are not finite; "
                f"{self._put_last_aside()}"
            )
        self._remove_oldest()
        return result
