"""Errors of fused_contrastive_kd name argument, value and remedy, before any work."""

from __future__ import annotations

import re

import pytest
import torch

from fdd_kernels import fused_contrastive_kd
from fdd_kernels.objectives.contrastive import api
from tests.support.contrastive import random_call

INF, NAN = float("inf"), float("nan")
GOOD = {loss: random_call(loss, 4).arguments() for loss in ("infonce", "kl", "supcon")}
V = torch.randn(4, 6)
INTS = torch.arange(4)


@pytest.fixture(autouse=True)
def _no_work(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work was done before the arguments were checked")

    monkeypatch.setattr(api, "_direction", fail)


CASES = [
    ("infonce", {"loss": "nce"}, ValueError, "loss='nce' is not one of 'infonce', 'kl'"),
    ("infonce", {"exclude": "own"}, ValueError, "exclude='own' is not one of 'none', 'self'"),
    ("supcon", {"positives": "both"}, ValueError, "positives='both' is not one of"),
    ("infonce", {"reduction": "max"}, ValueError, "reduction='max' is not one of"),
    ("infonce", {"normalize": "l2"}, ValueError, "normalize='l2' is not one of"),
    ("infonce", {"symmetric": 2}, ValueError, "symmetric=2 is not one of True, False"),
    ("infonce", {"backend": "gpu"}, ValueError, "backend='gpu' is not one of"),
    ("infonce", {"backend": "cpu"}, ValueError, "Backends that can: auto, reference, torch"),
    ("infonce", {"backend": "triton"}, ValueError, 'backend="triton" does not compute'),
    ("infonce", {"student_a": None}, TypeError, "student_a must be a tensor, got NoneType"),
    ("infonce", {"student_b": INTS}, TypeError, "student_b is a int64 tensor"),
    ("infonce", {"student_a": V[0]}, ValueError, "student_a has shape (6,): it must be (entries,"),
    ("infonce", {"student_b": V[:, :5]}, ValueError, "student_b has width 5 and student_a 6"),
    ("infonce", {"student_b": V[:0]}, ValueError, "pass at least one column"),
    ("infonce", {"student_b": V[:3]}, ValueError, "student_a has 4 rows and student_b 3"),
    ("infonce", {"student_b": V.to("meta")}, ValueError, "student_b is on meta and student_a"),
    ("infonce", {"teacher_a": V, "teacher_b": V}, ValueError, "leave teacher_a and teacher_b out"),
    ("kl", {"teacher_a": None}, ValueError, "teacher_a is None: pass teacher_a and teacher_b"),
    ("kl", {"teacher_b": None}, ValueError, "teacher_b is None"),
    ("kl", {"teacher_a": None, "teacher_b": None}, ValueError, "compares with a teacher's scores"),
    ("kl", {"teacher_a": V[:3]}, ValueError, "teacher_b has width 7 and teacher_a 6"),
    ("kl", {"teacher_a": torch.ones(3, 7)}, ValueError, "teacher_a has 3 rows and student_a 4"),
    ("kl", {"teacher_b": torch.ones(3, 7)}, ValueError, "teacher_b has 3 rows and student_b 4"),
    (
        "kl",
        {"teacher_a": torch.ones(4, 7, requires_grad=True)},
        ValueError,
        "teacher_a requires grad, but the loss never sends gradient to the teacher",
    ),
    ("kl", {"teachers": [(V, V)]}, ValueError, "teachers was given beside teacher_a"),
    ("kl", {"labels": INTS}, ValueError, 'labels are the positives of loss="infonce"'),
    ("supcon", {"labels": INTS}, ValueError, "leave them out, and pass row_tags"),
    ("supcon", {"exclude": "same_tag"}, ValueError, 'leaves loss="supcon" no positives'),
    ("supcon", {"row_tags": None, "column_tags": None}, ValueError, "row_tags is None, but loss="),
    ("infonce", {"exclude": "same_tag"}, ValueError, 'row_tags is None, but exclude="same_tag"'),
    ("supcon", {"row_tags": INTS[:3]}, ValueError, "row_tags has shape (3,), but student_a has 4"),
    ("supcon", {"column_tags": INTS[:3]}, ValueError, "column_tags has shape (3,), but student_b"),
    ("supcon", {"row_tags": V[:, 0]}, TypeError, "row_tags is a float32 tensor"),
    ("supcon", {"row_tags": [0, 1, 2, 3]}, TypeError, "row_tags must be a tensor, got list"),
    ("supcon", {"row_tags": None}, ValueError, "row_tags is None"),
    ("infonce", {"column_tags": INTS}, ValueError, "column_tags was given without row_tags"),
    (
        "kl",
        {"student_b": torch.ones(3, 6), "teacher_b": torch.ones(3, 7), "row_tags": INTS},
        ValueError,
        "column_tags is None: row_tags stand for the columns",
    ),
    ("infonce", {"mask": INTS[:2]}, ValueError, "mask has shape (2,)"),
    ("infonce", {"column_mask": V[:, 0]}, TypeError, "column_mask is a float32 tensor"),
    ("infonce", {"labels": INTS + 1}, ValueError, "labels contains 4, which is neither"),
    ("infonce", {"labels": INTS - 1}, ValueError, "labels contains -1"),
    ("infonce", {"labels": INTS[:2]}, ValueError, "labels has shape (2,)"),
    ("infonce", {"labels": INTS, "symmetric": True}, ValueError, "but labels were given"),
    ("supcon", {"positives": "teacher"}, ValueError, "takes its positives from one teacher's"),
    ("infonce", {"positives": "teacher"}, ValueError, 'belongs to loss="supcon"'),
    (
        "supcon",
        {"positives": "teacher", "teacher_b": torch.ones(4, 5)},
        ValueError,
        "teacher_b has width 5 and student_a 6",
    ),
    (
        "supcon",
        {"positives": "teacher", "teacher_b": V, "symmetric": True},
        ValueError,
        "teacher_a is None",
    ),
    ("infonce", {"scale": 0.0}, ValueError, "scale=0.0 must be finite and greater than 0"),
    ("infonce", {"scale": -1.0}, ValueError, "scale=-1.0 must be finite"),
    ("infonce", {"scale": "1"}, TypeError, "scale must be a number, got str"),
    ("infonce", {"scale": torch.tensor(-2.0)}, ValueError, "scale=-2.0 must be finite and greater"),
    ("infonce", {"scale": torch.ones(2)}, ValueError, "scale is a float32 tensor of shape (2,)"),
    ("infonce", {"scale": torch.tensor(2)}, ValueError, "scale is a int64 tensor"),
    ("kl", {"teacher_scale": INF}, ValueError, "teacher_scale=inf must be finite"),
    (
        "kl",
        {"teacher_scale": [1.0, 2.0]},
        ValueError,
        "teacher_scale has 2 numbers and there are 1",
    ),
    ("kl", {"teacher_scale": [0.0]}, ValueError, "teacher_scale[0]=0.0 must be finite"),
    (
        "kl",
        {"teacher_weights": [1.0]},
        ValueError,
        "teacher_weights weigh the softmaxes of several",
    ),
    ("infonce", {"num_items_in_batch": 0}, ValueError, "num_items_in_batch=0 must be greater"),
    ("infonce", {"reduction": "none", "num_items_in_batch": 2}, ValueError, "divides a sum"),
    ("infonce", {"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
    (
        "kl",
        {
            "student_b": torch.ones(3, 6),
            "teacher_b": torch.ones(3, 7),
            "symmetric": True,
            "reduction": "none",
        },
        ValueError,
        'symmetric=True with reduction="none" needs as many of each',
    ),
    (
        "kl",
        {"student_b": torch.ones(3, 6), "teacher_b": torch.ones(3, 7), "exclude": "self"},
        ValueError,
        'exclude="self" pairs row i with column i',
    ),
]


@pytest.mark.parametrize(
    ("loss", "changes", "error", "message"), CASES, ids=[f"{c[0]}-{c[-1][:40]}" for c in CASES]
)
def test_refused(loss, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fused_contrastive_kd(**(GOOD[loss] | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teachers": []}, ValueError, "teachers is empty"),
        ({"teachers": [V, V]}, TypeError, "teachers must be a list of pairs"),
        ({"teachers": V}, TypeError, "teachers must be a list of pairs"),
        ({"teachers": [(V, V), (V, V[:3])]}, ValueError, "teachers[1][1] has 3 rows"),
        ({"teachers": [(V, V), (V, None)]}, TypeError, "teachers[1][1] must be a tensor"),
        ({"teacher_weights": [1.0]}, ValueError, "teacher_weights has shape (1,)"),
        ({"teacher_weights": [1.0, -1.0]}, ValueError, "teacher_weights[1]=-1.0 must be finite"),
        ({"teacher_weights": [0.0, 0.0]}, ValueError, "teacher_weights has a position"),
        ({"teacher_weights": torch.tensor([1, NAN])}, ValueError, "teacher_weights has a position"),
        ({"teacher_weights": torch.ones(4, 2)}, ValueError, "or per row, (2, 4)"),
        ({"teacher_weights": torch.ones(2, 4), "symmetric": True}, ValueError, "(2,)"),
        ({"loss": "margin_mse"}, ValueError, "compares scores of one teacher, but teachers has 2"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_several_teachers(changes, error, message):
    arguments = {"student_a": V, "student_b": V, "loss": "kl", "teachers": [(V, V), (V, V)]}
    with pytest.raises(error, match=re.escape(message)):
        fused_contrastive_kd(**(arguments | changes))


def test_nan_is_refused_when_debugging(monkeypatch):
    monkeypatch.setenv("FDD_KERNELS_DEBUG", "1")
    bad = V.clone()
    bad[1, 2] = NAN
    with pytest.raises(ValueError, match="student_b has 1 entries that are NaN or infinite"):
        fused_contrastive_kd(V, bad)
