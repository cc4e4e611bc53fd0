"""Compare objectives at equal steps and at equal seconds, with intervals that are paired over seeds
and validation windows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
# Student's t, 97.5%, for 1, 2, ... degrees of freedom.
T_97_5 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A mean in nats per token, and half of its 95% interval."""

    mean: float
    half: float

    @property
    def exceeds_noise(self) -> bool:
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ±{self.half:.3f}" + ("*" if self.exceeds_noise else "")


def estimate(values: np.ndarray) -> Estimate:
    """Estimate the mean of values (seeds, windows) as `INTERVAL` says; from one seed the interval
    is over windows alone.
    """
    halves = [
        _t_97_5(len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
        for means in (values.mean(1), values.mean(0))
        if len(means) > 1
    ]
    return Estimate(float(values.mean()), math.hypot(*halves))


def _t_97_5(freedom: int) -> float:
    """The 97.5% quantile of Student's t: tabulated, or by its expansion around the normal's."""
    if freedom <= len(T_97_5):
        return T_97_5[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


class Comparison:
    """What the runs of several objectives and seeds say.

    Attributes:
        objectives: in the order of the runs.
        baseline: the objective that differences are taken to: output KD, or else the first.
        seconds_per_step: CPU seconds of one step of each objective, mean over seeds: the student's
            own, and the teacher's forward pass where the objective needs a teacher.
        seconds: the seconds that are compared at: when the student that ends first has ended.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs: dict[str, list[Run]] = {}
        for run in runs:
            self.runs.setdefault(run.objective, []).append(run)
        self.objectives = list(self.runs)
        self.baseline = BASELINE if BASELINE in self.runs else self.objectives[0]
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
        self.seconds = min(self.seconds_per_step.values()) * self.steps[-1]

    def steps_in(self, objective: str, seconds: float) -> float:
        """How many steps an objective makes in that many seconds."""
        return seconds / self.seconds_per_step[objective]

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

    def at_seconds(self, objective: str) -> np.ndarray:
        """Validation KL (seeds, windows) after `seconds`."""
        return self.kl(objective, self.steps_in(objective, self.seconds))

    def rows(self) -> list[dict]:
        """List what the table shows, an objective a row."""
        return [self._row(objective) for objective in self.objectives]

    def _row(self, objective: str) -> dict:
        row = {
            "objective": objective,
            "held_out_loss": statistics.fmean(r.held_out_loss[-1] for r in self.runs[objective]),
            "seconds_per_step": self.seconds_per_step[objective],
            "steps_at_equal_seconds": self.steps_in(objective, self.seconds),
        }
        for name, at in (("equal_steps", self.at_steps), ("equal_seconds", self.at_seconds)):
            kl = at(objective)
            row[name] = {
                "kl": estimate(kl),
                "difference": estimate(kl - at(self.baseline)),
                "by_seed": kl.mean(1).tolist(),
            }
        return row

    def neighbours(self) -> list[str]:
        """Say of each two objectives that follow one another in KL whether noise separates them."""
        sentences = []
        for title, at in (("steps", self.at_steps), ("seconds", self.at_seconds)):
            order = sorted(self.objectives, key=lambda objective: at(objective).mean())
            for better, worse in zip(order, order[1:]):
                gap = estimate(at(worse) - at(better))
                verdict = "more than" if gap.exceeds_noise else "within"
                sentences.append(
                    f"At equal {title}: {worse} - {better} = {gap.mean:.3f} ± {gap.half:.3f}, "
                    f"{verdict} the noise."
                )
        return sentences


def _needs_teacher(objective: str) -> bool:
    config = (OBJECTIVES | FURTHER)[objective]
    return config.compares_output or config.compares_dynamics


def mean_by_layer(runs: Sequence[Run], name: str) -> list[float]:
    """Mean over runs of `layer_kl_before` or `layer_kl_after`, layer by layer."""
    return np.mean([getattr(run, name) for run in runs], axis=0).tolist()
