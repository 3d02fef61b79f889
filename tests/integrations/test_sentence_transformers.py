"""RelationDistillLoss and RelationKLEvaluator with SentenceTransformerTrainer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentence_transformers.sentence_transformer.losses as st_losses
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from torch import nn

from minilm_kernels import MiniLMLoss, MiniLMv2Loss, QKVExtractor
from minilm_kernels.integrations.sentence_transformers import (
    RelationDistillLoss,
    RelationKLEvaluator,
    RelationSentenceTransformerTrainer,
)
from tests.distill.tiny import WORDS, make_texts, make_tokenizer
from tests.integrations.tiny import RELATION_HEADS, make
from tests.processes import run_two

TEXTS = {"anchor": make_texts(16, 1, 20), "positive": make_texts(16, 2, 12)}
LOSS = MiniLMv2Loss(RELATION_HEADS)
TOKENS = MiniLMv2Loss(RELATION_HEADS, reduction="token")


def sentence_model(folder: Path, seed: int = 0, words: list[str] = WORDS, **overrides) -> SentenceTransformer:
    """A SentenceTransformer made of a plain model's folder; its pooling is the mean."""
    make("bert", seed=seed, **overrides).save_pretrained(folder)
    make_tokenizer(words).save_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture
def teacher(tmp_path) -> SentenceTransformer:
    return sentence_model(tmp_path / "teacher", seed=1, layers=3, hidden_size=48)


@pytest.fixture
def student(tmp_path) -> SentenceTransformer:
    return sentence_model(tmp_path / "student")


def columns_of(model: SentenceTransformer, count: int = 16) -> list[dict]:
    return [model.preprocess(texts[:count]) for texts in TEXTS.values()]


def arguments(folder: Path, **options) -> SentenceTransformerTrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return SentenceTransformerTrainingArguments(str(folder), **quiet | options)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float = 1e-6) -> None:
    """The largest difference over all parameters, relative to the largest value, is at most `bound`."""
    assert found.keys() == expected.keys()
    largest = max(x.abs().max() for x in expected.values())
    assert largest > 0
    assert max((found[name] - x).abs().max() for name, x in expected.items()) <= bound * largest


