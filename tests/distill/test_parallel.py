"""Two processes over gloo: the bits of one process, a change of their number, sharded students, rounded gradients."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AlbertConfig, AlbertModel

from minilm_kernels import MiniLMv2Loss
from minilm_kernels.distill import DistillConfig, distill, gradients, loop
from minilm_kernels.distill.checkpoint import read_checkpoint
from minilm_kernels.distill.distributed import DistContext
from minilm_kernels.distill.metrics import read_metrics
from minilm_kernels.distill.models import LayerModel, TeacherStudent
from minilm_kernels.distill.sharding import shard_student
from minilm_kernels.distill.step import seed_dropout
from tests.processes import run_two

Settings = Callable[..., DistillConfig]
PLAN: dict[str, Any] = {"dropout": 0.3, "student_num_hidden_layers": 2, "save_total_limit": 9}
# Five micro-batches in the evaluation, of which two processes repeat one.
FSDP = PLAN | {"parallel": "fsdp", "eval_samples": 9, "micro_batch_size": 2}


def in_environment(rank: int, processes: int) -> None:
    os.environ.update(WORLD_SIZE=str(processes), RANK=str(rank), LOCAL_RANK=str(rank))


def forget(run: Path, step: int) -> None:
    """Removes everything after the checkpoint of a step, as if the run had been killed."""
    shutil.rmtree(run / "student")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def losses(run: Path) -> list[dict[str, Any]]:
    lines = [record for record in read_metrics(run / "metrics.jsonl") if record["split"] == "train"]
    return [{name: x for name, x in record.items() if name != "tokens_per_second"} for record in lines]


def check_equal(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    found, expected = weights(run), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def check_close(run: Path, other: Path) -> None:
    """AdamW divides by the size of the gradient, so that rounding moves single weights by a part of a step."""
    for one, two in zip(losses(run), losses(other), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def run_list(rank: int, folder: str) -> None:
    """Runs the configurations in runs.json one after the other."""
    in_environment(rank, 2)
    gradients.BUCKET_BYTES = 4096  # several buckets
    real, begun = loop.TrainingLoop._accumulate, loop.TrainingLoop._begin

    def fails_once(run: Any, prepared: Any, micro: int) -> None:
        """The second process runs out of memory in its last backward, after some buckets have been sent."""
        embedding = run.models.student.model.get_input_embeddings().weight
        if rank == 1 and run.state.step == 1 and micro == 4:

            def fail(gradient: torch.Tensor) -> None:
                assert 0 < run.gradients._sent < len(run.gradients._buckets)
                raise torch.OutOfMemoryError("CUDA out of memory")

            hook = embedding.register_hook(fail)
            try:
                real(run, prepared, micro)
            finally:
                hook.remove()
        else:
            real(run, prepared, micro)

    def note_sizes(run: Any) -> None:
        begun(run)
        sizes = {name: p.to_local().numel() for name, p in run.state.parameters.items() if isinstance(p, DTensor)}
        Path(folder, "sizes.json").write_text(json.dumps(sizes))

    for words in json.loads(Path(folder, "runs.json").read_text()):
        fails, forgotten = words.pop("fails"), words.pop("forgotten")
        loop.TrainingLoop._accumulate = fails_once if fails else real  # type: ignore[method-assign]
        loop.TrainingLoop._begin = note_sizes if words["parallel"] == "fsdp" else begun  # type: ignore[method-assign]
        if forgotten:
            if rank == 0:
                forget(Path(words["output_dir"]), forgotten)
            torch.distributed.barrier()
        distill(DistillConfig(**words))


@pytest.fixture(scope="module")
def runs(
    teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[..., DistillConfig]]:
    """The folders of runs by two processes, and a function that creates settings of a run in one of these folders."""
    from .conftest import short_run

    folder = tmp_path_factory.mktemp("runs")

    def make(name: str, **changes: Any) -> DistillConfig:
        return short_run(teacher_folder, text_file, folder / name, **changes)

    listed: list[dict[str, Any]] = []

    def add(name: str, *, fails: bool = False, forgotten: int = 0, **changes: Any) -> None:
        listed.append(make(name, **changes).as_dict() | {"fails": fails, "forgotten": forgotten})

    distill(make("one-then-two", micro_batch_size=4, **PLAN))
    add("one-then-two", forgotten=3, micro_batch_size=4, resume_from_checkpoint=True, **PLAN)
    add("single-samples", total_batch_size=2, **PLAN)
    add("two", **PLAN)
    add("two-then-two", **PLAN)
    add("two-then-two", forgotten=3, resume_from_checkpoint=True, **PLAN)
    add("two-then-one", **PLAN)
    add("out-of-memory", fails=True, **PLAN | {"dropout": 0.0})
    add("cached", **PLAN, cache_teacher=str(folder / "cache"), cache_teacher_dtype="float32")
    add("bfloat16", gradient_dtype="bfloat16", **PLAN)
    add("fsdp", **FSDP)
    add("fsdp-then-fsdp", **FSDP)
    add("fsdp-then-fsdp", forgotten=3, resume_from_checkpoint=True, **FSDP)
    add("fsdp-then-one", **FSDP)
    add("fsdp-bfloat16", gradient_dtype="bfloat16", gradient_checkpointing=True, **FSDP)
    add("fsdp-best", load_best_model_at_end=True, eval_steps=1, **FSDP)
    (folder / "runs.json").write_text(json.dumps(listed))
    run_two(run_list, folder)
    return folder, make


@pytest.mark.slow
def test_two_processes_have_the_bits_of_one_with_two_micro_batches(runs: tuple[Path, Settings]) -> None:
    """The gradient of a step is a sum of two numbers, in either order, and dropout depends on the samples."""
    folder, make = runs
    distill(make("one", micro_batch_size=4, **PLAN))
    check_equal(folder / "two", folder / "one")
    distill(make("one-by-one", total_batch_size=2, micro_batch_size=1, **PLAN))
    check_equal(folder / "single-samples", folder / "one-by-one")


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(runs: tuple[Path, Settings]) -> None:
    folder, make = runs
    check_equal(folder / "two-then-two", folder / "two")
    forget(folder / "two-then-one", 3)
    distill(make("two-then-one", resume_from_checkpoint=True, **PLAN))
    check_equal(folder / "two-then-one", folder / "two")
    check_equal(folder / "one-then-two", folder / "two")


@pytest.mark.slow
def test_a_checkpoint_does_not_depend_on_the_number_of_processes(runs: tuple[Path, Settings]) -> None:
    folder, make = runs
    distill(make("same", micro_batch_size=4, **PLAN))
    one, two = (read_checkpoint(folder / name / "checkpoints" / "step-000000003") for name in ("same", "two"))
    differing = {name for name in one.state if one.state[name] != two.state[name]}
    assert differing <= {"settings"}  # the folder, and --micro-batch-size
    for name, tensors in one.tensors.items():
        assert tensors.keys() == two.tensors[name].keys()
        assert all(torch.equal(tensor, two.tensors[name][key]) for key, tensor in tensors.items()), name


@pytest.mark.slow
def test_a_step_is_repeated_after_a_part_of_the_exchange(runs: tuple[Path, Settings]) -> None:
    folder, make = runs
    found = read_checkpoint(folder / "out-of-memory" / "checkpoints" / "step-000000003")
    assert found.state["micro_batch"] == 2
    distill(make("whole", **PLAN | {"dropout": 0.0}))
    check_close(folder / "out-of-memory", folder / "whole")


@pytest.mark.slow
def test_one_process_reads_the_teachers_values_that_two_have_stored(
    runs: tuple[Path, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, make = runs
    check_equal(folder / "cached", folder / "two")
    monkeypatch.setattr(loop, "teacher_qkv", None)  # the teacher does not run
    distill(
        make(
            "cached-one", micro_batch_size=4, **PLAN, cache_teacher=str(folder / "cache"), cache_teacher_dtype="float32"
        )
    )
    check_equal(folder / "cached-one", folder / "two")


@pytest.mark.slow
def test_gradients_in_bfloat16_train(runs: tuple[Path, Settings]) -> None:
    """The first gradient has a relative error of at most 3 u, see `_RoundedBucket`; the first loss has none."""
    folder, _ = runs
    (first, *others), (exact, *exact_others) = losses(folder / "bfloat16"), losses(folder / "two")
    assert first["loss"] == exact["loss"]
    assert 0 < abs(first["grad_norm"] / exact["grad_norm"] - 1) < 3 * 2**-8
    assert [x["loss"] for x in others] == pytest.approx([x["loss"] for x in exact_others], rel=0.05)


@pytest.mark.slow
def test_fsdp_shards_the_student_and_trains_as_ddp(runs: tuple[Path, Settings]) -> None:
    folder, make = runs
    changes = FSDP | {"parallel": "ddp"}
    distill(make("replicated", **changes))
    check_close(folder / "fsdp", folder / "replicated")
    evaluated = [
        [record["eval_loss"] for record in read_metrics(folder / name / "metrics.jsonl") if record["split"] == "eval"]
        for name in ("fsdp", "replicated")
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)
    names, sizes = weights(folder / "fsdp"), json.loads((folder / "sizes.json").read_text())
    assert all(abs(2 * size - names[name].numel()) <= names[name][:1].numel() for name, size in sizes.items())
    assert {"embeddings.word_embeddings.weight", "encoder.layer.1.attention.self.query.weight"} <= sizes.keys()


@pytest.mark.slow
def test_fsdp_resumes_to_the_same_bits_and_in_one_process(runs: tuple[Path, Settings]) -> None:
    folder, make = runs
    check_equal(folder / "fsdp-then-fsdp", folder / "fsdp")
    forget(folder / "fsdp-then-one", 3)
    distill(make("fsdp-then-one", resume_from_checkpoint=True, **FSDP))
    check_close(folder / "fsdp-then-one", folder / "fsdp")


@pytest.mark.slow
def test_fsdp_with_rounded_gradients_checkpointing_and_the_best_weights(runs: tuple[Path, Settings]) -> None:
    folder, _ = runs
    rounded, exact = losses(folder / "fsdp-bfloat16"), losses(folder / "fsdp")
    assert 0 < abs(rounded[0]["grad_norm"] / exact[0]["grad_norm"] - 1) < 3 * 2**-8
    best = read_checkpoint(max((folder / "fsdp-best" / "checkpoints").iterdir())).state["best_step"]
    expected = read_checkpoint(folder / "fsdp-best" / "checkpoints" / f"step-{best:09d}").tensors["model"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder / "fsdp-best").items())


def rounded_sums(rank: int, folder: str) -> None:
    in_environment(rank, 3)
    gradients.BUCKET_BYTES = 40
    sizes, context = (1, 7, 3, 11, 2), DistContext("cpu")  # no bucket is divisible by 3
    random = torch.Generator().manual_seed(0)
    given = torch.randn(3, sum(sizes), generator=random) * torch.logspace(-20, 20, sum(sizes))
    given[:, 0] = torch.tensor([1.0, 2.0**-9, 2.0**-9])  # 1 if added in bfloat16, where 1 + 2^-8 is 1.0039
    given[:, 1] = torch.tensor([1.0, 2.0**-8, 2.0**-8])
    for dtype in (torch.float32, torch.bfloat16):
        parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
        summed = gradients.SummedGradients(parameters, 2, context, dtype)
        for _ in range(2):  # the second step begins anew
            with summed.summed():
                summed.losses += torch.tensor([1 + 2.0**-20, rank])
                summed.exchange_in_next_backward()
                torch.dot(torch.cat(parameters), given[rank]).backward()
                assert summed._sent == len(summed._buckets) > 1  # during the backward
        exact, size = given.double().sum(0), given.double().abs().sum(0)
        u = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
        assert ((summed.gradients - exact).abs() <= u * (1 + u) * size + u * exact.abs()).all()
        assert summed.losses.tolist() == [3 * (1 + 2.0**-20), 3]
        if dtype == torch.bfloat16:
            assert summed.gradients[1] == 1 + 2.0**-7
    every = [torch.empty_like(summed.gradients) for _ in range(3)]
    torch.distributed.all_gather(every, summed.gradients)
    assert all(torch.equal(found, every[0]) for found in every)


@pytest.mark.slow
def test_rounded_sums_are_within_their_bound_and_equal_everywhere(tmp_path: Path) -> None:
    run_two(rounded_sums, tmp_path, processes=3)


def test_the_numbers_of_dropout_depend_on_the_micro_batch_alone() -> None:
    def numbers(*place: int) -> list[float]:
        torch.rand(len(place) + place[-1])  # earlier draws do not matter
        seed_dropout(*place)
        return torch.rand(8).tolist()

    places = [(0, 1, 0), (0, 1, 4), (0, 2, 0), (1, 1, 0)]
    assert [numbers(*place) for place in places] == [numbers(*place) for place in places]
    assert len({tuple(numbers(*place)) for place in places}) == len(places)


def test_one_process_exchanges_nothing_and_rounds_nothing() -> None:
    weight = nn.Parameter(torch.ones(3))
    summed = gradients.SummedGradients([weight], 1, DistContext("cpu"), torch.bfloat16)
    with summed.summed():
        summed.exchange_in_next_backward()
        (weight * (1 + 2.0**-20)).sum().backward()
    assert summed.gradients.tolist() == [1 + 2.0**-20] * 3
    assert not summed._buckets


@pytest.mark.parametrize("changes", [{"teacher_assistant": "2x36"}, {"torch_compile": True}], ids=str)
def test_fsdp_refuses_other_options_by_their_names(changes: dict[str, Any], settings: Settings) -> None:
    option = "--" + next(iter(changes)).replace("_", "-")
    with pytest.raises(ValueError, match=f"--parallel fsdp and {option} exclude each other"):
        settings(parallel="fsdp", **changes)


def test_fsdp_refuses_layers_that_share_their_weights() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 24, "embedding_size": 16, "num_hidden_layers": 2}
    model = AlbertModel(AlbertConfig(**sizes, num_attention_heads=2, intermediate_size=48))
    side = LayerModel(model, -1, None, "student")
    with pytest.raises(ValueError, match="--parallel fsdp: AlbertModel cannot be sharded, because its layers share"):
        shard_student(TeacherStudent(side, side, MiniLMv2Loss(2), None), DistContext("cpu"), torch.float32)
