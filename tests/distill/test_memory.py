"""Limited memory: smaller micro-batches after an out-of-memory error, gradient checkpointing, the teacher's type."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minilm_kernels.distill import DistillConfig, DistillResult, distill, evaluation, loop
from minilm_kernels.distill.batch import Batch
from minilm_kernels.distill.checkpoint import read_checkpoint
from minilm_kernels.distill.memory import is_out_of_memory
from minilm_kernels.distill.metrics import read_metrics
from minilm_kernels.distill.models import load_models
from minilm_kernels.students import copied_student

from .tiny import make_model, save_model

Settings = Callable[..., DistillConfig]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
]


def limit(monkeypatch: pytest.MonkeyPatch, most: int, *, error: Exception = ERRORS[0], calls: int = 10**9) -> list[int]:
    """Lets larger batches than `most` samples run out of memory. Returns the sizes of all batches, which is filled.

    Every second failure comes after the backward, when some gradients have been added.
    """
    sizes: list[int] = []
    failed = 0

    def limited(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def loss_vector(config: Any, models: Any, batch: Batch, *, requires_grad: bool) -> torch.Tensor:
            nonlocal failed
            sizes.append(len(batch.ids))
            values = real(config, models, batch, requires_grad=requires_grad)
            if len(batch.ids) > most and failed < calls:
                failed += 1
                if requires_grad and failed % 2 == 0:
                    values.sum().backward()
                raise error
            return values

        return loss_vector

    for module in (loop, evaluation):
        monkeypatch.setattr(module, "loss_vector", limited(module.loss_vector))
    return sizes


def records(result: DistillResult, split: str = "train") -> list[dict[str, Any]]:
    lines = [record for record in read_metrics(result.metrics) if record["split"] == split]
    return [{name: x for name, x in record.items() if name != "tokens_per_second"} for record in lines]


def weights(result: DistillResult) -> bytes:
    assert result.student is not None
    return (result.student / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("error", "packing"), [(ERRORS[0], True), (ERRORS[3], False)], ids=["packed", "padded"])
def test_a_step_that_runs_out_of_memory_is_repeated_with_the_same_average(
    error: Exception,
    packing: bool,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """7 samples become micro-batches of 4 and 3, and then of 2, 2, 2 and 1."""
    options = {"total_batch_size": 7, "dropout": 0.0, "packing": packing, "learning_rate": 1e-4, "max_steps": 3}
    options["eval_fraction"] = 0
    whole = distill(settings(output_dir=tmp_path / "whole", **options))
    sizes = limit(monkeypatch, 3, error=error)
    halved = distill(settings(**options))
    assert sizes == [7, 4, *[2, 2, 2, 1] * 3]
    said = capsys.readouterr().err
    assert [f"continuing with micro-batches of {size} samples" in said for size in (4, 2, 1)] == [True, True, False]
    for one, other in zip(records(whole), records(halved), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-5)
        assert other["tokens"] == one["tokens"]


def test_the_bits_are_those_of_a_run_that_began_with_the_smaller_micro_batch(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: the repeated step draws the same numbers, and gradients of the failed attempt do not remain."""
    options = {"dropout": 0.3, "max_steps": 4, "eval_fraction": 0}
    small = distill(settings(output_dir=tmp_path / "small", micro_batch_size=2, **options))
    limit(monkeypatch, 2)
    halved = distill(settings(**options))
    assert records(halved) == records(small)
    assert weights(halved) == weights(small)
    whole = settings(output_dir=tmp_path / "other", **options)
    monkeypatch.undo()
    assert weights(distill(whole)) != weights(small)  # the masks of dropout are others


def test_a_resumed_run_keeps_the_smaller_micro_batch(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dropout": 0.3, "save_steps": 100}
    limit(monkeypatch, 5, calls=1)  # in the first evaluation
    whole = distill(settings(output_dir=tmp_path / "whole", **options))
    monkeypatch.undo()

    sizes = limit(monkeypatch, 5, calls=1)
    real = loop.TrainingLoop._step

    def signalled(run: Any) -> None:
        if run.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_step", signalled)
        assert distill(settings(**options)).step == 4
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    assert read_checkpoint(checkpoint).state["micro_batch"] == 4
    del sizes[:]
    resumed = distill(settings(**options, resume_from_checkpoint=True))
    assert max(sizes) == 4
    assert records(resumed) == records(whole)
    assert records(resumed, "eval") == records(whole, "eval")
    assert weights(resumed) == weights(whole)


def test_an_evaluation_that_runs_out_of_memory_is_repeated(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distill(settings(output_dir=tmp_path / "whole", max_steps=1))
    limit(monkeypatch, 3)
    halved = distill(settings(max_steps=1))
    for one, other in zip(records(whole, "eval")[:1], records(halved, "eval")[:1], strict=True):
        assert other["eval_loss"] == pytest.approx(one["eval_loss"], rel=2e-6)


def test_one_sample_that_is_too_large_ends_the_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 0)
    with pytest.raises(RuntimeError, match=r"micro-batch of one sample; use --gradient-checkpointing.* 2.00 GiB"):
        distill(settings(eval_fraction=0))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:24])