def expected_relation(student, teacher, column, teacher_layer=-1, student_layer=-1, loss=LOSS) -> torch.Tensor:
    inputs = {name: column[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        target = QKVExtractor(teacher, teacher_layer)(**inputs)
    return loss(target, QKVExtractor(student, student_layer)(**inputs), inputs["attention_mask"])


# The value


def test_relation_is_the_weighted_mean_over_the_columns(student, teacher):
    columns = columns_of(student)
    assert columns[0]["modality"] == "text"
    assert columns[0]["input_ids"].shape != columns[1]["input_ids"].shape
    found = RelationDistillLoss(student, teacher, LOSS, layers={2: 1}, relation_weight=0.5)(columns, None)
    expected = sum(expected_relation(student, teacher, column, 2, 1) for column in columns) / 4
    torch.testing.assert_close(found, {"relation": expected}, rtol=1e-6, atol=0)


def test_embedding_loss_stands_beside_the_relation(student, teacher):
    columns = columns_of(student)
    mnrl = st_losses.MultipleNegativesRankingLoss(student)
    loss = RelationDistillLoss(student, teacher, LOSS, embedding_loss=mnrl)
    found = loss(columns_of(student), None)
    relation = sum(expected_relation(student, teacher, column) for column in columns) / 2
    torch.testing.assert_close(found, {"relation": relation, "embedding": mnrl(columns, None)}, rtol=1e-6, atol=1e-7)
    sum(found.values()).backward()
    together = gradients(student)
    student.zero_grad()
    (sum(expected_relation(student, teacher, column) for column in columns) / 2 + mnrl(columns, None)).backward()
    assert_close(together, gradients(student))


@pytest.mark.parametrize("each", [False, True], ids=["one", "each"])
def test_labels_can_be_the_teachers_embeddings(student, teacher, each):
    columns = columns_of(student)
    mse = st_losses.EmbedDistillLoss(student, distance_metric="mse", projection_dim=48)
    labels = torch.randn(16, 2, 48) if each else torch.randn(16, 48)
    loss = RelationDistillLoss(student, teacher, LOSS, embedding_loss=mse)
    assert any(parameter is mse.projection.weight for parameter in loss.parameters())
    torch.testing.assert_close(loss(columns_of(student), labels)["embedding"], mse(columns, labels))


def test_components_of_an_embedding_loss_keep_their_names(student, teacher):
    regularization = st_losses.GlobalOrthogonalRegularizationLoss(student)
    found = RelationDistillLoss(student, teacher, LOSS, embedding_loss=regularization)(columns_of(student), None)
    assert found.keys() == {"relation", *regularization(columns_of(student))}
    assert len(found) == 3


def test_teacher_can_be_a_plain_model(student, teacher):
    values = [
        RelationDistillLoss(student, t, LOSS)(columns_of(student))["relation"] for t in (teacher, teacher[0].model)
    ]
    assert torch.equal(*values)


def test_pooling_without_the_prompt_does_not_change_the_rows(student, teacher):
    student[1].include_prompt = False
    columns = [student.preprocess(texts, prompt="w1 w2 ") for texts in TEXTS.values()]
    assert "prompt_length" in columns[0]
    found = RelationDistillLoss(student, teacher, LOSS)([dict(column) for column in columns])
    expected = sum(expected_relation(student, teacher, column) for column in columns) / 2
    torch.testing.assert_close(found["relation"], expected, rtol=1e-6, atol=0)


def test_students_and_teachers_that_are_decoders(tmp_path):
    models = []
    for name, seed in (("teacher", 1), ("student", 0)):
        make("qwen3", seed=seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        models.append(SentenceTransformer(str(tmp_path / name), device="cpu"))
    teacher, student = models
    found = [
        RelationDistillLoss(student, teacher, LOSS, causal=c)(columns_of(student))["relation"] for c in (True, False)
    ]
    inputs = [{name: c[name] for name in ("input_ids", "attention_mask")} for c in columns_of(student)]
    qkv = [[QKVExtractor(model, frozen=True)(**x) for model in models] for x in inputs]
    for value, causal in zip(found, (True, False), strict=True):
        expected = sum(LOSS(*pair, x["attention_mask"], causal=causal) for pair, x in zip(qkv, inputs, strict=True)) / 2
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert found[0] != found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(student, teacher, dtype):
    loss = RelationDistillLoss(student, teacher, LOSS)
    expected = loss(columns_of(student))["relation"]
    with torch.autocast("cpu", dtype):
        found = loss(columns_of(student))["relation"]
    found.backward()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    assert all(x.isfinite().all() for x in gradients(student).values())


def test_teacher_is_no_part_of_the_loss(student, teacher):
    loss = RelationDistillLoss(student, teacher, LOSS)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in student.parameters()}
    assert loss.state_dict().keys() == {f"model.{name}" for name in student.state_dict()}
    loss.double()
    assert teacher.dtype == torch.float32


def test_other_forwards_between_the_steps_do_not_matter(student, teacher):
    loss = RelationDistillLoss(student, teacher, LOSS)
    loss(columns_of(student))["relation"].backward()
    expected = gradients(student)
    student.zero_grad()
    for model in (student, teacher):
        model.encode(TEXTS["anchor"], batch_size=4)
    RelationKLEvaluator(TEXTS["anchor"], loss, batch_size=5)(student)
    loss(columns_of(student))["relation"].backward()
    assert_close(gradients(student), expected, 0)


# Training


@pytest.mark.parametrize("joint", [False, True], ids=["alone", "joint"])
def test_training(student, teacher, tmp_path, joint):
    data = Dataset.from_dict({"anchor": make_texts(64, 1, 20), "positive": make_texts(64, 2, 20)})
    embedding_loss = st_losses.MultipleNegativesRankingLoss(student) if joint else None
    loss = RelationDistillLoss(student, teacher, LOSS, embedding_loss=embedding_loss, relation_weight=4.0)
    evaluator = RelationKLEvaluator(make_texts(20, 3, 20), loss, batch_size=8, name="eval-set")
    similarity = EmbeddingSimilarityEvaluator(TEXTS["anchor"], TEXTS["positive"], torch.rand(16).tolist())
    before = evaluator(student)["eval-set_relation_kl"]
    options = {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_eval-set_relation_kl"}
    args = arguments(
        tmp_path / "out",
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        greater_is_better=False,
        **options,
        **best,
    )
    trainer = SentenceTransformerTrainer(
        student,
        args,
        train_dataset=data,
        eval_dataset=Dataset.from_dict(TEXTS),
        loss=loss,
        evaluator=[similarity, evaluator],
    )
    trainer.train()
    after = evaluator(student)["eval-set_relation_kl"]
    assert after < 0.8 * before
    logged = trainer.state.log_history
    components = {"relation", "embedding"} if joint else {"relation"}
    training = [entry for entry in logged if "loss" in entry]
    assert len(training) == 3
    for entry in training:
        assert components <= entry.keys()
        assert sum(entry[name] for name in components) == pytest.approx(entry["loss"], abs=2e-4)
    evaluations = [entry for entry in logged if "eval_loss" in entry]
    assert {f"eval_{name}" for name in components} <= evaluations[0].keys()
    kl = [entry["eval_eval-set_relation_kl"] for entry in evaluations]
    assert after == pytest.approx(min(kl), rel=1e-6)
    assert before > kl[0] > kl[-1]

    saved = SentenceTransformer(trainer.state.best_model_checkpoint, device="cpu")
    assert torch.equal(
        saved.encode(TEXTS["anchor"], convert_to_tensor=True), student.encode(TEXTS["anchor"], convert_to_tensor=True)
    )
    card = (Path(trainer.state.best_model_checkpoint) / "README.md").read_text(encoding="utf-8")
    assert "arxiv.org/abs/2012.15828" in card
    assert "RelationDistillLoss" in card
    assert ("MultipleNegativesRankingLoss" in card) == joint


def alone(student: SentenceTransformer) -> dict:
    return {}


def joint(student: SentenceTransformer) -> dict:
    return {"embedding_loss": st_losses.CosineSimilarityLoss(student)}


def one_step(
    folder: Path,
    size: int,
    accumulation: int,
    loss=alone,
    trainer=SentenceTransformerTrainer,
    relation_loss=LOSS,
    **options,
) -> dict[str, torch.Tensor]:
    """The gradient of a step of 16 sentences with two columns, before an evaluation. Each sentence counts the same."""
    teacher, student = (SentenceTransformer(str(folder / name), device="cpu") for name in ("teacher", "student"))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    data = Dataset.from_dict({**TEXTS, "label": torch.linspace(-1, 1, 16).tolist()})
    args = arguments(
        folder / f"out-{size}",
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        eval_strategy="steps",
        eval_steps=1,
        **options,
    )
    relation = RelationDistillLoss(student, teacher, relation_loss, **loss(student))
    evaluator = RelationKLEvaluator(TEXTS["anchor"], relation)
    trainer(student, args, train_dataset=data, loss=relation, evaluator=evaluator).train()
    assert relation.items_per_micro_batch is None  # the loss may be used elsewhere
    return {name: before[name] - p.detach() for name, p in student.named_parameters()}


@pytest.mark.parametrize("loss", [alone, joint])
@pytest.mark.usefixtures("student", "teacher")
def test_micro_batches_equal_one_batch(tmp_path, loss):
    expected = one_step(tmp_path, 16, 1, loss=loss)
    assert_close(one_step(tmp_path, 4, 4, loss=loss), expected)


@pytest.mark.parametrize("relation_loss", [LOSS, TOKENS], ids=["sequence", "token"])
@pytest.mark.usefixtures("student", "teacher")
def test_micro_batches_of_other_sizes_equal_one_batch(tmp_path, relation_loss):
    settings = {"trainer": RelationSentenceTransformerTrainer, "relation_loss": relation_loss}
    expected = one_step(tmp_path, 16, 1, **settings)
    assert_close(one_step(tmp_path, 6, 3, **settings), expected)  # 6, 6 and 4 sentences


def test_exact_trainer_needs_a_relation_loss(student, tmp_path):
    data = Dataset.from_dict(TEXTS)
    loss = st_losses.MultipleNegativesRankingLoss(student)
    with pytest.raises(TypeError, match="loss: expected a RelationDistillLoss, got MultipleNegativesRankingLoss"):
        RelationSentenceTransformerTrainer(student, arguments(tmp_path), train_dataset=data, loss=loss)


def two_processes(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for loss in (alone, joint):
        for size, accumulation in ((8, 1), (2, 4)):
            found = one_step(Path(folder), size, accumulation, loss=loss)
            torch.save(found, Path(folder) / f"{loss.__name__}-{size}-{rank}.pt")
    found = one_step(Path(folder), 4, 2, trainer=RelationSentenceTransformerTrainer, relation_loss=TOKENS)
    torch.save(found, Path(folder) / f"tokens-{rank}.pt")


@pytest.mark.slow
@pytest.mark.usefixtures("student", "teacher")
def test_two_processes_equal_one(tmp_path):
    run_two(two_processes, tmp_path)
    for loss in (alone, joint):
        expected = one_step(tmp_path, 16, 1, loss=loss)
        for size in (8, 2):
            for rank in range(2):
                assert_close(torch.load(tmp_path / f"{loss.__name__}-{size}-{rank}.pt"), expected)
    expected = one_step(tmp_path, 16, 1, trainer=RelationSentenceTransformerTrainer, relation_loss=TOKENS)
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"tokens-{rank}.pt"), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("student", "teacher")
def test_gradient_checkpointing(tmp_path, reentrant):
    expected = one_step(tmp_path, 16, 1)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_close(one_step(tmp_path, 16, 1, **options), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("student", "teacher")
def test_compiled_model(tmp_path):
    expected = one_step(tmp_path, 8, 2)
    torch._dynamo.reset()
    assert_close(one_step(tmp_path, 8, 2, torch_compile=True, torch_compile_backend="eager"), expected)
    torch._dynamo.reset()


def test_students_made_by_removing_layers(teacher, tmp_path):
    student = SentenceTransformer(str(tmp_path / "teacher"), device="cpu")
    plain = student.transformers_model
    plain.encoder.layer = nn.ModuleList(layer for i, layer in enumerate(plain.encoder.layer) if i in (0, 2))
    plain.config.num_hidden_layers = 2
    labels = teacher.encode(TEXTS["anchor"], convert_to_tensor=True)
    loss = RelationDistillLoss(student, teacher, LOSS, layers={1: 1, 3: 2}, embedding_loss=st_losses.MSELoss(student))
    data = Dataset.from_dict({"sentence": TEXTS["anchor"], "label": labels.tolist()})
    evaluator = RelationKLEvaluator(make_texts(20, 3, 20), loss)
    before = evaluator(student)["relation_kl"]
    args = arguments(tmp_path / "out", max_steps=12, per_device_train_batch_size=8, learning_rate=2e-3)
    SentenceTransformerTrainer(student, args, train_dataset=data, loss=loss).train()
    assert evaluator(student)["relation_kl"] < 0.9 * before
    student.save_pretrained(str(tmp_path / "saved"))
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(
        saved.encode(TEXTS["anchor"], convert_to_tensor=True), student.encode(TEXTS["anchor"], convert_to_tensor=True)
    )
    assert len(saved.transformers_model.encoder.layer) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("teacher")
def test_example(tmp_path):
    (tmp_path / "sentences.txt").write_text("\n".join(make_texts(80, 1, 20)), encoding="utf-8")
    script = Path(__file__).resolve().parents[2] / "examples" / "sentence_transformers_trainer.py"
    command = [sys.executable, script, tmp_path / "teacher", tmp_path / "sentences.txt", tmp_path / "out"]
    options = ["--relation-heads=4", "--max-steps=20", "--batch-size=8", "--learning-rate=5e-3"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    before, after = map(float, re.search(r"eval KL (\S+) before, (\S+) after", run.stdout).groups())
    assert after < 0.9 * before
    saved = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert saved.encode(["w1 w2"]).shape == (1, 48)
    assert len(saved.transformers_model.encoder.layer) == 1


def test_model_init(teacher, tmp_path):
    made = []

    def new_student() -> SentenceTransformer:
        made.append(sentence_model(tmp_path / f"student{len(made)}"))
        return made[-1]

    trainer = SentenceTransformerTrainer(
        args=arguments(tmp_path / "out", max_steps=2, per_device_train_batch_size=8, learning_rate=5e-3),
        train_dataset=Dataset.from_dict(TEXTS),
        loss=lambda model: RelationDistillLoss(model, teacher, LOSS),
        model_init=new_student,
    )
    trainer.train()
    assert len(made) > 1
    assert trainer.loss.model is made[-1]
    assert not torch.equal(*(m[0].model.encoder.layer[0].attention.self.query.weight for m in (made[0], made[-1])))


# The evaluator


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_evaluator_does_not_depend_on_the_batches(student, teacher, reduction):
    loss_fn = MiniLMv2Loss(RELATION_HEADS, reduction=reduction)
    student.train()
    loss = RelationDistillLoss(student, teacher, loss_fn)
    column = student.preprocess(TEXTS["anchor"])
    expected = expected_relation(student, teacher, column, loss=loss_fn).item()
    for size in (16, 5, 1):
        found = RelationKLEvaluator(TEXTS["anchor"], loss, batch_size=size)(student)
        assert found == {"relation_kl": pytest.approx(expected, rel=1e-5)}
    assert student.training


# Errors


def test_tokenizers_that_differ_are_refused(student, tmp_path):
    other = sentence_model(tmp_path / "other", words=WORDS[::-1])
    with pytest.raises(ValueError, match="tokenizer"):
        RelationDistillLoss(student, other, LOSS)
    same_words = sentence_model(tmp_path / "lower")
    from tokenizers import normalizers

    same_words.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("№", "w1")
    with pytest.raises(ValueError, match="tokenizer"):
        RelationDistillLoss(student, same_words, LOSS)


def test_vocabularies_that_are_too_small_are_refused(student, tmp_path):
    with pytest.raises(ValueError, match="embedding 10 rows"):
        RelationDistillLoss(student, make("bert", vocab_size=10), LOSS)


def test_lengths(student, teacher, tmp_path):
    teacher.max_seq_length = 4
    student.max_seq_length = 12
    column = student.preprocess([" ".join(WORDS[:20])])
    assert column["input_ids"].shape == (1, 12)
    found = RelationDistillLoss(student, teacher, LOSS)([column])["relation"]
    torch.testing.assert_close(found, expected_relation(student, teacher, column), rtol=1e-6, atol=0)
    short = sentence_model(tmp_path / "short", max_position_embeddings=8)
    with pytest.raises(ValueError, match=r"max_seq_length is 12.*8 positions"):
        RelationDistillLoss(student, short, LOSS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CachedMultipleNegativesRankingLoss", "without gradients"),
        ("CachedGISTEmbedLoss", "without gradients"),
        ("MegaBatchMarginLoss", "without gradients"),
        ("MatryoshkaLoss", "compute_loss_from_embeddings"),
    ],
)
def test_embedding_losses_that_run_the_model_are_refused(student, teacher, name, message):
    arguments = {"CachedGISTEmbedLoss": [teacher], "MatryoshkaLoss": [st_losses.CoSENTLoss(student), [32, 16]]}
    loss = getattr(st_losses, name)(student, *arguments.get(name, []))
    with pytest.raises(ValueError, match=message):
        RelationDistillLoss(student, teacher, LOSS, embedding_loss=loss)


def test_other_arguments(student, teacher):
    with pytest.raises(TypeError, match="SentenceTransformer"):
        RelationDistillLoss(student[0].model, teacher, LOSS)
    with pytest.raises(TypeError, match="teacher"):
        RelationDistillLoss(student, "teacher", LOSS)
    with pytest.raises(ValueError, match="reduction"):
        RelationDistillLoss(student, teacher, MiniLMv2Loss(RELATION_HEADS, reduction="none"))
    loss = RelationDistillLoss(student, teacher, MiniLMLoss(4))
    assert "2002.10957" in loss.citation
    column = columns_of(student)[0]
    with pytest.raises(ValueError, match="pixel_values"):
        loss([{"modality": "image", "pixel_values": torch.zeros(1, 3, 8, 8)}])
    with pytest.raises(ValueError, match="unpad_inputs"):
        loss([{"modality": "text", "input_ids": column["input_ids"], "cu_seq_lens_q": torch.tensor([0, 3])}])
    for sentences in ([], "one"):
        with pytest.raises(ValueError, match="sentences"):
            RelationKLEvaluator(sentences, loss)
