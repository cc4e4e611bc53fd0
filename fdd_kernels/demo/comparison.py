"""Compare objectives at equal steps and at equal seconds, with intervals that are paired over seeds
and validation windows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fdd_kernels.common.student_t import half_width
from fdd_kernels.demo.students import FURTHER, OBJECTIVES, Run

BASELINE = "output KD"
INTERVAL = (
    "± is half of a 95% interval: the root of the sum of squares of two Student-t half-widths, one "
    "over seeds (mean of the windows), one over windows (mean of the seeds). Differences are taken "
    "seed by seed and window by window: within a seed, students share initial weights and batches."
)
ONE_SEED = (
    "One seed: ± is half of a 95% interval over windows alone, and another seed may differ by more."
)


@dataclass(frozen=True)
class Estimate:
    """A mean in nats per token, and half of its 95% interval."""

    mean: float
    half: float

    @property
    def exceeds_noise(self) -> bool:
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.3f}±{self.half:.3f}" + ("*" if self.exceeds_noise else "")


def estimate(values: np.ndarray) -> Estimate:
    """Estimate the mean of values (seeds, windows) as `INTERVAL` says; from one seed the interval
    is over windows alone.
    """
    halves = [half_width(means) for means in (values.mean(1), values.mean(0)) if len(means) > 1]
    return Estimate(float(values.mean()), math.hypot(*halves))


class Comparison:
    """What the runs of several objectives and seeds say.

    Attributes:
        runs: by objective, in their order.
        baseline: the objective that differences are taken to: output KD, or else the first.
        seconds_per_step: CPU seconds of one step of each objective, mean over seeds: the student's
            own, and the teacher's forward pass where the objective needs a teacher.
        seconds: what is compared at: the end of the student that ends first, and of the baseline's.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs: dict[str, list[Run]] = {}
        for run in runs:
            self.runs.setdefault(run.objective, []).append(run)
        self.baseline = BASELINE if BASELINE in self.runs else runs[0].objective
        self.seconds_per_step = {
            objective: statistics.fmean(
                (run.cpu_seconds[-1] + _needs_teacher(objective) * run.teacher_cpu_seconds[-1])
                / run.steps[-1]
                for run in of_objective
            )
            for objective, of_objective in self.runs.items()
        }
        self.seeds = sorted({run.seed for run in runs})
        self.steps = runs[0].steps
        ends = {name: each * self.steps[-1] for name, each in self.seconds_per_step.items()}
        self.seconds = sorted({min(ends.values()), ends[self.baseline]})

    def kl(self, objective: str, step: float) -> np.ndarray:
        """Validation KL (seeds, windows) after `step` steps, linear between two evaluations."""
        after = min(int(np.searchsorted(self.steps, step)), len(self.steps) - 1)
        before = max(after - 1, 0)
        share = np.interp(step, (self.steps[before], self.steps[after]), (0.0, 1.0))
        kl = np.array([run.window_kl_curve for run in self.runs[objective]])
        return (1 - share) * kl[:, before] + share * kl[:, after]

    def at_steps(self, objective: str) -> np.ndarray:
        """Validation KL (seeds, windows) after all steps."""
        return self.kl(objective, self.steps[-1])

    def at_seconds(self, objective: str, seconds: float) -> np.ndarray | None:
        """Validation KL (seeds, windows) after that many seconds; None if it ended before."""
        step = seconds / self.seconds_per_step[objective]
        return self.kl(objective, step) if step < 1.0001 * self.steps[-1] else None

    def places(self) -> dict[str, Callable[[str], np.ndarray | None]]:
        """The columns of the table: a title, and what gives an objective's KL there."""
        return {"equal steps": self.at_steps} | {
            f"{seconds:.0f} s": partial(self.at_seconds, seconds=seconds)
            for seconds in self.seconds
        }

    def rows(self) -> list[dict]:
        """List what the table shows, an objective a row."""
        return [
            {
                "objective": objective,
                "held_out_loss": statistics.fmean(run.held_out_loss[-1] for run in runs),
                "ms_per_step": 1000 * self.seconds_per_step[objective],
            }
            | {title: self._at(place, objective) for title, place in self.places().items()}
            for objective, runs in self.runs.items()
        ]

    def _at(self, place: Callable[[str], np.ndarray | None], objective: str) -> dict | None:
        kl = place(objective)
        if kl is None:
            return None
        difference = kl - place(self.baseline)
        return {
            "kl": estimate(kl),
            "kl_by_seed": kl.mean(1).tolist(),
            "difference": estimate(difference),
            "difference_by_seed": difference.mean(1).tolist(),
        }

    def neighbours(self) -> list[str]:
        """Say of each two objectives that follow one another in KL whether noise separates them."""
        sentences = []
        for title, place in self.places().items():
            kl = {name: place(name) for name in self.runs}
            order = sorted(
                (name for name in kl if kl[name] is not None), key=lambda name: kl[name].mean()
            )
            for better, worse in zip(order, order[1:]):
                gap = estimate(kl[worse] - kl[better])
                verdict = "more than" if gap.exceeds_noise else "within"
                sentences.append(
                    f"At {title}: {worse} - {better} = {gap.mean:.3f} ±{gap.half:.3f}, {verdict} "
                    "the noise."
                )
        return sentences


def _needs_teacher(objective: str) -> bool:
    config = (OBJECTIVES | FURTHER)[objective]
    return config.compares_output or config.compares_dynamics


def mean_by_layer(runs: Sequence[Run], name: str) -> list[float]:
    """Mean over runs of `layer_kl_before` or `layer_kl_after`, layer by layer."""
    return np.mean([getattr(run, name) for run in runs], axis=0).tolist()
