"""`--parallel fsdp`: the student's parameters, their gradients and the optimizer's state are divided among processes.

FSDP2 communicates in every forward and backward. A step during which one process runs out of memory can therefore not
be repeated, and every process must run the same number of forwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .distributed import DistContext
from .models import TeacherStudent


def shard_student(models: TeacherStudent, context: DistContext, dtype: torch.dtype) -> None:
    """Replaces the student's trained parameters by this process's part of them. It does not communicate.

    Args:
        dtype: type in which gradients are sent and added.

    Raises:
        ValueError: layers share their weights, or a parameter is in a module that the extractor has copied.
    """
    extractor, kind = models.student.extractor, type(models.student.model).__name__
    trained = models.trained().keys()
    lists = [list(module) for module in extractor.base.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=_size, default=[])
    owned = [id(parameter) for layer in layers for parameter in layer.parameters()]
    if len(set(owned)) < len(owned):
        raise ValueError(f"--parallel fsdp: {kind} cannot be sharded, because its layers share their weights")
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, context.device.type)
    policy = MixedPrecisionPolicy(reduce_dtype=dtype)
    # The last layer is a copy without its attention, whose forward does not end.
    for module in (*layers[:-1], extractor):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        # The loss of a micro-batch already has its weight in the step: gradients are added, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    parameters = dict(models.student.model.named_parameters())
    if whole := [name for name in trained if not isinstance(parameters[name], DTensor)]:
        raise ValueError(f"--parallel fsdp: {kind} cannot be sharded, because {whole[0]} has a module of its own")


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


class ShardedGradients:
    """The gradients of sharded parameters, and some losses, with the methods of `SummedGradients`.

    FSDP2 adds the gradients of all processes in every backward.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], losses: int, context: DistContext) -> None:
        self._parameters, self._context = list(parameters), context
        self.losses = torch.zeros(losses, device=context.device)

    @contextmanager
    def summed(self) -> Iterator[None]:
        """Removes all gradients and, at the end of the block, sums the losses over all processes."""
        self.losses.zero_()
        for parameter in self._parameters:
            parameter.grad = None
        yield
        self._context.sum(self.losses)

    def exchange_in_next_backward(self) -> None:
        """Does nothing."""

    def clip_(self, max_norm: float) -> Tensor:
        """Scales the gradients to a norm of at most `max_norm`; 0 turns clipping off. Returns the original norm."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if max_norm:
            nn.utils.clip_grads_with_norm_(self._parameters, max_norm, norm)
        return norm


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, or this process's part of it if `like` is sharded. It does not communicate.

    The tensors of a file have another alignment than those of torch, which can change the last bits of results.
    """
    if isinstance(like, DTensor):
        tensor = tensor.to(like.device)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.clone()
