"""RelationTrainer in transformers' own training loop: gradients, averages, options, checkpoints and errors."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
)

from minilm_kernels import MiniLMLoss, MiniLMv2Loss, record_qkv
from minilm_kernels.integrations import RelationTrainer, RelationTrainingArguments
from tests.distill.tiny import make_texts, make_tokenizer
from tests.processes import run_two

from .tiny import DECODERS, RELATION_HEADS, eval_kl, make, make_dataset

TOKENIZER = make_tokenizer()
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
STEP = {"max_steps": 1, "max_grad_norm": 0.0, "logging_steps": 1}
TRAINING = {"max_steps": 12, "learning_rate": 5e-3, "per_device_train_batch_size": 8}
LABELS = 3


class MaskEveryFifth(DataCollatorWithPadding):
    """Masks words by their position, so that a batch and its micro-batches have the same labels."""

    def __call__(self, features):
        batch = super().__call__(features)
        ids = batch["input_ids"]
        chosen = (torch.arange(ids.shape[1]) % 5 == 4) & (batch["attention_mask"] == 1)
        batch["labels"] = ids.masked_fill(~chosen, -100)
        batch["input_ids"] = ids.masked_fill(chosen, self.tokenizer.mask_token_id)
        return batch


class CountLaterTokens(DataCollatorWithPadding):
    """Lets only rows from the sixth on count, as for a completion after a prompt of five tokens."""

    def __call__(self, features):
        batch = super().__call__(features)
        batch["query_mask"] = batch["attention_mask"] * (torch.arange(batch["input_ids"].shape[1]) >= 5)
        return batch


COLLATORS = {
    "query-mask": CountLaterTokens(TOKENIZER),
    "none": DataCollatorWithPadding(TOKENIZER),
    "masked-lm": MaskEveryFifth(TOKENIZER),
    "causal-lm": DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
    "sequence-classification": DataCollatorWithPadding(TOKENIZER),
    "token-classification": DataCollatorForTokenClassification(TOKENIZER),
}


def labeled(count: int, head: str, seed: int = 0) -> Dataset:
    data = make_dataset(count, seed)
    if head == "sequence-classification":
        return data.map(lambda row: {"label": len(row["input_ids"]) % LABELS})
    if head == "token-classification":
        return data.map(lambda row: {"labels": [token % LABELS if token % 3 else -100 for token in row["input_ids"]]})
    return data


def make_trainer(
    folder: Path, student: nn.Module, head: str = "none", loss: Any = None, options: Any = None, **settings: Any
) -> RelationTrainer:
    family = student.config.model_type
    given = {
        "teacher": make(family, layers=3),
        "relation_loss": loss or MiniLMv2Loss(RELATION_HEADS),
        "data_collator": COLLATORS[head],
        "train_dataset": labeled(64, head),
        "eval_dataset": labeled(22, head, seed=1),
    }
    args = RelationTrainingArguments(str(folder), **(QUIET | settings))
    return RelationTrainer(student, args, **(given | (options or {})))


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Compares gradients relative to the largest one; a missing gradient is 0."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for name in found.keys() | expected.keys():
        a, b = found.get(name, torch.zeros(())), expected.get(name, torch.zeros(()))
        assert float((a - b).abs().max()) <= tolerance * largest, name


def own_loss(head: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if head == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, -2), labels.flatten())


def expected_step(
    student: nn.Module, teacher: nn.Module, head: str, weights: tuple[float, float], loss_fn: nn.Module, rows: Dataset
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients and losses of one batch of all rows, computed without Trainer."""
    columns = [name for name in rows.column_names if name != "text"]
    batch = dict(COLLATORS[head]([{name: row[name] for name in columns} for row in rows]))
    labels = batch.pop("labels", None)
    masks = {"causal": student.config.model_type in DECODERS, "query_mask": batch.pop("query_mask", None)}
    with record_qkv(student) as recorder_s, record_qkv(teacher) as recorder_t:
        output = student(**batch)
        with torch.no_grad():
            teacher(**batch)
        relation = loss_fn(recorder_t.pop()[-1], recorder_s.pop()[-1], batch["attention_mask"], **masks)
    loss, losses = weights[0] * relation, {"relation_kl": relation.item()}
    if weights[1]:
        own = own_loss(head, output.logits, labels)
        loss, losses["model_loss"] = loss + weights[1] * own, own.item()
    names, parameters = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    return found, losses | {"loss": loss.item()}


