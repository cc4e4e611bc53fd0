"""The tensors and options of a contrastive call, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels.backends import backend_names, resolve_row_backend
from fdd_kernels.objectives.numbers import check_labels, check_numbers, describe, looks_at
from fdd_kernels.objectives.option_checks import (
    REDUCTIONS,
    require_choice,
    require_int,
    require_number,
)
from fdd_kernels.objectives.teacher_weights import check_teacher_weights
from fdd_kernels.objectives.tensors import (
    FLOAT_DTYPES,
    INTEGERS,
    MASKS,
    check_entries,
    require_float,
)
from fdd_kernels.objectives.validation import (
    check_num_items,
    check_places,
    check_transforms,
)

LOSSES = ("infonce", "kl", "supcon", "margin_mse")
EXCLUDES = ("none", "self", "same_tag")
POSITIVES = ("student", "teacher")


@dataclass(frozen=True)
class ContrastiveOptions:
    """What a call computes; see `fused_contrastive_kd`."""

    loss: str
    exclude: str
    positives: str
    normalize: bool | None
    symmetric: bool
    ignore_index: int
    reduction: str
    backend: str

    def __post_init__(self) -> None:
        require_choice("loss", self.loss, LOSSES)
        require_choice("exclude", self.exclude, EXCLUDES)
        require_choice("positives", self.positives, POSITIVES)
        require_choice("normalize", self.normalize, (None, True, False))
        require_choice("symmetric", self.symmetric, (True, False))
        require_int("ignore_index", self.ignore_index, minimum=-(2**63))
        require_choice("reduction", self.reduction, REDUCTIONS)
        require_choice("backend", self.backend, backend_names())
        resolve_row_backend(self.backend)
        if self.positives == "teacher" and self.loss != "supcon":
            raise ValueError(
                f'positives="teacher" belongs to loss="supcon", but loss="{self.loss}": leave '
                "positives out"
            )
        if self.loss == "supcon" and self.exclude == "same_tag":
            raise ValueError(
                'exclude="same_tag" leaves loss="supcon" no positives, which are the columns of '
                'the row\'s tag: pass exclude="self" or "none"'
            )

    @property
    def has_teachers(self) -> bool:
        """Whether scores of teachers are compared with the student's."""
        return self.loss in ("kl", "margin_mse")

    @property
    def row_function(self) -> str:
        """The name of the row function."""
        if self.positives == "teacher":
            return "supcon_of_teacher"
        return {"kl": "contrastive_kl"}.get(self.loss, self.loss)

    @property
    def normalizes(self) -> bool:
        """Whether vectors are divided by their lengths."""
        return self.loss != "margin_mse" if self.normalize is None else self.normalize


