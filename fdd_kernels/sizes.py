"""Amounts of memory in words, read and written."""

from __future__ import annotations

import re

from fdd_kernels.user_error import UserError

MIB, GIB = 2**20, 2**30
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(text: str) -> int:
    """Bytes from "24GiB", "24G", "512 MB" or a plain number."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if not match or not float(match[1]) > 0:
        raise UserError(f"{text!r} is not an amount of memory: write it as 24GiB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def show(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB else f"{size / MIB:.1f} MiB"
