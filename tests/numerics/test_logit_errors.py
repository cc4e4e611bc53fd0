"""Errors of the objectives of the logits name argument, value and remedy, before any work."""

from __future__ import annotations

import re

import pytest
import torch

from fdd_kernels import fused_decoupled_kd, fused_topk_kd, row_statistics, selected_logprobs
from fdd_kernels.objectives.logits import call as logit_call
from fdd_kernels.objectives.numbers import DEBUG_SWITCH
from fdd_kernels.testing import random_problem
from tests.support.logit_objectives import random_call, statistics_arguments

INF, NAN = float("inf"), float("nan")
P = random_problem(layers=1, bias="plain", labels=True, mask=True)
CALLS = {
    "decoupled_kd": random_call("decoupled_kd", bias="plain", mask=True),
    "topk_kd": random_call("topk_kd", bias="plain", labels=True, mask=True),
    "selected": random_call("selected", bias="plain"),
}
FUNCTIONS = {
    "decoupled_kd": fused_decoupled_kd,
    "topk_kd": fused_topk_kd,
    "selected": selected_logprobs,
    "statistics": row_statistics,
}
GOOD = {name: call.arguments for name, call in CALLS.items()}
GOOD["statistics"] = statistics_arguments(P)
IDS, LOGPROBS = GOOD["topk_kd"]["ids"].clone(), GOOD["topk_kd"]["logprobs"].clone()
ROW = 0  # of the first position, which the mask keeps
VALID = (P.mask & (P.labels >= 0)).nonzero()[0]


