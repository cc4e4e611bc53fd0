"""The model card (README.md) of a distilled student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from fdd_kernels.cli.distill.options import DistillOptions
from fdd_kernels.data.sources import open_source
from fdd_kernels.hf.distiller import Distiller
from fdd_kernels.integrations.model_card import TAGS, distillation_section, public_name

_TRAINING = ("learning_rate", "batch_size", "gradient_accumulation", "dtype", "seed", "lora_rank")


def model_card(
    options: DistillOptions, distiller: Distiller, metrics: dict[str, Any], terms: list[str]
) -> ModelCard:
    """Make a card with metadata for the hub; paths are cut to their last part.

    Args:
        metrics: the content of metrics.json.
        terms: the terms of the loss to show.
    """
    student, teacher = public_name(options.student), public_name(distiller.teacher.name)
    cached = options.teacher_cache is not None
    data = (
        distiller.teacher.reader.contents["data"] or ()
        if cached
        else open_source(options.data).names()
    )
    files = [Path(file).name if cached else file for file in data]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        base_model=None if Path(options.student).exists() else options.student,
    )
    lines = [
        f"# {student} distilled from {teacher}",
        "",
        'A causal LM: `AutoModelForCausalLM.from_pretrained("...")` loads it, `AutoTokenizer` its '
        "tokenizer.",
        "",
        distillation_section(distiller),
        "## Training",
        "",
        f"- Data: {', '.join(files) or 'not named'}; {metrics['train_windows']} windows of at most "
        f"{metrics['max_length']} tokens, {metrics['train_tokens']} tokens; "
        f"{metrics['held_out_windows']} validation windows",
        f"- Steps: {metrics['steps']}, {metrics['epochs']:g} epochs",
        *(
            f"- {name}: {getattr(options, name)}"
            for name in _TRAINING
            if getattr(options, name) is not None
        ),
        *(f"- {name} {version}" for name, version in metrics["versions"].items()),
    ]
    if metrics["held_out"] is not None:
        lines += [
            "",
            "## On the validation split",
            "",
            "Means over tokens, in nats (derivative: 1 - cosine).",
            "",
        ]
        lines += ["| | before | after |", "|---|---|---|"]
        before, after = metrics["held_out_before"], metrics["held_out"]
        lines += [
            f"| {name} | {before[name]:.4f} | {after[name]:.4f} |"
            for name in terms
            if name in after
        ]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")
