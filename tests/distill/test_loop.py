"""Runs of the training loop: exact means, exact resuming, trained parameters, results and refused input."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetModel,
)

from minilm_kernels.distill import (
    DistillConfig,
    DistillResult,
    checkpoint,
    cli,
    conditions,
    distill,
    evaluation,
    loop,
    metrics,
)
from minilm_kernels.distill.batch import Batch
from minilm_kernels.distill.checkpoint import Checkpoint, Checkpoints, read_checkpoint
from minilm_kernels.distill.metrics import Metrics, read_metrics
from minilm_kernels.distill.run_folder import output_folder
from minilm_kernels.distill.sample_stream import SampleStream
from minilm_kernels.distill.stages import stages
from minilm_kernels.distill.step import loss_components
from minilm_kernels.distill.token_shards import TokenShards
from minilm_kernels.students import copied_student

from .tiny import make_model, make_texts, make_tokenizer, save_model

Settings = Callable[..., DistillConfig]
TIMED = {"tokens_per_second"}


def records(result: DistillResult, split: str = "train") -> list[dict[str, Any]]:
    """The metrics of one split, without timings."""
    lines = [record for record in read_metrics(result.metrics) if record["split"] == split]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in lines]


def weights(result: DistillResult) -> bytes:
    assert result.student is not None
    return (result.student / "model.safetensors").read_bytes()


def losses(result: DistillResult) -> list[float]:
    return [record["loss"] for record in records(result)]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal in the middle of a step, as users and schedulers do."""
    real = loop.TrainingLoop._step

    def signalled(run: Any) -> None:
        if run.state.step == step - 1:
            os.kill(os.getpid(), number)
        real(run)

    monkeypatch.setattr(loop.TrainingLoop, "_step", signalled)


