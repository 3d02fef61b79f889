"""Runs with teacher assistants: stages, stops and resuming, checks before the first step, metrics and model cards."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from minilm_kernels.distill import DistillConfig, DistillResult, distill, loop, metrics
from minilm_kernels.distill.distributed import DistContext
from minilm_kernels.distill.metrics import read_metrics
from minilm_kernels.distill.preparation import TokenFolder
from minilm_kernels.distill.run_folder import output_folder
from minilm_kernels.distill.stages import stages

from .tiny import make_texts, save_model

Settings = Callable[..., DistillConfig]
TIMED = {"tokens_per_second"}
# An assistant that is trained otherwise than the student.
CHAIN: dict[str, Any] = {
    "teacher_assistant": [
        {"student_num_hidden_layers": 2, "student_hidden_size": 36, "max_steps": 4, "learning_rate": 2e-3, "seed": 3}
    ],
    "dropout": 0.2,
}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def lines(path: Path) -> list[dict[str, Any]]:
    return [{name: x for name, x in record.items() if name not in TIMED} for record in read_metrics(path)]


def check_equal(run: Path, whole: Path) -> None:
    """The students and metrics of all stages are equal to the last bit."""
    for folder in ("", "assistant-1"):
        assert weights(run / folder / "student") == weights(whole / folder / "student")
        assert lines(run / folder / "metrics.jsonl") == lines(whole / folder / "metrics.jsonl")
    assert not [path for path in run.rglob("*") if path.name.startswith(".unfinished")]


@pytest.fixture(scope="module")
def whole(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of `CHAIN`."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    distill(_settings(teacher_folder, text_file, folder))
    return folder


def _settings(teacher: Path, text: Path, output: Path, **changes: Any) -> DistillConfig:
    """The settings of the fixture `settings`, for a fixture of another scope."""
    options: dict[str, Any] = {
        **{"teacher": teacher, "text": [str(text)], "output_dir": output, "device": "cpu", "relation_heads": 12},
        **{"student_num_hidden_layers": 1, "student_hidden_size": 24, "student_num_attention_heads": 4},
        **{"max_seq_length": 32, "total_batch_size": 8, "max_steps": 6, "learning_rate": 1e-3, "eval_fraction": 0.1},
        **{"eval_samples": 12, "logging_steps": 1, "eval_steps": 3, "save_steps": 3},
    }
    return DistillConfig(**{**options, **CHAIN, **changes})


def stop_at(stage: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process a signal in the middle of a step of a stage."""
    real = loop.TrainingLoop._step

    def signalled(run: Any) -> None:
        if (run.stage.name, run.state.step) == (stage, step - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        real(run)

    monkeypatch.setattr(loop.TrainingLoop, "_step", signalled)


def test_a_chain_is_one_run_after_the_other(settings: Settings, whole: Path, tmp_path: Path) -> None:
    first = {**CHAIN["teacher_assistant"][0], "dropout": 0.2}
    assistant = distill(settings(output_dir=tmp_path / "first", **first))
    assert assistant.student is not None
    student = distill(settings(output_dir=tmp_path / "second", teacher=str(assistant.student), dropout=0.2))
    assert student.student is not None
    assert weights(assistant.student) == weights(whole / "assistant-1" / "student")
    assert weights(student.student) == weights(whole / "student")
    for result, folder, stage in ((assistant, whole / "assistant-1", "assistant-1"), (student, whole, "student")):
        found = lines(folder / "metrics.jsonl")
        assert {record.pop("stage") for record in found} == {stage}
        assert found == lines(result.metrics)
    assert not any("stage" in record for record in lines(student.metrics))  # without an assistant

    sizes = AutoConfig.from_pretrained(whole / "assistant-1" / "student")
    assert (sizes.num_hidden_layers, sizes.hidden_size, sizes.num_attention_heads) == (2, 36, 4)


def record_starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The stage and the step at which each training loop begins."""
    began: list[tuple[str, int]] = []
    train = loop.TrainingLoop.train

    def recorded(run: Any, signals: Any) -> None:
        began.append((run.stage.name, run.state.step))
        train(run, signals)

    monkeypatch.setattr(loop.TrainingLoop, "train", recorded)
    return began


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        ("assistant-1", 2),
        # The signal interrupts the last evaluation.
        *(pytest.param(*moment, marks=pytest.mark.slow) for moment in (("assistant-1", 4), ("student", 1))),
        pytest.param("student", 5, marks=pytest.mark.slow),
    ],
)
def test_a_chain_stops_and_continues_in_the_right_stage(
    stage: str,
    step: int,
    settings: Settings,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        stop_at(stage, step, patch)
        stopped = distill(settings(**CHAIN))
    folder = tmp_path / "run" if stage == "student" else tmp_path / "run" / stage
    assert stopped == DistillResult(
        None, folder / "metrics.jsonl", step, stopped.eval_before, stopped.eval_after, signal.SIGTERM
    )
    assert f"stopped at step {step} of {stage}; continue with\n  minilm-distill" in capsys.readouterr().out
    assert (tmp_path / "run" / "assistant-1" / "student").exists() == (stage == "student")
    with pytest.raises(ValueError, match="contains another run"):
        distill(settings(**CHAIN))

    # The folder may have been moved meanwhile.
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    began = record_starts(monkeypatch)
    result = distill(settings(**CHAIN, output_dir=moved, resume_from_checkpoint=True))
    assert (result.student, result.step) == (moved / "student", 6)
    assert began == ([(stage, step)] if stage == "student" else [(stage, step), ("student", 0)])
    check_equal(moved, whole)

    again = distill(settings(**CHAIN, output_dir=moved, resume_from_checkpoint=True))  # nothing left to do
    assert (again.student, again.step) == (moved / "student", 6)


@pytest.mark.parametrize("method", ["_save", pytest.param("write_student", marks=pytest.mark.slow)])
def test_a_signal_at_the_end_of_an_assistant_ends_the_run(
    method: str, settings: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes during the last checkpoint or while the assistant is written."""
    with monkeypatch.context() as patch:
        real = getattr(loop.TrainingLoop, method)

        def signalled(run: Any, *arguments: Any) -> Any:
            if run.state.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(run, *arguments)

        patch.setattr(loop.TrainingLoop, method, signalled)
        stopped = distill(settings(**CHAIN))
    assert (stopped.stopped_by, stopped.step, stopped.student) == (signal.SIGTERM, 4, None)
    began = record_starts(monkeypatch)
    distill(settings(**CHAIN, resume_from_checkpoint=True))
    assert began == [("student", 0)]
    check_equal(tmp_path / "run", whole)


def test_other_settings_are_refused_in_every_stage(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at("assistant-1", 2, patch)
        distill(settings(**CHAIN))
    again = {**CHAIN, "resume_from_checkpoint": True}
    other = [{**CHAIN["teacher_assistant"][0], "learning_rate": 5e-3}]
    with pytest.raises(ValueError, match=r"--teacher-assistant: .*before, .*0\.005"):
        distill(settings(**{**again, "teacher_assistant": other}))
    with pytest.raises(ValueError, match="--student-hidden-size: 24 before, 36 now"):  # the stage to come
        distill(settings(**{**again, "student_hidden_size": 36}))
    with pytest.raises(ValueError, match="--teacher-assistant"):
        distill(settings(resume_from_checkpoint=True, dropout=0.2))
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"relation_heads": 24, "teacher_assistant": "1x36"}, "--relation-heads 24 does not divide"),
        (
            {"relation_heads": None, "teacher_assistant": [{"copy_layers": (1,), "relation_heads": 16}]},
            "^student: --relation-heads 48 does not divide the hidden sizes of teacher .48. and student .24.",
        ),
        ({"copy_layers": (3,), "teacher_assistant": "2x24"}, "^student: --copy-layers"),
        ({"method": "minilm", "relation_heads": None, "student_num_attention_heads": 6}, "as many attention heads"),
    ],
)
def test_every_stage_is_checked_before_the_first_step(
    options: dict[str, Any], said: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.TrainingLoop, "train", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=said):
        distill(settings(**{**CHAIN, **options}))
    found = [path.name for path in (tmp_path / "run").rglob("*") if not path.name.startswith(".lock")]
    assert set(found) <= {"assistant-1"}
    monkeypatch.undo()
    assert distill(settings(max_steps=1)).student is not None  # the folder is still free


