"""examples/paper: every stage runs on tiny models, resumes, and refuses what does not go together;
the configuration files hold the published setting and say whose each value is.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fdd_kernels import FDDConfig
from fdd_kernels.common.errors import UserError
from fdd_kernels.hf.layers import layer_grid
from tests.support.commands import quiet
from tests.support.hf_models import tiny_model, tiny_tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "paper"
sys.path.insert(0, str(FOLDER))
import dolly  # noqa: E402
import recipe  # noqa: E402
import run  # noqa: E402

sys.path.remove(str(FOLDER))
PUBLISHED = ("gpt2", "llama")
TRAINING = {
    "epochs": 2,
    "learning_rate": 0.003,
    "windows_per_step": 16,
    "batch_size": 8,
    "save_steps": 2,
    "dtype": "float32",
}
PLACES = {"teacher": "-", "student": "-", "data": Path("-"), "output": Path("-")}
LORA = {"lora_rank": 4, "lora_targets": ["c_attn", "c_fc"], "learning_rate": 0.03}


def write_inputs(folder):
    """Write dolly.jsonl, tiny models, and tiny.yaml, where the teacher is tuned with LoRA."""
    words = ("one", "two", "three", "four")
    lines = [
        {
            "instruction": f"the word {a} and {b}",
            "context": f"a is {a}" if a == b else "",
            "response": f"{b} the {a}",
            "category": "open_qa",
        }
        for a in words
        for b in words
    ]
    lines = [line | {"response": f"{line['response']} {c}"} for line in lines for c in words]
    lines.append({"instruction": "word " * 200, "context": "", "response": "one"})
    (folder / "dolly.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, seed in (("teacher", 2), ("student", 1)):
        model = tiny_model(
            "gpt2", depth=3 + seed, vocab_size=len(tiny_tokenizer()), seed=seed, n_positions=128
        )
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    content = {
        "teacher": str(folder / "teacher"),
        "student": str(folder / "student"),
        "seed": 0,
        "data": {
            "file": str(folder / "dolly.jsonl"),
            "validation": 8,
            "test": 8,
            "max_prompt_length": 90,
            "max_length": 128,
        },
        "sft_teacher": TRAINING | LORA,
        "sft_student": dict(TRAINING),
        "distill": dict(TRAINING),
        "loss": {"num_layers": 2, "ce_weight": 0.0},
        "evaluate": {"seeds": [1, 2], "top_p": 0.9, "questions": 4, "max_new_tokens": 6},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder / "tiny.yaml"


def start(config, output, *arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    return run.main(["--config", str(config), "--output", str(output), *arguments])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A folder with all stages of the objective fdd."""
    output = tmp_path_factory.mktemp("finished")
    assert start(config, output, "--objective", "fdd") == 0
    return output


def metrics(output, name):
    return json.loads((output / name / "metrics.json").read_text())


def weights(output, name):
    return load_file(output / name / "student" / "model.safetensors")


@pytest.mark.slow
def test_every_training_learns(finished):
    """The labels, on validation data; the distilled student all three terms."""
    for name in ("sft-teacher", "sft-student"):
        found = metrics(finished, name)
        assert found["held_out"]["ce"] < 0.9 * found["held_out_before"]["ce"], name
        assert not found["student_layers"]
        assert "without a teacher" in (finished / name / "student" / "README.md").read_text()
    found = metrics(finished, "distill-fdd")
    assert (found["student_layers"], found["teacher_layers"]) == ([1, 2], [1, 2])
    for term in ("output_kd", "trajectory"):
        assert found["held_out"][term] < found["held_out_before"][term], term
    assert found["train_windows"] == 64 - 8 - 8
    model = AutoModelForCausalLM.from_pretrained(finished / "distill-fdd" / "student")
    assert model.config.n_layer == 4


