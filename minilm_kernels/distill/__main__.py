"""`python -m minilm_kernels.distill`, for torchrun."""

import sys

from minilm_kernels.distill.cli import main

sys.exit(main())
