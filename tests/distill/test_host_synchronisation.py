"""Steps never wait for the device, except when they log: they run on a device whose tensors have no values to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minilm_kernels.distill import loop, step
from minilm_kernels.distill.gradients import SummedGradients
from minilm_kernels.distill.stages import stages

from .test_loop import Settings

META = torch.device("meta")


class BlockingCopies(TorchDispatchMode):
    """Lists copies between the CPU and another device that wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if source.device != result.device and waits:
                self.found.append(f"{func} from {source.device} to {result.device}")
        return result


@pytest.fixture
def _meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets modules move to the device without values. Autocast has no such device."""
    monkeypatch.setattr(step.torch, "autocast", lambda *device, **options: nullcontext())
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@contextmanager
def loop_on_meta(config: Any) -> Iterator[loop.TrainingLoop]:
    """A training loop on the device without values, where reading one raises."""
    with closing(loop.TrainingLoop(stages(config)[0], loop.DistContext("cpu"))) as run:
        for model in (run.models.teacher, run.models.student):
            model.extractor.to(META)
        run.dist.device, run.weights = META, run.weights.to(META)
        parameters = list(run.models.trained().values())
        run.gradients = SummedGradients(parameters, len(run.weights), run.dist, torch.float32)
        run.state.optimizer = torch.optim.AdamW(parameters)  # there is no fused one for this device
        run.models.student.extractor.train()
        yield run


@pytest.mark.usefixtures("_meta")
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"mask": "prefix", "reduction": "token"},
        {"mask": "causal", "teacher_dtype": "bfloat16"},
        {"method": "minilm", "relation_heads": None, "trim_vocabulary": 40},
        {"gradient_checkpointing": True, "max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_steps_read_nothing_from_the_device(options: dict[str, Any], settings: Settings, tmp_path: Path) -> None:
    with loop_on_meta(settings(output_dir=tmp_path, eval_fraction=0, **options)) as run, BlockingCopies() as copies:
        for _ in range(3):
            run._step()
        assert [losses.device for losses in run.state.window] == [META] * 3
    assert copies.found == []


READS: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x.sum().item(),
    lambda x: x.tolist(),
    lambda x: float(x[0]),
    lambda x: bool((x > 0).all()),
    lambda x: x[x > 0],
    lambda x: x.nonzero(),
    lambda x: x.masked_select(x > 0),
    lambda x: x.unique(),
    lambda x: x.cpu(),
    lambda x: x.numpy(),
]


@pytest.mark.usefixtures("_meta")
def test_reading_and_copies_that_wait_are_found(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.loss_vector
    with loop_on_meta(settings(output_dir=tmp_path, eval_fraction=0, max_steps=20)) as run:
        for read in READS:

            def reads(*arguments: Any, read: Callable[[torch.Tensor], Any] = read, **options: Any) -> torch.Tensor:
                values = real(*arguments, **options)
                read(values.detach())
                return values

            monkeypatch.setattr(loop, "loss_vector", reads)
            with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
                run._step()
        monkeypatch.setattr(loop, "loss_vector", lambda *a, **b: real(*a, **b) * torch.tensor([1.0] * 3).to(META))
        with BlockingCopies() as copies:
            run._step()
    assert copies.found == ["aten._to_copy.default from cpu to meta"]


def test_new_tensors_are_not_filled() -> None:
    """Deterministic algorithms fill every new tensor on CUDA, unless told not to."""

    def settings_now() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    before = settings_now()
    with loop._deterministic(torch.device("cuda")):
        assert settings_now() == (True, False)
    assert settings_now() == before