@dataclass(frozen=True)
class ContrastiveInputs:
    """The tensors of a call under the names of the public function.

    `pairs` are the teachers' vectors: (teacher_a or None, teacher_b) each.
    """

    student_a: Tensor
    student_b: Tensor
    pairs: tuple[tuple[Tensor | None, Tensor], ...]
    several: bool
    scale: Tensor | float
    teacher_scale: Sequence[float] | float | None
    teacher_weights: Sequence[float] | Tensor | None
    labels: Tensor | None
    row_tags: Tensor | None
    column_tags: Tensor | None
    mask: Tensor | None
    column_mask: Tensor | None
    num_items_in_batch: Tensor | float | None
    token_weights: None = None

    def named_floats(self) -> dict[str, Tensor | None]:
        """Name every tensor of floating point as error messages do."""
        named = {"student_a": self.student_a, "student_b": self.student_b}
        for m, pair in enumerate(self.pairs):
            names = [
                f"teachers[{m}][{i}]" if self.several else f"teacher_{'ab'[i]}" for i in (0, 1)
            ]
            given = zip(names, pair)
            named |= {name: t for name, t in given if self.several or t is not None}
        for name in ("scale", "teacher_weights"):
            if isinstance(getattr(self, name), Tensor):
                named[name] = getattr(self, name)
        return named

    @property
    def rows(self) -> int:
        """The number of rows, N."""
        return self.student_a.shape[0]

    @property
    def columns(self) -> int:
        """The number of columns of this process, C."""
        return self.student_b.shape[0]

    def check(self, o: ContrastiveOptions, with_group: bool) -> None:
        """Check everything but the labels' range.

        Raises:
            TypeError, ValueError: naming the argument, its value and the remedy.
        """
        self._check_vectors(o)
        self._check_integers(o)
        self._check_scales()
        self._check_weights(o)
        check_num_items(o.reduction, self.num_items_in_batch)
        named = self.named_floats()
        named.pop("scale", None)  # a number on the CPU is welcome everywhere
        check_places(named, "student_a", self.student_a)
        more = {"row_tags": self.row_tags, "column_tags": self.column_tags}
        more["column_mask"] = self.column_mask
        check_transforms(self, resolve_row_backend(o.backend), **more)
        check_numbers(self)
        self._check_pairing(o, with_group)

    def _check_vectors(self, o: ContrastiveOptions) -> None:
        shapes = {}
        for name, tensor in self.named_floats().items():
            if name in ("scale", "teacher_weights"):
                continue
            require_float(name, tensor)
            if tensor.ndim != 2 or tensor.shape[1] == 0:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}: it must be (entries, width); flatten "
                    "other dimensions first"
                )
            shapes[name] = tuple(tensor.shape)
        if not self.columns:
            raise ValueError(f"student_b has shape {shapes['student_b']}: pass at least one column")
        self._same_width("student_b", self.student_b, "student_a", self.student_a)
        if o.has_teachers and not (self.pairs and self.pairs[0][0] is not None):
            raise ValueError(
                f'loss="{o.loss}" compares with a teacher\'s scores: pass teacher_a and teacher_b, '
                "or teachers=[(a, b), ...]"
            )
        if o.positives == "teacher":
            if len(self.pairs) != 1:
                raise ValueError(
                    'positives="teacher" takes its positives from one teacher\'s columns: pass '
                    "teacher_b, of the student's width"
                )
            self._same_width("teacher_b", self.pairs[0][1], "student_a", self.student_a)
        elif self.pairs and not o.has_teachers:
            raise ValueError(
                f'loss="{o.loss}" compares with no teacher\'s scores: leave '
                f"{'teachers' if self.several else 'teacher_a and teacher_b'} out; a teacher's "
                "vectors may be given as student_b"
            )
        if o.loss == "margin_mse" and len(self.pairs) > 1:
            raise ValueError(
                f'loss="margin_mse" compares scores of one teacher, but teachers has '
                f"{len(self.pairs)}: call it once for each"
            )
        for m, (of_rows, of_columns) in enumerate(self.pairs):
            a, b = (f"teachers[{m}][{i}]" if self.several else f"teacher_{'ab'[i]}" for i in (0, 1))
            checks = [(b, of_columns, "student_b", self.columns)]
            if of_rows is not None:
                checks.append((a, of_rows, "student_a", self.rows))
                self._same_width(b, of_columns, a, of_rows)
            for name, tensor, of, count in checks:
                if len(tensor) != count:
                    raise ValueError(
                        f"{name} has {len(tensor)} rows and {of} {count}: pass both models' "
                        "vectors of the same entries"
                    )

    def _same_width(self, name: str, tensor: Tensor, of: str, other: Tensor) -> None:
        if tensor.shape[1] != other.shape[1]:
            raise ValueError(
                f"{name} has width {tensor.shape[1]} and {of} {other.shape[1]}: scores are inner "
                "products, project one of them"
            )

    def _check_integers(self, o: ContrastiveOptions) -> None:
        for name, count, dtypes in (
            ("labels", self.rows, INTEGERS),
            ("row_tags", self.rows, INTEGERS),
            ("column_tags", self.columns, INTEGERS),
            ("mask", self.rows, MASKS),
            ("column_mask", self.columns, MASKS),
        ):
            if getattr(self, name) is not None:
                side = "student_b" if name.startswith("column") else "student_a"
                remedy = f", but {side} has {count} rows: pass one entry per row, ({count},)"
                given = name, getattr(self, name), dtypes, (count,)
                check_entries(*given, self.student_a.device, "student_a", remedy)
        if self.labels is not None and o.loss != "infonce":
            raise ValueError(
                f'labels are the positives of loss="infonce", but loss="{o.loss}": leave them out'
                + (", and pass row_tags" if o.loss == "supcon" else "")
            )
        needs_tags = o.loss == "supcon" or o.exclude == "same_tag"
        if needs_tags and self.row_tags is None:
            why = 'loss="supcon"' if o.loss == "supcon" else 'exclude="same_tag"'
            raise ValueError(f"row_tags is None, but {why} compares tags: pass one integer per row")
        if self.column_tags is not None and self.row_tags is None:
            raise ValueError("column_tags was given without row_tags: pass both, or neither")
        if self.row_tags is not None and self.column_tags is None and self.rows != self.columns:
            raise ValueError(
                f"column_tags is None: row_tags stand for the columns too where there are as many, "
                f"but student_a has {self.rows} rows and student_b {self.columns}: pass column_tags"
            )

    def _check_scales(self) -> None:
        if isinstance(self.scale, Tensor):
            if self.scale.numel() != 1 or self.scale.dtype not in FLOAT_DTYPES:
                raise ValueError(
                    f"scale is a {describe(self.scale)}: pass a float or a tensor of one float"
                )
            if looks_at(self.scale) and not 0 < float(self.scale.detach()) < math.inf:
                raise ValueError(
                    f"scale={float(self.scale.detach())} must be finite and greater than 0: learn "
                    "its logarithm and pass .exp()"
                )
        else:
            require_number("scale", self.scale, positive=True)
        if isinstance(self.teacher_scale, Sequence) and not isinstance(self.teacher_scale, str):
            if len(self.teacher_scale) != len(self.pairs):
                raise ValueError(
                    f"teacher_scale has {len(self.teacher_scale)} numbers and there are "
                    f"{len(self.pairs)} teachers: pass one each, or one number"
                )
            for m, scale in enumerate(self.teacher_scale):
                require_number(f"teacher_scale[{m}]", scale, positive=True)
        else:
            require_number("teacher_scale", self.teacher_scale, positive=True, optional=True)

    def _check_weights(self, o: ContrastiveOptions) -> None:
        weights, count = self.teacher_weights, len(self.pairs)
        if weights is None:
            return
        if not self.several:
            raise ValueError(
                "teacher_weights weigh the softmaxes of several teachers: pass teachers=[(a, b), "
                "...], or leave them out"
            )
        if not isinstance(weights, Tensor):
            for m, weight in enumerate(weights):
                require_number(f"teacher_weights[{m}]", weight)
            weights = torch.tensor([float(w) for w in weights])
        shapes = [(count,)] if o.symmetric else [(count,), (count, self.rows)]
        check_teacher_weights(weights, shapes, None if self.mask is None else self.mask != 0)

    def _check_pairing(self, o: ContrastiveOptions, with_group: bool) -> None:
        """Check what takes each row's own column: labels that are not given, self, symmetry."""
        own = 'loss="infonce" without labels' if o.loss == "infonce" else 'exclude="self"'
        needs_own = (o.loss == "infonce" and self.labels is None) or o.exclude == "self"
        if o.symmetric and self.labels is not None:
            raise ValueError(
                "symmetric=True takes row i and column i for a pair, but labels were given: call "
                "once for each direction"
            )
        square = needs_own and (o.symmetric or with_group)
        if o.symmetric and o.reduction == "none":
            square, own = True, 'symmetric=True with reduction="none"'
        if square and self.rows != self.columns:
            raise ValueError(
                f"student_a has {self.rows} rows and student_b {self.columns}: {own} needs as many "
                "of each"
            )
        if needs_own and self.rows > self.columns:
            raise ValueError(
                f"student_a has {self.rows} rows and student_b {self.columns}: {own} pairs row i "
                "with column i" + (", pass labels" if o.loss == "infonce" else "")
            )

    def check_labels(self, ignore_index: int, columns: int) -> None:
        """Refuse labels outside of all columns, those of other processes among them."""
        if self.labels is not None:
            check_labels(self.labels, ignore_index, columns)
