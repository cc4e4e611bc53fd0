"""The backend "torch": the two operations in plain PyTorch, streamed over rows and vocabulary, on
any device.

GEMMs, sums and statistics are float32 (float64 for float64 inputs) whatever the inputs are, and
logits are never rounded below that. Beyond inputs, outputs and statistics it allocates tiles and
accumulators of bounded size.
"""

from fdd_kernels.backends.torch_stream.blocks import logits_of_rows, row_blocks
from fdd_kernels.backends.torch_stream.gradients import grad
from fdd_kernels.backends.torch_stream.pair_costs import pair_cost_gradients, pair_costs
from fdd_kernels.backends.torch_stream.problem import scale_and_cap_
from fdd_kernels.backends.torch_stream.statistics import add_second_pass, stats
from fdd_kernels.backends.torch_stream.tiling import TorchTiles, choose_tiles, memory

__all__ = [
    "TorchTiles",
    "add_second_pass",
    "choose_tiles",
    "grad",
    "logits_of_rows",
    "memory",
    "pair_cost_gradients",
    "pair_costs",
    "row_blocks",
    "scale_and_cap_",
    "stats",
]
