"""`fdd-kernels distill` end to end on tiny models: results, resuming, kills, full disks, bad
input.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdd_kernels import FDDConfig
from fdd_kernels.cli.distill import trainer as trainer_module
from fdd_kernels.cli.distill.identity import model_identity
from fdd_kernels.cli.distill.processes import Processes
from fdd_kernels.cli.distill.run import distill
from fdd_kernels.cli.main import main
from fdd_kernels.common.errors import RunStopped, SaidElsewhere, UserError
from fdd_kernels.integrations import FDDTrainer
from fdd_kernels.integrations.checkpoints import checkpoints
from tests.support.commands import TEXT, FullDisk, options, quiet, small_disk
from tests.support.hf_models import tiny_model, tiny_tokenizer


def weights(output):
    return load_file(output / "student" / "model.safetensors")


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """An uninterrupted run of six steps."""
    output = tmp_path_factory.mktemp("whole") / "run"
    distill(options(inputs, output), quiet())
    return output


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


COMMAND = [
    "--max-steps",
    "6",
    "--learning-rate",
    "3e-3",
    "--batch-size",
    "4",
    "--max-length",
    "24",
    "--eval-fraction",
    "0.2",
    "--save-steps",
    "2",
    "--log-steps",
    "1",
    "--dtype",
    "float32",
    "--num-layers",
    "2",
]


def command(inputs, output, *more):
    return [
        "distill",
        "--teacher",
        str(inputs / "teacher"),
        "--student",
        str(inputs / "student"),
        "--data",
        str(inputs / "data.txt"),
        "--output",
        str(output),
        *COMMAND,
        *more,
    ]


# Hang while writing the second checkpoint, or within a step after the first.
STUCK = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from fdd_kernels.cli.distill import trainer as distill
from fdd_kernels.cli.main import main

def hang():
    Path(sys.argv[2]).touch()
    time.sleep(600)

if sys.argv[1] == "saving":
    own = distill.ResumableTrainer._save_optimizer_and_scheduler
    def save(self, folder):
        if self.state.global_step == 4:
            hang()
        own(self, folder)
    distill.ResumableTrainer._save_optimizer_and_scheduler = save
else:
    own = distill.ResumableTrainer.compute_loss
    def loss(self, *args, **kwargs):
        if self.state.global_step == 3 and self.model.training:
            hang()
        return own(self, *args, **kwargs)
    distill.ResumableTrainer.compute_loss = loss
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["saving", "computing"])
def test_kill_9_loses_nothing_that_was_reported_as_saved(inputs, whole, tmp_path, moment):
    output, stuck = tmp_path / "run", tmp_path / "stuck"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", STUCK, moment, str(stuck), *command(inputs, output)],
            stderr=stderr,
            env=environment,
        )
        try:
            deadline = time.monotonic() + 240
            while not stuck.exists():
                assert process.poll() is None, (tmp_path / "stderr").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            # While it lives, nobody else may work there.
            with pytest.raises(UserError, match="another process"):
                distill(options(inputs, output), quiet())
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    told = (tmp_path / "stderr").read_text()
    reported = [line.split()[-1] for line in told.splitlines() if line.startswith("saved ")]
    assert reported == ["checkpoint-2"]
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (output / "metrics.json").exists()
    console = quiet()
    distill(options(inputs, output), console)
    assert "resuming from checkpoint-2" in console.file.getvalue()
    same(weights(output), weights(whole))
    assert not (output / ".unfinished").exists()
    mine, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (output, whole))
    assert mine["held_out"] == theirs["held_out"]
    assert [e["loss"] for e in mine["history"] if "loss" in e] == [
        e["loss"] for e in theirs["history"] if "loss" in e
    ]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("checkpoint-4", "checkpoint-2"),
        *[
            pytest.param(where, kept, marks=pytest.mark.slow)
            for where, kept in (
                ("checkpoint-2", None),
                ("student", "checkpoint-6"),
                (".unfinished/metrics.json", "checkpoint-6"),
            )
        ],
    ],
)
def test_a_full_disk_loses_nothing(inputs, whole, tmp_path, monkeypatch, where, kept):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        FullDisk(patch, lambda path: f"/{where}" in path)
        with pytest.raises(UserError, match="No space left on device") as error:
            distill(options(inputs, output), quiet())
    assert (f"{kept} is complete" if kept else "nothing was saved before") in str(
        error.value
    ).replace("\n", " ")
    assert "\n" not in str(error.value)
    saved = sorted(path.name for path in output.glob("checkpoint-*"))
    assert (saved[-1] if saved else None) == kept
    assert not (output / ".unfinished").exists()
    assert not (output / "metrics.json").exists()
    distill(options(inputs, output), quiet())
    same(weights(output), weights(whole))


def test_a_really_full_file_system(inputs, whole, tmp_path):
    """Fill a small file system: it has no room for two checkpoints."""
    checkpoint = sum(path.stat().st_size for path in (whole / "checkpoint-6").rglob("*"))
    with small_disk(tmp_path / "small", int(checkpoint * 1.5)) as small:
        with pytest.raises(
            UserError, match=r"checkpoint-4 could not be written.*checkpoint-2 is complete"
        ):
            distill(options(inputs, small / "run"), quiet())
        assert [path.name for path in (small / "run").glob("checkpoint-*")] == ["checkpoint-2"]
        assert not (small / "run" / ".unfinished").exists()
        moved = tmp_path / "moved"
        shutil.copytree(small / "run", moved)
    distill(options(inputs, moved), quiet())
    same(weights(moved), weights(whole))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-4}, "learning_rate was 0.003, is 0.0001"),
        ({"config": FDDConfig(num_layers=2, beta=0.5)}, "config.beta was 1.0, is 0.5"),
        ({"seed": 4}, "seed was 0, is 4"),
    ],
)
def test_another_configuration_is_refused(inputs, whole, changes, named):
    before = weights(whole)
    with pytest.raises(UserError, match=f"holds another run .*{named}.*--no-resume"):
        distill(options(inputs, whole, **changes), quiet())
    same(weights(whole), before)


def test_other_data_or_models_are_refused(inputs, whole, tmp_path):
    (tmp_path / "data.txt").write_text(TEXT)
    with pytest.raises(UserError, match=r"holds another run \(data was"):
        distill(options(inputs, whole, data=tmp_path / "data.txt"), quiet())
    with pytest.raises(UserError, match=r"holds another run \(student was"):
        distill(options(inputs, whole, student=str(inputs / "bare")), quiet())


def test_how_often_it_saves_may_change(inputs, whole):
    assert distill(options(inputs, whole, save_steps=3, log_steps=5), quiet())["steps"] == 6


def test_no_resume_starts_again(inputs, whole, tmp_path):
    output = tmp_path / "run"
    distill(options(inputs, output, max_steps=2), quiet())
    distill(options(inputs, output, resume=False), quiet())
    same(weights(output), weights(whole))


def test_checkpoints_of_somebody_else_are_not_touched(inputs, tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(UserError, match=r"holds checkpoint-7 but no run.json"):
        distill(options(inputs, tmp_path), quiet())
    assert (tmp_path / "checkpoint-7").is_dir()


def test_a_finished_run_can_be_made_longer(inputs, tmp_path):
    output = tmp_path / "run"
    distill(options(inputs, output, max_steps=2, scheduler="constant"), quiet())
    console = quiet()
    metrics = distill(options(inputs, output, max_steps=6, scheduler="constant"), console)
    assert "resuming from checkpoint-2" in console.file.getvalue()
    assert metrics["steps"] == 6
    distill(options(inputs, tmp_path / "at-once", scheduler="constant"), quiet())
    same(weights(output), weights(tmp_path / "at-once"))
    # By epochs too: 13 windows are four steps. Fewer steps than were done are refused: they would
    # be lost.
    assert (
        distill(options(inputs, output, max_steps=None, epochs=1.5, scheduler="constant"), quiet())[
            "steps"
        ]
        == 6
    )
    with pytest.raises(
        UserError,
        match=r"holds this run after 6 steps, and 4 are wanted: give more --steps or --epochs",
    ):
        distill(options(inputs, output, max_steps=None, epochs=1.0, scheduler="constant"), quiet())
    assert json.loads((output / "metrics.json").read_text())["steps"] == 6


def test_the_card_says_how_many_epochs_it_were(inputs, tmp_path):
    distill(options(inputs, tmp_path, max_steps=None, epochs=1.5), quiet())
    card = ModelCard.load(tmp_path / "student" / "README.md").text
    assert "- Steps: 6, 1.5 epochs" in card
    assert "epochs: 1.0" not in card


def test_copied_and_touched_models_are_the_same_run(inputs, whole, tmp_path):
    for name in ("teacher", "student"):
        shutil.copytree(inputs / name, tmp_path / name)
        for file in (tmp_path / name).iterdir():
            os.utime(file, (1, 1))
        (tmp_path / name / "README.md").write_text("notes")
    models = {name: str(tmp_path / name) for name in ("teacher", "student")}
    console = quiet()
    distill(options(inputs, whole, **models), console)
    assert "finished; nothing to do" in console.file.getvalue()
    # Another training of the same shape has other weights, though its files have the same sizes.
    model = tiny_model("llama", depth=3, vocab_size=len(tiny_tokenizer()), seed=7)
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match=r"\(student was another: model.safetensors differs\)"):
        distill(options(inputs, whole, **models), quiet())


def test_records_of_earlier_versions_are_understood(inputs, whole, tmp_path):
    """They have sizes and times of the models' files, and do not know newer options."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    record = json.loads((output / "run.json").read_text())
    for name in (
        "warmup",
        "scheduler",
        "weight_decay",
        "eval_data",
        "lora_alpha",
        "lora_targets",
        "teacher_dtype",
    ):
        del record[name]
    for role in ("teacher", "student"):
        record[role] = {file.name: [file.stat().st_size, 0] for file in (inputs / role).iterdir()}
    (output / "run.json").write_text(json.dumps(record))
    console = quiet()
    distill(options(inputs, output), console)
    assert "finished; nothing to do" in console.file.getvalue()
    with pytest.raises(UserError, match=r"scheduler was 'cosine', is 'linear'"):
        distill(options(inputs, output, scheduler="linear"), quiet())