def test_a_stopped_run_continues_to_the_same_bits(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # With dropout, several epochs, and a stop between two lines of metrics.
    options = {
        "max_steps": 40,
        "gradient_accumulation_steps": 2,
        "dropout": 0.2,
        "logging_steps": 4,
        "eval_steps": 9,
        "save_steps": 1000,
    }
    whole = distill(settings(output_dir=tmp_path / "whole", **options))
    assert records(whole)[-1]["epoch"] >= 1
    with monkeypatch.context() as patch:
        stop_at(26, patch)
        stopped = distill(settings(**options))
    assert (stopped.stopped_by, stopped.step, stopped.student) == (signal.SIGTERM, 26, None)
    said = capfd.readouterr()
    assert "continue with\n  minilm-distill" in said.out
    assert "--resume-from-checkpoint" in said.out
    assert "the same signal again aborts at once" in said.err

    torch.manual_seed(99)
    continued = distill(settings(**options, resume_from_checkpoint=True))
    assert records(continued) == records(whole)
    assert records(continued, "eval") == records(whole, "eval")
    assert weights(continued) == weights(whole)
    assert continued.stopped_by is None

    again = distill(settings(**options, resume_from_checkpoint=True))  # nothing left to do
    assert (again.step, again.student) == (40, continued.student)
    assert weights(again) == weights(whole)


def test_lines_after_the_checkpoint_are_dropped(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distill(settings(output_dir=tmp_path / "whole"))

    def die(run: Any) -> None:
        if run.state.step == 5:
            raise KeyboardInterrupt
        real(run)

    real = loop.TrainingLoop._step
    monkeypatch.setattr(loop.TrainingLoop, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        distill(settings())
    monkeypatch.undo()
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert [record["step"] for record in read_metrics(metrics)] == [0, 1, 2, 3, 3, 4, 5]
    with metrics.open("a") as file:
        file.write('{"step": 6, "spl')
    continued = distill(settings(resume_from_checkpoint=True))
    assert records(continued) == records(whole)
    assert records(continued, "eval") == records(whole, "eval")
    assert weights(continued) == weights(whole)


def test_resume_before_any_checkpoint_begins(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = distill(settings(output_dir=tmp_path / "whole", max_steps=3))
    fresh = distill(settings(max_steps=3, resume_from_checkpoint=True))
    assert weights(fresh) == weights(whole)
    assert "no checkpoint" not in capsys.readouterr().err
    for name in ("student", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / name)
    again = distill(settings(max_steps=3, resume_from_checkpoint=True))
    assert "there is no checkpoint in" in (said := capsys.readouterr().err)
    assert "starting from the beginning and removing the 5 lines of" in said
    assert weights(again) == weights(whole)


def test_an_error_of_the_text_saves_the_steps_before_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error occurs between two documents of a step. Samples that were read before it must be used again."""
    whole = distill(settings(output_dir=tmp_path / "whole"))
    real_take, real_read = SampleStream.take, TokenShards.read
    steps = reads = 0

    def take(stream: SampleStream, *arguments: Any) -> Any:
        nonlocal steps, reads
        steps, reads = steps + 1, 0
        return real_take(stream, *arguments)

    def broken(shards: TokenShards, *arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        if (steps, reads) == (5, 3):
            raise OSError(errno.EIO, "the text cannot be read")
        return real_read(shards, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SampleStream, "take", take)
        patch.setattr(TokenShards, "read", broken)
        with pytest.raises(OSError, match="the text cannot be read"):
            distill(settings(save_steps=1000))
    assert "saved step 4 before the error" in capsys.readouterr().err
    continued = distill(settings(resume_from_checkpoint=True))
    assert records(continued) == records(whole)
    assert weights(continued) == weights(whole)


def test_rows_of_a_step_that_failed_elsewhere_come_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process has read its samples, but another process has failed."""
    whole = distill(settings(output_dir=tmp_path / "whole"))
    real = loop.DistContext.on_all
    calls = 0

    def failed_elsewhere(dist: Any, action: Callable[[], Any]) -> Any:
        nonlocal calls
        result = real(dist, action)
        calls += 1
        if calls == 2 + 5:  # in the fifth step after the preparation
            raise RuntimeError("process 1 failed: no text")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(loop.DistContext, "on_all", failed_elsewhere)
        with pytest.raises(RuntimeError, match="process 1 failed"):
            distill(settings(save_steps=1000))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000004"]
    continued = distill(settings(resume_from_checkpoint=True))
    assert records(continued) == records(whole)
    assert weights(continued) == weights(whole)


@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_signal_cuts_the_held_out_loss_short(
    step: int, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run repeats the interrupted evaluation, and its results are the same."""
    whole = distill(settings(output_dir=tmp_path / "whole", eval_samples=20, dropout=0.2))
    real = evaluation.loss_vector
    counts: list[int] = []

    def signalled(*arguments: Any, requires_grad: bool) -> Any:
        counts[-1] += not requires_grad
        if len(counts) == 1 + step // 3 and counts[-1] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, requires_grad=requires_grad)

    def counted(*arguments: Any) -> Any:
        counts.append(0)
        return evaluate(*arguments)

    evaluate = loop.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", counted)
        patch.setattr(evaluation, "loss_vector", signalled)
        stopped = distill(settings(eval_samples=20, dropout=0.2))
    assert (stopped.step, stopped.stopped_by, stopped.student) == (step, signal.SIGTERM, None)
    assert counts[-1] == 1  # evaluation stopped after the first of several micro-batches
    assert [record["step"] for record in records(stopped, "eval")] == list(range(0, step, 3))
    continued = distill(settings(eval_samples=20, dropout=0.2, resume_from_checkpoint=True))
    for split in ("train", "eval"):
        assert records(continued, split) == records(whole, split)
    assert weights(continued) == weights(whole)


def test_a_line_after_an_unmeasured_checkpoint_is_not_kept_twice(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed after the repeated evaluation was logged, before the student was written."""
    whole = distill(settings(output_dir=tmp_path / "whole"))
    real = loop.evaluate

    def at_the_end(*arguments: Any) -> Any:
        if (tmp_path / "run" / "checkpoints" / "step-000000003").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", at_the_end)
        assert distill(settings()).step == 6
    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "write_student", lambda run, target, weights: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill(settings(resume_from_checkpoint=True))
    assert records(distill(settings(resume_from_checkpoint=True)), "eval") == records(whole, "eval")


def test_a_signal_before_the_first_step_ends_at_once(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any, **options: Any) -> Any:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)

    for name in ("load_models", "split_eval_set"):
        with monkeypatch.context() as patch:
            patch.setattr(loop, name, slow)
            with pytest.raises(KeyboardInterrupt):
                distill(settings())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "tokens"]
    assert distill(settings(max_steps=1)).step == 1


def test_a_damaged_checkpoint_falls_back(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = distill(settings())
    expected = weights(whole)
    shutil.rmtree(tmp_path / "run" / "student")
    os.truncate(tmp_path / "run" / "checkpoints" / "step-000000006" / "optimizer.safetensors", 10)
    again = distill(settings(resume_from_checkpoint=True))
    assert "step-000000006 is damaged: optimizer.safetensors has 10 bytes" in capsys.readouterr().err
    assert weights(again) == expected
    assert [record["step"] for record in records(again)] == [1, 2, 3, 4, 5, 6]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["damaged-step-000000006", "step-000000003", "step-000000006"]


def test_one_keeps_the_newest_when_a_damaged_one_lies_above(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --save-total-limit 1, a damaged later checkpoint must not replace the one that was just saved."""
    whole = distill(settings(output_dir=tmp_path / "whole"))
    distill(settings())
    shutil.rmtree(tmp_path / "run" / "student")
    os.truncate(tmp_path / "run" / "checkpoints" / "step-000000006" / "model.safetensors", 10)
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert distill(settings(resume_from_checkpoint=True, save_total_limit=1)).step == 5
    again = distill(settings(resume_from_checkpoint=True, save_total_limit=1))
    assert weights(again) == weights(whole)


def rewrite(folder: Path, changes: dict[str, Any]) -> None:
    """Changes the content of a checkpoint, with valid checksums. `...` removes a part."""
    found = read_checkpoint(folder)
    shutil.rmtree(folder)

    def changed(part: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in {**part, **change}.items() if value is not ...}

    tensors = {name: changed(part, changes.get(name, {})) for name, part in found.tensors.items()}
    state = changed(found.state, changes.get("state", {}))
    Checkpoints(folder.parent, keep=9).write(Checkpoint(changes.get("step", found.step), state, tensors))


def test_a_checkpoint_of_another_run_is_refused(settings: Settings, tmp_path: Path) -> None:
    distill(settings())
    distill(settings(output_dir=tmp_path / "other", seed=5))
    shutil.rmtree(tmp_path / "run" / "student")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="--seed: 5 before, 0 now"):
        distill(settings(resume_from_checkpoint=True))


def test_something_else_in_the_place_of_checkpoints_is_refused(settings: Settings, tmp_path: Path) -> None:
    distill(settings(max_steps=1))
    folder = tmp_path / "run" / "checkpoints"
    shutil.rmtree(tmp_path / "run" / "student")
    for make in (lambda: folder.write_text("mine"), lambda: folder.symlink_to("nowhere")):
        checkpoint.remove(folder)
        make()
        with pytest.raises(ValueError, match="checkpoints is not a folder; move it away"):
            distill(settings(max_steps=1, resume_from_checkpoint=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 10**9}, "step 1000000000 is not among the 6 --max-steps"),
        ({"step": 0}, "step 0 is not among"),
        ({"state": {"tokens": ...}}, "KeyError: 'tokens'"),
        ({"state": {"tokens": "many"}}, "tokens is 'many'"),
        ({"state": {"data": []}}, r"data is \[\]"),
        ({"state": {"settings": 1}}, "AttributeError"),
        ({"state": {"teacher": []}}, "AttributeError"),
        ({"state": {"conditions": 3}}, "TypeError|AttributeError"),
        ({"model": {"pooler.dense.bias": ...}}, "RuntimeError: .*pooler.dense.bias"),
        ({"model": {"pooler.dense.bias": torch.zeros(3)}}, "RuntimeError: .*size mismatch"),
        ({"optimizer": {"embeddings.LayerNorm.weight.exp_avg": ...}}, "state of the optimizer does not fit"),
        ({"optimizer": {"embeddings.LayerNorm.weight.exp_avg": torch.zeros(7)}}, "state of the optimizer does not fit"),
        ({"progress": {"window": torch.zeros(2)}}, r"window has shape \(2,\)"),
        ({"state": {"data": {"place": [0, 0, 0]}}}, "KeyError"),
        ({"data": {"eval.ids": torch.full((1, 32), 65, dtype=torch.int32)}}, "eval has no token ids of this tokenizer"),
        ({"data": {"eval.ids": torch.zeros(2)}}, "eval has no token ids of this tokenizer"),
        ({"data": {"eval.ids": torch.full((1, 32), -1, dtype=torch.int32)}}, "eval has no token ids of this tokenizer"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_wrong_content_is_one_message(
    changes: dict[str, Any], message: str, settings: Settings, tmp_path: Path
) -> None:
    distill(settings())
    shutil.rmtree(tmp_path / "run" / "student")
    folder = tmp_path / "run" / "checkpoints"
    shutil.rmtree(folder / "step-000000003")
    rewrite(folder / "step-000000006", changes)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ValueError, match=rf"(?s)checkpoint .*step-0*{changes.get('step', 6)} is damaged: .*{message}"):
        distill(settings(resume_from_checkpoint=True))
    assert before.items() <= {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}.items()


def test_a_teacher_that_was_exchanged_is_refused(settings: Settings, teacher_folder: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    distill(settings(teacher=teacher))
    shutil.rmtree(tmp_path / "run" / "student")
    (teacher / "README.md").write_text("not a part of the model")
    distill(settings(teacher=teacher, resume_from_checkpoint=True))
    shutil.rmtree(tmp_path / "run" / "student")
    make_model("bert", seed=5).save_pretrained(teacher)
    with pytest.raises(ValueError, match=r"--teacher .*teacher has changed since .*\(model\.safetensors\)"):
        distill(settings(teacher=teacher, resume_from_checkpoint=True))


def test_other_conditions_are_said_with_what_they_break(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(settings())
    shutil.rmtree(tmp_path / "run" / "student")
    distill(settings(resume_from_checkpoint=True))
    assert "last bits" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "student")
    torch.set_num_threads(2)
    monkeypatch.setattr(conditions.transformers, "__version__", "5.0.0")
    distill(settings(resume_from_checkpoint=True))
    said = [line for line in capsys.readouterr().err.splitlines() if "last bits" in line]
    assert len(said) == 2
    assert said[0].endswith("threads was 1, is 2")
    assert "transformers was" in said[1]
    assert said[1].endswith("is 5.0.0")


class Broken(io.TextIOBase):
    """A text stream that raises an error on every write."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), BrokenPipeError(), ValueError("closed"), None], ids=str
)
def test_a_run_outlives_its_output(
    error: Exception | None, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "QUIET_SECONDS", 0.0)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, error and Broken(error))
    result = distill(settings())
    assert result.student is not None
    assert distill(settings(resume_from_checkpoint=True)).student is not None  # "already finished"


def test_ranks_read_what_the_main_one_chose(settings: Settings, tmp_path: Path) -> None:
    """This process must not read a newer checkpoint than the main process."""

    class Second(loop.DistContext):
        world_size, rank, local_rank, device = 2, 1, 1, torch.device("cpu")  # type: ignore[assignment]
        agreed: list[Any]

        def __init__(self) -> None:
            self.agreed = []

        def on_main(self, action: Any) -> Any:
            return "step-000000003"

        def on_all(self, action: Any) -> Any:
            return action()

        def check_equal(self, value: Any, what: str) -> None:
            self.agreed.append(value)

    distill(settings())
    dist = Second()
    run = loop.TrainingLoop.__new__(loop.TrainingLoop)
    run.dist, run.checkpoints = dist, Checkpoints(tmp_path / "run" / "checkpoints", 2)
    found = run._choose_checkpoint()
    assert found is not None
    assert found.step == 3
    assert dist.agreed == [f"step 3, SHA-256 {found.digest}"]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="disk that all processes share"):
        run._choose_checkpoint()


def test_other_settings_are_refused_with_their_differences(settings: Settings, tmp_path: Path) -> None:
    distill(settings(max_steps=3))
    shutil.rmtree(tmp_path / "run" / "student")
    with pytest.raises(ValueError, match=r"(?s)--max-steps: 3 before, 9 now.*--learning-rate: 0.001 before, 0.01 now"):
        distill(settings(max_steps=9, learning_rate=0.01, resume_from_checkpoint=True))
    with pytest.raises(
        ValueError, match=r"another run \(settings.json, metrics.jsonl, checkpoints\).*--resume-from-checkpoint"
    ):
        distill(settings(max_steps=3))
    assert (
        distill(
            settings(max_steps=3, logging_steps=2, eval_steps=7, save_total_limit=1, resume_from_checkpoint=True)
        ).step
        == 3
    )


def test_a_start_that_fails_leaves_the_folder_free(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--teacher-layer"):
        distill(settings(teacher_layer=9))
    assert distill(settings(max_steps=1)).step == 1
    file = tmp_path / "run" / "settings.json"
    contents = [partial(Path.write_bytes, data=text) for text in (b"[]", b"\xff", b"{")]
    for make in (lambda file: None, os.mkfifo, Path.mkdir, *contents):
        checkpoint.remove(file)
        make(file)
        with pytest.raises(ValueError, match=r"without readable settings.json"):
            distill(settings(max_steps=1, resume_from_checkpoint=True))


def test_text_that_has_changed_is_refused_or_tokenized_anew(
    settings: Settings, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    whole = distill(settings(text=[text]))
    expected, tokens = weights(whole), tmp_path / "run" / "tokens"

    def resume(**changes: Any) -> Any:
        shutil.rmtree(tmp_path / "run" / "student", ignore_errors=True)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000000006", ignore_errors=True)
        return distill(settings(text=[text], resume_from_checkpoint=True, **changes))

    text.write_text(text_file.read_text())  # the same text with another date
    assert weights(resume()) == expected
    shutil.rmtree(tokens)  # the same tokens are made again
    assert weights(resume()) == expected
    for changed in (text_file.read_text() + "\n\nw1 w2", "w0" + text_file.read_text()[2:]):
        text.write_text(changed)
        with pytest.raises(
            ValueError, match=r"--resume-from-checkpoint: the training text has changed .*\(text\.txt differs\)"
        ):
            resume()
    tokens.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"--resume-from-checkpoint: .*tokens has other tokens than at the checkpoint"):
        resume()
    capsys.readouterr()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    text.write_text(text_file.read_text())
    assert weights(resume()) == expected
    assert "has the tokens of another text, or of another tokenizer (text.txt differs): making them" in (
        capsys.readouterr().err
    )


def late(folder: Path, line: str) -> Path:
    """300 documents, with `line` as the last one."""
    records = [json.dumps({"text": text}) for text in make_texts(299, seed=3, longest=15)]
    file = folder / "late.jsonl"
    file.write_text("\n".join([*records, line]) + "\n")
    return file


def test_a_bad_document_is_skipped_and_counted(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {
        "text": [late(tmp_path, '{"text": "w1 w2')],
        "max_steps": 30,
        "save_steps": 1000,
    }
    whole = distill(settings(output_dir=tmp_path / "whole", **options))
    said = capfd.readouterr()
    assert said.err.count(f"minilm-distill: skipped a document: {tmp_path / 'late.jsonl'}, line 300: not JSON") == 1
    last = records(whole)[-1]
    assert (last["bad_documents"], last["null_documents"]) == (1, 0)
    assert last["epoch"] > 0
    assert "minilm-distill: skipped bad documents: 1\n" in said.out
    with monkeypatch.context() as patch:
        stop_at(27, patch)
        distill(settings(**options))
    continued = distill(settings(**options, resume_from_checkpoint=True))
    assert records(continued) == records(whole)
    assert weights(continued) == weights(whole)

    late(tmp_path, '{"text": null}')
    nulls = records(distill(settings(output_dir=tmp_path / "nulls", **options)))[-1]
    assert (nulls["bad_documents"], nulls["null_documents"]) == (0, 1)


def test_a_run_that_a_bad_document_ended_continues_after_the_repair(settings: Settings, tmp_path: Path) -> None:
    options = {"max_steps": 30, "save_steps": 5, "eval_fraction": 0}
    repaired = '{"text": "w1 w2 and more than was cut off"}'
    whole = distill(settings(text=[late(tmp_path, repaired)], output_dir=tmp_path / "whole", **options))
    bad = late(tmp_path, '{"text": "w1 w2')
    with pytest.raises(ValueError, match=r"late\.jsonl, line 300: not JSON"):
        distill(settings(text=[bad], bad_documents="error", **options))
    assert not (tmp_path / "run" / "settings.json").exists()  # the text is tokenized before the first step
    late(tmp_path, repaired)
    continued = distill(settings(text=[bad], bad_documents="skip", resume_from_checkpoint=True, **options))
    assert records(continued) == records(whole)
    assert weights(continued) == weights(whole)


def test_what_a_folder_holds_besides_is_named(
    settings: Settings, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copy(text_file, folder)
    (folder / "table.csv").write_text("n,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(make_texts(20))))
    (folder / "more.txt.zst").write_bytes(b"")
    distill(settings(text=[folder], eval_text=[folder / "table.csv"], max_steps=1))
    [line] = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert line.startswith(f"minilm-distill: --text: skipped 1 files of folder {folder}")
    assert "(more.txt.zst)" in line


@pytest.mark.parametrize("options", [{}, {"total_batch_size": 64}, {"packing": False}, {"max_steps": 40}])
@pytest.mark.parametrize("documents", [2, 5])
def test_small_corpora_train(documents: int, options: dict[str, Any], settings: Settings, tmp_path: Path) -> None:
    text = tmp_path / "small.txt"
    text.write_text("\n\n".join(f"w{i} w{i + 1}" for i in range(documents)))
    result = distill(settings(text=[text], **{"eval_fraction": 0.01, "max_steps": 4, **options}))
    assert result.student is not None
    assert result.eval_after is not None


def test_one_line_without_end_trains(settings: Settings, tmp_path: Path) -> None:
    text = tmp_path / "line.txt"
    text.write_text(" ".join(f"w{i % 50}" for i in range(400_000)))
    assert text.stat().st_size > 1 << 20
    assert distill(settings(text=[text], eval_fraction=0.01, max_steps=2)).student is not None


def test_one_word_without_end_is_unknown(settings: Settings, tmp_path: Path) -> None:
    text = tmp_path / "line.txt"
    text.write_text("w7" * 600_000)
    with pytest.raises(ValueError, match="returns 1 tokens for the first 262144 characters"):
        distill(settings(text=[text], eval_fraction=0.01, max_steps=2))


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("packing", [True, False])
def test_accumulation_is_the_exact_average(reduction: str, packing: bool, settings: Settings, tmp_path: Path) -> None:
    """Micro-batches with different numbers of documents and tokens give the same steps as one batch."""
    runs = [
        distill(
            settings(
                output_dir=tmp_path / str(k),
                gradient_accumulation_steps=k,
                reduction=reduction,
                packing=packing,
                dropout=0.0,
                learning_rate=1e-4,
            )
        )
        for k in (1, 4)
    ]
    for one, four in zip(records(runs[0]), records(runs[1]), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=2e-6)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-5)
        assert four["tokens"] == one["tokens"]
    for split in ("train", "eval"):
        assert [r["step"] for r in records(runs[0], split)] == [r["step"] for r in records(runs[1], split)]
    for one, four in zip(records(runs[0], "eval"), records(runs[1], "eval"), strict=True):
        assert four["eval_loss"] == pytest.approx(one["eval_loss"], rel=2e-6)


@pytest.mark.parametrize("clip", [0.01, 1e3])
def test_steps_are_those_of_plain_pytorch(clip: float, settings: Settings, tmp_path: Path) -> None:
    """Optimizer, weight decay, schedule and clipping are those of a plain PyTorch loop."""
    config = settings(
        max_steps=8,
        warmup_steps=3,
        learning_rate=0.02,
        max_grad_norm=clip,
        weight_decay=0.5,
        adam_betas=(0.8, 0.9),
        dropout=0.0,
    )
    result = distill(config)
    assert result.student is not None
    norms = [record["grad_norm"] for record in records(result)]
    assert (min(norms) > clip) if clip < 1 else (max(norms) < clip)  # all steps are clipped, or none

    dist = loop.DistContext("cpu")
    with closing(loop.TrainingLoop(stages(config)[0], dist)) as run:
        model = run.models.student.model
        groups: dict[float, list[torch.nn.Parameter]] = {0.5: [], 0.0: []}
        for name, parameter in model.named_parameters():
            parameter.grad = None
            groups[0.0 if name.endswith("bias") or "LayerNorm" in name else 0.5].append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
            lr=0.02,
            betas=(0.8, 0.9),
            eps=1e-6,
        )
        factors = [1 / 3, 2 / 3, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step])
        model.train()
        for norm in norms:
            batch = Batch(run.stream.take(8), dist.device, packed=True)
            with torch.no_grad():
                teacher = run.models.teacher.project(batch)
            optimizer.zero_grad()
            run.models.loss(teacher, run.models.student.project(batch), **batch.loss_arguments()).backward()
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item() == pytest.approx(norm, rel=1e-4)
            optimizer.step()
            schedule.step()
        saved = load_file(result.student / "model.safetensors")
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("gradient", [True, False])
def test_only_the_student_has_gradients(gradient: bool, settings: Settings, tmp_path: Path) -> None:
    config = settings(output_dir=tmp_path)
    dist = loop.DistContext("cpu")
    with closing(loop.TrainingLoop(stages(config)[0], dist)) as run:
        batch = Batch(run.stream.take(2), dist.device, packed=True)
        values = loss_components(run.models, batch, bf16=config.bf16, requires_grad=gradient)
        assert {value.requires_grad for value in values.values()} == {gradient}
        assert not any(parameter.requires_grad for parameter in run.models.teacher.model.parameters())


def test_measuring_does_not_disturb_training(settings: Settings, tmp_path: Path) -> None:
    often = distill(settings(output_dir=tmp_path / "often", eval_steps=1, save_steps=1, dropout=0.3))
    never = distill(settings(output_dir=tmp_path / "never", eval_steps=99, save_steps=99, dropout=0.3, logging_steps=6))
    assert weights(often) == weights(never)
    assert records(never)[-1]["loss"] == pytest.approx(sum(losses(often)) / 6)
    assert len(records(often, "eval")) == 7


def test_the_loss_falls_and_the_student_is_usable(
    settings: Settings, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = distill(
        settings(max_steps=60, learning_rate=5e-3, logging_steps=5, eval_steps=60, relations="qq:1,kk:1,vv:0.5")
    )
    before, after = result.eval_before, result.eval_after
    assert before is not None
    assert after is not None
    assert result.student is not None
    assert (before["step"], after["step"]) == (0, 60)
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    assert after["eval_loss"] == pytest.approx(after["eval_qq"] + after["eval_kk"] + 0.5 * after["eval_vv"])
    *_, last = records(result)
    assert last["loss"] == pytest.approx(last["qq"] + last["kk"] + 0.5 * last["vv"])
    assert last["learning_rate"] == pytest.approx(5e-3 / 54)

    student, tokenizer = (kind.from_pretrained(result.student) for kind in (AutoModel, AutoTokenizer))
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (1, 24)
    assert student(**tokenizer("w1 w2 w3", return_tensors="pt")).last_hidden_state.isfinite().all()
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    again = DistillConfig.from_mapping(json.loads((result.student / "settings.json").read_text()))
    assert again.max_steps == 60
    assert (result.student / "metrics.jsonl").read_text() == result.metrics.read_text()
    assert {path.suffix for path in result.student.iterdir()} <= {".json", ".safetensors", ".jsonl", ".md"}
    readme = (result.student / "README.md").read_text()
    assert again.command() in readme
    assert f"| qq | {before['eval_qq']:.4f} | {after['eval_qq']:.4f} |" in readme
    assert "step 60/60" in capsys.readouterr().err


@pytest.mark.parametrize(("relations", "untrained"), [("qq,kk,vv", ()), ("vv", ("query", "key"))])
def test_the_readme_names_exactly_the_tensors_left_alone(
    relations: str, untrained: tuple[str, ...], settings: Settings
) -> None:
    """Weight decay must not change tensors on which the loss does not depend."""
    result = distill(settings(copy_layers=(2, 1), relations=relations, weight_decay=0.5, dropout=0.0))
    assert result.student is not None
    first = copied_student(make_model("bert"), [2, 1]).state_dict()
    last = load_file(result.student / "model.safetensors")
    assert first.keys() == last.keys()
    same = {name for name in first if torch.equal(first[name], last[name])}
    readme = (result.student / "README.md").read_text()
    named = {line[3:-1] for line in readme.splitlines() if line.startswith("- `")}
    assert named == same
    assert {"encoder.layer.1.output.dense.weight", "pooler.dense.bias"} <= named
    projections = {f"encoder.layer.1.attention.self.{name}.weight" for name in ("query", "key", "value")}
    assert {name.split(".")[-2] for name in projections & named} == set(untrained)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "minilm", "relation_heads": None},
        {"mask": "causal", "teacher_layer": 1},
        {"mask": "prefix", "packing": False},
        {"mask": "prefix", "eval_fraction": 0.0},
        {"bf16": True, "max_grad_norm": 0.0},
        {"reduction": "sum", "relations": "qk,kv"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_mode_trains(options: dict[str, Any], settings: Settings) -> None:
    result = distill(settings(max_steps=20, learning_rate=3e-3, dropout=0.0, **options))
    values = losses(result)
    assert sum(values[-5:]) < 0.98 * sum(values[:5])
    assert (result.eval_after is None) == ("eval_fraction" in options)


def test_the_student_may_be_any_folder(settings: Settings, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "student", seed=7)
    separate = tmp_path / "eval.jsonl"
    separate.write_text("\n".join(json.dumps({"body": text}) for text in make_texts(10, seed=8)))
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"body": text}) for text in make_texts(50, seed=9)))
    result = distill(
        settings(student=folder, student_layer=1, text=[text], eval_text=[separate], text_column="body", max_steps=4)
    )
    assert result.student is not None
    first, last = load_file(folder / "model.safetensors"), load_file(result.student / "model.safetensors")
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert any(name.startswith("encoder.layer.0") for name in changed)
    assert not any(name.startswith(("encoder.layer.1", "pooler")) for name in changed)