def test_the_folders_are_locked(settings: Settings) -> None:
    chain = stages(settings(**CHAIN))
    with ExitStack() as folders:
        folders.enter_context(output_folder(chain[-1].config, DistContext("cpu")))
        with pytest.raises(RuntimeError, match="another process is running"):
            distill(settings(**CHAIN))
    with ExitStack() as folders:
        folders.enter_context(output_folder(chain[0].config, DistContext("cpu")))
        with pytest.raises(RuntimeError, match=r"another process is running in .*assistant-1"):
            distill(settings(**CHAIN))


@pytest.mark.slow
def test_minilm_keeps_the_number_of_heads(settings: Settings, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher")  # 4 heads
    result = distill(
        settings(teacher=str(teacher), method="minilm", relation_heads=None, teacher_assistant="2x24,1x16", max_steps=1)
    )
    assert result.student is not None
    for folder, layers, hidden in (("assistant-1/", 2, 24), ("assistant-2/", 1, 16), ("", 1, 24)):
        sizes = AutoConfig.from_pretrained(tmp_path / "run" / folder / "student")
        assert (sizes.num_hidden_layers, sizes.hidden_size, sizes.num_attention_heads) == (layers, hidden, 4)


def test_layers_projections_and_vocabulary_belong_to_their_stage(settings: Settings) -> None:
    config = settings(
        teacher_layer=2,
        student_layer=-2,
        teacher_projections=("q.{i}", "k.{i}", "v.{i}"),
        trim_vocabulary=30,
        student_init="pca",
        teacher_assistant=["2x24", {"copy_layers": [1, 2], "student_layer": 1, "student_init": "random"}],
    )
    chain = stages(config)
    assert [stage.name for stage in chain] == ["assistant-1", "assistant-2", "student"]
    assert [(stage.steps_before, stage.steps_after) for stage in chain] == [(0, 12), (6, 6), (12, 0)]
    assert [stage.folder.relative_to(config.output_dir) for stage in chain] == [
        *(Path("assistant-1"), Path("assistant-2"), Path())
    ]
    models = [stage.model_config() for stage in chain]
    assert [each.teacher_layer for each in models] == [2, -2, 1]
    assert [each.teacher_projections for each in models] == [("q.{i}", "k.{i}", "v.{i}")] * 3
    assert [each.trim_vocabulary for each in models] == [None, None, 30]
    assert [each.student_init for each in models] == ["pca", "random", "pca"]
    folder = Path(config.output_dir)
    assert [each.teacher for each in models] == [
        config.teacher,
        str(folder / "assistant-1" / "student"),
        str(folder / "assistant-2" / "student"),
    ]
    assert chain[-1].config == config
    assert [stage.name for stage in stages(settings())] == [""]


def test_progress_is_that_of_all_stages(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "QUIET_SECONDS", 0.0)
    clock = iter(range(1000))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: float(next(clock)))
    bars = []
    real = metrics.tqdm

    class Bar(real):  # type: ignore[misc,valid-type]
        def __init__(self, **options: Any) -> None:
            bars.append((options["desc"], options["initial"], options["total"], options["leave"]))
            super().__init__(**options)

    monkeypatch.setattr(metrics, "tqdm", Bar)
    distill(settings(**CHAIN))
    assert bars == [("assistant-1", 0, 10, False), ("student", 4, 10, True)]
    said = [line for line in capsys.readouterr().err.splitlines() if "tokens/s" in line]
    assert [line.split(",")[0] for line in said] == [
        *(f"minilm-distill: assistant-1: step {step}/4" for step in range(1, 5)),
        *(f"minilm-distill: student: step {step}/6" for step in range(1, 7)),
    ]
    # The clock advances a second a line: after n steps of the assistant, 10 - n remain.
    assert [line.rsplit(", ", 1)[1] for line in said[:4]] == [f"00:{10 - step:02d} left" for step in range(1, 5)]


