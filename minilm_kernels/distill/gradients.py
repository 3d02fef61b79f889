"""The gradients of a step in one tensor, and their sum over all processes.

The sum is exchanged in buckets, while the last backward of a step computes the gradients of the next bucket.
`DistributedDataParallel` does this too, but waits forever if one process runs out of memory in its backward. Here every
attempt at a step exchanges every bucket once, whether it succeeds or not, so that all processes can repeat the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import DistContext

BUCKET_BYTES = 8 << 20  # float32 gradients of a bucket: about a layer of hidden size 384


class GradientBuffer:
    """One flat tensor with all gradients, followed by some losses, for a single norm and scaling.

    The `grad` of each parameter becomes a view of the buffer.

    Args:
        parameters: parameters of one device.
        losses: number of elements after the gradients.

    Attributes:
        flat: the buffer, (elements of all parameters + losses,).
        gradients: its first part, (elements of all parameters,).
        losses: its second part, (losses,).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], losses: int = 0) -> None:
        parameters = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes) + losses, device=parameters[0].device)
        self.gradients, self.losses = self.flat.split([sum(sizes), losses])
        for parameter, gradient in zip(parameters, self.gradients.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def zero_(self) -> None:
        """Sets gradients and losses to zero."""
        self.flat.zero_()

    def clip_(self, max_norm: float) -> Tensor:
        """Scales the gradients to a norm of at most `max_norm`; 0 turns clipping off. Returns the original norm."""
        norm = torch.linalg.vector_norm(self.gradients)
        if max_norm:
            self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


class SummedGradients(GradientBuffer):
    """A buffer that is summed over all processes, in buckets.

    The buckets and their order depend on the parameters alone, so that a resumed run adds in the same order.

    Args:
        parameters: parameters of one device, in the order of the forward.
        losses: number of elements after the gradients. They are summed in float32.
        dtype: type in which gradients are sent: torch.float32, or torch.bfloat16, see `_RoundedBucket`.

    Example:
        >>> import torch
        >>> from minilm_kernels.distill.distributed import DistContext
        >>> from minilm_kernels.distill.gradients import SummedGradients
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> gradients = SummedGradients([weight], 1, DistContext("cpu"), torch.float32)
        >>> with gradients.summed():
        ...     gradients.exchange_in_next_backward()
        ...     (2 * weight).sum().backward()
        >>> gradients.gradients
        tensor([2., 2., 2.])
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], losses: int, context: DistContext, dtype: torch.dtype
    ) -> None:
        parameters = list(parameters)
        super().__init__(parameters, losses)
        self._context = context
        self._buckets: list[_Bucket] = []
        self._sent = 0  # number of buckets whose exchange has begun
        self._overlapping = False
        if context.world_size == 1:
            return
        kind = _Bucket if dtype == torch.float32 else _RoundedBucket
        # The backward reaches the last parameters first.
        start = end = len(self.gradients)
        members: list[nn.Parameter] = []
        for index, parameter in reversed(list(enumerate(parameters))):
            start -= parameter.numel()
            members.append(parameter)
            if (end - start) * self.flat.itemsize >= BUCKET_BYTES or index == 0:
                bucket = kind(self.gradients[start:end], len(members), context)
                for member in members:
                    member.register_post_accumulate_grad_hook(partial(self._arrived, bucket))
                self._buckets.append(bucket)
                end, members = start, []

    @contextmanager
    def summed(self) -> Iterator[None]:
        """Sets the buffer to zero and, at the end of the block, sums it over all processes, even after an error.

        Every process thus sends the same tensors in the same order, and after an error the sums are useless.
        """
        self.zero_()
        self._sent, self._overlapping = 0, False
        for bucket in self._buckets:
            bucket.missing = bucket.members
        try:
            yield
        finally:
            for bucket in self._buckets[self._sent :]:
                bucket.send()
            for bucket in self._buckets:
                bucket.receive()
            self._context.sum(self.losses)

    def exchange_in_next_backward(self) -> None:
        """Call this before the last backward in a block of `summed`."""
        self._overlapping = True

    def _arrived(self, bucket: _Bucket, parameter: nn.Parameter) -> None:
        """Called after the gradient of a parameter has been added to the buffer."""
        if self._overlapping:
            bucket.missing -= 1
            while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
                self._buckets[self._sent].send()
                self._sent += 1


class _Bucket:
    """A slice of the buffer, which is summed in float32.

    Args:
        gradients: the slice, (elements,).
        members: number of its parameters.
    """

    def __init__(self, gradients: Tensor, members: int, context: DistContext) -> None:
        self.gradients, self.members, self.missing, self.context = gradients, members, members, context

    def send(self) -> None:
        """Begins the exchange."""
        self.work = dist.all_reduce(self.gradients, async_op=True)

    def receive(self) -> None:
        """Ends the exchange."""
        self.work.wait()


class _RoundedBucket(_Bucket):
    """A bucket that is sent in bfloat16, half as many bytes, and summed in float32.

    Each process gets one part of the bucket from all others, adds it up in the order of ranks, and sends the sum to all
    others. Both times a number is rounded to bfloat16, with a relative error of at most u = 2^-8. The error of a
    gradient g, the sum of g_r over the processes, is therefore at most u (1 + u) Σ|g_r| + u |g|, for any number of
    processes. The buffers, 4 bytes per parameter and 4 more divided by the number of processes, are allocated once,
    so that the exchange does not run out of memory.
    """

    def __init__(self, gradients: Tensor, members: int, context: DistContext) -> None:
        super().__init__(gradients, members, context)
        parts = context.world_size
        size = -(-len(gradients) // parts)  # elements of a part
        self.sent = gradients.new_zeros(parts * size, dtype=torch.bfloat16)
        self.parts = gradients.new_zeros(parts, size, dtype=torch.bfloat16)
        self.sum = gradients.new_zeros(size)

    def send(self) -> None:
        self.sent[: len(self.gradients)] = self.gradients
        self.work = dist.all_to_all_single(self.parts.view(-1), self.sent, async_op=True)

    def receive(self) -> None:
        self.work.wait()
        torch.sum(self.parts, 0, dtype=torch.float32, out=self.sum)
        mine = self.parts[0].copy_(self.sum)
        _all_gather(self.sent, mine)
        self.gradients.copy_(self.sent[: len(self.gradients)])


# torch 2.13 has renamed the function.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
