"""python -m fdd_kernels: the command line."""

import sys

from fdd_kernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