@pytest.mark.slow
def test_the_evaluation_compares_all_models(finished):
    """ROUGE-L of every seed, and KL to the teacher at the layers of the loss."""
    record = json.loads((finished / "evaluation.json").read_text())
    assert (record["sequences"], record["questions"], record["seeds"]) == (8, 4, [1, 2])
    before, distilled, teacher = record["models"]
    assert ["sft-student" in before["name"], "distill-fdd" in distilled["name"]] == [True, True]
    assert [layer["teacher_layer"] for layer in distilled["layers"]] == [1, 2]
    assert distilled["metrics"]["kl"]["mean"] < before["metrics"]["kl"]["mean"]
    for model in (before, distilled, teacher):
        assert len(model["answers"]["rouge_l_by_seed"]) == 2
    assert "ROUGE-L" in (finished / "evaluation.html").read_text()


@pytest.mark.slow
def test_a_complete_stage_is_skipped(config, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.json*")}
    assert start(config, finished, "--objective", "fdd") == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.json*")} == before
    assert capsys.readouterr().err.count("nothing to do") == len(run.STAGES)


@pytest.mark.slow
def test_a_stopped_stage_is_resumed(config, finished, tmp_path, capsys):
    """The weights are those of a run without a stop, bit for bit."""
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    folder = output / "distill-fdd"
    (folder / "metrics.json").unlink()
    shutil.rmtree(folder / "student")
    steps = [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")]
    shutil.rmtree(folder / f"checkpoint-{max(steps)}")
    assert start(config, output, "--stage", "distill", "--objective", "fdd") == 0
    assert f"resuming from checkpoint-{min(steps)}" in capsys.readouterr().err
    expected = weights(finished, "distill-fdd")
    for name, found in weights(output, "distill-fdd").items():
        assert torch.equal(found, expected[name]), name


def changed(config, tmp_path, section=None, **values):
    """Write a configuration file with other values."""
    content = yaml.safe_load(config.read_text())
    (content if section is None else content[section]).update(values)
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "changed.yaml"


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        (None, {"techer": "x"}, "there is no 'techer': did you mean teacher?"),
        ("distill", {"learning_rat": 1}, "distill: there is no 'learning_rat'"),
        ("distill", {"output": "x"}, "distill: there is no 'output'"),
        ("distill", {"batch_size": 5}, "windows_per_step=16 must be a multiple of batch_size=5"),
        ("distill", {"learning_rate": "1e-3"}, "distill: learning_rate='1e-3' is text"),
        ("loss", {"trajectory": "klx"}, "loss: trajectory='klx'"),
        ("loss", {"alfa": 1}, "loss: there is no 'alfa': did you mean alpha?"),
        ("data", {"test": 0}, "data: test=0 must be a whole number of at least 1"),
        ("data", {"max_length": 50}, "max_prompt_length=90 must be below max_length=50"),
        ("evaluate", {"seed": 1}, "evaluate: there is no 'seed': did you mean seeds?"),
        ("evaluate", {"top_p": 2.0}, "evaluate: top_p=2.0"),
    ],
)
def test_a_wrong_value_is_named_before_any_work(config, tmp_path, capsys, section, values, words):
    output = tmp_path / "output"
    assert start(changed(config, tmp_path, section, **values), output) == 2
    assert words in capsys.readouterr().err
    assert not output.exists()


def test_what_is_missing_is_named(config, tmp_path, capsys):
    output = tmp_path / "output"

    def error(*arguments):
        assert start(config, output, *arguments) == 2
        return capsys.readouterr().err

    assert "nowhere.yaml" in (run.main(["--config", "nowhere.yaml"]), capsys.readouterr().err)[1]
    assert "nowhere.jsonl: no such file: download" in error("--data", "nowhere.jsonl")
    assert "run --stage data first" in error("--stage", "sft-student")
    assert "sft-teacher is not complete: run --stage sft-teacher first" in error(
        "--stage", "distill", "--objective", "kd"
    )
    assert "no such directory" in error("--teacher", "./nowhere")