# Averages over micro-batches. Heads of the same kind differ in what they do with num_items_in_batch.
STEPS = [
    ("bert", "none", (2.0, 0.0), "sequence"),
    ("bert", "masked-lm", (2.0, 0.0), "token"),
    ("bert", "masked-lm", (1.0, 0.5), "token"),
    ("bert", "sequence-classification", (1.0, 0.5), "sequence"),
    ("bert", "token-classification", (1.0, 0.5), "sequence"),
    ("modernbert", "masked-lm", (1.0, 0.5), "sequence"),
    ("modernbert", "none", (1.0, 0.0), "token"),
    ("qwen3", "causal-lm", (1.0, 0.5), "token"),
    ("gpt2", "causal-lm", (1.0, 0.5), "token"),
    ("qwen3", "sequence-classification", (1.0, 0.5), "sequence"),
    ("qwen3", "none", (1.0, 0.0), "sequence"),
]


@pytest.mark.parametrize(("family", "head", "weights", "reduction"), STEPS)
def test_accumulated_micro_batches_have_the_gradient_of_one_batch(family, head, weights, reduction, tmp_path):
    """Micro-batches of 4, 4, 4 and 2 sequences of different lengths."""
    rows = labeled(14, head)
    expected = None
    for size, accumulation in ((14, 1), (4, 4)):
        student, gradients = make(family, head, seed=1, num_labels=LABELS), Gradients()
        settings = {"relation_weight": weights[0], "model_loss_weight": weights[1]}
        settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        options = {"callbacks": [gradients], "train_dataset": rows}
        loss = MiniLMv2Loss(RELATION_HEADS, reduction=reduction)
        trainer = make_trainer(tmp_path, student, head, loss, options, **STEP, **settings)
        expected = expected or expected_step(student, trainer.term.teacher, head, weights, loss, rows)
        trainer.train()
        assert_close(gradients.found, expected[0])
        logged = trainer.state.log_history[0]
        assert {name: logged[name] for name in expected[1]} == pytest.approx(expected[1], rel=1e-5)
        assert ("model_loss" in logged) == (weights[1] > 0)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_rows_that_count(reduction, tmp_path):
    """Some sequences have no row that counts, and neither gradient nor average may see them."""
    rows = make_dataset(14)
    assert min(map(len, rows["input_ids"])) < 6
    student, gradients = make(seed=1), Gradients()
    loss = MiniLMv2Loss(RELATION_HEADS, reduction=reduction)
    options = {"callbacks": [gradients], "train_dataset": rows, "eval_dataset": rows}
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 4}
    trainer = make_trainer(tmp_path, student, "query-mask", loss, options, **STEP, **settings)
    expected, losses = expected_step(student, trainer.term.teacher, "query-mask", (1.0, 0.0), loss, rows)
    assert trainer.evaluate()["eval_relation_kl"] == pytest.approx(losses["relation_kl"], rel=1e-5)
    trainer.train()
    assert_close(gradients.found, expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(losses["loss"], rel=1e-5)


def test_rows_that_count_can_be_a_column(tmp_path):
    """Trainer removes columns that the student's forward does not take; it must not remove this one."""
    ids, mask = torch.randint(5, 60, (8, 12)).tolist(), [[0] * 5 + [1] * 7] * 8
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 12] * 8, "query_mask": mask})
    student, loss = make(seed=1), MiniLMv2Loss(RELATION_HEADS)
    trainer = make_trainer(tmp_path, student, options={"eval_dataset": rows})
    _, losses = expected_step(student, trainer.term.teacher, "none", (1.0, 0.0), loss, rows)
    assert trainer.evaluate()["eval_relation_kl"] == pytest.approx(losses["relation_kl"], rel=1e-5)


