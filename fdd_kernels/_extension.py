"""The compiled C++ kernels, if they are there, else the reason why not."""

from __future__ import annotations

import torch  # noqa: F401  (the module links against torch's libraries, which this loads)

try:
    from fdd_kernels import _C as kernels

    why_missing = None
except ImportError as error:
    kernels = None
    why_missing = (
        f"the C++ kernels are not built or do not load ({error}); install a C++ compiler (g++ 12 or clang 15) and "
        "reinstall the package with FDD_KERNELS_BUILD=1 to see the compiler's messages"
    )
