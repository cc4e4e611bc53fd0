"""The command `fdd-kernels`. Importing it needs neither torch nor transformers."""

from fdd_kernels.cli.main import NOT_OPTIONS, build_parser, main

__all__ = ["NOT_OPTIONS", "build_parser", "main"]
