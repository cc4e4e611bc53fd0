"""Put an evaluation together: one record, as JSON can hold it, of all models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fdd_kernels.evaluation.compare import TEACHER, ModelSums
from fdd_kernels.evaluation.intervals import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Estimate,
    Ratio,
    paired_bootstrap,
)
from fdd_kernels.evaluation.metrics import ACCURACY, AGREEMENT, KL, NLL, OF_LAYER, PERPLEXITY

FORMAT, VERSION = "fdd_kernels evaluation", 1
LOSS, BITS_PER_BYTE, ROUGE_L = "loss", "bits_per_byte", "rouge_l"
# By metric: heading, digits, whether more is better.
COLUMNS = {
    LOSS: ("loss, nats per token", 3, False),
    PERPLEXITY: ("perplexity", 2, False),
    ACCURACY: ("accuracy", 4, True),
    BITS_PER_BYTE: ("bits per byte", 3, False),
    KL: ("KL to teacher", 3, False),
    AGREEMENT: ("agreement with teacher", 4, True),
    ROUGE_L: ("ROUGE-L", 2, True),
}
INTERVALS = (
    f"{CONFIDENCE:.0%} intervals of the paired bootstrap: {RESAMPLES} resamples of the sequences "
    f"(of the answers for ROUGE-L), the same for every model, seed {SEED}"
)


@dataclass(frozen=True)
class Answers:
    """What one model answered.

    Attributes:
        texts: by pass (one for each seed), each of all questions.
        scores: ROUGE-L likewise, from 0 to 100.
    """

    texts: list[list[str]]
    scores: list[list[float]]


@dataclass(frozen=True)
class Evaluation:
    """The results of all models, the teacher among them.

    Attributes:
        sums: by model; the first is the one that others are compared with.
        sizes: UTF-8 bytes of each sequence, (sequences,), or None.
        answers: by model; empty without generation.
        samples: prompts and references of some questions, the first ones.
    """

    sums: Mapping[str, ModelSums]
    sizes: np.ndarray | None = None
    answers: Mapping[str, Answers] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()

    def record(self) -> dict[str, Any]:
        """Return metrics with intervals, by model, and differences to the first model."""
        estimates = self._estimates()
        first, *_ = self.sums
        models = []
        for name, of_model in self.sums.items():
            metrics = {
                column: found for column in COLUMNS if (found := estimates.get((name, column)))
            }
            entry: dict[str, Any] = {
                "name": name,
                "metrics": {column: found.record() for column, found in metrics.items()},
                "layers": [
                    {"student_layer": own, "teacher_layer": other}
                    | estimates[name, f"{OF_LAYER}{own}"].record()
                    for own, other in of_model.layers
                ],
            }
            if name not in (first, TEACHER):
                entry["minus_first"] = {
                    column: found.minus(estimates[first, column]).record()
                    for column, found in metrics.items()
                }
            if name in self.answers:
                entry["answers"] = _of_answers(self.answers[name])
            models.append(entry)
        return {
            "format": FORMAT,
            "version": VERSION,
            "intervals": INTERVALS,
            "sequences": len(next(iter(self.sums.values())).weight),
            "models": models,
            "samples": [
                {**sample, "answers": {name: of.texts[0][i] for name, of in self.answers.items()}}
                for i, sample in enumerate(self.samples)
            ],
        }

    def _estimates(self) -> dict[tuple[str, str], Estimate]:
        ratios, of_answers = {}, {}
        for name, found in self.sums.items():
            for metric, sums in found.sums.items():
                ratio = Ratio(sums, found.weight)
                if metric == NLL:
                    ratios[name, LOSS] = ratio
                    ratios[name, PERPLEXITY] = ratio._replace(transform=np.exp)
                    if self.sizes is not None:
                        ratios[name, BITS_PER_BYTE] = Ratio(sums, self.sizes, _in_bits)
                else:
                    ratios[name, metric] = ratio
        for name, answers in self.answers.items():
            scores = np.mean(answers.scores, 0)
            of_answers[name, ROUGE_L] = Ratio(scores, np.ones_like(scores))
        return paired_bootstrap(ratios) | paired_bootstrap(of_answers)


def _in_bits(nats: np.ndarray) -> np.ndarray:
    return nats / math.log(2)


def _of_answers(answers: Answers) -> dict[str, Any]:
    """Return the mean ROUGE-L of each pass, and their standard deviation."""
    means = [float(np.mean(scores)) for scores in answers.scores]
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
    empty = sum(not text for texts in answers.texts for text in texts)
    return {"rouge_l_by_seed": means, "standard_deviation": spread, "empty": empty}


def shown(column: str, value: Mapping[str, float | None] | None) -> str:
    """Return a metric and half the width of its interval as text."""
    if value is None:
        return ""
    digits = COLUMNS.get(column, COLUMNS[KL])[1]
    text = f"{value['mean']:.{digits}f}"
    if value["low"] is None:
        return text
    return f"{text} ± {(value['high'] - value['low']) / 2:.{digits}f}"


def differs(value: Mapping[str, float | None] | None) -> bool:
    """Say whether the interval of a difference leaves out 0."""
    return value is not None and value["low"] is not None and value["low"] * value["high"] > 0