def test_a_micro_batch_without_labels(tmp_path):
    """The average over no labels is NaN, which must not reach the loss or the gradient."""
    rows = labeled(8, "token-classification")
    rows = rows.map(
        lambda row, i: {"labels": [-100] * len(row["labels"]) if i < 7 else row["labels"]}, with_indices=True
    )
    student, gradients = make("bert", "token-classification", seed=1, num_labels=LABELS), Gradients()
    options = {"callbacks": [gradients], "train_dataset": rows}
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "model_loss_weight": 1.0}
    trainer = make_trainer(tmp_path, student, "token-classification", None, options, **STEP, **settings)
    expected, losses = expected_step(
        student, trainer.term.teacher, "token-classification", (1.0, 1.0), MiniLMv2Loss(RELATION_HEADS), rows
    )
    trainer.train()
    assert_close(gradients.found, expected)
    assert trainer.state.log_history[0]["model_loss"] == pytest.approx(losses["model_loss"], rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_own_loss_functions(tmp_path, smoothing):
    """A compute_loss_func divides by num_items_in_batch by itself; label smoothing is Trainer's."""

    def summed(outputs, labels, num_items_in_batch=None):
        loss = cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing, reduction="sum")
        return loss / num_items_in_batch

    rows, found = labeled(14, "masked-lm"), []
    for size, accumulation in ((14, 1), (4, 4)):
        for function in (None, summed):
            gradients = Gradients()
            options = {"callbacks": [gradients], "train_dataset": rows, "compute_loss_func": function}
            settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
            settings |= {"model_loss_weight": 0.5, "label_smoothing_factor": 0.0 if function else smoothing}
            student = make("bert", "masked-lm", seed=1)
            trainer = make_trainer(tmp_path, student, "masked-lm", None, options, **STEP, **settings)
            trainer.train()
            found.append((gradients.found, trainer.state.log_history[0]))
    for gradients_of_case, logged in found[1:]:
        assert_close(gradients_of_case, found[0][0])
        assert logged["loss"] == pytest.approx(found[0][1]["loss"], rel=1e-5)
        assert logged["model_loss"] == pytest.approx(found[0][1]["model_loss"], rel=1e-5)


# Several processes


