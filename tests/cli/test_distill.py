"""Run `fdd-kernels distill` end to end on tiny models: results, reports, options."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdd_kernels import FDDConfig
from fdd_kernels.cli.distill import trainer as trainer_module
from fdd_kernels.cli.distill.run import distill
from fdd_kernels.common.errors import UserError
from fdd_kernels.integrations.model_card import validation_rows
from tests.support.commands import TEXT, command, options, quiet, same, weights
from tests.support.hf_models import tiny_model


def test_the_student_is_written_and_is_closer_to_the_teacher(inputs, whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert metrics["held_out"]["output_kd"] < 0.95 * metrics["held_out_before"]["output_kd"]
    student = AutoModelForCausalLM.from_pretrained(whole / "student")
    teacher = AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(whole / "student")
    before = AutoModelForCausalLM.from_pretrained(inputs / "student")
    ids = tokenizer("three and four is a word", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_p, after, start = (
            model(ids).logits.log_softmax(-1) for model in (teacher, student, before)
        )
    distance = [float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) for log_q in (after, start)]
    assert distance[0] < distance[1]


def test_what_a_run_leaves_behind(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {"run.json", "metrics.json", "student", "checkpoint-4", "checkpoint-6", ".lock"}
    # No pickle of arbitrary objects: every .pt and .pth file loads as tensors and plain values.
    for path in (whole / "checkpoint-6").iterdir():
        assert path.name != "training_args.bin"
        if path.name in ("optimizer.pt", "scheduler.pt"):
            torch.load(path, weights_only=True)


def test_the_student_has_a_model_card(inputs, whole):
    card = ModelCard.load(whole / "student" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"fdd", "distillation"} <= set(card.data.tags)
    held_out = json.loads((whole / "metrics.json").read_text())["held_out"]
    for text in (
        "# student distilled from teacher",
        "data.txt",
        "learning_rate: 0.003",
        "num_layers=2",
        f"{held_out['trajectory']:.4f} |",
        f"torch {torch.__version__}",
    ):
        assert text in card.text, text
    assert str(inputs) not in card.content
    assert "base_model" not in card.content


def test_the_metrics_are_in_the_result_and_on_the_card(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    last = [entry for entry in metrics["history"] if "eval_kl" in entry][-1]
    card = ModelCard.load(whole / "student" / "README.md").text
    for name in ("perplexity", "accuracy", "kl", "agreement", "kl_layer_1", "kl_layer_2"):
        before, after = metrics["held_out_before"][name], metrics["held_out"][name]
        assert after == last[f"eval_{name}"], name
        assert f"| {name} | {before:.4f} | {after:.4f} |" in card, name
    assert "eval_runtime" in last
    assert "runtime" not in card


def test_numbers_that_are_not_known_are_left_blank():
    """Of a run that an earlier release began, or of an infinite perplexity in a checkpoint."""
    found = {"held_out_before": {"loss": 2.0}, "held_out": {"loss": 1.0, "perplexity": None}}
    assert validation_rows(found | {"held_out": {**found["held_out"], "kl": 0.5}}, ["loss"]) == [
        ("loss", "2.0000", "1.0000"),
        ("perplexity", "", ""),
        ("kl", "", "0.5000"),
    ]


def test_every_term_is_in_the_history(whole):
    history = json.loads((whole / "metrics.json").read_text())["history"]
    trained = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in trained] == list(range(1, 7))
    assert all({"output_kd", "trajectory", "derivative", "ce"} <= entry.keys() for entry in trained)
    assert [entry["step"] for entry in history if "eval_trajectory" in entry] == [0, 2, 4, 6]


def test_a_finished_run_is_left_alone(inputs, whole):
    console = quiet()
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}
    assert distill(options(inputs, whole), console) == json.loads(
        (whole / "metrics.json").read_text()
    )
    assert "finished; nothing to do" in console.file.getvalue()
    assert {
        path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"
    } == before


def test_every_option_of_the_objective(inputs, tmp_path):
    """They reach the loss, the record, the card, and a second command knows the run."""
    config = FDDConfig(
        num_layers=2,
        trajectory="jsd:0.1",
        output_divergence="alpha_beta:0.2,0.7",
        derivative="weighted_cosine",
        derivative_temperature=2.0,
        layer_weights=(1.0, 0.5),
    )
    run = options(inputs, tmp_path, config=config, max_steps=2)
    console = quiet()
    metrics = distill(run, console)
    printed = console.file.getvalue()
    assert f"{metrics['held_out']['kl_layer_2']:.4f}" in printed
    plain = distill(options(inputs, tmp_path / "plain", max_steps=2), quiet())
    for name in ("output_kd", "trajectory", "derivative"):
        assert metrics["held_out_before"][name] != plain["held_out_before"][name], name
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config.trajectory"] == "jsd:0.1"
    assert record["config.layer_weights"] == [1.0, 0.5]
    card = ModelCard.load(tmp_path / "student" / "README.md").text
    for text in (
        "trajectory='jsd:0.1'",
        "output_divergence='alpha_beta:0.2,0.7'",
        "layer_weights=(1.0, 0.5)",
        "derivative_temperature=2.0",
    ):
        assert text in card, text
    console = quiet()
    distill(run, console)
    assert "finished; nothing to do" in console.file.getvalue()


def test_feature_space(inputs, tmp_path):
    """The card names it, and a run that is extended resumes with its projection."""
    config = FDDConfig.paper(num_layers=2, space="feature", trajectory="mse", projection="linear")
    distill(options(inputs, tmp_path, config=config, max_steps=2), quiet())
    card = ModelCard.load(tmp_path / "student" / "README.md").text
    assert "space='feature', projection='linear'" in card
    metrics = distill(options(inputs, tmp_path, config=config, max_steps=3), quiet())
    assert metrics["steps"] == 3
    assert (tmp_path / "checkpoint-3" / "fdd_projection.safetensors").is_file()


def test_an_alignment_that_was_never_needed(inputs, tmp_path):
    """A run that ends before the first stage with trajectory or derivative."""
    stages = "task=9:alpha=0,beta=0;both:alpha=1,beta=1"
    config = FDDConfig.paper(num_layers=2, layer_alignment="attention", stages=stages)
    metrics = distill(options(inputs, tmp_path, config=config, max_steps=1), quiet())
    assert metrics["layer_alignment"] is None
    assert not (tmp_path / "layer_alignment.svg").exists()


def test_an_alignment_is_printed_stored_drawn_and_resumed(inputs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    config = FDDConfig.paper(num_layers=2, layer_alignment="attention", alignment_every=3)
    run, console = options(inputs, tmp_path / "run", config=config), quiet()
    metrics = distill(run, console)
    found = metrics["layer_alignment"]
    assert (found["step"], found["student_layers"], found["teacher_layers"]) == (3, [1, 2], [1, 2])
    assert [sum(row) for row in found["weights"]] == pytest.approx([1.0, 1.0])
    entries = [entry for entry in metrics["history"] if "layer_alignment" in entry]
    assert [entry["step"] for entry in entries] == [0, 3]
    assert entries[-1]["layer_alignment"] == found
    logged = [entry["aligned_layer/2"] for entry in metrics["history"] if "loss" in entry]
    assert len(set(logged)) == 2
    assert all(1 <= layer <= 2 for layer in logged)
    printed = console.file.getvalue()
    assert "weights of the teacher's layers for each student layer, of step 3" in printed
    assert f"{found['weights'][0][0]:.2f}" in printed
    assert "teacher layer" in (run.output / "layer_alignment.svg").read_text()
    assert json.loads((run.output / "metrics.json").read_text())["layer_alignment"] == found
    card = ModelCard.load(run.output / "student" / "README.md").text
    assert "1, 2 with 1, 2, paired from data" in card
    assert "layer_alignment='attention'" in card

    student = weights(run.output)
    shutil.rmtree(run.output / "checkpoint-6")
    for name in ("metrics.json", "layer_alignment.svg"):
        (run.output / name).unlink()
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    console = quiet()
    resumed = distill(run, console)
    printed = console.file.getvalue()
    assert "resuming from checkpoint-4" in printed
    assert "layer_alignment.svg was not drawn: plot_layer_alignment needs matplotlib" in printed
    same(weights(run.output), student)
    assert resumed["layer_alignment"] == found
    again = [entry for entry in resumed["history"] if "layer_alignment" in entry]
    assert again == entries
    with pytest.raises(UserError, match=r"layer_alignment was 'attention', is 'emd'"):
        distill(replace(run, config=replace(config, layer_alignment="emd")), quiet())


def test_the_card_says_how_many_epochs_it_were(inputs, tmp_path):
    distill(options(inputs, tmp_path, max_steps=None, epochs=1.5), quiet())
    card = ModelCard.load(tmp_path / "student" / "README.md").text
    assert "- Steps: 6, 1.5 epochs" in card
    assert "epochs: 1.0" not in card


def test_another_text_to_evaluate_on(inputs, tmp_path):
    (tmp_path / "eval.txt").write_text(TEXT)
    metrics = distill(
        options(
            inputs,
            tmp_path / "run",
            eval_data=tmp_path / "eval.txt",
            eval_fraction=None,
            max_steps=1,
        ),
        quiet(),
    )
    plain = distill(options(inputs, tmp_path / "plain", eval_fraction=0.0, max_steps=1), quiet())
    assert metrics["train_windows"] == plain["train_windows"]
    assert metrics["held_out_windows"] > 3
    assert plain["held_out"] is None


def test_reports_go_to_tensorboard(inputs, tmp_path):
    distill(options(inputs, tmp_path, report_to=("tensorboard",), max_steps=1), quiet())
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.filterwarnings("error::FutureWarning")
def test_options_of_training_reach_the_trainer(inputs, tmp_path, monkeypatch):
    made = []
    own = trainer_module.ResumableTrainer.train
    monkeypatch.setattr(
        trainer_module.ResumableTrainer,
        "train",
        lambda self, **k: (made.append(self), own(self, **k))[1],
    )
    lora = {"lora_rank": 2, "lora_alpha": 3.0, "lora_targets": ("q_proj",)}
    settings = {
        "warmup": 0.5,
        "weight_decay": 0.2,
        "scheduler": "linear",
        "max_steps": 4,
        "gradient_checkpointing": True,
    }
    distill(options(inputs, tmp_path, **lora, **settings), quiet())
    arguments, config = made[0].args, made[0].model.peft_config["default"]
    assert (arguments.warmup_steps, arguments.weight_decay, arguments.lr_scheduler_type) == (
        2,
        0.2,
        "linear",
    )
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 3.0, {"q_proj"})


@pytest.mark.parametrize("place", ["auto", "cpu", "disk"])
def test_a_teacher_with_a_place_of_its_own_gives_the_same(inputs, whole, tmp_path, place):
    away = {
        "teacher_device_map": place,
        "teacher_offload_folder": tmp_path / "away" if place == "disk" else None,
    }
    distill(options(inputs, tmp_path / "run", **away), quiet())
    same(weights(tmp_path / "run"), weights(whole))


@pytest.mark.parametrize(
    ("kind", "library"),
    [("bnb4", "bitsandbytes"), ("bnb8", "bitsandbytes"), ("torchao-int8", "torchao")],
)
def test_a_quantised_teacher(inputs, whole, tmp_path, kind, library):
    pytest.importorskip(library)
    teacher = str(inputs / "student")  # a Llama: torchao knows no Conv1D
    metrics = distill(
        options(inputs, tmp_path / "q", teacher=teacher, teacher_quantization=kind, max_steps=1),
        quiet(),
    )
    # student and teacher differ by the quantisation alone
    assert 0 < metrics["held_out_before"]["output_kd"] < 0.05
    if library == "torchao":
        with pytest.raises(UserError, match="finds nothing to quantise"):
            distill(
                options(inputs, tmp_path / "none", teacher_quantization=kind, max_steps=1), quiet()
            )


def test_a_teacher_in_a_dtype_of_its_own(inputs, tmp_path):
    metrics = distill(options(inputs, tmp_path, teacher_dtype="bfloat16", max_steps=1), quiet())
    assert metrics["held_out"]["output_kd"] > 0
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_batches(inputs, whole, tmp_path):
    """Started by torchrun, two processes with batches of two take the steps of one with batches of
    four.
    """
    output, arguments = tmp_path / "run", command(inputs, tmp_path / "run")
    arguments[arguments.index("--batch-size") + 1] = "2"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fdd_kernels",
    ]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("saved checkpoint-6") == 1
    assert "FutureWarning" not in done.stderr
    metrics, alone = (
        json.loads((folder / "metrics.json").read_text()) for folder in (output, whole)
    )
    assert metrics["steps"] == alone["steps"] == 6
    logs = [
        [log["loss"] for log in found["history"] if "loss" in log] for found in (metrics, alone)
    ]
    # An epoch of 13 windows is odd: accelerate gives one window to both processes.
    assert logs[0][:3] == pytest.approx(logs[1][:3], rel=1e-4)
    assert metrics["held_out"]["loss"] == pytest.approx(alone["held_out"]["loss"], rel=0.05)
    with pytest.raises(UserError, match=r"processes was 2, is 1"):
        distill(options(inputs, output, batch_size=2), quiet())


def test_a_student_of_a_config_alone_is_initialised_by_seed(inputs, tmp_path):
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        console = quiet()
        distill(
            options(inputs, tmp_path / name, student=str(inputs / "bare"), seed=seed, max_steps=1),
            console,
        )
        assert "initialised at random" in console.file.getvalue()
        runs[name] = weights(tmp_path / name)
    same(runs["a"], runs["b"])
    assert not torch.equal(runs["a"]["lm_head.weight"], runs["c"]["lm_head.weight"])


def test_a_student_with_experts_is_shown_with_its_routers(inputs, tmp_path):
    folder = tmp_path / "mixture"
    size = json.loads((inputs / "student" / "config.json").read_text())["vocab_size"]
    tiny_model(
        "mixtral", depth=3, vocab_size=size, seed=1, output_router_logits=True
    ).save_pretrained(folder)
    metrics = distill(options(inputs, tmp_path / "run", student=str(folder), max_steps=2), quiet())
    assert metrics["held_out"]["router"] > 0
    assert "| router |" in (tmp_path / "run" / "student" / "README.md").read_text()


def test_bfloat16_keeps_float32_weights(inputs, tmp_path):
    metrics = distill(
        options(
            inputs, tmp_path, dtype="bfloat16", gradient_checkpointing=True, gradient_accumulation=2
        ),
        quiet(),
    )
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    assert metrics["held_out"]["output_kd"] < metrics["held_out_before"]["output_kd"]


def test_epochs_and_no_held_out_part(inputs, tmp_path):
    metrics = distill(
        options(inputs, tmp_path, max_steps=None, epochs=0.5, eval_fraction=0.0), quiet()
    )
    batches = -(-metrics["train_windows"] // 4)
    assert metrics["steps"] == -(-batches // 2) < batches
    assert metrics["held_out"] is None
    assert (tmp_path / "student").is_dir()
