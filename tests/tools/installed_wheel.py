"""Run the C++ kernels of an installed wheel, in another folder than the sources.

    python tests/tools/installed_wheel.py        (by tests/tools/wheel.py and cibuildwheel)

FDD_KERNELS_BUILD=0 forbids to compile them: they must come from the wheel.
"""

import os
import sys

os.environ["FDD_KERNELS_BUILD"] = "0"

import torch

from fdd_kernels import fused_fdd_loss
from fdd_kernels.backends.cpu import extension

assert extension.missing_reason() is None, extension.missing_reason()
assert extension.origin.startswith(sys.prefix), extension.origin
torch.manual_seed(0)
states = [torch.randn(40, 8, requires_grad=True) for _ in range(3)]
teacher = [state.detach() + 0.1 for state in states]
heads = torch.randn(20, 8), torch.randn(20, 8)
losses = {}
for backend in ("cpu", "reference"):
    loss = fused_fdd_loss(states, heads[0], teacher, heads[1], backend=backend)
    losses[backend] = loss.item(), *torch.autograd.grad(loss, states)
# Twenty tokens: sums of 20 and of 8 products in float32, far below 1e-5 of their result.
torch.testing.assert_close(losses["cpu"], losses["reference"], rtol=1e-5, atol=1e-6)
kernels = extension.kernels
print(f"{extension.origin}: {kernels.instruction_set()}, {kernels.gemm_library()}")
