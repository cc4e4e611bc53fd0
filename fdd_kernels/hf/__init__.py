"""The FDD loss for Hugging Face models.

`distiller.py` computes the loss of a batch: `model_reader.py` runs the student's backbone,
`teachers.py` gives the teacher's targets, live or cached, and `loss.py` compares them.

A model's blocks and head are found by `discovery.py`, which records the steps between them
(`tail.py`) and measures soft cap and scale (`transform.py`). `heads.py` computes the effective
weight of any kind of head; `capture.py` captures the sampled states of models that are offloaded
(`offload.py`), compiled (`compiled.py`) or data-parallel (`wrappers.py`). `positions.py` finds the
valid positions of a batch.
"""
