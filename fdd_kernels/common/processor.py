"""The processor of this machine. Needs the standard library only."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> tuple[str, frozenset[str]]:
    """Name and instruction-set flags of the processor, from /proc/cpuinfo.

    Without that file the name is the platform's and there are no flags.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="ignore").splitlines()
    except OSError:
        lines = []
    fields = {key.strip().lower(): value for key, _, value in (x.partition(":") for x in lines)}
    name = fields.get("model name", "").strip() or platform.processor() or platform.machine()
    return name, frozenset(f"{fields.get('flags', '')} {fields.get('features', '')}".split())