def as_rank(rank: int) -> None:
    """Sets the variables of torchrun. The process group exists already."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **rendezvous)


def has_twelve_tokens(row) -> bool:
    return len(row["input_ids"]) == 12


def check_two_processes(rank: int, folder: str) -> None:
    as_rank(rank)
    torch.distributed.barrier()
    for family, head, weights, reduction in [STEPS[0], STEPS[2], STEPS[7]]:
        for average in (True, False):
            print(family, head, reduction, average, flush=True)
            # Without the average over devices, a process averages over its own tokens; it has as many as the other one.
            rows = labeled(12, head) if average else labeled(400, head).filter(has_twelve_tokens).select(range(12))
            student, gradients = make(family, head, seed=1), Gradients()
            loss = MiniLMv2Loss(RELATION_HEADS, reduction=reduction)
            settings = {"relation_weight": weights[0], "model_loss_weight": weights[1], "weight_decay": 0.1}
            settings |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
            settings |= {"average_tokens_across_devices": average, "save_strategy": "steps", "save_steps": 1}
            options = {"callbacks": [gradients], "train_dataset": rows}
            before = {name: parameter.clone() for name, parameter in student.named_parameters()}
            run = Path(folder) / f"{family}-{head}-{average}"
            trainer = make_trainer(run, student, head, loss, options, **STEP, **settings)
            expected, losses = expected_step(student, trainer.term.teacher, head, weights, loss, rows)
            trainer.evaluate()  # after which Trainer alone would not synchronize the gradients
            trainer.train()
            assert_close(gradients.found, expected)
            logged = trainer.state.log_history[0]
            assert {name: logged[name] for name in losses} == pytest.approx(losses, rel=1e-5)
            changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
            assert changed == {name for name, gradient in expected.items() if gradient.any()}
            # 22 rows in batches of 2 x 4: accelerate repeats samples in the last one.
            metrics = trainer.evaluate()
            if head == "none":
                assert metrics["eval_relation_kl"] == pytest.approx(
                    eval_kl(student, trainer.term.teacher, trainer.eval_dataset), rel=1e-5
                )
            torch.distributed.barrier()
            loaded = AutoModel.from_pretrained(run / "checkpoint-1").get_parameter
            assert all(torch.equal(p, loaded(name)) for name, p in student.base_model.named_parameters())


def test_two_processes(tmp_path):
    run_two(check_two_processes, tmp_path)


FSDP2 = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}


def check_fsdp(rank: int, folder: str) -> None:
    as_rank(rank)
    torch.distributed.barrier()
    for own in (0.0, 0.5):
        found = []
        for kind in ("ddp", "fsdp"):
            student = make("bert", "masked-lm", seed=1)
            settings = {"max_steps": 3, "learning_rate": 5e-3, "logging_steps": 1, "gradient_accumulation_steps": 2}
            settings |= {"model_loss_weight": own, "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 3}
            settings |= {"fsdp": "full_shard", "fsdp_config": FSDP2} if kind == "fsdp" else {}
            trainer = make_trainer(Path(folder) / f"{kind}-{own}", student, "masked-lm", **settings)
            trainer.train()
            logs = [log["relation_kl"] for log in trainer.state.log_history if "relation_kl" in log]
            loaded = AutoModel.from_pretrained(Path(folder) / f"{kind}-{own}" / "checkpoint-3")
            kl = eval_kl(loaded, trainer.term.teacher, trainer.eval_dataset)
            found.append([*logs, trainer.evaluate()["eval_relation_kl"], kl])
        assert len(found[0]) == 5
        assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_fsdp2(tmp_path):
    run_two(check_fsdp, tmp_path)


# Options, evaluation and checkpoints


@pytest.mark.parametrize(
    ("family", "head", "settings"),
    [
        ("bert", "none", {}),
        ("modernbert", "masked-lm", {"model_loss_weight": 0.2, "relation_weight": 5.0}),
        ("qwen3", "causal-lm", {"model_loss_weight": 0.2, "relation_weight": 5.0}),
        ("bert", "masked-lm", {"model_loss_weight": 0.2, "bf16": True, "gradient_checkpointing": True}),
        ("bert", "none", {"bf16": True, "gradient_accumulation_steps": 2}),
    ],
)
def test_the_eval_kl_falls_and_the_checkpoint_is_the_students(family, head, settings, tmp_path):
    """The data set has a column of text, which Trainer removes by default."""
    student = make(family, head, seed=1)
    settings = TRAINING | settings | {"save_strategy": "steps", "save_steps": 6, "save_total_limit": 1}
    options = {"data_collator": DataCollatorForLanguageModeling(TOKENIZER)} if head == "masked-lm" else {}
    trainer = make_trainer(tmp_path, student, head, None, options, **settings)
    teacher, eval_rows = trainer.term.teacher, trainer.eval_dataset
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    before = eval_kl(student, teacher, eval_rows)
    trainer.train()
    after = eval_kl(student, teacher, eval_rows)
    assert after < 0.8 * before
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())
    folder = tmp_path / "checkpoint-12"
    assert folder.is_dir()
    loaded, found = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert {name.split(".")[0] for name in found["missing_keys"]} <= {"pooler"}
    assert {name.split(".")[0] for name in found["unexpected_keys"]} <= {"cls", "head", "decoder", "lm_head"}
    # Trainer's student keeps the autocast of bf16 in its forward.
    assert eval_kl(loaded, teacher, eval_rows) == pytest.approx(after, rel=1e-3 if "bf16" in settings else 1e-5)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_evaluation_averages_over_all_rows(reduction, tmp_path):
    """Batches of 5, 5, 5, 5 and 2 sequences of different lengths."""
    loss = MiniLMv2Loss(RELATION_HEADS, relations={"qk": 0.5, "vv": 2.0}, reduction=reduction)
    student = make(seed=1)
    trainer = make_trainer(tmp_path, student, "none", loss, per_device_eval_batch_size=5, relation_weight=3.0)
    _, losses = expected_step(student, trainer.term.teacher, "none", (1.0, 0.0), loss, trainer.eval_dataset)
    metrics = trainer.evaluate()
    assert metrics["eval_relation_kl"] == pytest.approx(losses["relation_kl"], rel=1e-5)
    parts = 0.5 * metrics["eval_relation_kl_qk"] + 2.0 * metrics["eval_relation_kl_vv"]
    assert parts == pytest.approx(losses["relation_kl"], rel=1e-5)
    assert "eval_model_loss" not in metrics
    assert metrics["eval_loss"] == pytest.approx(3 * losses["relation_kl"], rel=0.3)  # Trainer's mean over batches
    several = trainer.evaluate({"one": trainer.eval_dataset, "two": trainer.train_dataset})
    assert several["eval_one_relation_kl"] == pytest.approx(losses["relation_kl"], rel=1e-5)
    assert several["eval_two_relation_kl"] != several["eval_one_relation_kl"]


def test_predictions_and_metrics(tmp_path):
    """Metrics see logits and labels; a prediction without labels leaves nothing behind for the next step."""
    student = make("bert", "masked-lm", seed=1)
    seen = []
    options = {"compute_metrics": lambda p: seen.append((p.predictions.shape, p.label_ids.shape)) or {"one": 1.0}}
    trainer = make_trainer(tmp_path, student, "masked-lm", None, options, **TRAINING, model_loss_weight=1.0)
    assert trainer.evaluate()["eval_one"] == 1.0
    (logits, labels) = seen[0]
    assert logits == (*labels, student.config.vocab_size)
    trainer.data_collator = DataCollatorWithPadding(TOKENIZER)
    assert trainer.predict(trainer.eval_dataset).predictions.shape == logits
    trainer.data_collator = COLLATORS["masked-lm"]
    trainer.train()
    alone = make_trainer(tmp_path, make(seed=1), **TRAINING)
    assert "test_relation_kl" in alone.predict(alone.eval_dataset).metrics
    alone.train()


@pytest.mark.parametrize("own", [0.0, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["compile", "checkpointing", "reentrant"],
)
def test_wrappers_have_the_plain_gradients(settings, own, tmp_path):
    found = []
    for given in ({}, settings):
        torch.compiler.reset()
        gradients = Gradients()
        options = {"callbacks": [gradients], "train_dataset": labeled(8, "masked-lm")}
        given = STEP | given | {"model_loss_weight": own, "weight_decay": 0.1}
        student = make("bert", "masked-lm", seed=1)
        head = student.cls.predictions.transform.dense.weight
        before = head.detach().clone()
        make_trainer(tmp_path, student, "masked-lm", None, options, **given).train()
        found.append(gradients.found)
        assert torch.equal(head, before) == (own == 0)  # it does not decay, either
    assert_close(found[1], found[0])


@pytest.mark.parametrize("own", [0.0, 0.2])
def test_resuming(own, tmp_path):
    """The resumed run ends with the bits of the uninterrupted one, dropout included."""
    weights = []
    for resumed in (None, str(tmp_path / "checkpoint-6")):
        student = make("bert", "masked-lm", seed=1, hidden_dropout_prob=0.1)
        settings = TRAINING | {"save_strategy": "steps", "save_steps": 6, "model_loss_weight": own}
        trainer = make_trainer(tmp_path, student, "masked-lm", **settings)
        trainer.train(resume_from_checkpoint=resumed)
        assert trainer.state.global_step == 12
        weights.append(student.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_second_training_starts_new_averages(tmp_path):
    """The third step of a run is not logged; it must not reach the first log of the next run."""
    settings = {"max_steps": 3, "logging_steps": 2, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, make(seed=1), **settings)
    logged = []
    for _ in range(2):
        trainer.train()
        logged.append(trainer.state.log_history[0]["relation_kl"])
    assert logged[0] == logged[1]


def test_the_best_model_has_the_smallest_kl(tmp_path):
    student = make(seed=1)
    settings = {"max_steps": 8, "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "relation_kl"}
    trainer = make_trainer(tmp_path, student, **settings)
    trainer.train()
    history = [log["eval_relation_kl"] for log in trainer.state.log_history if "eval_relation_kl" in log]
    assert len(history) == 4
    assert min(history) < history[-1]  # otherwise this test shows nothing
    assert trainer.state.best_metric == min(history)
    assert eval_kl(student, trainer.term.teacher, trainer.eval_dataset) == pytest.approx(min(history), rel=1e-5)


def test_the_teacher_sees_the_masked_tokens(tmp_path):
    student, teacher = make("bert", "masked-lm", seed=1), make(layers=3)
    seen: dict[str, torch.Tensor] = {}
    for name, model in (("student", student), ("teacher", teacher)):
        model.get_input_embeddings().register_forward_hook(lambda _, ids, __, name=name: seen.update({name: ids[0]}))
    options = {"teacher": teacher}
    make_trainer(tmp_path, student, "masked-lm", None, options, **STEP, model_loss_weight=1.0).train()
    assert torch.equal(seen["student"], seen["teacher"])
    assert (seen["teacher"] == TOKENIZER.mask_token_id).any()


def test_several_layers_and_their_components(tmp_path):
    student = make(layers=2, seed=1)
    loss = MiniLMv2Loss(RELATION_HEADS, layers={3: 2, 1: 1}, layer_weights={1: 0.5})
    trainer = make_trainer(tmp_path, student, "none", loss, **STEP)
    trainer.train()
    logged = trainer.state.log_history[0]
    parts = [sum(logged[f"relation_kl_{layer}_{name}"] for name in ("qq", "kk", "vv")) for layer in (3, 1)]
    assert logged["relation_kl"] == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-5)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relation_weight": 0.0}, "relation_weight: expected a number greater than 0, got 0.0"),
        ({"model_loss_weight": -1.0}, "model_loss_weight: expected a number of 0 or more, got -1.0"),
        ({"relation_weight": math.nan}, "relation_weight: expected"),
    ],
)
def test_wrong_weights(settings, message):
    with pytest.raises(ValueError, match=message):
        RelationTrainingArguments("output", **settings)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"relation_loss": MiniLMv2Loss(RELATION_HEADS, reduction="sum")},
            ValueError,
            'reduction "sum" is not an average',
        ),
        ({"layers": {4: 1}}, ValueError, "layer=4: expected 1 to 3"),
        ({"layers": {1: 3}}, ValueError, "layer=3: expected 1 to 2"),
        ({"relation_loss": nn.MSELoss()}, TypeError, "loss: expected MiniLMLoss or MiniLMv2Loss"),
        (
            {"teacher": make(vocab_size=99)},
            ValueError,
            "teacher: its vocabulary has 99 tokens and that of the student 65",
        ),
        ({"term_options": {"causal": None, "rotary": "behind"}}, ValueError, "rotary"),
    ],
)
def test_wrong_arguments(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, make(), options=options)


def test_the_teacher_is_another_model(tmp_path):
    student = make()
    with pytest.raises(ValueError, match="teacher: expected another model than the student"):
        make_trainer(tmp_path, student, options={"teacher": student})


def test_a_vocabulary_that_is_padded(tmp_path):
    teacher = make(vocab_size=72)
    make_trainer(tmp_path, make(), options={"teacher": teacher, "processing_class": TOKENIZER}, **STEP).train()


def test_data_parallel_is_refused(tmp_path):
    args = RelationTrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs without a launcher.*torchrun --nproc-per-node.*CUDA_VISIBLE_DEVICES"):
        RelationTrainer(make(), args, teacher=make(), relation_loss=MiniLMLoss(4))


def test_other_kinds_of_arguments(tmp_path):
    with pytest.raises(TypeError, match="args: expected RelationTrainingArguments, got TrainingArguments"):
        RelationTrainer(
            make(), TrainingArguments(str(tmp_path), use_cpu=True), teacher=make(), relation_loss=MiniLMLoss(4)
        )
    args = RelationTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got NoneType; there is no model_init"):
        RelationTrainer(None, args, teacher=make(), relation_loss=MiniLMLoss(4), model_init=make)


def test_a_teacher_in_training_mode(tmp_path):
    trainer = make_trainer(tmp_path, make(seed=1), **STEP)
    trainer.term.teacher.train()
    with pytest.raises(RuntimeError, match="teacher: it is in training mode"):
        trainer.train()


def test_sequences_behind_one_another_are_refused(tmp_path):
    options = {"data_collator": DataCollatorWithFlattening()}
    with pytest.raises(ValueError, match="position_ids without attention_mask describe sequences behind one another"):
        make_trainer(tmp_path, make("qwen3", seed=1), options=options, **STEP).train()


# Example


@pytest.mark.parametrize("processes", [1, 2])
def test_the_example(processes, tmp_path):
    make(layers=4).save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n".join(make_texts(100, longest=20)), encoding="utf-8")
    script = Path(__file__).parents[2] / "examples" / "transformers_trainer.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes == 2 else []
    command = [sys.executable, *torchrun, script, *(tmp_path / name for name in ("teacher", "text.txt", "student"))]
    options = ["--relation-heads=4", "--max-steps=12", "--batch-size=8", "--learning-rate=5e-3"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    ((before, after),) = re.findall(r"eval KL (\S+) before, (\S+) after", run.stdout)
    assert float(after) < 0.8 * float(before)
    student = AutoModel.from_pretrained(tmp_path / "student")
    eval_rows = Dataset.from_dict(dict(TOKENIZER(make_texts(100, longest=20)[90:], return_token_type_ids=False)))
    assert eval_kl(student, make(layers=4), eval_rows) == pytest.approx(float(after), abs=1e-4)
