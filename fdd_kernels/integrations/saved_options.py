"""The options of a training in a Trainer's checkpoints, and the state of those that change."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from fdd_kernels.integrations.saved_config import config_record, warn_of_another_config
from fdd_kernels.integrations.trained_projection import TrainedProjection

# In a checkpoint, the options of its training.
CONFIG_FILE = "fdd_config.json"
# In a checkpoint, the state of what changes during training: see `Distiller.state_dict`.
STATE_FILE = "fdd_state.json"


class SavedOptions(TrainedProjection):
    """`TrainedProjection` that also saves the config of `self.distiller` and the state of its
    options that change. A training that resumes continues with that state, and is warned of options
    that are not those of the checkpoint.
    """

    def _write_more(self, folder: Path) -> None:
        super()._write_more(folder)
        found = {CONFIG_FILE: config_record(self.distiller.config)}
        if self.distiller.config.changes:
            found[STATE_FILE] = self.distiller.state_dict()  # of all processes
        for name, content in found.items() if self.args.should_save else ():
            (folder / name).write_text(json.dumps(content, allow_nan=False) + "\n", "utf-8")

    def _missing(self, folder: Path) -> list[str]:
        missing, changes = super()._missing(folder), self.distiller.config.changes
        if changes and not (folder / STATE_FILE).is_file():
            missing.append(f"{STATE_FILE} (which a training with {', '.join(changes)} writes)")
        return missing

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._follow_model()
        self._compare_options(Path(checkpoint))
        state = Path(checkpoint) / STATE_FILE
        if self.distiller.config.changes:
            self.distiller.load_state_dict(json.loads(state.read_text("utf-8")))
        elif state.is_file():
            warnings.warn(
                f"{state} is of a training with options that change, which this fdd_config does "
                "not have: it is left out",
                stacklevel=2,
            )

    def _compare_options(self, checkpoint: Path) -> None:
        """Warn of options of the loss that are not those of the checkpoint."""
        config = checkpoint / CONFIG_FILE
        saved = json.loads(config.read_text("utf-8")) if config.is_file() else None
        warn_of_another_config(str(checkpoint), saved, self.distiller.config)
