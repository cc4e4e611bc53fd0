"""`python -m benchmarks gpu`: whether the Triton strategies are right and fast on the GPU at hand,
in five minutes.

card.py         what the steps ask of a CUDA device, and of a CPU that stands in for it in a dry run
bench.py        what a step is given: the card, the problems, where its results go
plan.py         the steps, in the order of what they decide, each with its cap in seconds
runner.py       runs them one after another; the record is written after every result
supervisor.py   the process around it: kills a step that hangs, goes on with the next
verdict.py      measured beside predicted, and what follows
ours.py         this package's strategies and their budget
machine.py, products.py, correctness.py, end_to_end.py, kernels.py, graphs.py, training.py    the
steps
"""
