"""Memory prediction: sizes of models, arithmetic, advice, the command `plan`, and the loss compared
with allocated peaks.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.inputs import build_problem
from benchmarks.measure import step
from benchmarks.providers import PROVIDERS
from benchmarks.runner import loss_shape
from benchmarks.workloads import GPT2 as PAIR
from fdd_kernels.backends import BACKENDS, why_unavailable
from fdd_kernels.backends.cpu import tiling
from fdd_kernels.cli.main import main
from fdd_kernels.common.errors import UserError
from fdd_kernels.common.sizes import parse_count, parse_size
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.memory.loss import MIB, LossShape, input_bytes, loss_memory
from fdd_kernels.memory.models import read_model
from fdd_kernels.memory.step import Setup, advise, most_tokens, step_memory
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.testing import evaluate, random_problem
from tests.support.allocations import allocated_peak
from tests.support.hf_models import FAMILIES, tiny_config

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def shape_of(config: dict, folder):
    (folder / "config.json").write_text(json.dumps(config))
    return read_model(str(folder), "--student")


@pytest.mark.parametrize(("config", "weights"), [(GPT2, 124_439_808), (QWEN, 494_032_768)])
def test_parameters_are_the_published_ones(config, weights, tmp_path):
    assert shape_of(config, tmp_path).parameters == weights


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "starcoder2"])
def test_parameters_are_the_models(family, tmp_path):
    """Also of the families whose names had been taken for something else."""
    config = (
        tiny_config(family, depth=2)
        if family in FAMILIES
        else AutoConfig.for_model(family, **LITTLE)
    )
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config.to_dict(), tmp_path)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert shape.embeddings == head.numel() + (0 if head is embedding else embedding.numel())
    assert (shape.vocabulary, shape.width, shape.depth) == (*head.shape, 2)


LITTLE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 97,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
}


def test_a_token_meets_some_experts_only(tmp_path):
    shape = shape_of(tiny_config("mixtral", depth=3, num_experts_per_tok=2).to_dict(), tmp_path)
    gate_and_up, down = 2 * 48 + 32, 48 + 32
    assert shape.experts == 3 * 2 * (gate_and_up + down)
    attention, router = 2 * (32 + 32) + 2 * (32 + 16), 4 + 32
    assert shape.linear == 3 * (attention + router)
    assert shape.activations(10, 2, checkpointing=False) == 2 * 10 * (shape.linear + shape.experts)


def test_adapters_are_those_that_distill_adds(tmp_path):
    from fdd_kernels.cli.loading import with_lora

    pytest.importorskip("peft")
    config = tiny_config("llama", depth=2)
    student = with_lora(AutoModelForCausalLM.from_config(config), 4)
    added = sum(p.numel() for name, p in student.named_parameters() if "lora_" in name)
    assert shape_of(config.to_dict(), tmp_path).adapters(4) == added


def test_numbers_are_a_gpt2_of_that_size(tmp_path):
    by_numbers, by_config = read_model("768x12x50257", "--student"), shape_of(GPT2, tmp_path)
    assert by_numbers.parameters == pytest.approx(by_config.parameters, rel=0.01)
    assert replace(by_numbers, blocks=by_config.blocks) == by_config
    assert read_model(str(tmp_path / "config.json"), "--student") == by_config


SIZES = [
    ("24GiB", 24 * 2**30),
    ("24G", 24 * 2**30),
    ("1.5 TiB", 3 * 2**39),
    ("25769803776", 24 * 2**30),
]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-3GiB", "0", "3 parsecs"])
def test_what_is_no_size(text):
    with pytest.raises(
        UserError,
        match=rf"--vram {re.escape(repr(text))} is not an amount of memory: write it as 24GiB",
    ):
        parse_size(text, "--vram")


def test_bytes_that_were_meant_to_have_a_unit():
    with pytest.raises(
        UserError, match=r"--vram '24' has no unit and would be bytes: write 24GiB or 24MiB"
    ):
        parse_size("24", "--vram")


@pytest.mark.parametrize(
    ("text", "count"), [("8192", 8192), ("8k", 8192), ("8K", 8192), ("0.5k", 512), ("1m", 2**20)]
)
def test_counts(text, count):
    assert parse_count(text, "--tokens") == count


def test_a_backend_states_its_memory_and_auto_is_the_one_that_runs():
    assert all(backend.memory is not None for backend in BACKENDS.values())
    assert setup().chosen_backend == "triton"
    assert setup(device="cpu").chosen_backend == "cpu"
    assert setup(backend="torch").chosen_backend == "torch"


def test_several_blocks_of_rows_need_a_sum_of_the_heads_gradient():
    """Of a 16-bit head on a GPU, and of no other: 519 MiB for Qwen2.5 0.5B from 7B."""
    shape = LossShape(rows=8192, columns=151936, student_width=896, teacher_width=3584, itemsize=2)
    part = "sum of the head's gradient"
    assert loss_memory(shape, "triton").parts[part] == 4 * 151936 * 896
    for changes in ({"rows": 128}, {"itemsize": 4}, {"train_head": False}):
        assert loss_memory(replace(shape, **changes), "triton").parts[part] == 0


@pytest.mark.parametrize("provider", ["cpu", "torch", "triton", "dense"])
def test_more_of_anything_never_takes_less(provider):
    base = LossShape(256, 20000, 256, 512)

    def total(**changes):
        prediction = loss_memory(replace(base, **changes), provider, threads=2)
        return prediction.total + prediction.inputs

    for change in (
        {"rows": 4096},
        {"columns": 80000},
        {"student_width": 1024},
        {"teacher_width": 2048},
        {"layers": 9},
    ):
        assert total(**change) > total()
    # The dense loss peaks before the head's gradient exists, unless the head is wide: 938.0 and
    # 937.5 MiB were measured.
    assert total(train_head=False) <= total()


def test_the_paper_pair_without_logits():
    """Dense takes tens of gigabytes; the fused loss takes little beyond its gradients."""
    shape = LossShape(rows=2048, columns=151936, student_width=896, teacher_width=3584, itemsize=2)
    dense, fused = loss_memory(shape, "dense"), loss_memory(shape, "cpu", threads=2)
    one = 2048 * 151936 * 4
    assert dense.total > 23 * one
    gradients = 2 * (151936 * 896 + 5 * 2048 * 896)
    # a 16-bit head's gradient over several blocks is summed in float32: 2 bytes more a number
    head_sum = fused.parts["sum of the head's gradient"]
    assert head_sum == 2 * 151936 * 896
    assert fused.total - gradients - head_sum < tiling.CACHED_BYTES + 32 * 2**20
    assert input_bytes(shape) == 2 * (151936 + 5 * 2048) * (896 + 3584)
    assert "logits" in dense.arithmetic()


def setup(**changes):
    student, teacher = read_model("768x12x50257", ""), read_model("1600x48x50257", "")
    return Setup(**({"student": student, "teacher": teacher, "tokens": 8192} | changes))


def test_adapters_leave_the_weights_and_the_head_untrained():
    whole, lora = step_memory(setup()), step_memory(setup(lora_rank=16))
    # A and B on the four matrices of every block
    adapters = 12 * 16 * (768 + 3 * 768 + 2 * 768 + 2 * 5 * 768)
    assert setup(lora_rank=16).trained == adapters
    assert lora["student weights"] - whole["student weights"] == lora["gradients"] == 2 * adapters
    assert lora["optimizer"] == 8 * adapters
    assert lora["loss"] < whole["loss"]  # no sum of the head's gradient


@pytest.mark.parametrize(
    ("dtype", "of_blocks"), [(None, 2), ("float32", 4), ("int8", 1), ("int4", 0.5)]
)
def test_a_teacher_may_have_a_dtype_of_its_own(dtype, of_blocks):
    teacher, kept = setup().teacher, 4 if dtype == "float32" else 2
    parts = step_memory(setup(teacher_dtype=dtype))
    assert parts["teacher weights"] == teacher.blocks * of_blocks + kept * 1600 * 50257
    assert parts["teacher states"] == 5 * 8192 * 1600 * kept
    assert parts["student weights"] == step_memory(setup())["student weights"]


def test_advice_ends_with_what_fits():
    plan = setup()
    total = sum(step_memory(plan).values())
    assert most_tokens(plan, total) == 8192
    advice = advise(plan, total // 2)
    assert advice[-1].fits
    assert not any(a.fits for a in advice[:-1])
    assert [a.total for a in advice] == sorted((a.total for a in advice), reverse=True)
    assert not advise(plan, 2**20)[-1].fits


def test_command_prints_parts_and_verdict(capsys, tmp_path):
    arguments = [
        "plan",
        "--student",
        "768x12x50257",
        "--teacher",
        "1600x48x50257",
        "--tokens",
        "8192",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for word in (
        "student weights",
        "optimizer",
        "activations",
        "teacher weights",
        "loss",
        "total",
        "fits",
    ):
        assert word in out
    assert main([*arguments, "--vram", "4GiB"]) == 1
    assert "what to change" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["totals"]["fused"] == sum(data["fused"].values())
    assert data["fits"] == {"fused": True, "dense": False}


def test_the_objective_is_in_the_prediction(capsys):
    """Other temporaries, and log-sum-exps at another temperature."""
    arguments = [
        *["plan", "--student", "768x12x50257", "--teacher", "1600x48x50257", "--json"],
        *["--tokens", "8192", "--device", "cpu", "--backend", "torch"],
    ]

    def loss(*more):
        assert main([*arguments, *more]) == 0
        data = json.loads(capsys.readouterr().out)
        return data["fused"]["loss"], data["setup"]["objective"]

    weighted, objective = loss()
    assert (objective["derivative"], objective["teacher_mix"]) == ("weighted_cosine", 1.0)
    arguments += ["--derivative", "cosine"]
    plain = loss()[0]
    assert weighted > plain
    for more in (
        ["--output-divergence", "alpha_beta:0.2,0.7"],
        ["--trajectory", "jsd:0.1"],
        ["--derivative-temperature", "2"],
        ["--teacher-mix", "0.5"],
        ["--ce-weight", "1"],
        ["--layer-weights", ";".join(["1,1,1,1,1,1"] * 4)],  # of six teacher layers
    ):
        assert loss(*more)[0] > plain, more
    assert loss("--beta", "0")[0] < plain
    assert main([*arguments, "--trajectory", "jsd:2"]) == 2
    assert "--trajectory jsd:2 has beta 2" in capsys.readouterr().err
    assert main([*arguments, "--alpha", "0", "--beta", "0", "--output-kd-weight", "0"]) == 2
    assert "nothing to compute" in capsys.readouterr().err


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = [
        "plan",
        "--student",
        "768x12x50257",
        "--teacher",
        "1600x48x50257",
        "--tokens",
        "64",
        "--plot",
    ]
    assert main([*arguments, str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, str(tmp_path / "none" / "plan.png")]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--tokens": "0"}, "--tokens 0 must be at least 1"),
        ({"--lora-rank": "0"}, "--lora-rank 0 must be at least 1"),
        ({"--tokens": "many"}, "--tokens 'many' is not a whole number: write it as 8192 or 8k"),
        ({"--vram": "much"}, "--vram 'much' is not an amount of memory"),
        ({"--vram": "24"}, "--vram '24' has no unit"),
        ({"--num-layers": "12"}, "--num-layers 12, --student with 12 blocks"),
        ({"--backend": "cpu"}, "--backend cpu does not run on --device cuda: pass --device cpu"),
        ({"--student": "BAD"}, "has model_type None"),
        ({"--student": "UNFIT"}, "no causal LM can be built from its config"),
        ({"--student": "MASKED"}, "it is of a model of the task masked_lm"),
        ({"--student": "0x12x100"}, "must be positive"),
        ({"--student": "BROKEN"}, "is not JSON"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, changes, message):
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    options = {
        "--student": "768x12x50257",
        "--teacher": "1600x48x50257",
        "--tokens": "64",
    } | changes
    (tmp_path / "unfit.json").write_text('{"model_type": "vit"}')
    masked = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (tmp_path / "masked.json").write_text(json.dumps(masked))
    if options["--student"].isupper():
        options["--student"] = str(tmp_path / f"{options['--student'].lower()}.json")
    assert main(["plan", *[part for item in options.items() for part in item]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_plan_needs_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; from fdd_kernels.cli.main import main; "
        "sys.exit(main(['plan', '--student', '64x10x100', '--teacher', '64x10x100', '--tokens', "
        "'64']))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], timeout=300, capture_output=True).returncode
        == 0
    )


CASES = [
    ("cpu", {"rows": 256, "columns": 8000, "student_width": 256, "teacher_width": 512}),
    (
        "cpu",
        {
            "rows": 512,
            "columns": 6000,
            "student_width": 128,
            "teacher_width": 128,
            "dtype": "bfloat16",
        },
    ),
    ("torch", {"rows": 128, "columns": 8000, "student_width": 256, "teacher_width": 512}),
    (
        "torch",
        {
            "rows": 200,
            "columns": 16000,
            "student_width": 128,
            "teacher_width": 64,
            "layers": 2,
            "dtype": "bfloat16",
        },
    ),
    *[
        (
            "cpu",
            {
                "rows": 256,
                "columns": 8000,
                "student_width": 128,
                "teacher_width": 64,
                "layers": 3,
                "options": tuple(options.items()),
            },
        )
        for options in (
            {"output_divergence": "jsd:0.1", "trajectory": "alpha_beta"},
            {"derivative": "weighted_cosine", "derivative_temperature": 2.0, "teacher_mix": 0.5},
        )
    ],
    *[
        (
            "torch",
            {
                "rows": 64,
                "columns": 16000,
                "student_width": 64,
                "teacher_width": 32,
                "layers": 3,
                "options": tuple(options.items()),
            },
        )
        for options in (
            *[
                {"trajectory": name, "output_divergence": name, "derivative": None}
                for name in DIVERGENCES
            ],
            {"output_divergence": "jsd:0.1"},
            {"derivative": "weighted_cosine"},
            {"derivative": "weighted_cosine", "derivative_temperature": 2.0},
            {"trajectory": "alpha_beta:0.5,0.5", "derivative": "weighted_cosine"},
            {"teacher_mix": 0.5},
            {"teacher_mix": 0.5, "temperature": 2.0, "output_temperature": 3.0},
            {"derivative_temperature": 2.0, "output_in_dynamics": True},
        )
    ],
    (
        "dense",
        {"rows": 300, "columns": 32000, "student_width": 64, "teacher_width": 64, "layers": 4},
    ),
    ("dense", {"rows": 128, "columns": 8000, "student_width": 64, "teacher_width": 64}),
    (
        "dense",
        {"rows": 256, "columns": 20000, "student_width": 64, "teacher_width": 64, "layers": 1},
    ),
]


@pytest.mark.parametrize(
    ("provider", "shape"),
    CASES,
    ids=lambda case: case if isinstance(case, str) else str(case.get("options") or case["rows"]),
)
def test_prediction_agrees_with_the_peak_of_allocations(provider, shape):
    device, workload = torch.device("cpu"), replace(PAIR, **shape)
    reason = PROVIDERS[provider].unavailable(device)
    if reason:
        pytest.skip(reason)
    problem = build_problem(workload, device)
    measured = allocated_peak(
        lambda: step(PROVIDERS[provider], problem, PROVIDERS[provider].options(workload), device)
    )
    prediction = loss_memory(loss_shape(workload), provider, threads=1)
    predicted = prediction.total - prediction.parts["runtime"]
    # The C++ kernels take the scratch of their threads from the system; the rest of theirs, and all
    # of the others', is here.
    low = 0.9 * predicted if provider == "cpu" else 0.99 * predicted
    assert low <= measured <= 1.01 * predicted, (
        f"predicted {predicted / MIB:.2f} MiB, allocated {measured / MIB:.2f} MiB"
    )


@pytest.mark.parametrize("trajectory", ["kl", "jsd", "cosine"])
@pytest.mark.parametrize("depths", [(3, 6), (5, 2)], ids=str)
@pytest.mark.parametrize("provider", ["cpu", "torch"])
def test_prediction_of_pairs_of_layers(provider, depths, trajectory):
    if why_unavailable(provider, torch.device("cpu")):
        pytest.skip(f"{provider} cannot run here")
    rows, columns, widths = 64, 16000, (64, 32)
    weights = [[1.0 + j for j in range(depths[1] - 1)] for _ in range(depths[0] - 1)]
    options = {"layer_weights": weights, "trajectory": trajectory}
    problem = random_problem((rows,), columns, *widths, *depths)
    measured = allocated_peak(lambda: evaluate(problem, backend=provider, **options))
    objective = LossOptions(**options)
    layers, teacher_layers = depths
    shape = LossShape(
        rows, columns, *widths, layers, options=objective, teacher_layers=teacher_layers
    )
    prediction = loss_memory(shape, provider, threads=1)
    predicted = prediction.total - prediction.parts["runtime"]
    low = 0.9 * predicted if provider == "cpu" else 0.99 * predicted
    assert low <= measured <= 1.01 * predicted, (
        f"predicted {predicted / MIB:.2f} MiB, allocated {measured / MIB:.2f} MiB"
    )


def test_scratch_for_logits_follows_the_devices_memory():
    """At most a 32nd of the device's memory by default."""
    shape = LossShape(rows=8192, columns=151936, student_width=896, teacher_width=3584, itemsize=2)
    held = [
        loss_memory(shape, "triton", device_memory=gib * 2**30).parts["logits"]
        for gib in (24, 40, 80)
    ]
    assert held == sorted(held)
    assert all(scratch <= gib * 2**30 / 32 for scratch, gib in zip(held, (24, 40, 80)))
    assert setup(device_memory=24 * 2**30).device_memory == 24 * 2**30
