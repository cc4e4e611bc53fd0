"""What a model card says about a distillation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fdd_kernels.hf.distiller import Distiller
from fdd_kernels.objectives.fdd.options import FDDConfig
from fdd_kernels.version import __version__

TAGS = ["distillation", "fdd"]


def public_name(name: str) -> str:
    """A model's name; of a path only the last part, since the rest is this machine's."""
    path = Path(name)
    return path.name if path.is_absolute() or path.exists() else name


def distillation_section(distiller: Distiller) -> str:
    """Markdown: from which teacher, over which layers, with which options other than the
    defaults.
    """
    defaults, config = FDDConfig(), distiller.config
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(defaults, field.name)
    }
    layers = ", ".join(
        f"{s} with {t}" for s, t in zip(distiller.student_layers, distiller.teacher_layers)
    )
    lines = [
        "## Distillation",
        "",
        "Trained by Feature Dynamics Distillation (FDD; Gong et al., *Beyond Logits: Aligning "
        "Feature Dynamics for "
        f"Effective Knowledge Distillation*, ACL 2025) with fdd_kernels {__version__}.",
        "",
        f"- Teacher: {public_name(distiller.teacher.name)}",
        f"- Layers of student with teacher: {layers or 'none'}",
        f"- Loss: {config.output_kd_weight:g} · output KD + {config.alpha:g} · trajectory + "
        f"{config.beta:g} · derivative"
        f" + {config.ce_weight:g} · cross-entropy",
        "- Options other than the defaults: "
        f"{', '.join(f'{name}={value!r}' for name, value in options.items()) or 'none'}",
    ]
    return "\n".join(lines) + "\n"
