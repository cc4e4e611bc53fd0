"""The processor of this machine. Needs the standard library only."""

from __future__ import annotations

import platform
from pathlib import Path

# Generations of server processors that hide their model's name in virtual machines, by vendor and
# family, each with its models as /proc/cpuinfo numbers them.
_GENERATIONS = {
    ("GenuineIntel", 6): {
        "Skylake or Cascade Lake": (85,),
        "Ice Lake": (106, 108),
        "Sapphire Rapids": (143,),
        "Granite Rapids": (173, 174),
        "Emerald Rapids": (207,),
    },
    ("AuthenticAMD", 23): {"Zen 2": (49,)},
    ("AuthenticAMD", 25): {"Zen 3": (1,), "Zen 4": (17,), "Zen 4c": (160,)},
    ("AuthenticAMD", 26): {"Zen 5": (2,), "Zen 5c": (17,)},
}


def _fields() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="ignore").splitlines()
    except OSError:
        lines = []
    fields = (line.partition(":") for line in lines)
    return {key.strip().lower(): value.strip() for key, _, value in fields}


def processor() -> tuple[str, frozenset[str]]:
    """Name and instruction-set flags of the processor, from /proc/cpuinfo.

    Without that file the name is the platform's and there are no flags.
    """
    fields = _fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(f"{fields.get('flags', '')} {fields.get('features', '')}".split())


def vendor() -> str | None:
    """Name the maker of the processor as /proc/cpuinfo does: GenuineIntel, AuthenticAMD."""
    return _fields().get("vendor_id")


def generation() -> str | None:
    """Name the processor's generation, as in Zen 5; None if it is not known here."""
    fields = _fields()
    family, model = (fields.get(name, "") for name in ("cpu family", "model"))
    known = _GENERATIONS.get((fields.get("vendor_id"), int(family)), {}) if family else {}
    return next((name for name, models in known.items() if model in map(str, models)), None)
