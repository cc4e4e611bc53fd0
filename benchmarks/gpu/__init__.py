"""`python -m benchmarks gpu`: are the Triton strategies right and fast on the GPU at hand?

supervisor.py   the process around the measuring one: kills a step that hangs, starts the next
runner.py       runs the steps one after another; the record is written after every result
plan.py         the steps, in the order of what they decide, each with its cap in seconds
bench.py        a step's context: the card, the problems, the strategies, a place for results
card.py         what the steps ask of a CUDA device, and the CPU's stand-in for a dry run
verdict.py      measured beside predicted, and the conclusion
gemms.py, correctness.py, end_to_end.py, kernels.py, graphs.py, training.py    the steps
"""
