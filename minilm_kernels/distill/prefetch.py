"""`Prefetcher`: the samples and micro-batches of the next steps, prepared by a thread while the device computes."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Batch, LossWeights
from .config import DistillConfig
from .distributed import DistContext
from .packing import Samples
from .sample_stream import SampleStream
from .step import make_batch
from .teacher_cache import TeacherCache

STEPS_AHEAD = 2


class MicroBatch(NamedTuple):
    """A part of a step that this process computes at once.

    Attributes:
        start: index of its first sample in the step.
        first: number of its first sample in the endless sequence of samples.
        samples: its samples.
        batch: its tensors, on the CPU.
        weight: factor of its loss.
    """

    start: int
    first: int
    samples: Samples
    batch: Batch
    weight: float


class PreparedStep(NamedTuple):
    """The data of a step.

    Attributes:
        step: its number, from 0.
        samples: the samples of all processes, (samples, max_seq_length). The token ids are those of this process.
        total: their documents and tokens.
        size: number of samples of a micro-batch.
        micro_batches: the micro-batches of this process.
        epoch: that of the stream after these samples.
        state: state of the stream after these samples.
    """

    step: int
    samples: Samples
    total: LossWeights
    size: int
    micro_batches: list[MicroBatch]
    epoch: int
    state: tuple[dict[str, Any], dict[str, Tensor]]


class Prefetcher:
    """Takes the samples of the next steps from a stream and builds their micro-batches on a thread.

    The tensors are in pinned memory if the device is a CUDA device, so that copies to it do not wait. `state` is the
    state of the stream after the samples that `pop` has returned: steps that are only prepared do not count.

    Args:
        stream: the training samples. Nothing else may take samples from it.
        mask: "bidirectional", "causal" or "prefix".

    Attributes:
        cache: values of the teacher to read ahead; to be set before the first call of `wait`.
        epoch: number of complete passes over the text, after the latest step that was returned.
    """

    def __init__(self, config: DistillConfig, stream: SampleStream, mask: str, dist: DistContext) -> None:
        self.cache: TeacherCache | None = None
        self._config, self._stream, self._mask, self._dist = config, stream, mask, dist
        self._thread = ThreadPoolExecutor(1, "minilm-batches", initializer=self._begin)
        self._ahead: deque[Future[PreparedStep]] = deque()
        self._state: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        self.epoch = 0

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def wait(self, step: int, size: int) -> None:
        """Waits until a step is prepared.

        Args:
            step: its number, from 0. It is that of the first call, and then one more after each `pop`.
            size: number of samples of a micro-batch.

        Raises:
            Exception: of the thread, such as an `OSError` of the text. Every further call raises it, too.
        """
        if self._state is None:
            self._state = self._stream.state()
        last = min(step + STEPS_AHEAD, self._config.max_steps - 1)
        for number in range(step + len(self._ahead), last + 1):
            self._ahead.append(self._thread.submit(self._prepare, number, size))
        self._ahead[0].result()

    def pop(self) -> PreparedStep:
        """Returns the step that `wait` has waited for."""
        prepared = self._ahead.popleft().result()
        self._state, self.epoch = prepared.state, prepared.epoch
        return prepared

    def micro_batches(self, prepared: PreparedStep, size: int) -> list[MicroBatch]:
        """The micro-batches of this process. They are built again if `size` has changed since `wait`."""
        if size == prepared.size:
            return prepared.micro_batches
        return self._build(prepared.step, prepared.samples, prepared.total, size)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state of the stream after the latest step that was returned."""
        return self._state or self._stream.state()

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restores the stream before the first step; see `SampleStream.load_state`."""
        self._stream.load_state(state, tensors)

    def _begin(self) -> None:
        if self._dist.device.type == "cuda":  # pinned memory belongs to the thread's device, by default the first one
            torch.cuda.set_device(self._dist.device)

    def _prepare(self, step: int, size: int) -> PreparedStep:
        stream = self._stream
        samples = stream.take(self._config.total_batch_size, self._own())
        total = LossWeights.of(samples)
        micro_batches = self._build(step, samples, total, size)
        return PreparedStep(step, samples, total, size, micro_batches, stream.epoch, stream.state())

    def _own(self) -> slice:
        """The samples of this process in a step."""
        share = self._config.total_batch_size // self._dist.world_size
        return slice(self._dist.rank * share, (self._dist.rank + 1) * share)

    def _build(self, step: int, samples: Samples, total: LossWeights, size: int) -> list[MicroBatch]:
        config, dist, share = self._config, self._dist, self._own()
        found = []
        for start in range(share.start, share.stop, size):
            part = slice(start, min(start + size, share.stop))
            own, first = samples.part(part), step * config.total_batch_size + start
            batch = make_batch(config, self._mask, samples, torch.device("cpu"), (config.seed, 3, step), part)
            batch = batch.pinned() if dist.device.type == "cuda" else batch
            batch.teacher = None if self.cache is None else self.cache.read(first, own)
            weight = LossWeights.of(own).weight(config.reduction, total)
            found.append(MicroBatch(start, first, own, batch, weight))
        return found
