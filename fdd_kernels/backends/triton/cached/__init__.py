"""Cached logits: both models' logits of a block of rows by the vendor's GEMM into bounded scratch,
then row kernels.

logits.py       where a block's logits come from: the whole vocabulary once ("cached"), or a slab of
it at a time ("slabbed") row.py          one row's logits as every kernel here reads them
stats.py        statistics of a tile of the vocabulary, all layers
merge.py        tiles merged into the statistics of `spec.py`
second_pass.py  value and slope of the divergences that need both log-sum-exps
grad.py         dL/dlogits of a slab, all layers, and the accurate value of KL
host.py         blocks of rows: products, kernels, gradients
"""
