"""The FDD loss for Hugging Face models.

`distiller.py` computes the loss of a batch: `model_reader.py` runs the student's backbone,
`teachers.py` gives the teacher's targets, live or cached, and a `Comparison` compares them:
`loss.py` by predictions, `features.py` by states; `encoder.py` compares encoders that come before
a decoder. `tasks.py` says what a model predicts; models
without a vocabulary run with their head (`task_reader.py`) and are compared by `task_heads.py` and
`embeddings.py`.

A model's blocks and head are found by `discovery.py`, which records the steps between them
(`tail.py`) and measures soft cap and scale (`transform.py`). `heads.py` computes the effective
weight of any kind of head; `capture.py` captures the sampled states of models that are offloaded
(`offload.py`), compiled (`compiled.py`) or data-parallel (`wrappers.py`). `positions.py` finds the
valid positions of a batch.
"""
