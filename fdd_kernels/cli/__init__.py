"""The command line `fdd-kernels`. Importing it needs neither torch nor transformers."""

from fdd_kernels.cli.main import main

__all__ = ["main"]
