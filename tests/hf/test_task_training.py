"""FDDTrainer with classifiers, question answering and embeddings."""

from dataclasses import replace

import pytest
import torch

from fdd_kernels import Distiller, FDDConfig
from tests.support.task_models import pair, task_batch
from tests.support.training import same_parameters, trainer

CONFIG = FDDConfig.paper(
    space="feature", trajectory="mse", student_layers=(1, 2), teacher_layers=(2, 4)
)
CONFIGS = {
    "sequence_classification": replace(CONFIG, ce_weight=0.5),
    "token_classification": replace(CONFIG, ce_weight=0.5),
    # The model's own loss has the padding of a batch among its classes.
    "question_answering": CONFIG,
    "embedding": replace(CONFIG, output_divergence="cosine"),
}


def rows_of(task: str) -> list[dict]:
    """The rows of a batch without their padding, with a fourth one."""
    batch = task_batch(task)
    rows = []
    for index in (0, 1, 2, 1):
        length = int(batch["attention_mask"][index].sum())
        rows.append({k: v[index].tolist() for k, v in batch.items()})
        for name, value in rows[-1].items():
            rows[-1][name] = value[:length] if isinstance(value, list) else value
    return rows


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value):
        if not isinstance(value, list):
            return value
        return value + [-100 if name == "labels" else 0] * (longest - len(value))

    return {k: torch.tensor([padded(k, row[k]) for row in rows]) for k in rows[0]}


def run_of(task, folder, **options):
    student, teacher = pair("bert", task, dtype=torch.float32)
    descent = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
    }
    given = {
        "train": rows_of(task),
        "student": student,
        "teacher": teacher,
        "config": CONFIGS[task],
        "data_collator": collate,
    }
    return trainer(folder, **given | descent | options)


@pytest.mark.parametrize(
    "task",
    [
        "sequence_classification",
        "embedding",
        # Their sums over micro-batches are in test_task_heads.py.
        pytest.param("token_classification", marks=pytest.mark.slow),
        pytest.param("question_answering", marks=pytest.mark.slow),
    ],
)
def test_accumulated_steps_are_those_of_one_large_batch(task, tmp_path):
    run = run_of(task, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    start = run.distiller.projection.weight.detach().clone()
    run.train()
    student, teacher = pair("bert", task, dtype=torch.float32)
    distiller = Distiller(student.train(), teacher, CONFIGS[task])
    distiller.projection.weight.data = start
    terms = distiller(collate(rows_of(task)))
    terms.loss.backward()
    modules = torch.nn.ModuleList([student, distiller.projection])
    torch.optim.SGD(modules.parameters(), lr=0.5).step()
    found = torch.nn.ModuleList([run.model, run.distiller.projection])
    # float32 sums over tokens in another order.
    same_parameters(found, modules, rtol=1e-4, atol=5e-6)
    logged = run.state.log_history[0]
    for name, term in terms.named().items():
        assert logged[name] == pytest.approx(float(term.detach()), rel=1e-4), name


@pytest.mark.parametrize("task", ["sequence_classification", "question_answering"])
def test_metrics_get_logits_and_labels(task, tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"rows": len(prediction.label_ids)}

    run = run_of(
        task,
        tmp_path,
        held_out=rows_of(task)[:3],
        per_device_eval_batch_size=3,
        compute_metrics=metrics,
    )
    found, batch = run.evaluate(), task_batch(task)
    terms = run.distiller(batch)
    assert found["eval_loss"] == pytest.approx(float(terms.loss.detach()), rel=1e-5)
    with torch.no_grad():
        own = run.model.eval()(**batch)
    names = ["logits"] if task == "sequence_classification" else ["start_logits", "end_logits"]
    logits = seen[0].predictions if len(names) > 1 else [seen[0].predictions]
    for name, given in zip(names, logits, strict=True):
        torch.testing.assert_close(torch.tensor(given), getattr(own, name), rtol=1e-5, atol=1e-6)
    assert "eval_rows" in found


def test_metrics_of_an_embedding_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="computes no logits of the task embedding"):
        run_of("embedding", tmp_path, compute_metrics=lambda _: {})
