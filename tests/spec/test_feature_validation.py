"""Bad input of the objectives on features: refused before any work, named, with a remedy."""

import pytest
import torch

from fdd_kernels import (
    attention_transfer,
    gram_loss,
    norm_direction_loss,
    relational_kd,
    row_deltas,
)
from fdd_kernels.objectives import numbers

S, T = torch.zeros(2, 5, 4), torch.zeros(2, 5, 4)
LABELS, MEANS = torch.zeros(2, 5, dtype=torch.int64), torch.ones(3, 4)
META = torch.device("meta")


def norm_direction(student_features, teacher_features, **more):
    more = {"class_means": MEANS, "labels": LABELS} | more
    return norm_direction_loss(student_features, teacher_features, **more)


OBJECTIVES = [gram_loss, attention_transfer, norm_direction, relational_kd]
OF_ALL = [
    ({"student_features": None}, TypeError, "student_features must be a tensor, got NoneType"),
    ({"student_features": [S]}, TypeError, "student_features must be a tensor, got list"),
    ({"teacher_features": T.long()}, TypeError, "teacher_features is a int64 tensor.*pass float32"),
    (
        {"student_features": S[..., :0]},
        ValueError,
        r"student_features has shape \(2, 5, 0\).*width",
    ),
    ({"student_features": S.to_sparse()}, TypeError, "student_features has layout.*to_dense"),
    ({"teacher_features": T[:, :3]}, ValueError, r"leading shape \(2, 3\).*\(2, 5\): both models"),
    ({"teacher_features": T.to(META)}, ValueError, "device meta.*cpu: move one"),
    (
        {"teacher_features": T.clone().requires_grad_()},
        ValueError,
        r"teacher_features requires grad.*detach\(\)",
    ),
    ({"mask": torch.ones(2, 5)}, TypeError, "mask is a float32 tensor.*bool"),
    ({"mask": LABELS[:1]}, ValueError, r"mask has shape \(1, 5\)"),
    ({"mask": LABELS.to(META)}, ValueError, "mask is on meta"),
]
REDUCED = [
    ({"reduction": "max"}, ValueError, "reduction='max' is not one of 'mean', 'sum', 'none'"),
    ({"num_items_in_batch": 0}, ValueError, "num_items_in_batch=0 must be greater than 0"),
    ({"num_items_in_batch": "9"}, TypeError, "num_items_in_batch must be a number"),
    ({"num_items_in_batch": 9, "reduction": "none"}, ValueError, "num_items_in_batch divides"),
]


@pytest.mark.parametrize(("change", "error", "message"), OF_ALL)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tensors(objective, change, error, message):
    with pytest.raises(error, match=message):
        objective(**({"student_features": S, "teacher_features": T} | change))


@pytest.mark.parametrize(("change", "error", "message"), REDUCED)
@pytest.mark.parametrize("objective", OBJECTIVES[:3])
def test_reductions(objective, change, error, message):
    with pytest.raises(error, match=message):
        objective(S, T, **change)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nan_is_refused_where_debugging_asks_for_it(monkeypatch, objective):
    monkeypatch.setenv(numbers.DEBUG_SWITCH, "1")
    with pytest.raises(ValueError, match="student_features has 40 entries that are NaN"):
        objective(S * torch.nan, T)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gram_loss(S, T, "rbf"), ValueError, "kind='rbf' is not one of 'sp', 'cka'"),
        (lambda: gram_loss(S[0, 0], T[0, 0]), ValueError, "at least 2 dimensions"),
        (
            lambda: gram_loss(S, T[..., :3], "ickd"),
            ValueError,
            "teacher_features has width 3, student_features 4: project",
        ),
        (lambda: gram_loss(S, T, groups="row"), ValueError, "groups='row' is not 'all' or"),
        (lambda: gram_loss(S, T, groups=3), TypeError, "groups must be 'all' or .*got int"),
        (lambda: gram_loss(S, T, groups=MEANS), TypeError, "groups has dtype torch.float32"),
        (lambda: gram_loss(S, T, groups=LABELS[0]), ValueError, r"groups has shape \(5,\)"),
        (lambda: gram_loss(S, T, groups=LABELS.to(META)), ValueError, "groups is on meta"),
        (lambda: relational_kd(S, T, distance_weight=-1), ValueError, "distance_weight=-1"),
        (lambda: relational_kd(S, T, angle_weight="1"), TypeError, "angle_weight must be a number"),
        (
            lambda: norm_direction(S, T[..., :3]),
            ValueError,
            "teacher_features has width 3, student_features 4: project",
        ),
        (lambda: norm_direction(S, T, labels=None), TypeError, "labels is None: pass the class"),
        (
            lambda: norm_direction(S, T, labels=LABELS + 3),
            ValueError,
            r"labels contains 3.*\[0, 3\)",
        ),
        (lambda: norm_direction(S, T, labels=LABELS - 1), ValueError, "labels contains -1"),
        (
            lambda: norm_direction(S, T, class_means=MEANS[:, :2]),
            ValueError,
            r"class_means has shape \(3, 2\): it must be \(classes, 4\)",
        ),
        (
            lambda: norm_direction(S, T, class_means=MEANS.to(META)),
            ValueError,
            "class_means is on meta",
        ),
        (lambda: row_deltas(S.long()), TypeError, "hidden is a int64 tensor"),
        (lambda: row_deltas(S[0, 0]), ValueError, r"hidden has shape \(4,\)"),
        (lambda: row_deltas(S, "delta"), ValueError, "kind='delta' is not one of 'deviation'"),
        (lambda: row_deltas(S, reference="mean"), ValueError, "reference='mean' is not one of"),
        (lambda: row_deltas(S, reference=3.0), ValueError, "reference=3.0 is not one of 'batch'"),
        (
            lambda: row_deltas(S, reference=T[..., :3]),
            ValueError,
            r"reference has shape \(2, 5, 3\).*broadcast to hidden, \(2, 5, 4\)",
        ),
        (lambda: row_deltas(S, reference=LABELS), TypeError, "reference is a int64 tensor"),
        (lambda: row_deltas(S, reference=T[None]), ValueError, "reference has shape"),
        (lambda: row_deltas(S, mask=LABELS[0]), ValueError, r"mask has shape \(5,\)"),
        (lambda: row_deltas(S, as_layers=1), TypeError, "as_layers must be a bool, got int"),
        (lambda: row_deltas(S, groups="rows"), ValueError, "groups='rows' is not"),
        (
            lambda: row_deltas(S, reference=T, groups="all"),
            ValueError,
            "groups are of the batch's mean, but reference is a tensor",
        ),
        (
            lambda: row_deltas(S, "adjacent", groups="all"),
            ValueError,
            "neighbours within a sequence.*groups=None",
        ),
        (
            lambda: row_deltas(S, "adjacent", reference=T),
            ValueError,
            "neighbours within a sequence: leave reference out",
        ),
        (
            lambda: row_deltas(S, groups="sequence", process_group=object()),
            ValueError,
            "process_group takes the mean over all rows",
        ),
        (
            lambda: row_deltas(S, "adjacent", process_group=object()),
            ValueError,
            "process_group takes the mean over all rows",
        ),
    ],
)
def test_options(call, error, message):
    with pytest.raises(error, match=message):
        call()
