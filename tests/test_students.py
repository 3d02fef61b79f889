"""Students: configs, the two initialisations, and the presets against the papers' figures."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig

from minilm_kernels.qkv import QKVExtractor
from minilm_kernels.students import (
    PRESETS,
    copied_student,
    parameter_count,
    preset_config,
    random_student,
    student_config,
)

# Model type: the names of layers, hidden size, heads and intermediate size in its own config.
OWN_NAMES = {
    "bert": ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    "roberta": ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    "xlm-roberta": ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    "electra": ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    "mpnet": ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    "distilbert": ("n_layers", "dim", "n_heads", "hidden_dim"),
}
KNOWN = list(OWN_NAMES)


def teacher_config(model_type: str, **overrides) -> PreTrainedConfig:
    """A teacher whose vocabulary, positions and dropout are not the type's defaults."""
    dropout = "dropout" if model_type == "distilbert" else "hidden_dropout_prob"
    sizes = dict(zip(OWN_NAMES[model_type], (6, 48, 4, 96), strict=True))
    return AutoConfig.for_model(
        model_type, **({"vocab_size": 211, "max_position_embeddings": 70, dropout: 0.03} | sizes | overrides)
    )


@pytest.mark.parametrize("model_type", KNOWN)
def test_student_config_changes_the_sizes_and_keeps_the_rest(model_type):
    teacher = teacher_config(model_type)
    before = copy.deepcopy(teacher.to_dict())
    student = student_config(teacher, 3, 36)
    assert teacher.to_dict() == before
    assert type(student) is type(teacher)
    own = dict(zip(OWN_NAMES[model_type], (3, 36, 12, 144), strict=True))
    assert student.to_dict() == before | own

    model = AutoModel.from_config(student)
    assert QKVExtractor(model).layer == 3
    shapes = {tuple(p.shape) for p in model.parameters()}
    assert {(211, 128 if model_type == "electra" else 36), (144, 36), (36, 144), (36, 36)} <= shapes
    assert not any(size in shape for shape in shapes for size in (48, 96))


def test_other_arguments_of_student_config():
    teacher = teacher_config("bert")
    student = student_config(teacher, 2, 32, num_attention_heads=8, intermediate_size=40, hidden_dropout_prob=0.2)
    assert (student.num_attention_heads, student.intermediate_size, student.hidden_dropout_prob) == (8, 40, 0.2)
    assert student.vocab_size == 211
    narrow = student_config(teacher_config("distilbert"), 2, 24, intermediate_size=40)
    assert (narrow.dim, narrow.hidden_dim, narrow.n_heads) == (24, 40, 12)


def test_electra_s_embedding_size_follows_the_hidden_size_where_it_did():
    assert student_config(teacher_config("electra", embedding_size=48), 2, 24).embedding_size == 24
    assert student_config(teacher_config("electra", embedding_size=16), 2, 24).embedding_size == 16
    assert student_config(teacher_config("electra", embedding_size=48), 2, 24, embedding_size=20).embedding_size == 20


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (3, 50),
            {},
            ValueError,
            r"num_attention_heads=12 does not divide hidden_size=50; these do: 1, 2, 5, 10, 25, 50$",
        ),
        ((0, 48), {}, ValueError, "num_hidden_layers=0"),
        ((3, -48), {}, ValueError, "hidden_size=-48"),
        ((3, 48), {"num_attention_heads": 0}, ValueError, "num_attention_heads=0"),
        ((3, 48), {"intermediate_size": 0}, ValueError, "intermediate_size=0"),
        ((3, 48.0), {}, TypeError, "hidden_size"),
        ((True, 48), {}, TypeError, "num_hidden_layers"),
        ((3, 48), {"hidden_dropout": 0.0}, ValueError, "hidden_dropout: BertConfig .* hidden_dropout_prob"),
    ],
)
def test_wrong_sizes_are_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        student_config(teacher_config("bert"), *arguments, **options)


def test_a_model_in_place_of_its_config_is_an_error():
    with pytest.raises(TypeError, match=r"model\.config"):
        student_config(random_student(teacher_config("bert")), 3, 48)


