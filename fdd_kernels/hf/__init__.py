"""Reading Hugging Face causal LMs: their states, norms and heads, wherever the weights are, and
what stands for a teacher.

`lens.py` finds a model's blocks, head, soft cap and scale (`heads.py`: one weight from any kind of
head) and what is done between blocks and head (`tail.py`); `capture.py` takes its sampled states,
of models that are offloaded (`offload.py`), compiled (`compiled.py`) or spread over processes
(`parallel.py`). `positions.py` says which positions of a batch count; `teachers.py` is what a
`Distiller` asks of a teacher, live or cached. Everything here is above the loss (`api.py`) and
below `distiller.py`.
"""
