"""Logits of a row block by the vendor's GEMM into bounded scratch, then row kernels over them.

logits.py           the logits of a block: the whole vocabulary once ("cached"), or a slab of it at
                    a time, as often as it is asked for ("slabbed")
blocks.py           the walk over row blocks, and the launch of row kernels over a slab
fill_statistics.py  the statistics of a block; stats.py, merge.py, second_pass.py: their kernels
gradients.py        the gradients of a call; grad.py: its kernels
row.py              device functions over one row of logits
"""
