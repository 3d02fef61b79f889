"""`minilm-distill` on a small teacher of each family of text models, with its real layout."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from minilm_kernels.distill import DistillConfig, distill
from minilm_kernels.distill.batch import Batch
from minilm_kernels.distill.models import LayerModel, load_models
from minilm_kernels.distill.packing import Packer
from minilm_kernels.distill.preflight import check_masks
from minilm_kernels.distill.step import make_batch
from minilm_kernels.distill.tokenization import DocumentTokenizer

from .families import CAUSAL, FAMILIES, NOT_PACKED, make_teacher
from .tiny import make_tokenizer

NEW = {"student_num_hidden_layers": 2, "student_hidden_size": 24, "student_num_attention_heads": 4}
STUDENTS = {
    "random": NEW,
    "pca, trimmed": {**NEW, "student_init": "pca", "trim_vocabulary": 50},
    "copied": {"student_init": "copy", "student_num_hidden_layers": 2, "learning_rate": 2e-4},  # near its optimum
}


@pytest.fixture
def run(tmp_path, text_file):
    def settings(family, **options):
        teacher = tmp_path / family
        if not teacher.exists():
            make_teacher(family).save_pretrained(teacher)
            make_tokenizer().save_pretrained(teacher)
        base = {
            "teacher": str(teacher),
            "output_dir": str(tmp_path / "run"),
            "text": [str(text_file)],
            "relation_heads": 4,
            "max_seq_length": 40,
            "total_batch_size": 8,
            "max_steps": 6,
            "learning_rate": 3e-3,
            "warmup_steps": 0,
            "eval_samples": 8,
            "packing": family not in NOT_PACKED,
            "device": "cpu",
        }
        return DistillConfig(**{**base, **options})

    return settings


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_distilled(family, run, tmp_path):
    for number, (name, options) in enumerate(STUDENTS.items()):
        if family == "modernbert" and name != "copied":  # every third layer is global: 1 and 4
            options = {**options, "student_num_hidden_layers": 4}
        config = run(family, output_dir=str(tmp_path / f"run-{number}"), **options)
        result = distill(config)
        assert result.eval_after["eval_loss"] < result.eval_before["eval_loss"], name
        student, tokenizer = AutoModel.from_pretrained(result.student), AutoTokenizer.from_pretrained(result.student)
        teacher = AutoModel.from_pretrained(config.teacher)
        assert type(student) is type(teacher)
        assert student.config.num_hidden_layers == options["student_num_hidden_layers"]
        assert student.config.hidden_size == (48 if name == "copied" else 24)
        rows = student.get_input_embeddings().weight.shape[0]
        assert (rows, len(tokenizer)) == ((50, 50) if "trimmed" in name else (65, 65))
        record = json.loads((result.student / "settings.json").read_text())
        assert record["mask"] == "auto"
        card = (result.student / "README.md").read_text()
        assert f"{'causal' if family in CAUSAL else 'bidirectional'} mask" in card


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "modernbert"])
def test_layers_with_windows_are_refused_and_others_are_listed(family, run):
    partial = {"gemma2": ([1, 3], "2, 4"), "modernbert": ([2, 3], "1, 4")}
    layers, legal = partial[family]
    for layer in layers:
        with pytest.raises(ValueError, match=rf"--teacher-layer.*layer={layer}.*layers with full attention: {legal}"):
            load_models(run(family, teacher_layer=layer, **NEW), torch.device("cpu"))
    student = {**NEW, "student_num_hidden_layers": 3}
    with pytest.raises(ValueError, match=r"--student-layer.*layers with full attention: "):
        load_models(run(family, **student), torch.device("cpu"))
    models = load_models(run(family, student_layer=2 if family == "gemma2" else 1, **student), torch.device("cpu"))
    assert models.teacher.extractor.layer == 4


@pytest.mark.parametrize(("family", "layer"), [("gemma2", 2), ("embedding-gemma", 2), ("modernbert", 1)])
def test_packed_documents_keep_their_windows(family, layer, run, monkeypatch):
    models = load_models(run(family, student_layer=layer, attention="mask", **NEW), torch.device("cpu"))
    tokenizer = DocumentTokenizer(models.tokenizer)
    check_masks(models, tokenizer, 40, packing=True)
    inputs = Batch.model_inputs

    def wider(*arguments, reach, **options):
        return inputs(*arguments, reach=reach + 1, **options)

    monkeypatch.setattr(Batch, "model_inputs", wider)
    with pytest.raises(ValueError, match=r"--packing: the query of the teacher's .*; use --no-packing"):
        check_masks(models, tokenizer, 40, packing=True)


@pytest.mark.parametrize("family", ["mpnet", "gemma2"])
def test_models_without_packed_attention_keep_the_mask(family, run):
    """MPNet does not use the attention interface; Gemma 2 caps its scores."""
    options = {"student_layer": 2} if family == "gemma2" else {}
    models = load_models(run(family, **NEW, **options), torch.device("cpu"))
    assert models.attention.startswith("attention: teacher with a mask of every pair of tokens of a row (model: ")
    check_masks(models, DocumentTokenizer(models.tokenizer), 40, packing=True)
    with pytest.raises(ValueError, match="--attention packed: the teacher cannot have it: model: "):
        load_models(run(family, attention="packed", **NEW, **options), torch.device("cpu"))


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "albert", "llama", "gemma3"])
@pytest.mark.parametrize("mask", ["auto", "causal", "prefix"])
def test_packed_attention_equals_the_mask(family, mask, run):
    """Teacher and student; documents of two samples, padding and windows."""
    options = {"student_layer": 4 if family == "modernbert" else -1, "mask": mask, **NEW}
    options = {**options, "student_num_hidden_layers": 4}
    device, found = torch.device("cpu"), []
    for attention in ("mask", "packed"):
        models = load_models(run(family, attention=attention, **options), device)
        packer = Packer(DocumentTokenizer(models.tokenizer), 40, True, models.max_document_length)
        for length in (3, 20, 7, 17, 1, 5):
            packer.add(np.arange(5, 5 + length, dtype=np.int32))
        packer.flush()
        samples = packer.samples
        batch = make_batch(run(family, **options), models.mask, samples, device, (0,), slice(0, 2))
        assert [side.packed for side in (models.teacher, models.student)] == [attention == "packed"] * 2
        for side in (models.teacher.model, models.student.model):
            side.eval().double()
        found.append([models.teacher.project(batch), models.student.project(batch)])
    for x, y in zip(*(torch.cat([*side[0], *side[1]], -1) for side in found), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6 if "gemma" in family else 1e-11)


@pytest.mark.parametrize(
    ("family", "problem"), [("bart", "depends on the other documents"), ("deberta-v2", "does not accept packed")]
)
def test_models_that_cannot_separate_documents_need_no_packing(family, problem, run):
    models = load_models(run(family, **NEW), torch.device("cpu"))
    tokenizer = DocumentTokenizer(models.tokenizer)
    with pytest.raises(ValueError, match=rf"--packing: .*teacher's .*{problem}.*; use --no-packing"):
        check_masks(models, tokenizer, 40, packing=True)
    check_masks(models, tokenizer, 40, packing=False)


def test_the_mask_is_that_of_the_models(run, tmp_path):
    for family, mask in (("llama", "causal"), ("bert", "bidirectional"), ("t5", "bidirectional")):
        assert load_models(run(family, **NEW), torch.device("cpu")).mask == mask
    other = {"student": str(tmp_path / "bert")}
    with pytest.raises(ValueError, match="--mask auto: the teacher attends to earlier tokens only, the student to all"):
        load_models(run("llama", **other), torch.device("cpu"))
    assert load_models(run("llama", mask="causal", **other), torch.device("cpu")).mask == "causal"


@pytest.mark.parametrize(("model_type", "causal"), [("mixtral", True), ("qwen3_moe", True), ("bert", False)])
def test_rounding_does_not_hide_a_causal_model(model_type, causal):
    """The last token changes the sizes of the products of experts, and with them the rounding of other tokens."""
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1}
    for seed in range(4):
        torch.manual_seed(seed)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes, **heads))
        assert LayerModel(model, -1, None, "teacher").causal == causal


@pytest.mark.slow
def test_a_new_student_has_the_teacher_s_projections(run):
    """The student of a decoder's layer is distilled in its decoder, too, and not in its encoder."""
    config = run("bart", teacher_projections=("decoder",), mask="causal", **NEW)
    models = load_models(config, torch.device("cpu"))
    for side in (models.teacher, models.student):
        assert "decoder" in side.extractor._paths[0]


@pytest.mark.slow
def test_a_fused_projection_and_a_stack_can_be_named(run):
    found = load_models(run("gpt2", attention="mask", **NEW), torch.device("cpu"))
    projections = {"teacher_projections": ("h.{i}.attn.c_attn:blocks",), "attention": "mask"}
    named = load_models(run("gpt2", **projections, **NEW), torch.device("cpu"))
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    for x, y in zip(found.teacher.extractor(**ids), named.teacher.extractor(**ids), strict=True):
        assert torch.equal(x, y)
    decoder = load_models(run("t5", teacher_projections=("encoder",), **NEW), torch.device("cpu"))
    assert decoder.teacher.extractor(**ids).query.shape == (1, 3, 48)
