"""The config of a training in its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from typing import Any

from fdd_kernels.objectives.fdd.options import FDDConfig

# What a checkpoint without a config may have been trained with: the default of its release.
_FORMER_DERIVATIVE = "cosine"


def config_record(config: FDDConfig) -> dict[str, Any]:
    """Return the options as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def warn_of_another_config(where: str, saved: Mapping[str, Any] | None, config: FDDConfig) -> None:
    """Warn of options of the loss that are not those of the checkpoint that a training resumes.

    Args:
        where: the checkpoint, for the warning.
        saved: its `config_record`; None for a checkpoint of a release that did not write it.
    """
    now = config_record(config)
    if saved is not None:
        names = [n for n in now if n != "backend" and n in saved and saved[n] != now[n]]
        before = ", ".join(f"{name}={saved[name]!r}" for name in names)
    else:
        is_new = config.derivative == "weighted_cosine" and config.ever("beta")
        names = ["derivative"] if is_new else []
        before = f"derivative={_FORMER_DERIVATIVE!r}, if it was trained with FDDConfig's default"
    if names:
        given = ", ".join(f"{name}={now[name]!r}" for name in names)
        warnings.warn(
            f"{where} has {before}, and fdd_config has {given}: the training continues with "
            "fdd_config, another loss than before. Give FDDConfig the options of the checkpoint to "
            "continue with its loss",
            stacklevel=4,
        )