@pytest.fixture
def _no_work(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work was done before the arguments were checked")

    for name in ("row_sum", "row_values", "dense_logits"):
        monkeypatch.setattr(logit_call, name, fail)


def state(name: str) -> str:
    return "hidden" if name == "selected" else "student_hidden"


def prefix(name: str) -> str:
    return state(name).removesuffix("hidden")


def changed(tensor: torch.Tensor, value, at=(0,)) -> torch.Tensor:
    """The tensor with another number in the first valid position's entry `at`."""
    tensor = tensor.clone()
    tensor[(*VALID, *at)] = value
    return tensor


def refused(name: str, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FUNCTIONS[name](**(GOOD[name] | changes))


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("name", FUNCTIONS)
class TestModels:
    def test_types(self, name):
        s = prefix(name)
        refused(name, {f"{s}hidden": None}, TypeError, f"^{s}hidden must be a tensor, got NoneType")
        refused(name, {f"{s}hidden": [1]}, TypeError, f"^{s}hidden must be a tensor, got list")
        refused(name, {f"{s}weight": None}, TypeError, f"^{s}weight must be a tensor, got NoneType")
        wrong = GOOD[name][f"{s}weight"].to(torch.int8)
        refused(name, {f"{s}weight": wrong}, TypeError, f"^{s}weight is a int8.*dequantise")
        refused(name, {f"{s}bias": 0.5}, TypeError, f"^{s}bias must be a tensor, got float")

    def test_shapes(self, name):
        s, good = prefix(name), GOOD[name]
        weight, hidden = good[f"{s}weight"], good[f"{s}hidden"]
        refused(name, {f"{s}weight": weight[:, :5]}, ValueError, rf"^{s}weight has shape \(37, 5\)")
        refused(name, {f"{s}bias": good[f"{s}bias"][:3]}, ValueError, rf"^{s}bias has shape \(3,\)")
        narrow = {f"{s}hidden": hidden[..., :0]}
        refused(name, narrow, ValueError, rf"^{s}hidden has shape \(2, 5, 0\)")
        single = {f"{s}hidden": hidden.sum()}
        refused(name, single, ValueError, rf"^{s}hidden has shape \(\)|^ids has shape|^labels has")

    def test_devices(self, name):
        s = prefix(name)
        moved = {f"{s}weight": GOOD[name][f"{s}weight"].to("meta")}
        refused(name, moved, ValueError, f"^{s}weight is on meta and {s}hidden on cpu")

    def test_options(self, name):
        s = prefix(name)
        for option in ("temperature", f"{s}softcap", f"{s}logit_scale"):
            for value in (0, -1.0, INF, NAN):
                refused(
                    name, {option: value}, ValueError, f"^{option}={value} must be finite and gr"
                )
            refused(name, {option: "hot"}, TypeError, f"^{option} must be a number, got str")
        refused(name, {"vocab_size": 38}, ValueError, "^vocab_size=38 is larger than")
        refused(name, {"vocab_size": 0}, ValueError, "^vocab_size=0 must be at least 1")
        refused(name, {"ignore_index": 1.5}, TypeError, "^ignore_index must be an int, got float")

    def test_backends(self, name):
        for backend in ("cpu", "triton"):
            able = "Backends that can: auto, reference, torch"
            refused(name, {"backend": backend}, ValueError, f'^backend="{backend}" does.*{able}')
        refused(name, {"backend": "cuda"}, ValueError, "^backend='cuda' is not one of 'auto'")

    def test_nan_in_debug_mode(self, name, monkeypatch):
        monkeypatch.setenv(DEBUG_SWITCH, "1")
        s = prefix(name)
        bad = {f"{s}weight": torch.full_like(GOOD[name][f"{s}weight"], NAN)}
        refused(name, bad, ValueError, f"^{s}weight has 296 entries that are NaN or infinite")


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("name", ["decoupled_kd", "statistics"])
class TestTeachers:
    def test_a_teacher_that_asks_for_gradient(self, name):
        if name == "statistics":
            return  # without gradient there is none to ask for
        for argument in ("teacher_hidden", "teacher_weight", "teacher_bias"):
            wrong = {argument: GOOD[name][argument].clone().requires_grad_()}
            refused(name, wrong, ValueError, f"^{argument} requires grad.*detach")

    def test_models_that_do_not_go_together(self, name):
        good = GOOD[name]
        wrong = {"teacher_hidden": good["teacher_hidden"][:, :4]}
        refused(name, wrong, ValueError, r"^teacher_hidden has leading shape \(2, 4\)")
        wrong = {"teacher_weight": good["teacher_weight"][:30], "teacher_bias": None}
        refused(name, wrong, ValueError, "student_weight has 37 rows and teacher_weight 30.*voc")
        refused(name, {"teacher_weight": None}, TypeError, "^teacher_weight must be a tensor")
        refused(name, {"teacher_hidden": ()}, TypeError, "^teacher_hidden must be a tensor")

    def test_labels(self, name):
        labels = GOOD[name]["labels"]
        refused(name, {"labels": labels.float()}, TypeError, "^labels is a float32 tensor")
        refused(name, {"labels": labels[:, :3]}, ValueError, r"^labels has shape \(2, 3\)")
        wrong = {"labels": changed(labels, 37, ())}
        refused(name, wrong, ValueError, r"^labels contains 37.*\[0, 37\)")
        refused(name, {"vocab_size": 2}, ValueError, r"^labels contains .*\[0, 2\)")


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("name", ["decoupled_kd", "topk_kd"])
class TestLosses:
    def test_reductions(self, name):
        refused(name, {"reduction": "batchmean"}, ValueError, "^reduction='batchmean' is not")
        for value in (0, -3.0, NAN):
            wrong = {"num_items_in_batch": value}
            refused(name, wrong, ValueError, f"^num_items_in_batch={value} must be greater than 0")
        wrong = {"num_items_in_batch": 3, "reduction": "none"}
        refused(name, wrong, ValueError, "^num_items_in_batch divides a sum")
        wrong = {"num_items_in_batch": torch.ones(2)}
        refused(name, wrong, ValueError, r"^num_items_in_batch has shape \(2,\)")

    def test_masks_and_weights(self, name):
        mask = GOOD[name]["mask"]
        refused(name, {"mask": mask.float()}, TypeError, "^mask is a float32 tensor")
        refused(name, {"mask": mask[:1]}, ValueError, r"^mask has shape \(1, 5\)")
        weights = torch.ones(2, 5)
        refused(name, {"token_weights": weights[0]}, ValueError, r"^token_weights has shape \(5,\)")
        refused(name, {"token_weights": mask}, TypeError, "^token_weights is a bool tensor")
        refused(name, {"token_weights": -weights}, ValueError, "^token_weights contains -1.0")
        wrong = {"token_weights": weights.requires_grad_()}
        refused(name, wrong, ValueError, "^token_weights requires grad")

    def test_shift_without_labels(self, name):
        refused(name, {"labels": None, "shift": True}, ValueError, "labels")


@pytest.mark.usefixtures("_no_work")
class TestDecoupledKD:
    def test_weights(self):
        for name in ("target_weight", "nontarget_weight"):
            refused("decoupled_kd", {name: -1.0}, ValueError, f"^{name}=-1.0 must be finite")
            refused("decoupled_kd", {name: True}, TypeError, f"^{name} must be a number, got bool")
        wrong = {"target_weight": 0.0, "nontarget_weight": 0}
        refused("decoupled_kd", wrong, ValueError, "^nothing to compute: target_weight=0.0")

    def test_no_labels(self):
        refused("decoupled_kd", {"labels": None}, ValueError, "^labels is None.*pass labels")


@pytest.mark.usefixtures("_no_work")
class TestTopK:
    def test_options(self):
        wrong = "^tail='rest' is not one of 'bucket', 'drop', 'renormalize'"
        refused("topk_kd", {"tail": "rest"}, ValueError, wrong)
        refused(
            "topk_kd", {"divergence": "kl2"}, ValueError, "^divergence='kl2' is not one of kl, r"
        )
        wrong = "^divergence='jsd:2' has beta 2, which is not in"
        refused("topk_kd", {"divergence": "jsd:2"}, ValueError, wrong)
        wrong = "^divergence='tv' is not one of kl, reverse_kl, jsd"
        refused("topk_kd", {"divergence": "tv"}, ValueError, wrong)
        refused("topk_kd", {"divergence": 0.5}, TypeError, "^divergence must be a string")

    def test_types_and_shapes(self):
        refused("topk_kd", {"ids": None}, TypeError, "^ids must be a tensor, got NoneType")
        refused("topk_kd", {"ids": IDS.float()}, TypeError, "^ids is a float32.*expected int64")
        refused("topk_kd", {"logprobs": 1}, TypeError, "^logprobs must be a tensor, got int")
        refused("topk_kd", {"logprobs": IDS}, TypeError, "^logprobs is a int64 tensor")
        refused("topk_kd", {"ids": IDS[..., 0]}, ValueError, r"^ids has shape \(2, 5\).*'K'\)")
        refused("topk_kd", {"ids": IDS[..., :0]}, ValueError, r"^ids has shape \(2, 5, 0\)")
        wrong = r"^logprobs has shape \(2, 5, 3\) and ids \(2, 5, 4\)"
        refused("topk_kd", {"logprobs": LOGPROBS[..., :3]}, ValueError, wrong)
        wrong = {"logprobs": LOGPROBS.clone().requires_grad_()}
        refused("topk_kd", wrong, ValueError, "^logprobs requires grad.*detach")
        refused("topk_kd", {"ids": IDS.to("meta")}, ValueError, "^ids is on meta and student")

    def test_ids_out_of_range_or_twice(self):
        for wrong in (37, -2):
            message = rf"^ids contains {wrong}, which is no token in \[0, 37\).*padding by"
            refused("topk_kd", {"ids": changed(IDS, wrong)}, ValueError, message)
        # -1 is padding only together with -inf.
        wrong = {"ids": changed(IDS, -1), "logprobs": changed(LOGPROBS, -1.0)}
        refused("topk_kd", wrong, ValueError, "^ids contains -1, which is no token")
        refused("topk_kd", {"vocab_size": 1, "labels": None}, ValueError, "^ids contains")
        twice = changed(changed(IDS, 3), 3, (1,))
        refused("topk_kd", {"ids": twice}, ValueError, "^ids contains 3 twice in one row")

    def test_probabilities_above_one(self):
        refused("topk_kd", {"logprobs": changed(LOGPROBS, NAN)}, ValueError, "^logprobs contains N")
        for wrong in (0.5, 0.02, INF):
            logprobs = changed(LOGPROBS, wrong)
            message = "^logprobs .*pass natural logarithms of the teacher's probabilities"
            refused("topk_kd", {"logprobs": logprobs, "ids": changed(IDS, 36)}, ValueError, message)

    def test_what_is_masked_may_hold_anything(self):
        mask = torch.zeros_like(P.mask)
        refused("topk_kd", {"mask": mask, "ids": IDS + 1000}, AssertionError, "work was done")


@pytest.mark.usefixtures("_no_work")
class TestSelected:
    def test_ids(self):
        ids = GOOD["selected"]["ids"]
        refused("selected", {"ids": ids.float()}, TypeError, "^ids is a float32 tensor")
        wrong = r"^ids has shape \(2, 4, 4\).*\(2, 5, 'K'\) or \(2, 5\)"
        refused("selected", {"ids": ids[:, :4]}, ValueError, wrong)
        refused("selected", {"ids": ids.clamp(min=37)}, ValueError, r"^ids contains 37.*\[0, 37\)")
        refused("selected", {"ids": ids.where(ids > 0, -1)}, ValueError, "^ids contains -1")


def test_the_bound_is_that_of_bfloat16():
    """Any distribution passes rounded to bfloat16; one whose sum is higher than that does not."""
    head = torch.eye(512)
    for spread in (0.1, 1.0, 4.0, 10.0):
        z = spread * torch.randn((64, 512), generator=torch.Generator().manual_seed(1))
        logprobs, ids = z.log_softmax(-1).sort(-1, descending=True)
        fused_topk_kd(z, head, ids, logprobs.bfloat16())
        fused_topk_kd(z, head, ids, logprobs.half())
        fused_topk_kd(z, head, ids, logprobs)
        # The largest number that rounds so is v (1 - 2^-8): a little more, and none may.
        too_high = logprobs.double() * (1 - 2.0**-7)
        with pytest.raises(ValueError, match=re.escape("above 1 by more than the rounding")):
            fused_topk_kd(z, head, ids, too_high)
