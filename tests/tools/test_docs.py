"""README.md, CONTRIBUTING.md and docs/ do what they print.

Every Python block runs, our parsers take every command line, every link leads somewhere.
"""

import argparse
import importlib.util
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdd_kernels import Distiller, FDDConfig, fused_fdd_loss
from fdd_kernels.data import Windows, pad_windows
from tests.support.hf_models import tiny_batch, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MOST_README_BYTES = 6144
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VOCAB = len(tiny_tokenizer())


def python_blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match[1] == "python":
                line = text.count("\n", 0, match.start(2)) + 1
                yield pytest.param(page, line, match[2], id=f"{page.name}:{line}")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """teacher/ and student/ with their tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, family, seed in (("teacher", "llama", 2), ("student", "gpt2", 1)):
        tiny_model(family, depth=5, vocab_size=VOCAB, seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def process_group():
    """A group of this process alone; accelerate forgets it after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


class Deepspeed:
    """Stand in for deepspeed in the block on ZeRO-3, with nothing partitioned; test_parallel.py
    runs deepspeed itself.
    """

    class zero:
        class GatheredParameters:
            def __init__(self, parameters):
                assert all(isinstance(p, torch.nn.Parameter) for p in parameters)

            def __enter__(self): ...

            def __exit__(self, *_): ...

    class Engine(DistributedDataParallel):
        def backward(self, loss):
            loss.backward()

        def step(self): ...


def namespace(folder):
    """Make the objects that the pages use without making them."""
    import datasets
    import trl
    import trl.experimental.gkd
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import TrainingArguments

    from fdd_kernels.teacher_cache import write_teacher_cache

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher")
    )
    batch = tiny_batch(vocab_size=VOCAB)
    texts = datasets.Dataset.from_list([{"text": "one and two is three, the word " * 2}] * 4)
    tokens = [
        {
            name: values[0].tolist()
            for name, values in tiny_batch(rows=1, vocab_size=VOCAB, seed=s).items()
        }
        for s in range(8)
    ]
    write_teacher_cache(
        "CACHE",
        teacher,
        Windows([w | {"attention_mask": [1] * 9} for w in tokens]),
        layers=(1, 2, 3, 4),
    )
    arguments = {
        "output_dir": "out",
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "per_device_train_batch_size": 2,
    }
    on_policy = arguments | {"bf16": False}
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    distiller = Distiller(student, teacher)
    return {
        "torch": torch,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "DistributedDataParallel": DistributedDataParallel,
        "deepspeed": Deepspeed,
        "Distiller": Distiller,
        "FDDConfig": FDDConfig,
        "fused_fdd_loss": fused_fdd_loss,
        "student": student,
        "teacher": teacher,
        "tokenizer": AutoTokenizer.from_pretrained(folder / "student"),
        "batch": batch,
        "loader": [batch] * 2,
        "optimizer": torch.optim.SGD(student.parameters(), 0.1),
        "distiller": distiller,
        "training_arguments": TrainingArguments(**arguments),
        "sft_config": trl.SFTConfig(**arguments),
        "distillation_config": trl.DistillationConfig(max_completion_length=4, **on_policy),
        "gkd_config": trl.experimental.gkd.GKDConfig(max_new_tokens=4, **on_policy),
        "prompts": datasets.Dataset.from_list([{"prompt": "one two three"}] * 4),
        "chats": datasets.Dataset.from_list([{"messages": chat}] * 4),
        "train": tokens,
        "held_out": tokens[:2],
        "texts": texts,
        "collator": pad_windows,
        "labels": batch["labels"],
        "student_hidden": [random(2, 9, 8).requires_grad_() for _ in range(3)],
        "teacher_hidden": [random(2, 9, 12) for _ in range(3)],
        "student_head": torch.nn.Linear(8, VOCAB, bias=False),
        "teacher_head": torch.nn.Linear(12, VOCAB, bias=False),
        "student_weight": random(VOCAB, 8).requires_grad_(),
        "teacher_weight": random(VOCAB, 12),
        "world": 1,
        "rank": 0,
        "items": distiller.count_positions(batch),
        "engine": Deepspeed.Engine(student),
        "mesh": init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)),
    }