def test_a_tensor_that_differs_is_found(tmp_path):
    tensors = {"a": torch.zeros(5000), "b": torch.arange(7.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = model_identity(str(tmp_path))
    for name, index in (("a", 0), ("a", 4999), ("a", 2500), ("b", 3)):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed[name][index] += 1
        save_file(changed, tmp_path / "model.safetensors")
        assert model_identity(str(tmp_path)) != before
    save_file(tensors, tmp_path / "model.safetensors")
    assert model_identity(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_text("no safetensors at all")
    assert model_identity(str(tmp_path)) != before
    assert model_identity("gpt2-of-nobody") == "gpt2-of-nobody"


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


def test_an_error_of_one_process_is_said_once(monkeypatch):
    """A failure in the first process, or in one of several, ends all with one message."""

    class Arguments:
        device, world_size, process_index = torch.device("cpu"), 2, 0

    def fail():
        raise UserError("no such file")

    sent = []

    def broadcast(shared, **where):
        if sent:
            shared[:] = sent
        sent[:] = shared

    def gather(found, own):
        found[:] = [False, True]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    first, second = (
        Processes(Arguments),
        Processes(type("Second", (Arguments,), {"process_index": 1})),
    )
    assert [first.first(lambda: {"steps": 3}), second.first(lambda: pytest.fail("not here"))] == [
        {"steps": 3}
    ] * 2
    sent.clear()
    with pytest.raises(UserError, match="no such file"):
        first.first(fail)
    with pytest.raises(SaidElsewhere):
        second.first(lambda: pytest.fail("not here"))
    with pytest.raises(UserError, match="no such file"):
        second.all(fail)
    with pytest.raises(SaidElsewhere):
        first.all(lambda: 1)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_models_are_refused_by_name(inputs, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(
        UserError, match=r"(FSDP|DeepSpeed) shards the model, which this command does not do"
    ):
        distill(options(inputs, tmp_path), quiet())


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


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_a_loss_that_is_no_number_ends_the_run(inputs, tmp_path, capsys):
    """At the first such step, with exit status 1 and no student; every file is JSON."""
    output = tmp_path / "run"
    assert main(command(inputs, output, "--learning-rate", "1e12", "--save-steps", "1")) == 1
    errors = capsys.readouterr().err
    assert "is not finite (loss " in errors
    assert "nothing was saved before" in errors
    assert "learning rate" in errors
    assert "Traceback" not in errors
    assert not (output / "student").exists()
    assert not (output / "metrics.json").exists()
    # Without a validation split only the next loss shows it.
    assert (
        main(
            command(
                inputs,
                output,
                "--no-resume",
                "--learning-rate",
                "1e12",
                "--save-steps",
                "1",
                "--eval-fraction",
                "0",
            )
        )
        == 1
    )
    assert not checkpoints(output)
    for file in output.rglob("*.json"):
        json.loads(file.read_text("utf-8"), parse_constant=refuse_constant)
    assert main(command(inputs, output, "--no-resume")) == 0
    assert not list(output.glob("*not-finite"))
    json.loads((output / "metrics.json").read_text("utf-8"), parse_constant=refuse_constant)


def test_the_last_good_checkpoint_is_kept_and_resumed_from(inputs, whole, tmp_path, monkeypatch):
    own = FDDTrainer.training_step

    def ruined(self, model, *arguments, **named):
        if self.state.global_step == 3:
            with torch.no_grad():
                model.lm_head.weight.fill_(torch.inf)
        return own(self, model, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(FDDTrainer, "training_step", ruined)
        with pytest.raises(
            RunStopped,
            match=r"loss of step 4 is not finite .*checkpoint-2 is the last good checkpoint",
        ) as stop:
            distill(options(inputs, tmp_path / "run"), quiet())
    assert stop.value.exit_status == 1
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    distill(options(inputs, tmp_path / "run"), quiet())
    same(weights(tmp_path / "run"), weights(whole))


def test_a_student_with_experts_is_shown_with_its_routers(inputs, tmp_path):
    folder = tmp_path / "mixture"
    size = json.loads((inputs / "student" / "config.json").read_text())["vocab_size"]
    tiny_model(
        "mixtral", depth=3, vocab_size=size, seed=1, output_router_logits=True
    ).save_pretrained(folder)
    metrics = distill(options(inputs, tmp_path / "run", student=str(folder), max_steps=2), quiet())
    assert metrics["held_out"]["router"] > 0
    assert "| router |" in (tmp_path / "run" / "student" / "README.md").read_text()


def test_lora_resumes_and_is_merged(inputs, tmp_path):
    lora = {"lora_rank": 2, "max_steps": 4}
    distill(options(inputs, tmp_path / "whole", **lora), quiet())
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, lambda path: "/checkpoint-4" in path)
        with pytest.raises(UserError):
            distill(options(inputs, tmp_path / "parts", **lora), quiet())
    distill(options(inputs, tmp_path / "parts", **lora), quiet())
    same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    start = load_file(inputs / "student" / "model.safetensors")
    merged = weights(tmp_path / "whole")
    assert merged.keys() == start.keys()
    same({"lm_head.weight": merged["lm_head.weight"]}, {"lm_head.weight": start["lm_head.weight"]})
    assert not torch.equal(
        merged["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"]
    )
    base = AutoModelForCausalLM.from_pretrained(inputs / "student")
    adapted = peft.PeftModel.from_pretrained(
        base, tmp_path / "whole" / "adapter"
    ).merge_and_unload()
    torch.testing.assert_close(
        adapted.state_dict()["model.layers.0.mlp.up_proj.weight"],
        merged["model.layers.0.mlp.up_proj.weight"],
    )


def test_bfloat16_keeps_float32_weights(inputs, tmp_path):
    metrics = distill(
        options(
            inputs, tmp_path, dtype="bfloat16", gradient_checkpointing=True, gradient_accumulation=2
        ),
        quiet(),
    )
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    assert metrics["held_out"]["output_kd"] < metrics["held_out_before"]["output_kd"]


def test_unequal_padding_of_the_heads_is_found_out(inputs, tmp_path):
    padded = tiny_model("llama", depth=3, vocab_size=320)
    padded.save_pretrained(tmp_path / "student")
    metrics = distill(
        options(inputs, tmp_path / "run", student=str(tmp_path / "student"), max_steps=1), quiet()
    )
    assert metrics["vocab_size"] == len(tiny_tokenizer()) < 320


def test_epochs_and_no_held_out_part(inputs, tmp_path):
    metrics = distill(
        options(inputs, tmp_path, max_steps=None, epochs=0.5, eval_fraction=0.0), quiet()
    )
    batches = -(-metrics["train_windows"] // 4)
    assert metrics["steps"] == -(-batches // 2) < batches
    assert metrics["held_out"] is None
    assert (tmp_path / "student").is_dir()


class TestBadInput:
    """Print one line on stderr, exit with 2, leave nothing like a result."""

    def fails(self, capsys, arguments, message):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        last = error.strip().splitlines()[-1]
        assert last.startswith("fdd-kernels distill: "), error
        assert message in last, error
        assert "Traceback" not in error

    def replaced(self, inputs, output, **changes):
        arguments = command(inputs, output)
        for name, value in changes.items():
            arguments[arguments.index(f"--{name}") + 1] = str(value)
        return arguments

    def test_missing_teacher(self, inputs, tmp_path, capsys):
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", teacher=tmp_path / "none"),
            "no such directory",
        )

    def test_unknown_name_offline(self, inputs, tmp_path, capsys):
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", student="no-such-model-here"),
            "student no-such-model-here",
        )

    def test_truncated_weights(self, inputs, tmp_path, capsys):
        shutil.copytree(inputs / "student", tmp_path / "student")
        with (tmp_path / "student" / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", student=tmp_path / "student"),
            "cannot load the student",
        )

    def test_remote_code_is_never_run(self, inputs, tmp_path, capsys):
        shutil.copytree(inputs / "student", tmp_path / "student")
        config = json.loads((tmp_path / "student" / "config.json").read_text())
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        }
        (tmp_path / "student" / "config.json").write_text(json.dumps(config))
        (tmp_path / "student" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", student=tmp_path / "student"),
            "cannot load the",
        )
        assert not (tmp_path / "ran").exists()

    def test_corrupt_line(self, inputs, tmp_path, capsys):
        (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n{"text": "cut\n')
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", data=tmp_path / "d.jsonl"),
            f"{tmp_path / 'd.jsonl'}:2: not valid JSON",
        )

    def test_missing_data(self, inputs, tmp_path, capsys):
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", data=tmp_path / "d.jsonl"),
            "no such file or directory",
        )

    def test_another_tokenizer(self, inputs, tmp_path, capsys):
        shutil.copytree(inputs / "student", tmp_path / "student")
        text = (tmp_path / "student" / "tokenizer.json").read_text()
        (tmp_path / "student" / "tokenizer.json").write_text(text.replace('"!":', '"!!":'))
        changed = self.replaced(inputs, tmp_path / "o", student=tmp_path / "student")
        self.fails(capsys, changed, "is '!' to the teacher and '!!' to the student")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--vocab-size", "5", "--ce-weight", "1"], "--vocab-size 5"),
            (
                ["--lora-rank", "2", "--lora-targets", "no_such_layer"],
                "cannot add LoRA adapters to the student",
            ),
            (["--report-to", "nowhere"], "--report-to nowhere is not one of"),
            (
                ["--report-to", "comet_ml"],
                "--report-to comet_ml needs comet_ml, which is not installed: pip install comet_ml",
            ),
            (["--eval-data", "none.txt", "--eval-fraction", "0"], "none.txt"),
            (["--student-layers", "1,9", "--teacher-layers", "1,2"], "9"),
        ],
    )
    def test_options_that_do_not_go_with_the_models(
        self, inputs, tmp_path, capsys, arguments, message
    ):
        self.fails(capsys, [*command(inputs, tmp_path / "o"), *arguments], message)

    def test_no_tokenizer(self, inputs, tmp_path, capsys):
        changed = self.replaced(inputs, tmp_path / "o", teacher=inputs / "bare")
        self.fails(capsys, changed, "has no tokenizer")

    def test_too_many_layers(self, inputs, tmp_path, capsys):
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", **{"num-layers": 9}),
            "needs a deeper model",
        )

    def test_too_long_windows(self, inputs, tmp_path, capsys):
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", **{"max-length": 65}),
            "has only 64 positions",
        )

    def test_unavailable_backend(self, inputs, tmp_path, capsys):
        from fdd_kernels.backends import why_unavailable

        if why_unavailable("triton", torch.device("cpu")) is None:
            pytest.skip("triton runs here")
        self.fails(
            capsys,
            [*command(inputs, tmp_path / "o"), "--backend", "triton"],
            "--backend triton cannot run",
        )

    def test_output_that_is_a_file(self, inputs, tmp_path, capsys):
        (tmp_path / "o").write_text("")
        self.fails(capsys, command(inputs, tmp_path / "o"), "cannot be made a directory")
