"""What is measured: named problems with the shapes of real model pairs, and the suites made of
them.

Rows (tokens) are scaled so that each problem finishes on two cores; vocabularies and widths are the
models' own. The states are random with the structure of a residual stream: time and memory of the
loss depend on shapes and dtypes alone.
"""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass, replace
from typing import Any

SUITES = ("tiny", "quick", "full", "limits")
MEASURES = ("time", "memory", "accuracy")
DTYPES = ("float32", "bfloat16", "float16")
SWEPT = {"rows": "R", "columns": "V", "layers": "L"}


@dataclass(frozen=True)
class Workload:
    """One problem: a call of the loss and what is measured of it.

    `layers` counts the final state. `options` are those of `fused_fdd_loss`. `providers` None: all
    of the registry; `repeats` and `threads` None: those of the run. `sweep` names the field of a
    scaling sweep that this is a point of. `near` makes the teacher the student with noise of this
    relative size.
    """

    name: str
    text: str
    rows: int
    columns: int
    student_width: int
    teacher_width: int
    layers: int = 5
    dtype: str = "float32"
    train_head: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    feature_space: bool = False
    near: float | None = None
    group: str = "pairs"
    providers: tuple[str, ...] | None = None
    measures: tuple[str, ...] = MEASURES
    repeats: int | None = None
    threads: int | None = None
    sweep: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.name}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.feature_space and self.columns != self.teacher_width:
            raise ValueError(f"{self.name}: in feature space columns are the teacher's width")

    @property
    def loss_options(self) -> dict[str, Any]:
        return dict(self.options)

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def dynamics(self) -> int:
        """How many layers trajectory and derivative see."""
        return self.layers if self.loss_options.get("output_in_dynamics") else self.layers - 1

    @property
    def read_layers(self) -> int:
        """How many layers are multiplied by a head at all: in feature space the final state has no
        term.
        """
        return self.dynamics if self.feature_space else self.layers

    def describe(self) -> str:
        """Shapes in one line."""
        head = "trainable head" if self.train_head else "frozen head"
        if self.feature_space:
            head = "trainable projection" if self.train_head else "frozen projection"
        return (
            f"R={self.rows} {'C' if self.feature_space else 'V'}={self.columns} "
            f"D={self.student_width}/{self.teacher_width} "
            f"L={self.layers} {self.dtype} {head}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"options": self.loss_options}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Workload:
        """The inverse of `to_json`."""
        lists = {
            name: tuple(data[name])
            for name in ("providers", "measures")
            if data.get(name) is not None
        }
        return cls(**(data | lists | {"options": tuple(data["options"].items())}))


FEATURES = (("trajectory", "mse"), ("derivative", "mse"), ("output_in_dynamics", True))
SOFTCAP = (("student_softcap", 30.0), ("teacher_softcap", 30.0))

GPT2 = Workload("gpt2", "GPT-2 from GPT-2 XL, the FDD paper's pair", 256, 50257, 768, 1600)
TINYLLAMA = Workload("tinyllama", "TinyLlama 1.1B from Llama-2 13B", 128, 32000, 2048, 5120)
QWEN = Workload("qwen", "Qwen2.5 0.5B from 7B", 64, 151936, 896, 3584)
GEMMA = Workload(
    "gemma",
    "Gemma-like: V=262144, both logits soft-capped at 30",
    32,
    262144,
    1152,
    2304,
    options=SOFTCAP,
)
FEATURE = Workload(
    "feature",
    "feature space through a learned projection, MSE of states and deltas",
    2048,
    4096,
    2048,
    4096,
    options=FEATURES,
    feature_space=True,
)
KD = Workload(
    "kd", "plain output distillation of GPT-2 from GPT-2 XL, L=1", 512, 50257, 768, 1600, layers=1
)

OURS = ("cpu", "triton")
BASELINES = ("dense", "torch", "cpu", "triton")


def _tiny() -> list[Workload]:
    small = {"rows": 6, "columns": 97, "student_width": 16, "teacher_width": 24}
    workloads = [replace(w, **small) for w in (GPT2, GEMMA)]
    workloads += [replace(KD, **small, dtype="bfloat16")]
    workloads += [replace(FEATURE, rows=6, columns=24, student_width=16, teacher_width=24)]
    sweep = [
        replace(
            GPT2,
            **(small | {"rows": r}),
            name=f"rows-{r}",
            group="scaling",
            sweep="rows",
            providers=BASELINES,
            measures=("time", "memory"),
        )
        for r in (4, 8)
    ]
    return workloads + sweep


def _quick() -> list[Workload]:
    no_compile = ("dense", "dense-chunked", "torch", "cpu", "triton", "liger", "trl", "orda")
    return [
        replace(GPT2, rows=64, providers=no_compile),
        replace(QWEN, rows=16, providers=BASELINES),
        replace(FEATURE, rows=512, providers=no_compile),
        replace(KD, rows=128, providers=no_compile),
    ]


def _full() -> list[Workload]:
    pairs = [
        GPT2,
        replace(GPT2, name="gpt2-bf16", dtype="bfloat16", rows=128),
        TINYLLAMA,
        QWEN,
        GEMMA,
        FEATURE,
        KD,
    ]
    base = replace(
        GPT2, rows=256, group="scaling", providers=BASELINES, measures=("time", "memory")
    )
    sweeps = [replace(base, name=f"rows-{n}", sweep="rows", rows=n) for n in (64, 128, 256, 512)]
    sweeps += [
        replace(base, name=f"columns-{n}", sweep="columns", columns=n)
        for n in (8192, 16384, 32768, 65536)
    ]
    sweeps += [replace(base, name=f"layers-{n}", sweep="layers", layers=n) for n in (2, 3, 5, 9)]
    sweeps = [replace(w, text=f"scaling over {SWEPT[w.sweep]}, GPT-2 pair") for w in sweeps]
    return pairs + sweeps


def _limits() -> list[Workload]:
    """What the CPU kernels are held to: speed, flat memory, threads, accuracy, and a batch whose
    dense loss cannot run.
    """
    workloads = []
    for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
        for train, head in ((True, "trainable"), (False, "frozen")):
            workloads.append(
                replace(
                    GPT2,
                    name=f"limits-{short}-{head}",
                    rows=1024,
                    dtype=dtype,
                    train_head=train,
                    group="limits",
                    providers=("dense", "cpu", "triton"),
                )
            )
    workloads.append(
        replace(
            GPT2,
            name="near-bf16",
            text="teacher equal to the student within 1%, GPT-2 widths: accuracy alone",
            rows=16,
            teacher_width=768,
            near=0.01,
            dtype="bfloat16",
            group="limits",
            measures=("accuracy",),
        )
    )
    for rows in (256, 1024, 4096, 16384):
        workloads.append(
            replace(
                GPT2,
                name=f"flat-{rows}",
                text="peak memory against rows, GPT-2 pair",
                rows=rows,
                group="flatness",
                providers=OURS,
                measures=("memory",),
            )
        )
    for threads in (1, 2):
        workloads.append(
            replace(
                GPT2,
                name=f"threads-{threads}",
                text=f"GPT-2 pair on {threads} thread(s)",
                threads=threads,
                rows=256,
                group="threads",
                providers=("cpu",),
                measures=("time",),
            )
        )
    workloads.append(
        replace(
            QWEN,
            name="qwen-large",
            text="Qwen2.5 0.5B from 7B, a batch whose dense loss does not fit here",
            rows=2048,
            dtype="bfloat16",
            group="limits",
            providers=("dense", "cpu", "triton"),
            repeats=1,
        )
    )
    return workloads


_SUITES = {"tiny": _tiny, "quick": _quick, "full": _full, "limits": _limits}


def suite(name: str) -> list[Workload]:
    """The workloads of a suite.

    Raises:
        ValueError: no such suite.
    """
    if name not in _SUITES:
        raise ValueError(f"unknown suite {name!r}: choose from {', '.join(SUITES)}")
    return _SUITES[name]()


def select(workloads: list[Workload], patterns: list[str] | None) -> list[Workload]:
    """Those whose name or group matches one of the patterns (shell wildcards), in order.

    Raises:
        ValueError: a pattern that matches nothing; lists the names.
    """
    if not patterns:
        return workloads
    for pattern in patterns:
        if not any(_matches(w, pattern) for w in workloads):
            names = ", ".join(w.name for w in workloads)
            raise ValueError(
                f"unknown workload {pattern!r} in this suite: choose from {names}, or a group"
            )
    return [w for w in workloads if any(_matches(w, pattern) for pattern in patterns)]


def _matches(workload: Workload, pattern: str) -> bool:
    return fnmatch.fnmatchcase(workload.name, pattern) or workload.group == pattern
