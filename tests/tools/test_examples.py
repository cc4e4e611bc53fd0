"""Every example runs unchanged, resumes after a stop, and writes a student that plain
transformers loads.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
NEEDS = {"lightning_module": "lightning", "sft": "trl", "on_policy": "trl"}


def run(name, output, monkeypatch, *arguments):
    """The example in this process, as if it had been started by its name."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output", str(output), *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


def student(output):
    return load_file(output / "student" / "model.safetensors")


def same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "name",
    [
        "plain_loop",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("trainer", "sft", "on_policy", "accelerate_loop", "lightning_module")
        ],
    ],
)
def test_it_runs_and_resumes(tmp_path, monkeypatch, name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    arguments = ["--steps", "6", "--save-steps", "2"]
    run(name, tmp_path / "whole", monkeypatch, *arguments)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "student")
    same(
        {n: t for n, t in model.state_dict().items() if n in student(tmp_path / "whole")},
        student(tmp_path / "whole"),
        rtol=0,
        atol=0,
    )
    if name != "accelerate_loop":
        assert len(AutoTokenizer.from_pretrained(tmp_path / "whole" / "student")) == 97
    if name == "lightning_module":
        # Lightning restores no random numbers (see docs/training.md): check that it takes the two
        # steps left.
        before = student(tmp_path / "whole")
        run(name, tmp_path / "whole", monkeypatch, "--steps", "8", "--save-steps", "2")
        assert torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["global_step"] == 8
        assert any(not torch.equal(t, before[n]) for n, t in student(tmp_path / "whole").items())
        return
    # Imitate a run killed after its second checkpoint: remove the later ones.
    copy = tmp_path / "copy"
    copy.mkdir()
    kept = {"plain_loop": "step-000004", "accelerate_loop": "step-000004"}.get(name, "checkpoint-4")
    (tmp_path / "whole" / kept).rename(copy / kept)
    run(name, copy, monkeypatch, *arguments)
    same(student(copy), student(tmp_path / "whole"), rtol=0, atol=0)


def test_bfloat16(tmp_path, monkeypatch):
    run("plain_loop", tmp_path, monkeypatch, "--steps", "2", "--bf16")
    assert {tensor.dtype for tensor in student(tmp_path).values()} == {torch.float32}


def torchrun(name, output, *arguments):
    """Two processes, through examples/launch/torchrun.sh."""
    environment = os.environ | {
        "PROCESSES": "2",
        "PORT": "0",
        "RESTARTS": "0",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [
        str(ROOT / "examples/launch/torchrun.sh"),
        str(ROOT / f"examples/{name}.py"),
        "--output",
        str(output),
    ]
    found = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accelerate_loop", "trainer"])
def test_two_processes_equal_one(tmp_path, monkeypatch, name):
    """One micro-batch in each of two processes, or two in one: of unequal numbers of tokens, and
    the mean is over all.
    """
    torchrun(
        name, tmp_path / "two", "--steps", "4", "--save-steps", "2", "--gradient-accumulation", "1"
    )
    run(
        name,
        tmp_path / "one",
        monkeypatch,
        "--steps",
        "4",
        "--save-steps",
        "2",
        "--gradient-accumulation",
        "2",
    )
    same(student(tmp_path / "two"), student(tmp_path / "one"), rtol=1e-3, atol=2e-5)
    folder = tmp_path / "two" / ("step-000004" if name == "accelerate_loop" else "checkpoint-4")
    random_states = {
        path.name
        for path in folder.iterdir()
        if path.name.startswith(("random_states", "rng_state"))
    }
    assert len(random_states) == 2
    assert not (tmp_path / "two" / ".unfinished").exists()


def test_an_argument_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run("plain_loop", tmp_path, monkeypatch, "--teacher", "somewhere")
    assert "give --teacher, --student and --data together" in capsys.readouterr().err
