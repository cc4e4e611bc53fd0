"""The two operations with the GEMM inside the kernels: the strategy of least memory.

host.py         the operations over blocks of rows, and the GEMMs of the gradients
blocks.py       how a call is cut into tiles and blocks of rows
tiles.py        device functions: a tile of logits of one layer of one model, parked in scratch
online.py       device functions: running statistics, updated by tiles and merged between splits
stats.py        first pass; splits.py merges its splits of the vocabulary
second_pass.py  divergences that need both log-sum-exps
grad.py         dL/dlogits of a block of rows and tokens
"""