def test_the_model_card_names_teacher_and_assistant(whole: Path) -> None:
    card = (whole / "student" / "README.md").read_text()
    assert "through an assistant (2 layers, hidden size 36)." in card
    settings = json.loads((whole / "student" / "settings.json").read_text())
    run = DistillConfig.from_mapping(json.loads((whole / "settings.json").read_text()))
    assert settings == run.published().as_dict()
    assert settings["teacher_assistant"][0]["student_hidden_size"] == 36
    assert f"--teacher={settings['teacher']}" in card
    assert "--teacher-assistant=" in card
    first = (whole / "assistant-1" / "student" / "README.md").read_text()
    assert "an assistant" not in first


@pytest.mark.slow
def test_a_finished_assistant_needs_no_checkpoints(
    settings: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at("student", 4, patch)
        distill(settings(**CHAIN))
    shutil.rmtree(tmp_path / "run" / "assistant-1" / "checkpoints")
    distill(settings(**CHAIN, resume_from_checkpoint=True))
    check_equal(tmp_path / "run", whole)


def test_all_stages_use_the_same_tokens(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, prepared = TokenFolder.prepare, []
    monkeypatch.setattr(TokenFolder, "prepare", lambda *given: prepared.append(given[0].folder) or real(*given))
    distill(settings(**CHAIN))
    assert prepared == [tmp_path / "run" / "tokens"]
    assert not list((tmp_path / "run").glob("assistant-*/tokens"))
    # An assistant with a text of its own has tokens of its own, which the student replaces.
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(make_texts(90, seed=8)))
    chain = {
        **CHAIN,
        "output_dir": tmp_path / "two",
        "teacher_assistant": [{**CHAIN["teacher_assistant"][0], "text": [str(other)]}],
    }
    distill(settings(**chain))
    assert prepared == [tmp_path / "run" / "tokens", *[tmp_path / "two" / "tokens"] * 2]
    assert "has the tokens of another text" in capsys.readouterr().err
