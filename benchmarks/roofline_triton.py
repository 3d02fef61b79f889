"""The exponentials of a GPU and nothing else, in Triton: registers go through ex2 over and over."""

import torch
import triton
import triton.language as tl

BLOCK = 1024
TURNS = 1024
WARPS = 8  # four elements a thread, in chains of their own: enough to hide the latency of ex2


@triton.jit
def kernel(out, TURNS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = -(place % 1024).to(tl.float32) / 1024
    for _ in range(TURNS):
        x = -tl.math.exp2(x)
    tl.store(out + place, x)


def launch(out: torch.Tensor, turns: int) -> None:
    """(blocks · BLOCK,) float32 on a CUDA device; element i becomes −2^(…) of −(i mod 1024) / 1024, `turns` times."""
    kernel[(out.numel() // BLOCK,)](out, turns, BLOCK, num_warps=WARPS)
