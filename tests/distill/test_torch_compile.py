"""Inference mode of the teacher, and --torch-compile: numbers of graphs, results and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from minilm_kernels.distill import DistillConfig, distill, loop, step
from minilm_kernels.distill.batch import Batch
from minilm_kernels.distill.models import TeacherStudent
from minilm_kernels.distill.signals import StopSignals
from minilm_kernels.distill.stages import stages
from minilm_kernels.distill.step import loss_components, teacher_qkv

from .test_loop import Settings, losses, records, stop_at, weights

PADDED = {"packing": False}
UNEVEN = {"total_batch_size": 8, "micro_batch_size": 3}  # micro-batches of 3, 3 and 2 samples


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    yield
    torch.compiler.reset()


class CountingBackend:
    """A backend of torch.compile that runs its graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("options", [{}, PADDED, {"mask": "prefix"}, {"teacher_dtype": "bfloat16"}])
def test_the_teacher_runs_in_inference_mode_with_the_gradients_of_no_grad(
    options: dict[str, Any], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(output_dir=tmp_path, dropout=0.0, **options)
    with closing(loop.TrainingLoop(stages(config)[0], loop.DistContext("cpu"))) as run:
        samples = run.stream.take(8)
        found = []
        for mode in (torch.inference_mode, torch.no_grad):
            monkeypatch.setattr(step.torch, "inference_mode", mode)
            batch = step.make_batch(config, run.models.mask, samples, run.dist.device, (0,), slice(0, 8))
            assert teacher_qkv(run.models, batch).query.is_inference() == (mode is not torch.no_grad)
            monkeypatch.undo()
            monkeypatch.setattr(step.torch, "inference_mode", mode)
            run.gradients.zero_()
            sum(loss_components(run.models, batch).values()).backward()
            monkeypatch.undo()
            found.append(run.gradients.gradients.clone())
        assert found[0].abs().max() > 0
        assert torch.equal(*found)


def test_each_model_has_one_graph_for_each_number_of_samples(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches differ in their documents. Evaluations, whose last micro-batch is smaller, add no graph."""
    backend = CountingBackend()
    compile_models = TeacherStudent.compile
    monkeypatch.setattr(TeacherStudent, "compile", lambda models: compile_models(models, backend))
    config = settings(torch_compile=True, max_steps=3, **UNEVEN)
    documents = set()
    real = Batch.loss_arguments

    def counted(batch: Batch) -> Any:
        arguments = real(batch)
        documents.add((len(batch.ids), len(arguments["cu_seqlens"])))
        return arguments

    monkeypatch.setattr(Batch, "loss_arguments", counted)
    distill(config)
    assert len(documents) > 4
    assert backend.graphs == 2 * 2


@pytest.mark.slow
def test_smaller_micro_batches_are_compiled_too(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile's own limit of 8 graphs would be reached by halving."""
    backend = CountingBackend()
    compile_models = TeacherStudent.compile
    monkeypatch.setattr(TeacherStudent, "compile", lambda models: compile_models(models, backend))
    real = loop.loss_vector
    failures = iter(range(4))

    def limited(config: DistillConfig, models: TeacherStudent, batch: Batch, **options: Any) -> torch.Tensor:
        values = real(config, models, batch, **options)
        if next(failures, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return values

    monkeypatch.setattr(loop, "loss_vector", limited)
    config = settings(output_dir=tmp_path, torch_compile=True, total_batch_size=16, eval_fraction=0, max_steps=2)
    with closing(loop.TrainingLoop(stages(config)[0], loop.DistContext("cpu"))) as run, StopSignals() as signals:
        run.train(signals)
        assert run.state.micro_batch == 1
    assert backend.graphs == 5 * 2


def test_a_model_that_cannot_be_compiled_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: Any) -> None:
        raise NotImplementedError("no such instruction")

    compile_models = TeacherStudent.compile
    monkeypatch.setattr(TeacherStudent, "compile", lambda models: compile_models(models, broken))
    with pytest.raises(ValueError, match=r"--torch-compile: the teacher's BertModel cannot be .*no such instruction"):
        distill(settings(torch_compile=True))


def test_padded_batches_are_refused(settings: Settings) -> None:
    with pytest.raises(ValueError, match="--torch-compile needs --packing"):
        settings(torch_compile=True, packing=False)


@pytest.mark.slow
def test_compiled_runs_have_the_losses_of_eager_ones_and_continue_to_the_same_bits(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = distill(settings(output_dir=tmp_path / "eager", dropout=0.0))
    compiled = distill(settings(output_dir=tmp_path / "compiled", dropout=0.0, torch_compile=True))
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)

    options = {"torch_compile": True, "dropout": 0.2}
    whole = distill(settings(output_dir=tmp_path / "whole", **options))
    assert losses(whole) != losses(compiled)
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        distill(settings(**options))
    torch.compiler.reset()
    continued = distill(settings(**options, resume_from_checkpoint=True))
    assert records(continued) == records(whole)
    assert weights(continued) == weights(whole)
