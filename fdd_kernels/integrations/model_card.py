"""Model cards of distilled students."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from fdd_kernels.evaluation.metrics import is_metric
from fdd_kernels.hf.distiller import Distiller
from fdd_kernels.objectives.fdd.options import FDDConfig
from fdd_kernels.version import __version__

TAGS = ["distillation", "fdd"]


def public_name(name: str) -> str:
    """Return a model's name, of a path the last part only: the rest is private to this machine."""
    path = Path(name)
    return path.name if path.is_absolute() or path.exists() else name


def distillation_section(distiller: Distiller) -> str:
    """Return Markdown on the teacher, the layers, and the options other than the published ones."""
    published, config = FDDConfig.paper(), distiller.config
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(published, field.name)
    }
    weights = ("output_kd_weight", "alpha", "beta", "ce_weight")
    names = ("output KD", "trajectory", "derivative", "cross-entropy")
    changing = distiller.logged()
    shown = [name if name in changing else f"{getattr(config, name):g}" for name in weights]
    loss = " + ".join(f"{weight} · {name}" for weight, name in zip(shown, names))
    others = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"""## Distillation

Trained by Feature Dynamics Distillation (FDD; Gong et al., *Beyond Logits: Aligning Feature
Dynamics for Effective Knowledge Distillation*, ACL 2025) with fdd_kernels {__version__}.

- Teacher: {public_name(distiller.teacher.name)}
- Layers of student with teacher: {_layers(distiller)}
- Loss: {loss}
- Options other than the published ones: {others or "none"}
"""


def _layers(distiller: Distiller) -> str:
    """Return which layers of the models were compared, in words."""
    layers = distiller.student_layers, distiller.teacher_layers
    found = distiller.alignment is not None
    if not found and not distiller.config.pairs_all_layers:
        return ", ".join(f"{s} with {t}" for s, t in zip(*layers)) or "none"
    students, teachers = (", ".join(map(str, of_model)) for of_model in layers)
    return f"{students} with {teachers}{', paired from data' if found else ''}"


def validation_rows(metrics: Mapping[str, Any], terms: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return name, number before and number after of each term and metric; "" for a number that is
    not known, as of a run that an earlier release began.

    Args:
        metrics, terms: as in `model_card`, with a validation split.
    """
    before, after = metrics["held_out_before"], metrics["held_out"]
    names = [name for name in terms if name in after] + [name for name in after if is_metric(name)]

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    return [(name, shown(before.get(name)), shown(after[name])) for name in names]


def model_card(
    student: str,
    distiller: Distiller,
    *,
    data: Sequence[str],
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
    terms: Sequence[str],
) -> ModelCard:
    """Return the card of a finished `fdd-kernels distill`, with metadata for the hub.

    Args:
        student: name or path of the model that was distilled.
        data: names of files or data sets.
        training: options of the run to show; None is left out.
        metrics: the contents of metrics.json.
        terms: the terms of the loss to show, before the metrics.
    """
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        base_model=None if Path(student).exists() else student,
    )
    lines = [
        f"# {public_name(student)} distilled from {public_name(distiller.teacher.name)}",
        "",
        'A causal LM: `AutoModelForCausalLM.from_pretrained("...")` loads it, `AutoTokenizer` its '
        "tokenizer.",
        "",
        distillation_section(distiller),
        "## Training",
        "",
        f"- Data: {', '.join(data) or 'not named'}; {metrics['train_windows']} windows of at most "
        f"{metrics['max_length']} tokens, {metrics['train_tokens']} tokens; "
        f"{metrics['held_out_windows']} validation windows",
        f"- Steps: {metrics['steps']}, {metrics['epochs']:g} epochs",
        *(f"- {name}: {value}" for name, value in training.items() if value is not None),
        *(f"- {name} {version}" for name, version in metrics["versions"].items()),
    ]
    if metrics["held_out"] is not None:
        lines += [
            "",
            "## On the validation split",
            "",
            "Means over tokens, in nats (derivative: 1 - cosine). kl, kl_layer_k: KL(teacher ‖ "
            "student) at the output and at layer k of the student. accuracy, agreement: shares of "
            "tokens whose largest logit is the text's token, or the teacher's. perplexity: of the "
            "text.",
            "",
            "| | before | after |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in validation_rows(metrics, terms)),
        ]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")