@pytest.mark.parametrize(("page", "line", "source"), list(python_blocks()))
def test_a_python_block_runs_as_printed(
    models, process_group, tmp_path, monkeypatch, page, line, source
):
    for module in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    names = namespace(tmp_path)
    if "SFT" in source:
        names["train"] = names["texts"]
    exec(compile("\n" * (line - 1) + source, str(page), "exec"), names)


class _ParsedError(Exception):
    """A command line was parsed: the command itself is not run."""


def _commands():
    """(page, command line, whether it stands in running text, where required arguments may be
    missing).
    """
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        running = FENCE.sub("", text)
        code = [
            line
            for match in FENCE.finditer(text)
            if match[1] != "python"
            for line in match[2].splitlines()
        ]
        code += re.findall(r"^ {4,}(\S.*)$", running, re.MULTILINE)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", running)]
        for lines, inline in ((code, False), (spans, True)):
            for line in lines:
                command = line.removeprefix("$ ").split("  #")[0].strip()
                if re.match(
                    r"(fdd-kernels|python -m|python tests/)", command
                ) and not command.endswith("("):
                    yield pytest.param(command, inline, id=f"{page.name}: {command[:60]}")


@pytest.mark.parametrize(("command", "inline"), list(_commands()))
def test_a_command_line_is_parsed(monkeypatch, command, inline):
    words = [{"N": "8"}.get(word, word) for word in shlex.split(command) if word != "..."]
    if words[0] == "fdd-kernels":
        words = ["python", "-m", "fdd_kernels", *words[1:]]
    by_name = words[1] == "-m"
    target, arguments = (words[2], words[3:]) if by_name else (words[1], words[2:])
    if target == "pytest":
        assert all((ROOT / word).exists() for word in arguments if not word.startswith("-"))
        return
    if by_name and target.partition(".")[0] not in ("fdd_kernels", "benchmarks", "tests"):
        return  # another project's, such as venv
    if by_name:
        spec = importlib.util.find_spec(target)
        assert spec is not None, f"there is no module {target}"
        path = (
            Path(spec.submodule_search_locations[0]) / "__main__.py"
            if spec.submodule_search_locations
            else Path(spec.origin)
        )
    else:
        path = ROOT / target
    if "parse_args" not in path.read_text(encoding="utf-8") and "main" not in path.stem:
        assert not arguments, f"{target} takes no arguments"
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise _ParsedError

    def error(parser, message):
        if inline and ("required" in message or "expected" in message):
            raise _ParsedError
        raise AssertionError(f"{command}: {message}")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    monkeypatch.setattr(sys, "argv", [target, *arguments])
    run = runpy.run_module if by_name else runpy.run_path
    with pytest.raises(SystemExit if {"--help", "--version"} & set(arguments) else _ParsedError):
        run(target if by_name else str(path), run_name="__main__")


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= MOST_README_BYTES


def test_the_index_names_every_page():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in text, page.name


def test_the_page_of_parameters_is_current():
    from docs.make_parameters import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m docs.make_parameters`"


def test_the_page_of_parameters_has_every_function():
    """But what takes the options of the loss, returns a pair, or is a class for training loops."""
    import fdd_kernels
    from docs.make_parameters import NAMES

    elsewhere = {"Distiller", "FusedFDDLoss", "RowDeltas", "__version__", "fdd_loss_reference"}
    assert set(NAMES) == set(fdd_kernels.__all__) - elsewhere


def anchors(page):
    """The anchors of a page's headings, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_and_files_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            to = page.parent / target if target else page
            assert to.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(to), f"{page.name}: {target}#{anchor}"
        for path in re.findall(
            r"`((?:fdd_kernels|tests|examples|benchmarks|docs|csrc)/[\w./-]+)`", text
        ):
            assert (ROOT / path).exists() or path.startswith("benchmarks/results/"), (
                f"{page.name}: {path}"
            )
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(
        r"(?:^ {4}|`)make\s+([a-z-]+)",
        "\n".join(p.read_text(encoding="utf-8") for p in PAGES),
        re.MULTILINE,
    ):
        assert target in targets, f"make {target}"
