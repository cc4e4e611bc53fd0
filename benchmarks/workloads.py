"""The measured problems: named calls with the shapes of real pairs of models, and suites of them.

Tokens are few enough for two cores; vocabularies and widths are the models' own. Hidden states are
random with the structure of a residual stream: time and memory depend on shapes and dtypes alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.call import LOSS

MEASURES = ("time", "memory", "accuracy")
DTYPES = ("float32", "bfloat16", "float16")
SWEPT = {"rows": "tokens R", "columns": "vocabulary V", "layers": "layers L"}


@dataclass(frozen=True)
class Workload:
    """One problem: a call of the loss and the measures taken of it.

    `layers` counts the final state; `teacher_layers` of None are as many. `objective`
    is the public function, `options` are its options, and `tensors` names what it takes besides
    states and heads: labels, own (labels that are the rows' own numbers), token_weights, ids (with
    logprobs). With `heads` the objective compares attention: rows and columns are positions,
    hidden states queries and weights keys. `beside` are options of a call that this package takes
    in turn with it, for the ratio of their times. `providers` are names or kinds of providers, all
    if None (`providers.of_workload`); `repeats` and `threads` are the run's if None. `sweep` is the
    field that a scaling sweep varies. `near` makes the teacher the student plus noise of this
    relative size. With `pair` the measured call is a whole training step of a pair of models
    (`steps.PAIRS`), and the other fields describe its FDD loss.
    """

    name: str
    text: str
    rows: int
    columns: int
    student_width: int
    teacher_width: int
    layers: int = 5
    teacher_layers: int | None = None
    heads: int | None = None
    dtype: str = "float32"
    train_head: bool = True
    objective: str = LOSS
    options: tuple[tuple[str, Any], ...] = ()
    tensors: tuple[str, ...] = ()
    beside: tuple[tuple[str, Any], ...] = ()
    feature_space: bool = False
    near: float | None = None
    pair: str | None = None
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
        widths = self.student_width, self.teacher_width
        if self.heads and (self.rows != self.columns or any(w % self.heads for w in widths)):
            raise ValueError(
                f"{self.name}: rows and columns are positions, and heads divide widths"
            )

    def resized(self, rows: int, columns: int, student_width: int, teacher_width: int) -> Workload:
        """Take other sizes, as near to these as the objective allows."""
        if self.heads:
            columns = rows
            student_width, teacher_width = (
                self.heads * max(1, width // self.heads) for width in (student_width, teacher_width)
            )
        if self.feature_space:
            columns = teacher_width
        sizes = {"rows": rows, "columns": columns}
        return replace(self, **sizes, student_width=student_width, teacher_width=teacher_width)

    def with_rows(self, rows: int) -> Workload:
        """Take another number of rows."""
        return self.resized(rows, self.columns, self.student_width, self.teacher_width)

    @property
    def loss_options(self) -> dict[str, Any]:
        return dict(self.options)

    @property
    def options_beside(self) -> dict[str, Any]:
        """Return the options of the call beside it."""
        return self.loss_options | dict(self.beside)

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def projected_layers(self) -> int:
        """Count the layers multiplied by a head. The final state has no term in feature space."""
        if self.feature_space and not self.loss_options.get("output_in_dynamics"):
            return self.layers - 1
        return self.layers

    @property
    def in_overview(self) -> bool:
        """Tell whether the workload stands for itself, and is not one point of a curve."""
        return not self.sweep and self.group not in ("flatness", "threads")

    def describe(self) -> str:
        """Describe the shapes in one line."""
        if self.heads:
            widths = f"D={self.student_width}/{self.teacher_width}"
            return f"T={self.rows} H={self.heads} {widths} {self.dtype}"
        head = f"{'trainable' if self.train_head else 'frozen'} "
        head += "projection" if self.feature_space else "head"
        columns = f"{'C' if self.feature_space else 'V'}={self.columns}"
        widths = f"D={self.student_width}/{self.teacher_width}"
        layers = f"{self.layers}" + (f"/{self.teacher_layers}" if self.teacher_layers else "")
        if self.objective == "fused_contrastive_kd":
            return f"R={self.rows} C={self.columns} {widths} {self.dtype}"
        return f"R={self.rows} {columns} {widths} L={layers} {self.dtype} {head}"

    @property
    def extent(self) -> tuple[str, str, int]:
        """Return what flat memory is shown against: its name, a text, and its number."""
        if self.teacher_layers:
            text = f"Ls x Lt={self.layers} x {self.teacher_layers}"
            return "Ls x Lt", text, self.layers * self.teacher_layers
        name = "T" if self.heads else "R=C" if self.rows == self.columns else "R"
        return name, f"{name}={self.rows}", self.rows

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"options": self.loss_options, "beside": dict(self.beside)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Workload:
        """Invert `to_json`."""
        names = ("providers", "measures", "tensors")
        found = {n: tuple(data[n]) for n in names if data.get(n) is not None}
        found |= {n: tuple(data.get(n, {}).items()) for n in ("options", "beside")}
        return cls(**(data | found))


GPT2 = Workload("gpt2", "GPT-2 from GPT-2 XL, the FDD paper's pair", 256, 50257, 768, 1600)
TINYLLAMA = Workload("tinyllama", "TinyLlama 1.1B from Llama-2 13B", 128, 32000, 2048, 5120)
QWEN = Workload("qwen", "Qwen2.5 0.5B from 7B", 64, 151936, 896, 3584)
SOFTCAP = (("student_softcap", 30.0), ("teacher_softcap", 30.0))
_CAPPED = "Gemma-like: V=262144, both logits soft-capped at 30"
GEMMA = Workload("gemma", _CAPPED, 32, 262144, 1152, 2304, options=SOFTCAP)
FEATURES = (("trajectory", "mse"), ("derivative", "mse"), ("output_in_dynamics", True))
_PROJECTED = "feature space through a learned projection, MSE of states and deltas"
FEATURE = Workload(
    "feature", _PROJECTED, 2048, 4096, 2048, 4096, options=FEATURES, feature_space=True
)
_OUTPUT = "plain output distillation of GPT-2 from GPT-2 XL, L=1"
KD = Workload("kd", _OUTPUT, 512, 50257, 768, 1600, layers=1)

# Kinds of providers: every backend of the registry, and the one that "auto" takes on the device.
BASELINES = ("dense", "backends")
COMPILED = ("dense", "dense-compile", "backends")
DEFAULT = ("dense", "default")


def _sweep(
    base: Workload, field: str, values: tuple[int, ...], providers: tuple[str, ...] = BASELINES
) -> list[Workload]:
    about = {"group": "scaling", "sweep": field, "providers": providers}
    about |= {"text": f"scaling over {SWEPT[field]}, GPT-2 pair", "measures": ("time", "memory")}
    return [replace(base, name=f"{field}-{n}", **{field: n}, **about) for n in values]


def _tiny() -> list[Workload]:
    small = {"rows": 6, "columns": 97, "student_width": 16, "teacher_width": 24}
    problems = [replace(w, **small) for w in (GPT2, GEMMA)]
    problems += [
        replace(KD, **small, dtype="bfloat16"),
        replace(FEATURE, **small | {"columns": 24}),
    ]
    return problems + _sweep(problems[0], "rows", (4, 8))


def _quick() -> list[Workload]:
    no_compile = ("dense", "dense-chunked", "backends", "packages")
    return [
        replace(GPT2, rows=64, providers=no_compile),
        replace(QWEN, rows=16, providers=BASELINES),
        replace(FEATURE, rows=512, providers=no_compile),
        replace(KD, rows=128, providers=no_compile),
    ]


def _full() -> list[Workload]:
    narrow = replace(GPT2, name="gpt2-bf16", dtype="bfloat16", rows=128)
    return [
        *(GPT2, narrow, TINYLLAMA, QWEN, GEMMA, FEATURE, KD),
        *_sweep(GPT2, "rows", (16, 32, 64, 128, 256, 512), COMPILED),
        *_sweep(GPT2, "columns", (4096, 8192, 16384, 32768, 65536), COMPILED),
        *_sweep(GPT2, "layers", (2, 3, 5, 9)),
    ]


def _limits() -> list[Workload]:
    """List the CPU kernels' limits: speed, flat memory, threads, accuracy, and a batch whose dense
    loss cannot run.
    """
    large = replace(GPT2, rows=1024, group="limits", providers=DEFAULT)
    workloads = [
        replace(large, name=f"limits-{short}-{head}", dtype=dtype, train_head=head == "trainable")
        for dtype, short in (("float32", "f32"), ("bfloat16", "bf16"))
        for head in ("trainable", "frozen")
    ]
    near = replace(GPT2, name="near-bf16", rows=16, teacher_width=768, near=0.01, dtype="bfloat16")
    text = "teacher equal to the student within 1%, GPT-2 widths: accuracy alone"
    workloads.append(replace(near, text=text, group="limits", measures=("accuracy",)))
    default = replace(GPT2, providers=("default",))
    flat = replace(default, text="peak memory against rows, GPT-2 pair", measures=("memory",))
    workloads += [
        replace(flat, name=f"flat-{rows}", rows=rows, group="flatness")
        for rows in (256, 1024, 4096, 16384)
    ]
    for n in (1, 2):
        timed = replace(default, name=f"threads-{n}", text=f"GPT-2 pair on {n} thread(s)")
        workloads.append(replace(timed, threads=n, group="threads", measures=("time",)))
    text = "Qwen2.5 0.5B from 7B, a batch whose dense loss does not fit here"
    too_large = replace(QWEN, name="qwen-large", text=text, rows=2048, dtype="bfloat16", repeats=1)
    return [*workloads, replace(too_large, group="limits", providers=DEFAULT)]


# Name: (divergence of the output, the options of a call beside it).
OUTPUTS = (
    "reverse_kl",
    "jsd:0.5",
    "skew_kl:0.1",
    "skew_reverse_kl:0.1",
    "tv",
    "alpha_beta:0.2,0.7",
)
_KL = (("output_divergence", "kl"),)
_FUNCTIONS = {
    "fused_decoupled_kd": (("labels",), (("temperature", 4.0),)),
    "fused_topk_kd": (("ids",), ()),
    "selected_logprobs": (("labels",), ()),
    "row_statistics": (("labels",), ()),
}


def objectives(output: Workload = KD, dynamics: Workload = GPT2) -> list[Workload]:
    """List every objective at the shapes of `output`, and the derivative's at those of
    `dynamics`.
    """
    about = {"group": "objectives", "providers": ("dense", "dense-compile", "default"), "layers": 1}
    weighted = (("derivative", "weighted_cosine"),)
    found = [
        replace(
            dynamics,
            name="weighted_cosine",
            text="full FDD with derivative=weighted_cosine",
            options=weighted,
            beside=(("derivative", "cosine"),),
            **about | {"layers": dynamics.layers},
        )
    ]
    for text in OUTPUTS:
        options = {"options": (("output_divergence", text),), "beside": _KL}
        name, title = text.partition(":")[0], f"output KD with output_divergence={text}"
        found.append(replace(output, name=name, text=title, **options, **about))
    mixed = {"options": (("teacher_mix", 0.5),), "beside": (("teacher_mix", 1.0),)}
    title = "output KD with teacher_mix=0.5 (TAID)"
    found.append(replace(output, name="teacher_mix", text=title, **mixed, **about))
    weights = {"tensors": ("token_weights",), "text": "output KD with token_weights"}
    found.append(replace(output, name="token_weights", **weights, **about))
    for name, (tensors, options) in _FUNCTIONS.items():
        given = {"objective": name, "tensors": tensors, "options": options, "text": name}
        given["providers"] = (*about["providers"][:2], "backends")  # the default may not have it
        found.append(replace(output, name=name, **about | given))
    return found


_FEW = replace(GPT2, rows=64)


def streamed(rows: int = 4096, positions: int = 2048, costs: Workload = _FEW) -> list[Workload]:
    """List the objectives that hold no matrix of rows x columns, positions x positions or layers x
    tokens x vocabulary, and points of their memory against these.
    """
    one = {"layers": 1, "group": "objectives"}
    about = one | {"providers": COMPILED}
    scales = ("scale", 14.0), ("teacher_scale", 14.0)
    contrastive = {"objective": "fused_contrastive_kd", "tensors": ("own",)}
    infonce = Workload(
        "infonce",
        "InfoNCE, the positive of a row is its own column",
        *(rows, rows, 512, 768),
        options=(("loss", "infonce"), scales[0]),
        **contrastive | about,
    )
    similarities = replace(
        infonce,
        name="contrastive_kl",
        text="KL between the similarities of teacher and student",
        options=(("loss", "kl"), *scales),
    )
    relation = Workload(
        "relation",
        "MiniLM's relations of queries and keys",
        *(positions, positions, 768, 768),
        heads=12,
        tensors=("own",),
        objective="fused_relation_kd",
        **about,
    )
    attention = {"objective": "fused_attention_kd", "text": "KL between both models' attention"}
    attention = replace(relation, name="attention", **attention)
    causal = {"text": "the same, causal", "options": (("causal", True),)}
    causal = replace(attention, name="attention_causal", **causal)
    depths = {"layers": 4, "teacher_layers": 8}
    text = "KL of every layer of the student and every one of the teacher"
    matrix = replace(costs, name="layer_costs", text=text, objective="layer_costs")
    matrix = replace(matrix, **about | depths)
    text = "SinKD's distance of all rows, one group"
    transport = replace(costs, name="sinkhorn", text=text, objective="fused_sinkhorn_kd")
    transport = replace(transport, **about)
    points = [
        *[replace(infonce, rows=n, columns=n) for n in (rows, 2 * rows, 4 * rows)],
        *[w.with_rows(n * positions // 2) for w in (relation, causal) for n in (1, 2, 4)],
        *[replace(matrix, layers=n, teacher_layers=2 * n) for n in (2, 4, 8)],
    ]
    return [
        *(infonce, similarities, relation, attention, causal, matrix, transport),
        *[_flat(point) for point in points],
    ]


def _flat(workload: Workload) -> Workload:
    """Measure this package's memory alone."""
    name = f"{workload.name}-{workload.extent[2]}"
    about = {"group": "flatness", "measures": ("memory",), "providers": ("backends",)}
    return replace(workload, name=name, text=f"peak memory of {workload.objective}", **about)


_SUITES = {"tiny": _tiny, "quick": _quick, "full": _full, "limits": _limits}
_SUITES |= {"objectives": objectives, "streamed": streamed}
SUITES = tuple(_SUITES)


def suite(name: str) -> list[Workload]:
    """List the workloads of a suite.

    Raises:
        ValueError: no such suite.
    """
    if name not in _SUITES:
        raise ValueError(f"unknown suite {name!r}: choose from {', '.join(SUITES)}")
    return _SUITES[name]()


def select(workloads: list[Workload], patterns: list[str] | None) -> list[Workload]:
    """Select workloads whose name (shell wildcards) or group matches one of the patterns, in order.

    Raises:
        ValueError: a pattern matches nothing; lists the names.
    """

    def matches(workload: Workload, pattern: str) -> bool:
        return fnmatchcase(workload.name, pattern) or workload.group == pattern

    for pattern in patterns or ():
        if not any(matches(w, pattern) for w in workloads):
            names = ", ".join(w.name for w in workloads)
            raise ValueError(
                f"unknown workload {pattern!r} in this suite: choose from {names}, or a group"
            )
    return [w for w in workloads if not patterns or any(matches(w, p) for p in patterns)]
