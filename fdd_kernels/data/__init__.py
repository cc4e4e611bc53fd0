"""Turn text from files or data sets into token windows with labels: plain text, prompts with
completions, and chats.

Reading needs the `hf` extra, and `pad_windows` torch only.
"""

from fdd_kernels.data.chats import chat_pieces
from fdd_kernels.data.collate import IGNORED, pad_windows
from fdd_kernels.data.files import SUFFIXES, data_files, file_digest
from fdd_kernels.data.records import Chat, Record, read_records
from fdd_kernels.data.sources import Source, open_source
from fdd_kernels.data.windows import Window, Windows, load_windows, tokenize

__all__ = [
    "IGNORED",
    "SUFFIXES",
    "Chat",
    "Record",
    "Source",
    "Window",
    "Windows",
    "chat_pieces",
    "data_files",
    "file_digest",
    "load_windows",
    "open_source",
    "pad_windows",
    "read_records",
    "tokenize",
]