def test_other_architectures_name_their_projections(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shape = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 2}
    LlamaModel(LlamaConfig(vocab_size=65, max_position_embeddings=40, **shape)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    names = [f"layers.{{i}}.self_attn.{letter}_proj" for letter in "qkv"]
    common = {"teacher": folder, "teacher_projections": names, "mask": "causal", "max_steps": 20, "learning_rate": 3e-3}
    values = losses(distill(settings(student_projections=names, **common)))
    assert sum(values[-5:]) < 0.98 * sum(values[:5])
    assert losses(distill(settings(output_dir=tmp_path / "found", **common))) == values  # by their usual names

    unusual = tmp_path / "xlnet"  # projections that are no modules
    XLNetModel(XLNetConfig(vocab_size=65, d_model=48, n_head=4, n_layer=2, d_inner=96)).save_pretrained(unusual)
    with pytest.raises(ValueError, match=r"--student-projections: .*XLNetModel"):
        distill(settings(output_dir=tmp_path / "other", student=unusual, copy_layers=None, **common))


def test_a_full_disk_ends_the_run_and_loses_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distill(settings(output_dir=tmp_path / "whole"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = loop.TrainingLoop._save

    def save(run: Any) -> None:
        if run.state.step > 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            real(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(loop.TrainingLoop, "_save", save)
    with pytest.raises(OSError, match=r"disk is full.*make room.*--resume-from-checkpoint"):
        distill(settings())
    monkeypatch.undo()
    continued = distill(settings(resume_from_checkpoint=True))
    assert weights(continued) == weights(whole)
    assert records(continued) == records(whole)


def test_a_full_disk_is_named_for_metrics_too(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        with pytest.raises(OSError, match="disk is full"):
            metrics.write({"step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_loss_that_is_not_finite_ends_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.TrainingLoop._step

    def poisoned(run: Any) -> None:
        if run.state.step == 4:
            next(iter(run.state.parameters.values())).data.fill_(float("nan"))
        real(run)

    monkeypatch.setattr(loop.TrainingLoop, "_step", poisoned)
    with pytest.raises(RuntimeError, match=r"not finite at step 5.*--learning-rate"):
        distill(settings(logging_steps=6))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000003"]


def test_one_run_a_folder_at_a_time(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    holder = re.escape(f"(host {socket.gethostname()}, process {os.getpid()})")
    with (
        loop.DistContext("cpu") as dist,
        output_folder(config, dist),
        pytest.raises(RuntimeError, match=rf"another process is running in .*run {holder}"),
    ):
        distill(settings(resume_from_checkpoint=True))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, 524])
def test_a_file_system_without_locks_is_said(
    number: int, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert distill(settings(max_steps=1)).student is not None
    assert "has no file locks" in capsys.readouterr().err
    number = errno.EIO
    with pytest.raises(OSError, match=r"--output-dir: .*\.lock cannot be locked") as caught:
        distill(settings(max_steps=1, resume_from_checkpoint=True))
    assert caught.value.errno == errno.EIO


def test_a_lock_that_is_no_file_of_ours_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    for make in (lambda: lock.symlink_to(mine), lambda: lock.symlink_to("nowhere"), lambda: os.mkfifo(lock)):
        make()
        with pytest.raises(
            ValueError, match=r"--output-dir: .*\.lock is (a symbolic link|not a regular file); remove it"
        ):
            distill(settings())
        lock.unlink()
    assert mine.read_text() == "mine"
    assert not (tmp_path / "run" / "nowhere").exists()


def test_folders_that_cannot_be_synced_are_passed_over(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    assert distill(settings()).student is not None


def test_only_a_student_is_finished(settings: Settings, tmp_path: Path) -> None:
    result = distill(settings(max_steps=3))
    student = result.student
    assert student is not None
    assert {path.stat().st_mode & 0o777 for path in student.iterdir()} == {student.stat().st_mode & 0o666}
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for make in (
        lambda: student.write_text("mine"),
        lambda: student.symlink_to("nowhere"),
        lambda: student.symlink_to(other),
        lambda: shutil.copytree(other, student),
    ):
        checkpoint.remove(student)
        make()
        with pytest.raises(
            ValueError, match=r"--output-dir: .*student is neither a finished student nor an empty folder"
        ):
            distill(settings(max_steps=3, resume_from_checkpoint=True))
        with pytest.raises(ValueError, match="contains another run"):
            distill(settings(max_steps=3))
    assert (other / "notes.txt").read_text() == "mine"
    checkpoint.remove(student)
    student.mkdir()
    assert weights(distill(settings(max_steps=3, resume_from_checkpoint=True)))


def test_a_disk_that_is_full_for_the_tokenizer_is_explained(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*arguments: Any, **options: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # tokenizers raises plain exceptions

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
        with pytest.raises(OSError, match=r"disk is full.*--resume-from-checkpoint"):
            distill(settings())
    assert not list((tmp_path / "run").glob(".unfinished*"))
    assert distill(settings(resume_from_checkpoint=True)).student is not None


def other_tokenizer(folder: Path) -> str:
    save_model(folder)
    make_tokenizer([f"v{i}" for i in range(60)]).save_pretrained(folder)
    return str(folder)


def pickled_teacher(folder: Path) -> str:
    save_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save(make_model("bert").state_dict(), folder / "pytorch_model.bin")
    return str(folder)


def empty_file(folder: Path) -> list[str]:
    folder.write_text("\n \n\n")
    return [str(folder)]


def one_document(path: Path) -> list[str]:
    path.write_text("w1 w2\nw3\nw4 w5")
    return [str(path)]


def utf_16(path: Path) -> list[str]:
    path.write_bytes("w1 w2 w3 w4\n\nw5 w6".encode("utf-16-le"))
    return [str(path)]


def mixed_folder(path: Path) -> list[str]:
    path.mkdir()
    for name in ("a.txt.zst", "b.html"):
        (path / name).write_text("w1 w2")
    return [str(path)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "./no/such/teacher"}, r"--teacher: there is no folder \./no/such/teacher"),
        ({"teacher": lambda p: p}, "--teacher: no tokenizer could be loaded from the folder"),
        ({"teacher": pickled_teacher}, "--teacher: no safetensors model could be loaded"),
        ({"teacher_layer": 3}, "--teacher-layer, .*: layer=3: expected 1 to 2"),
        ({"student_layer": 2}, "--student-layer, .*: layer=2: expected 1 to 1"),
        ({"copy_layers": (1, 3)}, "--copy-layers: layer=3: expected 1 to 2"),
        ({"relation_heads": 7}, "--relation-heads 7 .* 1, 2, 3, 4, 6, 8, 12, 24$"),
        ({"relation_heads": None}, "--relation-heads 48 does not divide"),
        (
            {"method": "minilm", "relation_heads": None, "student_num_attention_heads": 3},
            r"heads in the student \(3\).*teacher \(4\)",
        ),
        (
            {"max_seq_length": 64, "max_document_length": 41},
            "--max-document-length 41 exceeds the 40 positions of the teacher",
        ),
        ({"student": other_tokenizer}, "tokenizers of --teacher .* differ, for example in .*'w"),
        ({"text": ["./nowhere.txt"]}, "--text: there is no file or folder nowhere.txt"),
        ({"text": empty_file}, "training text is empty"),
        ({"text": one_document}, r"has 1 document, .*--documents line, if each of its 3 lines"),
        ({"text": utf_16}, r"--text: .*text is not plain UTF-8 text but UTF-16 without a byte order mark.*iconv"),
        (
            {"eval_text": utf_16},
            r"--eval-text: .*text is not plain UTF-8 text but UTF-16 without a byte order mark.*iconv",
        ),
        ({"text": ["/dev/zero"]}, "--text: /dev/zero is a device"),
        ({"text": mixed_folder}, r"--text: folder .*text has no text files.*it has a\.txt\.zst, b\.html"),
        ({"text": empty_file, "eval_fraction": 0}, "training text is empty"),
        ({"eval_text": empty_file}, "--eval-text has no text"),
        (
            {"total_batch_size": 9, "gradient_accumulation_steps": 3, "output_dir": empty_file},
            "is a file, expected a folder",
        ),
        ({"backend": "abacus"}, "backend"),
    ],
)
def test_bad_input_is_one_clear_error(
    options: dict[str, Any], message: str, settings: Settings, tmp_path: Path
) -> None:
    made = {name: value(tmp_path / name) if callable(value) else value for name, value in options.items()}
    if isinstance(made.get("output_dir"), list):
        [made["output_dir"]] = made["output_dir"]
    if options.get("teacher") and made["teacher"] == tmp_path / "teacher":
        made["teacher"].mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        distill(settings(**made))


def test_the_command_line_reports_errors_without_a_traceback(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(settings(teacher_layer=5).command())[1:]
    assert cli.main(words) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("minilm-distill: error: --teacher-layer, ")
