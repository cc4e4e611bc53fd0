"""Atomic checkpoints of a transformers Trainer: complete or absent, also after a kill or a full
disk.

Trainer writes a checkpoint file by file under its final name, removes old ones file by file, and
resumes from the highest number. After a kill it may resume without optimizer state, with other
random numbers, or fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from fdd_kernels.common.atomic import (
    UNFINISHED,
    atomic_directory,
    clear_unfinished,
    remove_directory,
)
from fdd_kernels.integrations.finite import as_json

PREFIX = "checkpoint-"
# Suffix of a checkpoint whose weights give a loss that is not finite: nothing resumes from it.
NOT_FINITE = "-not-finite"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; `problem` says which, why, and what is left."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(
            f"{problem}. Make room, then train(resume_from_checkpoint=True) resumes from the last "
            "complete one"
        )


def checkpoints(run: Path) -> list[Path]:
    """Return the folders checkpoint-N of a run, by step."""
    folders = [
        path
        for path in run.glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdigit() and path.is_dir()
    ]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(PREFIX)))


def last_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint of the highest step, or None."""
    return next(reversed(checkpoints(run)), None)


class AtomicCheckpoints:
    """Mixin for a `transformers.Trainer`: write and remove checkpoints atomically, and resume from
    complete ones only.
    """

    # The folder that Trainer writes into while a checkpoint is unfinished.
    _writing: Path | None = None

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._writing is None else str(self._writing)

    def _save_checkpoint(self, model, trial) -> None:
        """Write checkpoint-N under another name and rename it; then remove checkpoints beyond
        save_total_limit.

        Raises:
            CheckpointError: it could not be written; earlier ones are intact.
        """
        run = Path(self._get_output_dir(trial))
        target = run / f"{PREFIX}{self.state.global_step}"
        folder = run / UNFINISHED / target.name
        try:
            # One process (with save_on_each_node one per node) makes and renames the folder; all
            # write into it.
            with atomic_directory(target) if self.args.should_save else contextlib.nullcontext():
                self.accelerator.wait_for_everyone()
                self._writing = folder.parent
                super()._save_checkpoint(model, trial)
                self._write_more(folder)
                self._name_best_checkpoint(target)
                if self.args.should_save:
                    self._save_state(folder / TRAINER_STATE_NAME)
                self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            last = last_checkpoint(run)
            left = "nothing was saved before" if last is None else f"{last.name} is complete"
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise CheckpointError(f"{target} could not be written ({reason}); {left}") from error
        finally:
            self._writing = None
        if self.args.should_save:
            self._rotate(run)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _write_more(self, folder: Path) -> None:
        """Write further files into the folder of an unfinished checkpoint. All processes call it
        together, those too that write nothing.
        """

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploads run in the background: do not start one from a folder that will be renamed.
        if self._writing is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_state(self) -> None:
        """Write the trainer's state as valid JSON."""
        if self.is_world_process_zero():
            self._save_state(Path(self.args.output_dir) / TRAINER_STATE_NAME)

    def _save_state(self, file: Path) -> None:
        """Write the trainer's state, with null for infinities and NaN, which JSON does not have."""
        numbers = {
            name: as_json(getattr(self.state, name)) for name in ("log_history", "best_metric")
        }
        dataclasses.replace(self.state, **numbers).save_to_json(str(file))

    def _name_best_checkpoint(self, target: Path) -> None:
        """Set the path of the best checkpoint, in every process, to its final name: Trainer looked
        for it in the unfinished folder.
        """
        if self.state.best_global_step:
            best = target.with_name(f"{PREFIX}{self.state.best_global_step}")
            if best == target or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _rotate(self, run: Path) -> None:
        """Remove the oldest checkpoints beyond save_total_limit, but never the newest or the best,
        as Trainer does.
        """
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        # By time: a run that resumed from an earlier step writes lower numbers later.
        saved = sorted(checkpoints(run), key=lambda path: path.stat().st_mtime_ns)
        kept = {saved[-1], Path(self.state.best_model_checkpoint or saved[-1])}
        excess = len(saved) - max(limit, len(kept))
        for old in [path for path in saved if path not in kept][: max(excess, 0)]:
            remove_directory(old)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `transformers.Trainer.train`, but resume from a complete checkpoint only.

        Raises:
            ValueError: the named checkpoint lacks files; or, with True, none is complete.
        """
        run = Path(self.args.output_dir)
        if self.args.should_save:
            clear_unfinished(run)  # may restore a checkpoint that was being replaced
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete(run)
        elif resume_from_checkpoint and (missing := self._missing(Path(resume_from_checkpoint))):
            raise ValueError(
                f"resume_from_checkpoint={str(resume_from_checkpoint)!r} lacks "
                f"{', '.join(missing)}: it was not written completely, or with save_only_model. "
                "Give another checkpoint, or True for the last complete one"
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        """Return the micro-batches of the next step; none for a run that resumed at its end, where
        Trainer would take one more step.
        """
        if self._is_at_its_end:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    @property
    def _is_at_its_end(self) -> bool:
        """Whether training runs with no step left: a run that resumed at its end."""
        return self.is_in_train and self.state.global_step >= self.state.max_steps

    def _last_complete(self, run: Path) -> str:
        saved = checkpoints(run)
        for folder in reversed(saved):
            missing = self._missing(folder)
            if not missing:
                return str(folder)
            warnings.warn(
                f"{folder} lacks {', '.join(missing)}: it is not complete and is left out",
                stacklevel=4,
            )
        raise ValueError(
            f"resume_from_checkpoint=True, but output_dir={str(run)!r} holds no complete "
            f"checkpoint (of {len(saved)})"
        )

    def _missing(self, folder: Path) -> list[str]:
        """Return the files that a checkpoint lacks for resuming. Without one of them Trainer would
        silently restart that part of its state.
        """
        missing = [] if any(folder.glob("rng_state*.pth")) else ["rng_state.pth"]
        names = [TRAINER_STATE_NAME]
        # FSDP and DeepSpeed have formats of their own.
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            names += [OPTIMIZER_NAME, SCHEDULER_NAME]
            if not any(any(folder.glob(f"**/*model*.{end}")) for end in ("safetensors", "bin")):
                missing.append("weights")
        return missing + [name for name in names if not (folder / name).is_file()]