@pytest.mark.slow
def test_splits_of_another_seed_or_file_are_refused(config, finished, tmp_path, capsys):
    other = changed(config, tmp_path, seed=1)
    assert start(other, finished, "--stage", "sft-student") == 2
    assert "seed was 0, is 1): give another --output" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text("{}\n")
    assert start(config, finished, "--data", str(tmp_path / "other.jsonl")) == 2
    assert "other.jsonl has another content" in capsys.readouterr().err


def test_the_splits(config, tmp_path):
    """Disjoint, complete but for the long prompt, others for another seed; the prompt ends where
    the answer begins.
    """
    options = recipe.load_recipe(config).data
    found = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        assert not dolly.is_prepared(folder, options, seed)
        dolly.prepare(folder, options, seed, tiny_tokenizer(), quiet())
        assert dolly.is_prepared(folder, options, seed)
        found[seed] = {
            name: (folder / f"{name}.jsonl").read_text().splitlines()
            for name in ("test", "validation", "train")
        }
        assert [len(part) for part in found[seed].values()] == [8, 8, 48]
        assert len({line for part in found[seed].values() for line in part}) == 64
    assert found[0]["test"] != found[1]["test"]
    documents = [json.loads(line) for line in found[0]["train"]]
    with_context = [d for d in documents if "Context" in d["prompt"]]
    assert 0 < len(with_context) < len(documents)
    one = with_context[0]
    word = one["completion"].split()[0]
    assert one["prompt"] == (
        f"Instruction:\nthe word {word} and {word}\n\nContext:\na is {word}\n\nAnswer:\n"
    )


@pytest.mark.parametrize("line", ["[1]", "{", '{"instruction": "a", "context": null}'])
def test_a_line_that_is_no_document_is_named(config, tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(
        json.dumps({"instruction": "a", "context": "", "response": "b"}) + f"\n\n{line}\n"
    )
    options = recipe.load_recipe(config, data=str(tmp_path / "bad.jsonl")).data
    with pytest.raises(UserError, match=r"bad\.jsonl:3: expected an object with the texts"):
        dolly.prepare(tmp_path / "data", options, 0, tiny_tokenizer(), quiet())


def test_the_published_setting():
    """The values that are known of the paper: weights, divergences, layers, LoRA."""
    terms = {
        "kd": (1, 0, 0, 0),
        "trajectory": (1, 1, 0, 0),
        "derivative": (1, 0, 1, 0),
        "fdd": (1, 1, 1, 0),
    }
    assert terms.keys() == recipe.OBJECTIVES.keys()
    papers = {name: recipe.load_recipe(FOLDER / f"{name}.yaml") for name in PUBLISHED}
    for paper in papers.values():
        for objective, weights in terms.items():
            config = paper.config(objective)
            found = (config.output_kd_weight, config.alpha, config.beta, config.ce_weight)
            assert found == weights
            assert (config.trajectory, config.derivative) == ("kl", "cosine")
            assert (config.num_layers, config.layer_grid) == (4, "floor")
    grids = [layer_grid(depth, 4, "floor") for depth in (12, 48, 22, 32)]
    assert [list(grid) for grid in grids] == [
        [2, 4, 6, 8],
        [9, 18, 27, 36],
        [4, 8, 12, 16],
        [6, 12, 18, 24],
    ]
    assert papers["gpt2"].config("fdd") == FDDConfig.paper()
    options = papers["llama"].training("distill", 2, **PLACES)
    assert (options.lora_rank, options.lora_targets) == (16, ("q_proj", "v_proj"))
    assert options.batch_size * options.gradient_accumulation * 2 == 128


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_says_whose_it_is(name):
    """Each line with a value ends with its source; lines of the layers say what the grid gives."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r" *\w+: .", line)]
    assert len(values) > 40
    for line in values:
        source = line.partition("  # ")[2].partition(";")[0]
        assert source, line
        assert set(source.split(", ")) <= {"paper", "minillm", "distillm", "ours"}, line
