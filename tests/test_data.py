"""Reading text, prompts and chats; what is learned; what is held out; what a corrupt line says."""

import json

import pytest
from hf_models import tiny_tokenizer

from fdd_kernels.data import IGNORED, data_files, load_windows, read_records, tokenize
from fdd_kernels.user_error import UserError

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one and one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and one more"},
    {"role": "assistant", "content": "three"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write(path, *entries):
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), encoding="utf-8")
    return path


def learned_text(path, tokenizer):
    """What the labels of the only record of a file say, and the whole."""
    (record,) = read_records(path)
    ids, labels = tokenize(record, tokenizer)
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels))
    return tokenizer.decode([label for label in labels if label != IGNORED]), tokenizer.decode(ids)


def load(path, tokenizer, **options):
    return load_windows(path, tokenizer, **({"max_length": 16, "eval_fraction": 0.0, "seed": 0} | options))


def test_plain_text_is_learned_whole(tmp_path, tokenizer):
    learned, whole = learned_text(write(tmp_path / "a.jsonl", {"text": "zwei Wörter ✓"}), tokenizer)
    assert learned == whole == "zwei Wörter ✓<end>"


def test_completions_are_learned_without_their_prompt(tmp_path, tokenizer):
    learned, whole = learned_text(write(tmp_path / "a.jsonl", {"prompt": "two plus two is ", "completion": "four"}), tokenizer)
    assert learned == "four<end>"
    assert whole == "two plus two is four<end>"


def test_only_assistant_turns_of_a_chat_are_learned(tmp_path, tokenizer):
    learned, whole = learned_text(write(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer)
    assert whole == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert learned == "two<end>\nthree<end>\n"


def test_a_chat_that_ends_with_a_question_learns_no_question(tmp_path, tokenizer):
    learned, whole = learned_text(write(tmp_path / "a.jsonl", {"messages": CHAT[:4]}), tokenizer)
    assert learned == "two<end>\n"
    assert whole.endswith("and one more<end>\n")


def test_turns_that_a_template_rewrites_are_not_learned_but_the_last_is(tmp_path):
    """As Qwen3's template, which shows reasoning in the last turn only."""
    tokenizer = tiny_tokenizer(thoughts=True)
    learned, whole = learned_text(write(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer)
    assert learned == "(thinking)three<end>\n"
    assert "(thinking)two" not in whole


def test_a_template_without_a_stable_prompt_is_refused(tmp_path, tokenizer):
    other = tiny_tokenizer()
    other.chat_template = "{% for m in messages %}{{ messages | length }} {{ m.content }}{% endfor %}"
    path = write(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*chat template does not begin"):
        learned_text(path, other)


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"a\.jsonl:1: the tokenizer's chat template refuses"):
        learned_text(write(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer)


@pytest.mark.parametrize(("line", "message"), [
    ('{"text": "cut of', r"not valid JSON: Unterminated string"),
    ("not json", r"not valid JSON"),
    ("[1, 2]", r"expected a JSON object, got list"),
    ('{"content": "x"}', r"expected \"text\".*got \['content'\]"),
    ("{}", r"got no key"),
    ('{"prompt": "x"}', r"got \['prompt'\]"),
    ('{"text": 3}', r"\"text\" must be a string, got int"),
    ('{"prompt": "x", "completion": null}', r"\"completion\" must be a string, got NoneType"),
    ('{"messages": []}', r"must be a list of messages"),
    ('{"messages": [{"role": "user"}]}', r"message 1 must be an object with the strings"),
    ('{"messages": [{"role": "user", "content": "x"}]}', r"no message has the role assistant"),
    ("[" * 100_000, r"not valid JSON"),
])  # fmt: skip
def test_a_corrupt_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, "", line, {"text": "fine"})
    with pytest.raises(UserError, match=rf"{path}:3: .*{message}"):
        list(read_records(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_bytes_that_are_no_text_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=rf"{path}:2: not UTF-8 text: invalid start byte at byte 11"):
        list(read_records(path))


def test_byte_order_mark_and_empty_lines_are_ignored(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert [(r.source, r.value) for r in read_records(path)] == [(f"{path}:1", "a"), (f"{path}:4", "b")]


def test_files_of_a_directory_come_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "deep/a.jsonl", "a.txt", "notes.md"):
        (tmp_path / name).write_text("")
    assert [str(f.relative_to(tmp_path)) for f in data_files(tmp_path)] == ["a.txt", "b.txt", "deep/a.jsonl"]


@pytest.mark.parametrize(("name", "message"), [("none.txt", "no such file"), ("notes.md", "expected a .txt or .jsonl"),
                                               (".", "no .txt or .jsonl file in this directory")])  # fmt: skip
def test_no_data_is_an_error(tmp_path, name, message):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=message):
        data_files(tmp_path / name)


def test_long_texts_become_windows_that_hold_every_token(tmp_path, tokenizer):
    text = " ".join(str(i) for i in range(60))
    path = tmp_path / "a.txt"
    path.write_text(text)
    windows = load(path, tokenizer)
    assert {len(w["input_ids"]) for w in list(windows.train)[:-1]} == {16}
    assert tokenizer.decode([t for w in windows.train for t in w["input_ids"]]) == text + "<end>"
    assert windows.train_tokens == sum(len(w["attention_mask"]) for w in windows.train)


def test_what_does_not_fit_is_cut_off_and_counted(tmp_path, tokenizer):
    long = "word " * 30
    path = write(tmp_path / "a.jsonl", {"prompt": long, "completion": "never seen"}, {"prompt": "a ", "completion": long})
    windows = load(path, tokenizer)
    assert windows.without_labels == [f"{path}:1"]
    assert [len(w["input_ids"]) for w in windows.train] == [16]
    with pytest.raises(UserError, match=rf"nothing to learn: 1 documents.*max_length=16 \(for example {tmp_path}/b.jsonl:1\)"):
        load(write(tmp_path / "b.jsonl", {"prompt": long, "completion": "never seen"}), tokenizer)


def test_whole_documents_are_held_out(tmp_path, tokenizer):
    entries = [{"text": f"{i} " * 40} for i in range(40)]
    path = write(tmp_path / "a.jsonl", *entries)
    windows = load(path, tokenizer, eval_fraction=0.2)
    total = len(windows.train) + len(windows.held_out)
    assert 0.1 * total <= len(windows.held_out) <= 0.2 * total
    # Each document has a number of its own; no number is on both sides.
    numbers = [{tokenizer.decode(w["input_ids"]).split()[-2] for w in side} for side in (windows.train, windows.held_out)]
    assert not numbers[0] & numbers[1]
    again = load(path, tokenizer, eval_fraction=0.2)
    other = load(path, tokenizer, eval_fraction=0.2, seed=1)
    assert again.held_out.to_list() == windows.held_out.to_list()
    assert other.held_out.to_list() != windows.held_out.to_list()


def test_of_a_single_document_the_end_is_held_out(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(" ".join(str(i) for i in range(200)))
    whole, parts = load(path, tokenizer), load(path, tokenizer, eval_fraction=0.25)
    assert [*parts.train, *parts.held_out] == list(whole.train)
    assert len(parts.held_out) == round(0.25 * len(whole.train))
    assert load(path, tokenizer, eval_fraction=0.0).held_out.to_list() == []
