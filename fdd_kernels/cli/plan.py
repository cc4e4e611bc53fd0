"""`fdd-kernels plan`: predict whether a training step fits in memory, what takes the memory, and
what to change.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

from fdd_kernels.cli.parsing import add_options, flag, given_options
from fdd_kernels.common.errors import UserError
from fdd_kernels.common.sizes import GIB, parse_count, parse_size, show
from fdd_kernels.memory.models import read_model
from fdd_kernels.memory.step import (
    DTYPE_BYTES,
    OPTIMIZERS,
    QUANTISED_BYTES,
    Advice,
    Setup,
    advise,
    step_memory,
)
from fdd_kernels.objectives.fdd.options import FDDConfig, LossOptions

# Options of the loss that its memory depends on.
OBJECTIVE = (
    "alpha",
    "beta",
    "output_kd_weight",
    "ce_weight",
    "trajectory",
    "derivative",
    "output_divergence",
    "layer_weights",
    "derivative_layers",
    "temperature",
    "derivative_temperature",
    "output_temperature",
    "teacher_mix",
    "output_in_dynamics",
)


def add_plan(commands) -> None:
    """Add the subcommand to the parser of `fdd-kernels`."""
    plan = commands.add_parser(
        "plan",
        help="predict whether a training step fits in memory, and what to change",
        description=run_plan.__doc__,
    )
    config = "a Hugging Face config (name, directory or config.json), or WIDTHxDEPTHxVOCABULARY"
    plan.add_argument("--student", required=True, metavar="CONFIG", help=config)
    plan.add_argument("--teacher", required=True, metavar="CONFIG", help="likewise, of the teacher")
    plan.add_argument("--tokens", required=True, metavar="N", help="of one micro-batch; 8k is 8192")
    plan.add_argument(
        "--vram",
        default="24GiB",
        metavar="SIZE",
        help="memory of the device, with its unit (%(default)s)",
    )
    plan.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS, help="(%(default)s)")
    plan.add_argument(
        "--dtype",
        default="bfloat16",
        choices=DTYPE_BYTES,
        help="of weights and activations (%(default)s)",
    )
    plan.add_argument(
        "--num-layers",
        type=int,
        default=4,
        metavar="N",
        help="number of compared layers (%(default)s, the paper's)",
    )
    add_options(plan, FDDConfig, ("num_teacher_layers", "layer_alignment"))
    plan.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "triton", "torch", "cpu"),
        help="the backend whose buffers are counted (%(default)s: the default one on the device)",
    )
    plan.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(%(default)s)")
    plan.add_argument(
        "--frozen-head", action="store_true", help="the loss does not train the student's head"
    )
    plan.add_argument("--gradient-checkpointing", action="store_true")
    plan.add_argument(
        "--lora-rank",
        type=int,
        metavar="N",
        help="train LoRA adapters on all linear layers, not the weights",
    )
    plan.add_argument(
        "--cached-teacher",
        action="store_true",
        help="the teacher's states come from a cache or another device",
    )
    plan.add_argument(
        "--teacher-dtype",
        choices=(*DTYPE_BYTES, *QUANTISED_BYTES),
        help="of the teacher's weights (--dtype)",
    )
    add_options(plan.add_argument_group("the loss"), LossOptions, OBJECTIVE)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--plot", type=Path, metavar="FILE", help="draw the parts (png, svg, pdf)")
    plan.set_defaults(run=run_plan, options=(FDDConfig,))


def run_plan(arguments: argparse.Namespace) -> int:
    """Predict the peak memory of a training step by part, with the dense loss and with the fused
    one. The exit code is 1 if the step with the fused loss does not fit.
    """
    from fdd_kernels.hf.layers import layer_grid

    limit = parse_size(arguments.vram, "--vram")
    tokens = parse_count(arguments.tokens, "--tokens")
    for name, value in {
        "--num-layers": arguments.num_layers,
        "--lora-rank": arguments.lora_rank,
    }.items():
        if value is not None and value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if {"triton": "cuda", "cpu": "cpu"}.get(
        arguments.backend, arguments.device
    ) != arguments.device:
        other = "cpu" if arguments.device == "cuda" else "cuda"
        raise UserError(
            f"--backend {arguments.backend} does not run on --device {arguments.device}: pass "
            f"--device {other}"
        )
    models = {
        option: read_model(text, option)
        for option, text in (("--student", arguments.student), ("--teacher", arguments.teacher))
    }
    config, objective = _options(arguments)
    layers = [
        number - config.output_in_dynamics
        for number in (config.dynamics_layers, config.teacher_dynamics_layers)
    ]
    of_teacher = "num_layers" if config.num_teacher_layers is None else "num_teacher_layers"
    for (option, model), number, name in zip(models.items(), layers, ("num_layers", of_teacher)):
        try:
            layer_grid(model.depth, number, "floor", name)
        except ValueError as error:
            raise UserError(
                f"{flag(name)} {number}, {option} with {model.depth} blocks: {error}"
            ) from error
    setup = Setup(
        student=models["--student"],
        teacher=models["--teacher"],
        tokens=tokens,
        optimizer=arguments.optimizer,
        dtype=arguments.dtype,
        layers=layers[0],
        teacher_layers=layers[1],
        alignment=config.layer_alignment,
        backend=arguments.backend,
        device=arguments.device,
        train_head=not arguments.frozen_head,
        checkpointing=arguments.gradient_checkpointing,
        teacher_elsewhere=arguments.cached_teacher,
        lora_rank=arguments.lora_rank,
        teacher_dtype=arguments.teacher_dtype,
        device_memory=limit if arguments.device == "cuda" else None,
        objective=objective,
    )
    fused, dense = step_memory(setup), step_memory(setup, dense=True)
    totals = {"fused": sum(fused.values()), "dense": sum(dense.values())}
    advice = [] if totals["fused"] <= limit else advise(setup, limit)
    if arguments.json:
        print(
            json.dumps(
                {
                    "setup": asdict(setup),
                    "limit": limit,
                    "fused": fused,
                    "dense": dense,
                    "totals": totals,
                    "fits": {name: total <= limit for name, total in totals.items()},
                    "advice": [asdict(a) for a in advice],
                },
                indent=1,
            )
        )
    else:
        _print(setup, fused, dense, limit, advice)
    if arguments.plot:
        _draw(fused, dense, limit, arguments.plot)
    return 0 if totals["fused"] <= limit else 1


def _options(arguments: argparse.Namespace) -> tuple[FDDConfig, LossOptions]:
    """Return layers and loss of the training, and the loss alone.

    Raises:
        UserError: options that do not go together, or with the backend.
    """
    from fdd_kernels.backends import check_spec
    from fdd_kernels.objectives.fdd.plan import build_plan

    given = given_options(arguments, FDDConfig) | {"num_layers": arguments.num_layers}
    try:
        # The derivative that a training has unless told otherwise.
        loss = {"derivative": FDDConfig().derivative} | given_options(arguments, LossOptions)
        objective = LossOptions(**loss)
        if objective.pairs_all_layers:
            columns = len(objective.layer_weights[0]) - objective.output_in_dynamics
            given.setdefault("num_teacher_layers", columns)
        config = FDDConfig(**given)
        if config.layer_alignment == "rank":
            counts = config.dynamics_layers, config.teacher_dynamics_layers
            states = [count + 1 - config.output_in_dynamics for count in counts]
            plan = build_plan(objective, 1, *states)
            if arguments.backend != "auto":
                check_spec(arguments.backend, plan.spec)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    return config, objective


def _print(
    setup: Setup, fused: dict[str, int], dense: dict[str, int], limit: int, advice: list[Advice]
) -> None:
    print(
        f"student {setup.student.parameters / 1e9:.2f}B, teacher "
        f"{setup.teacher.parameters / 1e9:.2f}B weights, {setup.tokens} tokens, {setup.layers} "
        f"layers + output, {setup.dtype}, {setup.optimizer}, backend {setup.chosen_backend}"
    )
    print(f"{'':<18} {'dense loss':>12} {'fused loss':>12}")
    for part in fused:
        if fused[part] or dense[part]:
            print(f"{part:<18} {show(dense[part]):>12} {show(fused[part]):>12}")
    totals = [sum(parts.values()) for parts in (dense, fused)]
    print(f"{'total':<18} {show(totals[0]):>12} {show(totals[1]):>12}")
    print(
        f"{f'in {show(limit)}':<18} {'fits' if totals[0] <= limit else 'no':>12} "
        f"{'fits' if totals[1] <= limit else 'no':>12}"
    )
    if advice:
        print("\nwhat to change, each on top of those before:")
        for a in advice:
            print(f"  {a.change}: {show(a.total)}{', fits' if a.fits else ''}")
        if not advice[-1].fits:
            alternative = "" if setup.lora_rank else "LoRA adapters (--lora-rank 16), "
            print(f"  even so it does not fit: {alternative}a smaller student, or more memory")
    print(
        "\nactivations are an estimate from the sizes of the matrices; kernels of attention, scans "
        "and experts may store more or less"
    )


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
