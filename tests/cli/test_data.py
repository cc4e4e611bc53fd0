"""Read text, prompts and chats: labels, the validation split, messages for corrupt lines."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch

from fdd_kernels.common.errors import UserError
from fdd_kernels.data import (
    IGNORED,
    data_files,
    load_windows,
    open_source,
    pad_windows,
    read_records,
    tokenize,
)
from tests.support.hf_models import tiny_tokenizer

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
    path.write_text(
        "".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries),
        encoding="utf-8",
    )
    return path


def learned_text(path, tokenizer):
    """Decode the labels and the tokens of a file's only record."""
    (record,) = read_records(path)
    ids, labels = tokenize(record, tokenizer)
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels))
    return tokenizer.decode([label for label in labels if label != IGNORED]), tokenizer.decode(ids)


def load(path, tokenizer, **options):
    return load_windows(
        path, tokenizer, **({"max_length": 16, "eval_fraction": 0.0, "seed": 0} | options)
    )


def test_plain_text_is_learned_whole(tmp_path, tokenizer):
    learned, whole = learned_text(write(tmp_path / "a.jsonl", {"text": "zwei Wörter ✓"}), tokenizer)
    assert learned == whole == "zwei Wörter ✓<end>"


def test_completions_are_learned_without_their_prompt(tmp_path, tokenizer):
    learned, whole = learned_text(
        write(tmp_path / "a.jsonl", {"prompt": "two plus two is ", "completion": "four"}), tokenizer
    )
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
    """Show reasoning in the last turn only, as Qwen3's template does."""
    tokenizer = tiny_tokenizer(thoughts=True)
    learned, whole = learned_text(write(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer)
    assert learned == "(thinking)three<end>\n"
    assert "(thinking)two" not in whole


def test_a_prompt_that_begins_the_reasoning_ends_before_it(tmp_path):
    """Drop reasoning from finished turns, as DeepSeek's template does."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<assistant>{% endif", "<assistant><think>{% endif"
    )
    answers = [{**message, "content": "<" + message["content"]} for message in CHAT]
    learned, whole = learned_text(write(tmp_path / "a.jsonl", {"messages": answers}), tokenizer)
    assert learned == "<two<end>\n<three<end>\n"
    assert whole == tokenizer.apply_chat_template(answers, tokenize=False)


def test_a_template_without_a_stable_prompt_is_refused(tmp_path, tokenizer):
    other = tiny_tokenizer()
    other.chat_template = (
        "{% for m in messages %}{{ messages | length }} {{ m.content }}{% endfor %}"
    )
    path = write(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*chat template does not begin"):
        learned_text(path, other)


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: a chat, but the tokenizer has no chat template"
    ):
        learned_text(write(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
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
        (
            '{"messages": [{"role": "assistant", "content": null}]}',
            r"message 1 must be .* got the content NoneType",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            r"message 1: part 1 of its content is 'image'",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": ["f"]}]}',
            r"message 1: \"tool_calls\" must be a list",
        ),
        (
            '{"prompt": [{"role": "user", "content": "x"}], "completion": "y"}',
            r"\"prompt\" must be a string, got list",
        ),
        (
            '{"conversations": [{"from": "narrator", "value": "x"}]}',
            r"message 1 is \"from\" 'narrator'",
        ),
        ('{"instruction": "x", "output": 1}', r"\"output\" must be a string, got int"),
        ('{"input_ids": [1, 2], "labels": [1]}', r"2 \"input_ids\", but 1 \"labels\""),
        (
            '{"messages": [{"role": "assistant", "content": "x"}], "tools": "{"}',
            r"\"tools\" is not valid JSON",
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}', r"no message has the role assistant"),
        ("[" * 100_000, r"not valid JSON"),
    ],
)
def test_a_corrupt_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, "", line, {"text": "fine"})
    with pytest.raises(UserError, match=rf"{path}:3: .*{message}"):
        list(read_records(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_bytes_that_are_no_text_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(
        UserError, match=rf"{path}:2: not UTF-8 text: invalid start byte at byte 11"
    ):
        list(read_records(path))


def test_byte_order_mark_and_empty_lines_are_ignored(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert [(r.source, r.value) for r in read_records(path)] == [
        (f"{path}:1", "a"),
        (f"{path}:4", "b"),
    ]


def test_files_of_a_directory_come_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in (
        "b.txt",
        "deep/a.jsonl",
        "a.txt",
        "notes.md",
        ".hidden.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
    ):
        (tmp_path / name).write_text("")
    assert [str(f.relative_to(tmp_path)) for f in data_files(tmp_path)] == [
        "a.txt",
        "b.txt",
        "deep/a.jsonl",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "no such file"),
        ("notes.md", "expected a .txt, .jsonl, .json, .csv or .parquet file"),
        (".", "no .txt, .jsonl, .json, .csv or .parquet file in this directory"),
    ],
)
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
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": long, "completion": "never seen"},
        {"prompt": "a ", "completion": long},
    )
    windows = load(path, tokenizer)
    assert windows.without_labels == [f"{path}:1"]
    assert [len(w["input_ids"]) for w in windows.train] == [16]
    with pytest.raises(
        UserError,
        match=rf"nothing to learn: 1 documents.*max_length=16 \(for example {tmp_path}/b.jsonl:1\)",
    ):
        load(write(tmp_path / "b.jsonl", {"prompt": long, "completion": "never seen"}), tokenizer)


def test_whole_documents_are_held_out(tmp_path, tokenizer):
    entries = [{"text": f"{i} " * 40} for i in range(40)]
    path = write(tmp_path / "a.jsonl", *entries)
    windows = load(path, tokenizer, eval_fraction=0.2)
    total = len(windows.train) + len(windows.held_out)
    assert 0.1 * total <= len(windows.held_out) <= 0.2 * total
    # Each document has a number of its own; no number is on both sides.
    numbers = [
        {tokenizer.decode(w["input_ids"]).split()[-2] for w in side}
        for side in (windows.train, windows.held_out)
    ]
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


QUESTION, ANSWER = (
    {"role": "user", "content": "one and one"},
    {"role": "assistant", "content": "two"},
)
ASKED = "<user>one and one<end>\n<assistant>"


@pytest.mark.parametrize(
    ("entry", "whole", "learned"),
    [
        ({"prompt": CHAT[:4], "completion": CHAT[4:]}, None, "three<end>\n"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "one and "}, "one"]},
                    ANSWER,
                ]
            },
            ASKED + "two<end>\n",
            "two<end>\n",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "one and one"},
                    {"from": "gpt", "value": "two"},
                ],
                "system": "be brief",
            },
            "<system>be brief<end>\n" + ASKED + "two<end>\n",
            "two<end>\n",
        ),
        ({"conversations": [QUESTION, ANSWER]}, ASKED + "two<end>\n", "two<end>\n"),
        (
            {"instruction": "add", "input": "1 1", "output": "two"},
            "<user>add\n\n1 1<end>\n<assistant>two<end>\n",
            "two<end>\n",
        ),
        (
            {"instruction": "one and one", "input": "", "output": "two"},
            ASKED + "two<end>\n",
            "two<end>\n",
        ),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, None, None),
    ],
)
def test_every_shape_goes_through_the_template(tmp_path, tokenizer, entry, whole, learned):
    found_learned, found_whole = learned_text(write(tmp_path / "a.jsonl", entry), tokenizer)
    if "input_ids" in entry:
        assert (found_learned, found_whole) == (
            tokenizer.decode([2, 3]),
            tokenizer.decode([1, 2, 3]),
        )
        return
    assert found_learned == learned
    assert found_whole == (whole or tokenizer.apply_chat_template(CHAT, tokenize=False))


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
}
CALLING = [QUESTION, CALL, {"role": "tool", "content": "2"}, ANSWER]
_TURN = (
    "{% for m in messages %}<{{ m.role }}>CONTENT{% for c in m.tool_calls or [] %}CALL{% "
    "endfor %}<end>\n{% endfor %}"
)
_PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize(
    ("content", "call"),
    [
        (
            "{% if m.content %}{{ m.content }}{% endif %}",
            "{{ c.function.name }}({{ c.function.arguments | tojson }})",
        ),
        # Templates that write content unchanged, want the arguments as text, or recognise a call by
        # its empty content.
        ("{{ m.content }}", "{{ c.function.name }}({{ c.function.arguments | tojson }})"),
        ("{{ m.content }}", "{{ c.function.name + '(' + c.function.arguments + ')' }}"),
        (
            "{{ m.content }}",
            "{% if m.content == '' %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% "
            "endif %}",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tool_calls_are_learned_as_the_template_writes_them(tmp_path, content, call, suffix):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = _TURN.replace("CONTENT", content).replace("CALL", call) + _PROMPT
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        write(path, {"messages": CALLING})
    else:  # where every message has every field
        datasets.Dataset.from_list(
            [{"messages": CALLING, "text": None}, {"messages": None, "text": "x"}]
        ).to_parquet(path)
    ids, labels = tokenize(next(iter(read_records(path))), tokenizer)
    assert (
        tokenizer.decode([label for label in labels if label != IGNORED])
        == 'add({"a": 1})<end>\ntwo<end>\n'
    )
    assert (
        tokenizer.decode(ids) == f'{ASKED}add({{"a": 1}})<end>\n<tool>2<end>\n<assistant>two<end>\n'
    )


def test_templates_of_many_models(tmp_path):
    """TRL's templates: learn each answer that later turns leave unchanged, and no question."""
    trl = importlib.util.find_spec("trl")
    paths = sorted((Path(trl.origin).parent / "chat_templates").glob("*.jinja")) if trl else []
    if not paths:
        pytest.skip("no TRL that ships templates")
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "one and one"}]},
        {"role": "assistant", "content": ["two"]},
    ]
    tokenizer = tiny_tokenizer()
    for path in paths:
        if path.stem.endswith("_training"):  # variants
            continue
        tokenizer.bos_token, tokenizer.chat_template = "<s>", path.read_text()
        for messages, answer in ((CHAT[1:], "three"), (parts, "two")):
            learned, whole = learned_text(
                write(tmp_path / "a.jsonl", {"messages": messages}), tokenizer
            )
            assert answer in learned, path.name
            assert "one" not in learned, path.name
            assert "one and one" in whole, path.name
            assert '"text"' not in whole, path.name
            assert "'text'" not in whole, path.name


def test_a_template_without_tool_calls_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"messages": CALLING})
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*template"):
        learned_text(path, tokenizer)


def test_tools_reach_the_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for t in tools %}{{ t.name }} {% endfor %}" + tokenizer.chat_template
    )
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        path = write(tmp_path / "a.jsonl", {"messages": [QUESTION, ANSWER], "tools": tools})
        assert learned_text(path, tokenizer) == ("two<end>\n", "add " + ASKED + "two<end>\n")


def test_a_template_of_parts_gets_parts(tmp_path):
    tokenizer = tiny_tokenizer()
    parts = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", parts)
    for question in ("one and one", [{"type": "text", "text": "one and one"}]):
        path = write(
            tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": question}, ANSWER]}
        )
        assert learned_text(path, tokenizer) == ("two<end>\n", ASKED + "two<end>\n")


ROWS = [{"prompt": f"{i} words\n", "completion": f'the "word", {i}'} for i in range(5)]


def as_file(folder, suffix):
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        write(path, *ROWS)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_reads_the_same(tmp_path, suffix):
    assert [record.value for record in read_records(as_file(tmp_path, suffix))] == [
        tuple(row.values()) for row in ROWS
    ]


def test_json_may_have_an_object_on_each_line(tmp_path):
    path = write(tmp_path / "a.json", *ROWS, "{")
    records = read_records(path)
    assert [next(records).source for _ in ROWS] == [f"{path}:{i}" for i in range(1, 6)]
    with pytest.raises(UserError, match=r"a\.json:6: not valid JSON"):
        next(records)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            '[{"text": "x"},\n {"text": 3}]',
            r"a\.json, record 2: \"text\" must be a string",
        ),
        ("a.json", '[{"text": "x"},\n {"text" 3}]', r"a\.json:2: not valid JSON"),
        ("a.json", "3", r"a\.json: expected a list of objects"),
        ("a.csv", "prompt,completion\na,b\nc\n", r"a\.csv:3: expected .* got \['prompt'\]"),
        ("a.csv", "text\na,b\n", r"a\.csv:2: more fields"),
        ("a.csv", 'text\n"a" b\n', r"a\.csv:2: not valid CSV"),
        ("a.parquet", "no table", r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_a_corrupt_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_records(tmp_path / name))


def test_data_sets_read_as_files_do(tmp_path, tokenizer, monkeypatch):
    """In memory, streamed, saved, and by name (here of a folder, since no test asks the hub)."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cached")
    expected = load(as_file(tmp_path, ".jsonl"), tokenizer).train.to_list()
    whole = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": whole, "test": whole.select(range(2))})
    whole.save_to_disk(tmp_path / "one")
    splits.save_to_disk(tmp_path / "two")
    (tmp_path / "folder").mkdir()
    whole.to_parquet(tmp_path / "folder" / "train.parquet")
    whole.select(range(2)).to_json(tmp_path / "other.json")
    for data in (
        whole,
        whole.with_format("torch"),
        whole.to_iterable_dataset(),
        splits,
        tmp_path / "one",
        tmp_path / "two",
        f"{tmp_path}/two:train",
        f"{tmp_path}/folder:train",
    ):
        assert load(data, tokenizer).train.to_list() == expected, data
    assert load(f"{tmp_path}/two:test", tokenizer).train.to_list() == expected[:2]
    assert load(f"{tmp_path}/folder:train[:2]", tokenizer).train.to_list() == expected[:2]
    for data, message in (
        (f"{tmp_path}/two:dev", "has no split 'dev': name one of train, test"),
        (f"{tmp_path}/one:x", "has no splits"),
        ("nobody/nothing-2.5", "no such file, and no data set that can be loaded"),
        (3, "int: expected a path"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(data)
    with pytest.raises(UserError, match=r"a Dataset, row 1: expected \"text\""):
        load(datasets.Dataset.from_list([{"body": "x"}]), tokenizer)


def test_digests_tell_contents_apart(tmp_path):
    """Digests of files equal those of yesterday's runs and caches, by names within the folder."""
    path = as_file(tmp_path, ".jsonl")
    by_file, by_folder = open_source(path).digests(), open_source(tmp_path).digests()
    assert by_file == by_folder
    assert list(by_file) == ["rows.jsonl"]
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "saved")
    assert set(open_source(tmp_path / "saved").digests().values()) == set(
        open_source(whole).digests().values()
    )
    assert open_source(whole).digests() != open_source(whole.select(range(4))).digests()


def test_windows_take_nine_bytes_a_token(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("the words are three and four, " * 2000)
    windows = load(path, tokenizer, max_length=512).train
    assert isinstance(windows, datasets.Dataset)
    tokens = sum(len(window["input_ids"]) for window in windows)
    assert windows.data.nbytes <= 9.1 * tokens
    assert windows.data.schema.field("input_ids").type == pa.list_(pa.int32())


def test_windows_of_several_pieces(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("fdd_kernels.data.windows._PIECE", 40)
    path = write(tmp_path / "a.jsonl", *({"text": f"{i} " * (i % 7 + 1)} for i in range(50)))
    found = load(path, tokenizer, max_length=64).train
    assert len(found.data.column("input_ids").chunks) > 1
    assert [tokenizer.decode(w["input_ids"]) for w in found][::9] == [
        f"{i} " * (i % 7 + 1) + "<end>" for i in range(50)
    ][::9]


def test_weights_of_documents_and_of_tokens(tmp_path, tokenizer, monkeypatch):
    """A number for a whole document, a list for tokens; 1 in documents without."""
    tokens = {"input_ids": [1, 2, 3, 4, 5], "token_weights": [0, 0.5, 1, 2, 3]}
    entries = [{"input_ids": [6, 7]}, tokens, {"text": "two", "token_weights": 0.25}]
    path = write(tmp_path / "a.jsonl", *entries, tokens | {"token_weights": 4})
    for piece in (1 << 20, 6, 1):
        monkeypatch.setattr("fdd_kernels.data.windows._PIECE", piece)
        weights = [w["token_weights"] for w in load(path, tokenizer, max_length=3).train]
        assert weights[:3] == [[1, 1], [0, 0.5, 1], [2, 3]]
        assert {w for window in weights[3:-2] for w in window} == {0.25}
        assert weights[-2:] == [[4, 4, 4], [4, 4]]
    assert pad_windows(load(path, tokenizer).train[:])["token_weights"].dtype == torch.float32


def test_weights_in_tables(tmp_path, tokenizer):
    rows = datasets.Dataset.from_list([{"text": "one", "token_weights": w} for w in (0.5, None)])
    table = tmp_path / "a.csv"
    table.write_text("text,token_weights\none,0.5\n")
    for data, expected in ((rows, [0.5, 1.0]), (table, [0.5])):
        found = load(data, tokenizer).train
        assert [set(window["token_weights"]) for window in found] == [{w} for w in expected]
    (window,) = load(write(tmp_path / "c.jsonl", {"text": "one"}), tokenizer).train
    assert "token_weights" not in window


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"text": "one", "token_weights": [1.0]}, 'is a list, but only "input_ids" have known'),
        ({"input_ids": [1, 2], "token_weights": [1.0]}, '2 "input_ids", but 1 "token_weights"'),
        ({"text": "one", "token_weights": -1}, "finite numbers of at least 0, got -1"),
        ({"text": "one", "token_weights": float("nan")}, "at least 0, got nan"),
        ({"text": "one", "token_weights": True}, "at least 0, got True"),
        ({"text": "one", "token_weights": "much"}, "at least 0, got 'much'"),
        ({"input_ids": [1, 2], "token_weights": [1, None]}, r"at least 0, got \[1, None\]"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_wrong_weights_name_the_line(tmp_path, tokenizer, entry, message):
    path = write(tmp_path / "a.jsonl", {"text": "one"}, entry)
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{message}"):
        load(path, tokenizer)


def test_tokens_that_one_model_lacks_are_left_out(tmp_path, tokenizer):
    unshared = frozenset(tokenizer("x")["input_ids"])
    path = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "x"}, {"text": "and " * 30 + "x"})
    windows = load(path, tokenizer, unshared=unshared)
    assert len(windows.train) == len(load(path, tokenizer).train) - 2 > 1
    assert all(unshared.isdisjoint(window["input_ids"]) for window in windows.train)
    assert len(windows.not_shared) == 2
    assert windows.not_shared[0].startswith(f"{path}:2 (")
    assert "'x'" in windows.not_shared[0]
    with pytest.raises(
        UserError, match=r"every document holds a token that only one model has, as .*:1"
    ):
        load(write(tmp_path / "b.jsonl", {"text": "x"}), tokenizer, unshared=unshared)


def test_padding_takes_lists_tensors_and_data_sets():
    lists = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "teacher_index": 4},
        {"input_ids": [5], "labels": [5], "teacher_index": 7},
    ]
    tensors = [{name: torch.tensor(value) for name, value in window.items()} for window in lists]
    expected = {
        "input_ids": [[1, 2, 3], [5, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 2, 3], [5, -100, -100]],
        "teacher_index": [4, 7],
    }
    for windows in (
        lists,
        tensors,
        datasets.Dataset.from_list(lists),
        datasets.Dataset.from_list(lists).with_format("torch"),
    ):
        for rows in ([windows[0], windows[1]], windows[:2]):
            batch = pad_windows(rows)
            assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
            assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    without = [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    assert pad_windows(without).keys() == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="1 of 2 windows have labels"):
        pad_windows([lists[0], without[0]])
    weights = [{"token_weights": [0.5, 1, 2]}, {"token_weights": [3]}]
    weighted = [window | own for window, own in zip(lists, weights)]
    for windows in (weighted, datasets.Dataset.from_list(weighted)[:2]):
        batch = pad_windows(windows)
        assert batch.pop("token_weights").tolist() == [[0.5, 1, 2], [3, 0, 0]]
        assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    with pytest.raises(ValueError, match="1 of 2 windows have token_weights"):
        pad_windows([lists[0], weighted[0]])


def test_caches_and_collators_need_no_terminal_and_no_data_library():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('rich', 'datasets', 'pyarrow')))\n"
        "from fdd_kernels.data import file_digest, pad_windows\n"
        "import fdd_kernels.data.windows\nimport fdd_kernels.teacher_cache"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
