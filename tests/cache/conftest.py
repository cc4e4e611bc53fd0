"""Windows and caches of a tiny teacher, made once for all files here."""

from __future__ import annotations

import json

import pytest

from fdd_kernels.data import load_windows
from fdd_kernels.teacher_cache.codec import CODECS
from tests.support.cache_inputs import CHAT, write
from tests.support.hf_models import tiny_tokenizer


@pytest.fixture(scope="session")
def windows(tmp_path_factory):
    """Make windows of unequal length, some with a prompt whose tokens are not valid."""
    path = tmp_path_factory.mktemp("text") / "data.jsonl"
    numbers = ("one", "two", "three", "four")
    entries = [
        {"text": f"{a} and {b} is " + "the word " * length}
        for a in numbers
        for length, b in enumerate(numbers)
    ]
    entries += [{"prompt": f"{a} words ", "completion": f"the {a} and a word"} for a in numbers]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, {"messages": CHAT}]))
    return load_windows(path, tiny_tokenizer(), max_length=24, eval_fraction=0.2, seed=0)


@pytest.fixture(scope="session")
def caches(windows, tmp_path_factory):
    """One cache for each codec; in float32 of several shards."""
    folder = tmp_path_factory.mktemp("caches")
    return {codec: write(folder / codec, windows, codec=codec) for codec in CODECS}
