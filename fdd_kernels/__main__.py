"""Run the command line as `python -m fdd_kernels`."""

import sys

from fdd_kernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
