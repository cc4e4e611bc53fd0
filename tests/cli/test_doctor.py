"""`fdd-kernels doctor`."""

import json
import subprocess
import sys

import torch

from fdd_kernels import backends
from fdd_kernels.cli import doctor
from fdd_kernels.cli.main import main

CPU = torch.device("cpu")


def test_every_backend_is_examined(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert set(findings["backends"]) == set(backends.backend_names()) - {"auto"}
    assert (
        findings["packages"]["torch"] == torch.__version__.split("+")[0]
        or findings["packages"]["torch"] == torch.__version__
    )
    for devices in findings["backends"].values():
        result = devices["cpu"]
        assert result["works"] == (result["reason"] is None)
    assert findings["backends"]["torch"]["cpu"]["works"]
    assert findings["backends"]["reference"]["cpu"]["works"]


def test_the_text_names_backends_and_reasons(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor,
        "why_unavailable",
        lambda name, device: "no such chip: buy one" if name == "cpu" else None,
    )
    findings = doctor.examine()
    doctor.print_findings(findings)
    out = capsys.readouterr().out
    assert "no: no such chip: buy one" in out
    for name in backends.backend_names()[1:]:
        assert f"  {name} " in out
    assert f"Python {sys.version.split()[0]}" in out


def replace_torch_backend(monkeypatch, **changes):
    broken = backends.Backend(**{**vars(backends.BACKENDS["torch"]), **changes})
    monkeypatch.setitem(backends.BACKENDS, "torch", broken)


def test_a_backend_with_wrong_gradients_is_found(monkeypatch, capsys):
    own = backends.BACKENDS["torch"].grad

    def grad(*args, **kwargs):
        return [g if g is None else g * 1.01 for g in own(*args, **kwargs)]

    replace_torch_backend(monkeypatch, grad=grad)
    result = doctor.examine_backend("torch", CPU)
    assert result["expected"]
    assert not result["works"]
    assert "relative to the reference" in result["reason"]
    assert main(["doctor"]) == 1
    assert "wrong by 1.0e-02" in capsys.readouterr().out


def test_a_backend_that_raises_is_found(monkeypatch):
    def stats(*args, **kwargs):
        raise OSError("libfoo.so not found")

    replace_torch_backend(monkeypatch, stats=stats)
    result = doctor.examine_backend("torch", CPU)
    assert not result["works"]
    assert "OSError: libfoo.so not found" in result["reason"]


def test_missing_packages_are_named_with_a_remedy(monkeypatch, capsys):
    installed = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: None if name == "transformers" else installed(name)
    )
    monkeypatch.setattr(
        doctor,
        "examine_backend",
        lambda name, device: {"works": True, "expected": True, "reason": None},
    )
    assert doctor.print_findings(doctor.examine()) == 0
    out = capsys.readouterr().out
    assert "transformers  missing: needed for Distiller" in out
    assert 'pip install "fdd_kernels[hf]"' in out


def test_torch_and_numpy_suffice():
    blocked = [
        "transformers",
        "accelerate",
        "safetensors",
        "tokenizers",
        "rich",
        "peft",
        "matplotlib",
        "huggingface_hub",
    ]
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from fdd_kernels.cli.main import main
sys.exit(main(["doctor"]) or main(["doctor", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout
