"""Encodings of rows: float32, bfloat16, or 8 bits with one scale per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Name of the part that holds the scales; the part "" holds the numbers.
SCALE = ".scale"


@dataclass(frozen=True)
class Codec:
    """Encode and decode rows (rows, width).

    Args:
        dtype: of the stored numbers.
        largest: the stored number that the largest number of a row is scaled to; None: no scale.
    """

    dtype: torch.dtype
    largest: float | None = None

    def parts(self, width: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return what is stored for one row: name of the part -> (dtype, shape)."""
        scale = {} if self.largest is None else {SCALE: (torch.float32, ())}
        return {"": (self.dtype, (width,)), **scale}

    def bytes_per_row(self, width: int) -> int:
        return width * self.dtype.itemsize + (0 if self.largest is None else 4)

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """Encode rows (rows, width) into their stored parts."""
        rows = rows.float()
        if self.largest is None:
            return {"": rows.to(self.dtype)}
        scale = rows.abs().amax(dim=-1) / self.largest
        scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros
        scaled = rows / scale[:, None]
        if not self.dtype.is_floating_point:
            scaled = scaled.round()
        return {"": scaled.clamp(-self.largest, self.largest).to(self.dtype), SCALE: scale}

    def decode(self, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Decode stored parts to rows (rows, width) in `dtype`."""
        if self.largest is None:
            return parts[""].to(dtype)
        return (parts[""].float() * parts[SCALE][:, None]).to(dtype)


CODECS = {
    "float32": Codec(torch.float32),
    "bfloat16": Codec(torch.bfloat16),
    "int8": Codec(torch.int8, largest=127.0),
    "float8": Codec(torch.float8_e4m3fn, largest=448.0),
}
