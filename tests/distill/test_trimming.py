"""Runs with a trimmed vocabulary: alignment of teacher and student, exact resuming, and results of real sizes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer

from minilm_kernels import MiniLMv2Loss, QKVExtractor, preset_config, trim_vocabulary
from minilm_kernels.distill import DistillConfig, distill, loop
from minilm_kernels.distill.model_card import write_student
from minilm_kernels.distill.models import load_models
from minilm_kernels.distill.packing import Packer
from minilm_kernels.distill.step import loss_components, make_batch
from minilm_kernels.distill.tokenization import DocumentTokenizer

from .test_loop import records, stop_at, weights
from .tiny import make_texts, make_tokenizer

Settings = Callable[..., DistillConfig]
CPU = torch.device("cpu")


@pytest.mark.parametrize("packing", [True, False])
def test_teacher_and_student_see_the_same_tokens(packing: bool, settings: Settings) -> None:
    """The loss is that of both models alone, on the teacher's ids and on the student's, which has some unknown ones."""
    config = settings(trim_vocabulary=30, packing=packing)
    texts = make_texts(8, seed=3, longest=6)  # too short to be cut
    models = load_models(config, CPU, make_texts(40, seed=1))
    vocabulary = models.vocabulary
    assert vocabulary is not None
    assert len(models.student_tokenizer) == models.student.model.config.vocab_size == 30
    tokenizer = DocumentTokenizer(models.tokenizer)
    packer = Packer(tokenizer, config.max_seq_length, packing)
    for tokens in tokenizer.batch(texts):
        packer.add(tokens)
    packer.flush()
    samples = packer.samples
    models.student.model.eval()
    found = loss_components(models, make_batch(config, models.mask, samples, CPU, (0,), slice(None)))
    batch = models.tokenizer(texts, padding=True, return_tensors="pt")
    teacher = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student = {**teacher, "input_ids": vocabulary.student_ids[teacher["input_ids"]]}
    unknown = (student["input_ids"] == models.student_tokenizer.unk_token_id)[teacher["attention_mask"] == 1]
    assert 0.1 < unknown.float().mean() < 0.9
    for model in (models.teacher.model, models.student.model):
        model.set_attn_implementation("sdpa")  # the reference has a text a row, and padding
    expected = MiniLMv2Loss(12).components(
        QKVExtractor(models.teacher.model, frozen=True)(**teacher),
        QKVExtractor(models.student.model)(**student),
        teacher["attention_mask"],
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_stopped_run_keeps_its_vocabulary(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary is that of the checkpoint, even if other tokens are the most frequent now."""
    text = tmp_path / "text.txt"
    documents = make_texts(3000, longest=20)
    text.write_text("\n\n".join(documents))
    options: dict[str, Any] = {"trim_vocabulary": 30, "text": [text], "dropout": 0.1}
    whole = distill(settings(output_dir=tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        assert distill(settings(**options)).stopped_by == signal.SIGTERM
    other = [*documents[:2500], *(["w1 w1 w2 w59 w59 w59"] * 500)]
    counted = trim_vocabulary(make_tokenizer(), other, 30)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_counted", lambda config, sources: other)
        continued = distill(settings(**options, resume_from_checkpoint=True))
    names = [AutoTokenizer.from_pretrained(run.student).get_vocab() for run in (whole, continued)]
    assert names[0] == names[1] != counted.tokenizer.get_vocab()
    assert weights(continued) == weights(whole)
    assert records(continued) == records(whole)


def test_the_student_s_folder_has_its_own_tokenizer(settings: Settings, text_file: Path) -> None:
    result = distill(settings(trim_vocabulary=30, max_steps=1))
    tokenizer, student = AutoTokenizer.from_pretrained(result.student), AutoModel.from_pretrained(result.student)
    expected = trim_vocabulary(make_tokenizer(), text_file.read_text().split("\n\n"), 30)
    assert tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert student.get_input_embeddings().weight.shape == (30, 24)
    output = student(**tokenizer("w1 w2 w59", return_tensors="pt"))
    assert output.last_hidden_state.shape == (1, 5, 24)


def test_a_student_with_its_own_weights_is_trimmed(settings: Settings, teacher_folder: Path) -> None:
    models = load_models(settings(student=str(teacher_folder), trim_vocabulary=30), CPU, make_texts(40))
    assert models.vocabulary is not None
    whole = AutoModel.from_pretrained(teacher_folder).get_input_embeddings().weight
    assert torch.equal(models.student.model.get_input_embeddings().weight, whole[models.vocabulary.teacher_ids])
    with pytest.raises(ValueError, match=r"--trim-vocabulary: size=3: .* always kept"):
        load_models(settings(trim_vocabulary=3), CPU, make_texts(40))


def multilingual(folder: Path, layers: int, hidden: int, heads: int) -> Path:
    """A teacher in the layout of XLM-R, with a vocabulary of 250 002 pieces."""
    words = [f"▁w{i}" for i in range(60)]
    pieces = [f"{'▁' if i % 2 else ''}{i:x}" for i in range(250_002 - len(words) - 6)]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    scored = [(piece, -5.0 - i / 50_000) for i, piece in enumerate([*words, "▁", *pieces])]
    tokenizer = XLMRobertaTokenizer(vocab=[*special, *scored, ("<mask>", 0.0)])
    assert len(tokenizer) == 250_002
    config = XLMRobertaConfig(
        vocab_size=250_002,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=hidden,
    )
    XLMRobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_published_student_loads_as_its_article_says(tmp_path: Path, text_file: Path) -> None:
    """12 layers, hidden size 384 and the vocabulary of XLM-R."""
    config = DistillConfig(
        teacher=str(multilingual(tmp_path / "teacher", layers=1, hidden=48, heads=4)),
        output_dir=str(tmp_path),
        text=(str(text_file),),
        student_num_hidden_layers=12,
        student_hidden_size=384,
        relation_heads=12,
    )
    models = load_models(config, CPU)
    (tmp_path / "metrics.jsonl").touch()
    write_student(
        tmp_path / "student", config, models, models.student.model.state_dict(), tmp_path / "metrics.jsonl", None, 1, 1
    )

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    model = AutoModel.from_pretrained(tmp_path / "student")
    inputs = tokenizer("w1 w2 w3 feed the kernels", return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    length = inputs["input_ids"].shape[1]
    assert length > 5
    assert outputs.last_hidden_state.shape == (1, length, 384)
    assert outputs.pooler_output.shape == (1, 384)
    assert len(tokenizer) == model.config.vocab_size == 250_002
    published = preset_config("minilmv2-l12-h384-xlm-roberta-large")
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    assert [getattr(model.config, name) for name in names] == [getattr(published, name) for name in names]


@pytest.mark.slow
def test_the_multilingual_recipe_with_a_smaller_vocabulary(tmp_path: Path, text_file: Path) -> None:
    """Layer 19 of 24, 64 relation heads, vocabulary 250 002: the student has the words of the text."""
    config = DistillConfig(
        teacher=str(multilingual(tmp_path / "teacher", layers=24, hidden=64, heads=16)),
        output_dir=str(tmp_path / "run"),
        text=(str(text_file),),
        teacher_layer=19,
        relation_heads=64,
        student_num_hidden_layers=2,
        student_hidden_size=64,
        student_num_attention_heads=4,
        trim_vocabulary=100,
        max_seq_length=64,
        total_batch_size=4,
        max_steps=3,
        learning_rate=1e-3,
        device="cpu",
    )
    result = distill(config)
    assert result.eval_after is not None
    assert result.eval_before is not None
    assert result.eval_after["eval_loss"] < result.eval_before["eval_loss"]
    student, tokenizer = AutoModel.from_pretrained(result.student), AutoTokenizer.from_pretrained(result.student)
    assert 60 < len(tokenizer) == student.config.vocab_size < 80  # 60 words, their characters and special tokens
    teacher = AutoTokenizer.from_pretrained(config.teacher)
    text = text_file.read_text()
    assert tokenizer.tokenize(text) == teacher.tokenize(text)
    assert tokenizer.unk_token not in tokenizer.tokenize(text)


def test_tokens_give_the_vocabulary_of_their_text(settings: Settings, tmp_path: Path) -> None:
    options: dict[str, Any] = {"trim_vocabulary": 30, "trim_vocabulary_documents": 40, "max_steps": 1}
    from_text = distill(settings(output_dir=tmp_path / "text", **options))
    from_tokens = distill(settings(text=(), tokens=tmp_path / "text" / "tokens", **options))
    names = [AutoTokenizer.from_pretrained(run.student).get_vocab() for run in (from_text, from_tokens)]
    assert names[0] == names[1]
    assert weights(from_text) == weights(from_tokens)
