"""`python -m minilm_kernels.distill`, the form that torchrun takes."""

import sys

from minilm_kernels.distill.cli import main

sys.exit(main())
