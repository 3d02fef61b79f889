"""A Triton kernel that computes only exponentials: it applies ex2 repeatedly to registers."""

import torch
import triton
import triton.language as tl

BLOCK = 1024
TURNS = 1024
WARPS = 8  # this gives four independent elements per thread, enough to hide the latency of ex2


@triton.jit
def _kernel(out, TURNS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = -(index % 1024).to(tl.float32) / 1024
    for _ in range(TURNS):
        x = -tl.math.exp2(x)
    tl.store(out + index, x)


def launch(out: torch.Tensor, turns: int) -> None:
    """Fill (blocks · BLOCK,) float32: element i is x ↦ −2^x applied `turns` times to −(i mod 1024) / 1024."""
    _kernel[(out.numel() // BLOCK,)](out, turns, BLOCK, num_warps=WARPS)