@pytest.mark.parametrize("model_type", KNOWN)
def test_random_student_is_seeded_and_leaves_the_global_state(model_type):
    config = student_config(teacher_config(model_type, dtype="bfloat16"), 2, 24)
    before = config.to_dict()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (random_student(config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(12)
    torch.testing.assert_close(random_student(config, seed=1).state_dict(), first.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again.state_dict(), first.state_dict(), rtol=0, atol=0)
    weight = first.get_input_embeddings().weight
    assert not torch.equal(weight, other.get_input_embeddings().weight)
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert weight[5:].std().item() == pytest.approx(config.initializer_range, rel=0.1)  # the type's own initialisation
    assert config.to_dict() == before


@pytest.mark.parametrize("model_type", KNOWN)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
def test_copied_student_holds_the_layers_asked_for(model_type, auto):
    teacher = auto.from_config(teacher_config(model_type)).eval()
    before = copy.deepcopy(teacher.state_dict())
    student = copied_student(teacher, [1, 3, -1]).eval()
    base = teacher.base_model
    (layers,) = (name for name in ("encoder.layer", "transformer.layer") if f"{name}.0" in dict(base.named_modules()))
    for mine, theirs in ((0, 0), (1, 2), (2, 5)):
        torch.testing.assert_close(
            student.get_submodule(f"{layers}.{mine}").state_dict(),
            base.get_submodule(f"{layers}.{theirs}").state_dict(),
            rtol=0,
            atol=0,
        )
    torch.testing.assert_close(student.embeddings.state_dict(), base.embeddings.state_dict(), rtol=0, atol=0)
    assert student.config.num_hidden_layers == 3
    assert base.config.num_hidden_layers == 6

    # The student's first two layers are the teacher's first and third: with those moved up, the teacher agrees.
    batch = {"input_ids": torch.randint(5, 211, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    stack = base.get_submodule(layers)
    kept = [stack[i] for i in (0, 2, 5)]
    with torch.no_grad():
        found = student(**batch).last_hidden_state
        original = dict(stack._modules)
        stack._modules = {str(i): layer for i, layer in enumerate(kept)}
        torch.testing.assert_close(found, base(**batch).last_hidden_state)
        stack._modules = original

    student.train()
    student(**batch).last_hidden_state.square().sum().backward()
    torch.optim.SGD(student.parameters(), lr=1.0).step()
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)


def test_copied_student_of_a_frozen_bf16_teacher_is_trainable_float32():
    teacher = AutoModel.from_config(teacher_config("bert"), dtype=torch.bfloat16).requires_grad_(False)
    student = copied_student(teacher, [6, 6])
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    assert torch.equal(student.encoder.layer[0].output.dense.weight, student.encoder.layer[1].output.dense.weight)
    assert torch.equal(student.pooler.dense.weight, teacher.pooler.dense.weight.float())
    assert student.config.dtype == torch.float32
    assert teacher.config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([], ValueError, "1 to 6"),
        ([0, 2], ValueError, r"layer=0: expected 1 to 6"),
        ([1, 7], ValueError, r"layer=7: expected 1 to 6"),
        (["1"], TypeError, "layer"),
    ],
)
def test_wrong_layers_are_errors(layers, error, message):
    teacher = AutoModel.from_config(teacher_config("bert"))
    with pytest.raises(error, match=message):
        copied_student(teacher, layers)


def test_a_teacher_that_cannot_be_copied_is_an_error():
    with pytest.raises(TypeError, match="teacher"):
        copied_student(torch.nn.Linear(2, 2), [1])
    llama = AutoConfig.for_model(
        "llama", hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, vocab_size=10
    )
    with pytest.raises(ValueError, match="llama"):
        copied_student(AutoModel.from_config(llama), [1])


# What the papers publish: vocabulary, layers, hidden size -> millions of parameters.
PUBLISHED = {
    (30522, 6, 768): 66,
    (30522, 12, 384): 33,
    (30522, 6, 384): 22,
    (50265, 6, 768): 81,
    (50265, 12, 384): 41,
    (50265, 6, 384): 30,
    (250002, 12, 384): 117,
    (250002, 6, 384): 107,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_parameter_counts(name):
    preset, config = PRESETS[name], preset_config(name)
    shape = (config.num_hidden_layers, config.hidden_size)
    published = PUBLISHED.get((config.vocab_size, *shape))
    assert preset.million_parameters == published
    count = parameter_count(config)
    if published is None:
        assert shape in {(4, 384), (3, 384)}
    else:
        assert round(count / 1e6) == published
    # The count by formula: word embeddings, and per layer four square projections, the feed-forward, two LayerNorms.
    layer = 4 * (shape[1] ** 2 + shape[1]) + 8 * shape[1] ** 2 + 5 * shape[1] + 4 * shape[1]
    assert count == config.vocab_size * shape[1] + shape[0] * layer


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent(name):
    preset, config = PRESETS[name], preset_config(name)
    assert name == f"{preset.method}-l{config.num_hidden_layers}-h{config.hidden_size}-{preset.teacher}"
    assert config.model_type == preset.family
    assert config.num_attention_heads == 12
    assert config.intermediate_size == 4 * config.hidden_size
    assert config.max_position_embeddings == (512 if preset.family == "bert" else 514)
    large = preset.teacher.endswith("large")
    assert preset.teacher_layers == (24 if large else 12)
    if preset.method == "minilm":
        assert preset.relation_heads == 12
        assert preset.teacher_layer == 12
    else:
        assert preset.relation_heads == (64 if large else 48)
        assert preset.teacher_layer == {"bert-base": 12, "bert-large": 21}.get(preset.teacher, 19)
    assert config.hidden_size % preset.relation_heads == 0


def test_every_published_student_is_there():
    expected = """
        minilm-l6-h768-bert-base minilm-l6-h384-bert-base minilm-l4-h384-bert-base minilm-l3-h384-bert-base
        minilm-l12-h384-in-house-base minilm-l6-h384-assistant minilm-l12-h384-xlm-roberta-base
        minilmv2-l6-h768-bert-base minilmv2-l6-h384-bert-base minilmv2-l6-h768-bert-large minilmv2-l6-h384-bert-large
        minilmv2-l6-h768-roberta-large minilmv2-l12-h384-roberta-large minilmv2-l6-h384-roberta-large
        minilmv2-l12-h384-xlm-roberta-large minilmv2-l6-h384-xlm-roberta-large
    """
    assert set(PRESETS) == set(expected.split())
    speed = {(p.num_hidden_layers, p.hidden_size): p.speedup for p in PRESETS.values()}
    assert speed == {(6, 768): 2.0, (12, 384): 2.7, (6, 384): 5.3, (4, 384): 7.8, (3, 384): 10.1}


def test_an_unknown_preset_is_an_error_with_the_names():
    with pytest.raises(ValueError, match="minilmv2-l6-h384-roberta-large"):
        preset_config("minilm")
