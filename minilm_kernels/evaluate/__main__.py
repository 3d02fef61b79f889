"""`python -m minilm_kernels.evaluate`: the same as `minilm-evaluate`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
