"""Tokenizers that differ: one has more tokens, a token has another name, or they cannot be
compared.
"""

import io
import json

import datasets
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdd_kernels import FDDConfig
from fdd_kernels.cli.cache_teacher import CacheOptions, cache_teacher
from fdd_kernels.cli.distill.run import distill
from fdd_kernels.cli.distill.run_folder import DistillOptions
from fdd_kernels.cli.loading import fit_vocabularies
from fdd_kernels.cli.vocabulary import shared_vocabulary
from fdd_kernels.common.errors import UserError
from tests.support.hf_models import tiny_model, tiny_tokenizer

SIZE = len(tiny_tokenizer())
CHAT = {
    "messages": [
        {"role": "user", "content": "one and two"},
        {"role": "assistant", "content": "three is the word"},
    ]
}


def longer(*tokens, special=True):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    return tokenizer


def test_equal_vocabularies_are_compared_whole():
    found = shared_vocabulary(tiny_tokenizer(), tiny_tokenizer())
    assert (found.size, found.partial, found.unshared, found.notes) == (
        SIZE,
        False,
        frozenset(),
        [],
    )


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("more", ["teacher", "student"])
def test_one_vocabulary_may_be_longer(more, special):
    short, long = tiny_tokenizer(), longer("<think>", "</think>", special=special)
    student, teacher = (long, short) if more == "student" else (short, long)
    found = shared_vocabulary(student, teacher)
    assert found.tokenizer is student
    assert (found.size, found.partial, found.unshared) == (SIZE, True, {SIZE, SIZE + 1})
    sides = ("'<think>'", "nothing") if more == "teacher" else ("nothing", "'<think>'")
    assert (
        f"differ in 2 entries ({SIZE} is {sides[0]} to the teacher and {sides[1]} to the student; "
        in found.notes[0]
    )
    rows = {"student": SIZE + 2, "teacher": SIZE + 2}
    assert fit_vocabularies(FDDConfig(), rows, found).vocab_size == SIZE
    assert fit_vocabularies(FDDConfig(vocab_size=SIZE - 1), rows, found).vocab_size == SIZE - 1
    with pytest.raises(
        UserError,
        match=rf"vocab_size={SIZE + 1}, but the models share the first {SIZE} tokens only",
    ):
        fit_vocabularies(FDDConfig(vocab_size=SIZE + 1), rows, found)


def test_an_added_token_may_have_another_name():
    """Rename two reserved tokens, as Llama 3.1 does to Llama 3's."""
    student, teacher = longer("<reserved_1>", "<last>"), longer("<pad>", "<last>")
    found = shared_vocabulary(student, teacher)
    assert (found.size, found.partial, found.unshared) == (SIZE + 2, False, {SIZE})
    assert f"{SIZE} is '<pad>' to the teacher and '<reserved_1>' to the student" in found.notes[0]
    rows = {"student": SIZE + 2, "teacher": SIZE + 2}
    assert fit_vocabularies(FDDConfig(), rows, found).vocab_size is None


def test_other_tokens_are_named_and_refused(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab, first = content["model"]["vocab"], SIZE - 2
    content["model"] |= {
        "vocab": {t + "'" if i >= first else t: i for t, i in vocab.items()},
        "merges": [],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    student, teacher = tiny_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)
    token = student.convert_ids_to_tokens(first)
    with pytest.raises(UserError) as error:
        shared_vocabulary(student, teacher)
    assert (
        f'differ in 2 entries: {first} is "{token}\'" to the teacher and {token!r} to the student; '
        in str(error.value)
    )
    assert f"vocab_size={first}" in str(error.value)
    found = shared_vocabulary(student, teacher, vocab_size=first)
    assert (found.size, found.partial, found.unshared) == (first, True, {first, first + 1})


def test_a_student_without_a_chat_template_takes_the_teachers():
    base = tiny_tokenizer()
    base.chat_template = None
    found = shared_vocabulary(base, tiny_tokenizer())
    assert found.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert found.notes == ["the student's tokenizer has no chat template: the teacher's is taken"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Make a teacher with one more token than its student, which has no chat template; one chat
    uses the token.
    """
    folder = tmp_path_factory.mktemp("inputs")
    base = tiny_tokenizer()
    base.chat_template = None
    for name, tokenizer, seed in (("student", base, 1), ("teacher", longer("<think>"), 2)):
        tiny_model("llama", depth=3, vocab_size=len(tokenizer), seed=seed).save_pretrained(
            folder / name
        )
        tokenizer.save_pretrained(folder / name)
    (folder / "data.jsonl").write_text((json.dumps(CHAT) + "\n") * 8)
    return folder


def console():
    return Console(file=io.StringIO(), width=400)


OPTIONS = {"config": FDDConfig(num_layers=2), "max_steps": 1, "dtype": "float32"}


def test_a_teacher_with_one_token_more_is_distilled(inputs, tmp_path):
    said = console()
    given = {"teacher": str(inputs / "teacher"), "student": str(inputs / "student")}
    given["data"] = datasets.Dataset.from_list([CHAT] * 8)
    metrics = distill(DistillOptions(output=tmp_path, **given, **OPTIONS), said)
    assert metrics["vocab_size"] == SIZE
    assert f"{SIZE} is '<think>' to the teacher and nothing to the student" in said.file.getvalue()
    assert "has no chat template: the teacher's is taken" in said.file.getvalue()
    student = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert (len(student), student.chat_template) == (SIZE, tiny_tokenizer().chat_template)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.vocab_size == SIZE


@pytest.mark.parametrize("thinking", [False, True])
def test_its_cache_serves_the_student_if_the_text_does(inputs, tmp_path, thinking):
    data = tmp_path / "data.jsonl"
    data.write_text(
        (inputs / "data.jsonl").read_text() + ('{"text": "one <think> two"}\n' if thinking else "")
    )
    given = {"num_layers": 2, "teacher_dtype": "float32"}
    cache_teacher(
        CacheOptions(
            teacher=str(inputs / "teacher"), data=data, output=tmp_path / "cache", **given
        ),
        console(),
    )
    options = DistillOptions(
        student=str(inputs / "student"),
        teacher_cache=tmp_path / "cache",
        output=tmp_path / "run",
        **OPTIONS,
    )
    if thinking:
        with pytest.raises(
            UserError,
            match=rf"holds 1 tokens that student and teacher do not share, the first is {SIZE}",
        ):
            distill(options, console())
    else:
        assert distill(options, console())["vocab_size"] == SIZE
