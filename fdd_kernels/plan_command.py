"""`fdd-kernels plan`: will a training step fit, what takes the memory, and what to change if it does not."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fdd_kernels.layers import layer_grid
from fdd_kernels.planner import GIB, LossShape, loss_memory, show
from fdd_kernels.user_error import UserError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes an optimiser keeps for each trained weight.
OPTIMIZERS = {"adamw": 8, "adamw8bit": 2, "lion": 4, "sgd-momentum": 4, "sgd": 0}
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class ModelShape:
    """What of a causal LM decides its memory."""

    vocabulary: int
    width: int
    depth: int
    intermediate: int
    query_width: int
    key_width: int
    gated: bool
    tied: bool
    softcap: bool = False

    @property
    def parameters(self) -> int:
        """Weights of matrices; norms and biases are left out."""
        attention = 2 * self.width * (self.query_width + self.key_width)
        mlp = (3 if self.gated else 2) * self.width * self.intermediate
        return self.depth * (attention + mlp) + (1 if self.tied else 2) * self.vocabulary * self.width

    def activations(self, tokens: int, itemsize: int, *, checkpointing: bool) -> int:
        """What the blocks keep for the backward pass, an estimate: inputs of every product, norm and nonlinearity.

        Attention is taken to keep no (tokens x tokens) matrix. With checkpointing one block's, and every block's input.
        """
        block = 6 * self.width + 2 * (self.query_width + self.key_width) + (4 if self.gated else 2) * self.intermediate
        kept = block + self.depth * self.width if checkpointing else self.depth * block
        return itemsize * tokens * kept


@dataclass(frozen=True)
class Setup:
    """A training step to plan for."""

    student: ModelShape
    teacher: ModelShape
    tokens: int
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    layers: int = 4
    backend: str = "torch"
    device: str = "cuda"
    train_head: bool = True
    checkpointing: bool = False
    teacher_elsewhere: bool = False

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def loss(self) -> LossShape:
        return LossShape(
            rows=self.tokens, columns=min(self.student.vocabulary, self.teacher.vocabulary), layers=self.layers + 1,
            student_width=self.student.width, teacher_width=self.teacher.width, itemsize=self.itemsize,
            train_head=self.train_head, softcap=self.student.softcap,
        )  # fmt: skip


def step_memory(setup: Setup, *, dense: bool = False) -> dict[str, int]:
    """Bytes of a training step by part, with the dense loss or with ours; they are taken to exist at the same time."""
    weights = setup.student.parameters
    loss = loss_memory(setup.loss, "dense" if dense else setup.backend, device=setup.device)
    # The head's gradient is among the gradients already.
    in_loss = loss.total - loss.parts["gradient of the head"]
    return {
        "student weights": weights * setup.itemsize,
        "gradients": weights * setup.itemsize,
        "optimizer": weights * OPTIMIZERS[setup.optimizer],
        "activations": setup.student.activations(setup.tokens, setup.itemsize, checkpointing=setup.checkpointing),
        "teacher weights": 0 if setup.teacher_elsewhere else setup.teacher.parameters * setup.itemsize,
        "teacher head": setup.teacher.vocabulary * setup.teacher.width * setup.itemsize if setup.teacher_elsewhere else 0,
        "teacher states": (setup.layers + 1) * setup.tokens * setup.teacher.width * setup.itemsize,
        "loss": in_loss,
    }


@dataclass(frozen=True)
class Advice:
    """A change and what the step takes with it."""

    change: str
    total: int
    fits: bool


def advise(setup: Setup, limit: int) -> list[Advice]:
    """What to change so that the step with the fused loss fits, least intrusive first, each on top of those before."""
    found: list[Advice] = []

    def add(change: str, changed: Setup) -> Setup:
        total = sum(step_memory(changed).values())
        found.append(Advice(change, total, total <= limit))
        return changed

    if not setup.checkpointing:
        setup = add("gradient checkpointing in the student", replace(setup, checkpointing=True))
    if not setup.teacher_elsewhere:
        setup = add(
            "teacher states computed beforehand or on another device (its head stays)", replace(setup, teacher_elsewhere=True)
        )
    if OPTIMIZERS[setup.optimizer] > OPTIMIZERS["adamw8bit"]:
        setup = add("an 8-bit AdamW", replace(setup, optimizer="adamw8bit"))
    most = most_tokens(setup, limit)
    if most and most < setup.tokens:
        add(f"micro-batches of {most} tokens, gradients accumulated", replace(setup, tokens=most))
    first = next((i for i, a in enumerate(found) if a.fits), None)
    return found if first is None else found[: first + 1]


def most_tokens(setup: Setup, limit: int) -> int:
    """The most tokens, a multiple of 64, whose step fits; 0 if none does."""
    low, high = 0, max(1, setup.tokens // 64)
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum(step_memory(replace(setup, tokens=64 * middle)).values()) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return 64 * low


def parse_size(text: str) -> int:
    """Bytes from "24GiB", "24G", "512 MB" or a plain number."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if not match or not float(match[1]) > 0:
        raise UserError(f"{text!r} is not an amount of memory: write it as 24GiB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def read_model(text: str, option: str) -> ModelShape:
    """A model from "WIDTHxDEPTHxVOCABULARY", a config.json, a directory that holds one, or a name that transformers knows.

    Raises:
        UserError: it is none of these; says what was tried.
    """
    numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if numbers:
        width, depth, vocabulary = map(int, numbers.groups())
        return ModelShape(vocabulary, width, depth, 4 * width, width, width, gated=False, tied=True)
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{option}: {path} is not JSON ({error})") from error
        return model_from_config(data, f"{option}: {path}")
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise UserError(
            f"{option} {text!r} is no file, no directory and not WIDTHxDEPTHxVOCABULARY; names need "
            'pip install "fdd_kernels[hf]"'
        ) from error
    try:
        data = AutoConfig.from_pretrained(text).to_dict()
    except Exception as error:  # transformers raises many kinds for a name that it cannot resolve
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{option} {text!r} is no file or directory, not WIDTHxDEPTHxVOCABULARY (as 768x12x50257), and no model name "
            f"that can be resolved here: {first}"
        ) from error
    return model_from_config(data, f"{option}: {text}")


def model_from_config(data: dict[str, Any], where: str) -> ModelShape:
    """The shape in a Hugging Face config's fields, under any of the names in use.

    Raises:
        UserError: a field is missing or no positive number.
    """
    data = data | (data.get("text_config") or {}) if isinstance(data, dict) else {}

    def number(*names: str, default: int | None = None) -> int:
        value = next((data[name] for name in names if data.get(name) is not None), default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UserError(f"{where}: {' or '.join(names)} is {value!r}, a positive number is needed")
        return value

    width = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head", "n_heads")
    head_width = number("head_dim", default=max(1, width // heads))
    kind = str(data.get("model_type", ""))
    return ModelShape(
        vocabulary=number("vocab_size"),
        width=width,
        depth=number("num_hidden_layers", "n_layer", "n_layers"),
        intermediate=number("intermediate_size", "n_inner", "ffn_dim", default=4 * width),
        query_width=heads * head_width,
        key_width=number("num_key_value_heads", default=heads) * head_width,
        gated=not kind.startswith(("gpt", "opt", "bloom", "phi-msft", "falcon")),
        tied=bool(data.get("tie_word_embeddings", kind.startswith(("gpt2", "gemma")))),
        softcap=bool(data.get("final_logit_softcapping")),
    )


def add_plan(commands) -> None:
    """Add the subcommand to the parser of `fdd-kernels`."""
    plan = commands.add_parser(
        "plan", help="will a training step fit in memory, and what to change", description=run_plan.__doc__
    )
    config = "a Hugging Face config (name, directory or config.json), or WIDTHxDEPTHxVOCABULARY"
    plan.add_argument("--student", required=True, metavar="CONFIG", help=config)
    plan.add_argument("--teacher", required=True, metavar="CONFIG", help="likewise")
    plan.add_argument("--tokens", required=True, type=int, metavar="N", help="of one micro-batch")
    plan.add_argument("--vram", default="24GiB", metavar="SIZE", help="memory that there is (%(default)s)")
    plan.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS, help="(%(default)s)")
    plan.add_argument("--dtype", default="bfloat16", choices=DTYPE_BYTES, help="of weights and activations (%(default)s)")
    plan.add_argument("--num-layers", type=int, default=4, metavar="N", help="layers compared (%(default)s, the paper's)")
    plan.add_argument("--backend", default=None, choices=("torch", "cpu"), help="whose buffers are counted (torch)")
    plan.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(%(default)s)")
    plan.add_argument("--frozen-head", action="store_true", help="the loss does not train the student's head")
    plan.add_argument("--gradient-checkpointing", action="store_true")
    plan.add_argument("--cached-teacher", action="store_true", help="the teacher's states come from elsewhere")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--plot", type=Path, metavar="FILE", help="draw the parts (png, svg, pdf)")
    plan.set_defaults(run=run_plan)


def run_plan(arguments: argparse.Namespace) -> int:
    """Predict the peak memory of a training step by part, with the dense loss and with the fused one; exit code 1 if the
    fused one does not fit."""
    limit = parse_size(arguments.vram)
    for name, value in (("--tokens", arguments.tokens), ("--num-layers", arguments.num_layers)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    setup = Setup(
        student=read_model(arguments.student, "--student"), teacher=read_model(arguments.teacher, "--teacher"),
        tokens=arguments.tokens, optimizer=arguments.optimizer, dtype=arguments.dtype, layers=arguments.num_layers,
        backend=arguments.backend or "torch", device=arguments.device, train_head=not arguments.frozen_head,
        checkpointing=arguments.gradient_checkpointing, teacher_elsewhere=arguments.cached_teacher,
    )  # fmt: skip
    try:
        for model in (setup.student, setup.teacher):
            layer_grid(model.depth, setup.layers, "floor")
    except ValueError as error:
        raise UserError(str(error)) from error
    fused, dense = step_memory(setup), step_memory(setup, dense=True)
    totals = {"fused": sum(fused.values()), "dense": sum(dense.values())}
    advice = [] if totals["fused"] <= limit else advise(setup, limit)
    if arguments.json:
        print(
            json.dumps(
                {
                    "setup": asdict(setup), "limit": limit, "fused": fused, "dense": dense, "totals": totals,
                    "fits": {name: total <= limit for name, total in totals.items()}, "advice": [asdict(a) for a in advice],
                }, indent=1,
            )
        )  # fmt: skip
    else:
        _print(setup, fused, dense, limit, advice)
    if arguments.plot:
        _draw(fused, dense, limit, arguments.plot)
    return 0 if totals["fused"] <= limit else 1


def _print(setup: Setup, fused: dict[str, int], dense: dict[str, int], limit: int, advice: list[Advice]) -> None:
    print(f"student {setup.student.parameters / 1e9:.2f}B, teacher {setup.teacher.parameters / 1e9:.2f}B weights, "
          f"{setup.tokens} tokens, {setup.layers} layers + output, {setup.dtype}, {setup.optimizer}")  # fmt: skip
    print(f"{'':<18} {'dense loss':>12} {'fused loss':>12}")
    for part in fused:
        if fused[part] or dense[part]:
            print(f"{part:<18} {show(dense[part]):>12} {show(fused[part]):>12}")
    totals = [sum(parts.values()) for parts in (dense, fused)]
    print(f"{'total':<18} {show(totals[0]):>12} {show(totals[1]):>12}")
    print(
        f"{f'in {show(limit)}':<18} {'fits' if totals[0] <= limit else 'no':>12} {'fits' if totals[1] <= limit else 'no':>12}"
    )
    if advice:
        print("\nwhat to change, each on top of those before:")
        for a in advice:
            print(f"  {a.change}: {show(a.total)}{', fits' if a.fits else ''}")
        if not advice[-1].fits:
            print("  even so it does not fit: a smaller student, LoRA, or more memory")
    print("\nactivations are an estimate; python -m benchmarks prints how far predictions of the loss are off")


def _draw(fused: dict[str, int], dense: dict[str, int], limit: int, path: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    left = [0.0, 0.0]
    for part in fused:
        sizes = [dense[part] / GIB, fused[part] / GIB]
        if any(sizes):
            axis.barh(["dense loss", "fused loss"], sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes)]
    axis.axvline(limit / GIB, color="black", ls="--", lw=1, label=f"{show(limit)}")
    axis.set_xlabel("GiB")
    axis.set_xlim(0, 1.05 * math.ceil(max(*left, limit / GIB)))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)
