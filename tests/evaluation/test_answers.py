"""Questions, generated answers and their ROUGE-L."""

import pytest
import torch

from fdd_kernels.common.errors import UserError
from fdd_kernels.data import Chat, Record
from fdd_kernels.data.records import Tokens
from fdd_kernels.evaluation.answers import (
    Question,
    Sampling,
    generate,
    question_of,
    questions_of,
    rouge_l,
    that_fit,
)
from tests.support.hf_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model("gpt2", depth=2, vocab_size=len(tokenizer), seed=2, spread=3.0)


def test_rouge_l_of_known_cases():
    """F = 2PR / (P + R) of the longest common subsequence (Lin 2004)."""
    reference = "the cat sat on the mat"
    answers = [reference, "The cat, the mat!", "a dog", "", "mat the on sat cat the"]
    # Subsequences of 6, 4, 0, 0 and 3 words ("the on the").
    expected = [100.0, 100 * 2 * 4 / (4 + 6), 0.0, 0.0]
    found = rouge_l([reference] * 5, answers)
    assert found[:4] == pytest.approx(expected)
    assert found[4] == pytest.approx(100 * 2 * 3 / 12)


def test_questions_of_every_form(tokenizer):
    ids = tokenizer("one two three")["input_ids"]
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": " four "},
    ]
    of_pair = question_of(Record("a:1", ("one and ", "two")), tokenizer)
    assert (of_pair.reference, of_pair.source) == ("two", "a:1")
    assert tokenizer.decode(of_pair.prompt) == "one and "
    of_chat = question_of(Record("a:2", Chat(chat)), tokenizer)
    assert of_chat.reference == "four"
    assert tokenizer.decode(of_chat.prompt).endswith("<user>three<end>\n<assistant>")
    labels = [-100] * (len(ids) - 1) + ids[-1:]
    of_tokens = question_of(Record("a:3", Tokens(ids, labels)), tokenizer)
    assert (of_tokens.prompt, of_tokens.reference) == (ids[:-1], "three")
    for value in ("one two", Tokens(ids, ids), Tokens(ids, [-100] * len(ids))):
        assert question_of(Record("a:4", value), tokenizer) is None


def test_data_without_answers(tokenizer):
    good, wordless = Record("a", ("one", "two")), Record("b", ("one", "。。"))
    texts = [Record("c", "one two")] * 3
    assert len(questions_of([*texts, good, wordless, good, good], tokenizer, "d", 2)) == 2
    with pytest.raises(UserError, match=r"d: ROUGE-L needs answers, and none of 3 documents"):
        questions_of(texts, tokenizer, "d", 5)
    with pytest.raises(UserError, match=r"d: the references of 1 answers have no word"):
        questions_of([wordless], tokenizer, "d", 5)


def test_greedy_answers_do_not_depend_on_the_batch(model, tokenizer):
    """Nor on the model's own defaults; a longer prompt beside it is padding on the left."""
    model.generation_config.do_sample, model.generation_config.temperature = True, 3.0
    texts = ["one two", "three and four is the word", "a"]
    questions = [Question(text, tokenizer(text)["input_ids"], "") for text in texts]
    expected = []
    for question in questions:
        ids = torch.tensor([question.prompt])
        for _ in range(6):
            with torch.no_grad():
                following = model(input_ids=ids).logits[0, -1].argmax()
            if following == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following.view(1, 1)], 1)
        new = ids[0, len(question.prompt) :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    done = []
    found = generate(
        model, tokenizer, questions, Sampling(6), batch_size=2, advance=lambda n: done.append(n)
    )
    assert found == [expected]
    assert done == [2, 1]
    assert model.generation_config.temperature == 3.0


def test_each_seed_gives_its_own_answers(model, tokenizer):
    questions = [Question("", tokenizer("one two")["input_ids"], "")] * 3
    first, again, other = (
        generate(model, tokenizer, questions, Sampling(6, seeds, 1.5, 0.9))
        for seeds in ((0, 1), (0,), (5,))
    )
    assert len(first) == 2
    assert first[0] == again[0]
    assert first[0] != first[1] != other[0]


def test_prompts_that_fit(model):
    questions = [Question("", [1] * length, "") for length in (3, 60, 64)]
    assert [len(q.prompt) for q in that_fit(questions, model, 4)] == [3, 60]