def test_errors_of_all_allocators_are_recognized(error: RuntimeError) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("expected a contiguous tensor"))


def test_other_errors_end_the_run_at_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = limit(monkeypatch, 0, error=RuntimeError("expected all tensors to be on the same device"))
    with pytest.raises(RuntimeError, match="same device"):
        distill(settings(eval_fraction=0))
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 8), ({"micro_batch_size": "auto"}, 8), ({"micro_batch_size": 3}, 3), ({"micro_batch_size": "99"}, 8)],
)
def test_the_size_of_a_micro_batch(given: dict[str, Any], expected: int, settings: Settings) -> None:
    config = settings(**given)
    assert config.micro_batch(1) == expected
    assert config.micro_batch(2) == min(expected, 4)
    assert settings(gradient_accumulation_steps=4).micro_batch(2) == 1
    with pytest.raises(ValueError, match="--micro-batch-size and --gradient-accumulation-steps exclude each other"):
        settings(micro_batch_size=2, gradient_accumulation_steps=2)


@pytest.mark.slow
def test_all_processes_halve_together(settings: Settings, tmp_path: Path) -> None:
    """Only the second process runs out of memory, with 5 and 3 samples; 2, 2 and 1 fit."""
    changes = {"total_batch_size": 10, "max_steps": 4, "dropout": 0.0, "learning_rate": 1e-4}
    one = distill(settings(output_dir=tmp_path / "one", **changes))
    code = """
        import sys, os, torch
        from minilm_kernels.distill import cli, loop
        real = loop.loss_vector
        def limited(config, models, batch, *, requires_grad):
            values = real(config, models, batch, requires_grad=requires_grad)
            if os.environ["RANK"] == "1" and len(batch.ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return values
        loop.loss_vector = limited
        sys.exit(cli.main(sys.argv[1:]))
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    words = settings(**changes).command().split()[1:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[:3000]
    assert [done.stderr.count(f"continuing with micro-batches of {size} samples") for size in (3, 2)] == [1, 1]
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert read_checkpoint(newest).state["micro_batch"] == 2
    for single, double in zip(records(one), read_metrics(tmp_path / "run" / "metrics.jsonl")[1:], strict=False):
        if double["split"] == "train":
            assert double["loss"] == pytest.approx(single["loss"], rel=1e-4)
    assert one.student is not None
    models = [load_file(path / "model.safetensors") for path in (one.student, tmp_path / "run" / "student")]
    assert all((models[0][name] - models[1][name]).abs().max() < 2e-4 for name in models[0])


def test_gradient_checkpointing_changes_no_bit(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"student_num_hidden_layers": 3, "dropout": 0.3, "max_steps": 3, "eval_fraction": 0}
    plain = distill(settings(output_dir=tmp_path / "plain", **options))
    runs: list[bool] = []
    real = loop.load_models

    def hooked(*arguments: Any) -> Any:
        models = real(*arguments)
        models.student.model.encoder.layer[0].attention.register_forward_pre_hook(
            lambda *_: runs.append(models.student.model.training)
        )
        return models

    monkeypatch.setattr(loop, "load_models", hooked)
    checkpointed = distill(settings(**options, gradient_checkpointing=True))
    assert sum(runs) == 2 * 3  # twice in each step
    assert records(checkpointed) == records(plain)
    assert weights(checkpointed) == weights(plain)


def test_a_model_without_gradient_checkpointing_is_refused(settings: Settings, tmp_path: Path) -> None:
    teacher = str(save_model(tmp_path / "mpnet", "mpnet"))
    with pytest.raises(ValueError, match=r"--gradient-checkpointing: .*MPNet"):
        distill(settings(teacher=teacher, gradient_checkpointing=True))


def test_a_bfloat16_teacher_computes_in_bfloat16(settings: Settings, tmp_path: Path) -> None:
    models = load_models(settings(teacher_dtype="bfloat16", copy_layers=(2,)), torch.device("cpu"))
    assert {p.dtype for p in models.teacher.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in models.student.model.parameters()} == {torch.float32}
    expected = copied_student(make_model("bert"), [2]).state_dict()  # from the float32 weights
    assert all(torch.equal(tensor, expected[name]) for name, tensor in models.student.model.state_dict().items())

    options = {"max_steps": 2, "dropout": 0.0, "learning_rate": 1e-4}
    exact = distill(settings(output_dir=tmp_path / "exact", **options))
    rounded = distill(settings(**options, teacher_dtype="bfloat16"))
    for one, other in zip(records(exact), records(rounded), strict=True):
        # bfloat16 has 8 bits: errors of 2^-8 in the teacher's projections.
        assert 0 < abs(other["loss"] / one["loss"] - 1) < 0.05
