"""Parse and format amounts of memory and numbers of tokens."""

from __future__ import annotations

import re

from fdd_kernels.common.errors import UserError

MIB, GIB = 2**20, 2**30
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
# A number without a unit means bytes; a smaller one is taken for a mistake.
_FEWEST_PLAIN_BYTES = MIB


def parse_size(text: str, option: str = "") -> int:
    """Parse "24GiB", "24G", "512 MB", or a plain number of bytes of at least 1 MiB, into bytes.

    Raises:
        UserError: it is none of these; names `option`.
    """
    where = f"{option} {text!r}" if option else repr(text)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if not match or not float(match[1]) > 0:
        raise UserError(f"{where} is not an amount of memory: write it as 24GiB or 512MiB")
    size = int(float(match[1]) * _UNITS[match[2]])
    if not match[2] and not match[3] and size < _FEWEST_PLAIN_BYTES:
        raise UserError(
            f"{where} has no unit and would be bytes: write {match[1]}GiB or {match[1]}MiB"
        )
    return size


def parse_count(text: str, option: str) -> int:
    """Parse "8192" or "8k" (times 1024) into a whole number of at least 1.

    Raises:
        UserError: it is no such number; names `option`.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([km]?)\s*", text.lower())
    number = float(match[1]) * _UNITS[match[2]] if match else 0.5
    if number != int(number):
        raise UserError(f"{option} {text!r} is not a whole number: write it as 8192 or 8k")
    if number < 1:
        raise UserError(f"{option} {text} must be at least 1")
    return int(number)


def show(size: float) -> str:
    """Format bytes in MiB or GiB."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB else f"{size / MIB:.1f} MiB"
