"""Students: configs, both initializations, and the presets compared with the papers."""

import contextlib
import copy
import inspect

import pytest
import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from minilm_kernels.presets import PRESETS
from minilm_kernels.qkv import QKVExtractor
from minilm_kernels.students import (
    copied_student,
    parameter_count,
    pca_student,
    preset_config,
    principal_directions,
    random_student,
    student_config,
)

# Model type -> names of layers, hidden size, heads and intermediate size in its config.
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
    """A teacher with other vocabulary, positions and dropout than the type's defaults."""
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


SIZES = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 90}
DECODER = {**SIZES, "max_position_embeddings": 64, "num_key_value_heads": 2, "pad_token_id": 0}
SLIDING, FULL = "sliding_attention", "full_attention"


def made_and_reloaded(config, folder) -> PreTrainedModel:
    """Builds and runs the model of a config, and checks that saving and loading preserves it."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model(input_ids=torch.arange(5, 13)[None])
    model.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    return again


@pytest.mark.parametrize("layers", [1, 2, 6, 7])
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen3", {"head_dim": 12}),
        ("qwen3", {"head_dim": 12, "layer_types": [FULL, SLIDING] * 2, "use_sliding_window": True}),
        ("gemma2", {"head_dim": 12}),
        ("gemma3_text", {"head_dim": 12, "layer_types": [SLIDING, FULL, FULL, FULL]}),
        ("cohere2", {}),
        ("smollm3", {}),
        ("modernbert", {}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 12}),
    ],
)
def test_settings_with_an_entry_for_each_layer_have_the_student_s_depth(model_type, options, layers, tmp_path):
    teacher = AutoConfig.for_model(model_type, **DECODER, **options)
    student = made_and_reloaded(student_config(teacher, layers, 24, num_attention_heads=4), tmp_path)
    assert len(student.layers) == layers
    for name in ("layer_types", "no_rope_layers"):
        if getattr(teacher, name, None) is not None:
            assert len(getattr(student.config, name)) == layers


@pytest.mark.parametrize(
    ("types", "layers", "expected"),
    [
        ([SLIDING, FULL, SLIDING, FULL], 6, [SLIDING, FULL] * 3),
        ([SLIDING, FULL, SLIDING, FULL], 3, [SLIDING, FULL, SLIDING]),
        ([SLIDING, SLIDING, SLIDING, FULL], 2, [SLIDING, FULL]),
        ([SLIDING, SLIDING, SLIDING, FULL], 1, [FULL]),
        ([FULL, SLIDING, SLIDING, SLIDING], 8, [FULL] * 2 + [SLIDING] * 6),
    ],
)
def test_kinds_of_layers_repeat_their_pattern_or_are_taken_evenly(types, layers, expected):
    teacher = AutoConfig.for_model("qwen3", **DECODER, head_dim=12, layer_types=types, use_sliding_window=True)
    assert list(student_config(teacher, layers, 24, num_attention_heads=4).layer_types) == expected
    assert list(teacher.layer_types) == types
    given = [FULL] * layers
    assert student_config(teacher, layers, 24, num_attention_heads=4, layer_types=given).layer_types == given


def test_what_the_class_derives_is_derived_anew():
    """Every third layer of ModernBERT has global attention; truncating a list of 4 would not give 7 entries."""
    teacher = AutoConfig.for_model("modernbert", **SIZES, pad_token_id=0)
    types = student_config(teacher, 7, 24, num_attention_heads=4).layer_types
    assert [i for i, kind in enumerate(types) if kind == FULL] == [0, 3, 6]


def test_runs_of_layer_kinds(tmp_path):
    shape = {"hidden_size": 48, "num_layers": 4, "num_heads": 4, "vocab_size": 90, "max_position_embeddings": 64}
    teacher = AutoConfig.for_model("gpt_neo", **shape, attention_types=[[["global", "local"], 2]])
    student = made_and_reloaded(student_config(teacher, 3, 24, num_attention_heads=4), tmp_path)
    assert student.config.attention_layers == ["global", "local", "global"]


def test_lists_that_only_look_like_layers_stay():
    teacher = teacher_config("bert", num_labels=6, eos_token_id=[1, 2, 3, 4, 5, 6])
    student = student_config(teacher, 3, 36)
    assert (student.eos_token_id, student.id2label) == (teacher.eos_token_id, teacher.id2label)


@pytest.mark.parametrize(("given", "expected"), [(None, 6), (12, 6), (16, 16)])
def test_head_width_follows_where_it_was_hidden_over_heads(given, expected, tmp_path):
    extra = {} if given is None else {"head_dim": given}
    student = student_config(AutoConfig.for_model("llama", **DECODER, **extra), 2, 24, num_attention_heads=4)
    assert made_and_reloaded(student, tmp_path).layers[0].self_attn.q_proj.out_features == 4 * expected
    assert (
        student_config(AutoConfig.for_model("llama", **DECODER), 2, 24, num_attention_heads=4, head_dim=10).head_dim
        == 10
    )


def test_key_heads_follow_or_must_divide(tmp_path):
    llama = AutoConfig.for_model("llama", **DECODER)
    with pytest.raises(ValueError, match=r"num_key_value_heads=2 does not divide num_attention_heads=3.*one of 1, 3"):
        student_config(llama, 2, 24, num_attention_heads=3)
    made_and_reloaded(student_config(llama, 2, 24, num_attention_heads=3, num_key_value_heads=1), tmp_path)
    whole = AutoConfig.for_model("llama", **{**DECODER, "num_key_value_heads": 4})
    assert student_config(whole, 2, 24, num_attention_heads=3).num_key_value_heads == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: AutoConfig.for_model("clip"), "CLIPConfig contains .*text_config"),
        (lambda: AutoConfig.for_model("resnet"), "num_hidden_layers: ResNetConfig has no such attribute"),
        (lambda: AutoConfig.for_model("mobilebert"), "MobileBertConfig of num_hidden_layers=2, .* cannot run"),
        (lambda: AutoConfig.for_model("qwen3_next", **DECODER, num_experts=4), "num_hidden_layers=2.* cannot run"),
        (
            lambda: AutoConfig.for_model("llama", **DECODER, per_layer_config={0: {"intermediate_size": 64}}),
            "per_layer_config",
        ),
    ],
)
def test_what_cannot_be_resized_is_refused_at_once(config, message):
    with pytest.raises(ValueError, match=message):
        student_config(config(), 2, 48, num_attention_heads=6)


def small_config(model_type: str) -> PreTrainedConfig:
    """The default config of a type with small sizes, under the names of its class."""
    config = AutoConfig.for_model(model_type)
    wanted = {**DECODER, "head_dim": 12, "embedding_size": 48, "num_experts_per_tok": 2, "moe_k": 2}
    wanted |= dict.fromkeys(("hidden_dim", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 96)
    wanted |= {"rotary_dim": 4, "coordinate_size": 8, "shape_size": 8, "entity_vocab_size": 20, "entity_emb_size": 16}
    wanted |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "q_lora_rank": 8, "kv_lora_rank": 8}
    changes = {
        config.attribute_map.get(name, name): value
        for name, value in wanted.items()
        if type(getattr(config, name, None)) is int or (name == "vocab_size" and hasattr(config, name))
    }
    for name, value in config.to_dict().items():
        if type(value) is not int:
            continue
        if "expert" in name and value > 4 and name.startswith(("num", "n_")):
            changes[name] = 4
        elif name.endswith("intermediate_size") and value > 96:
            changes[name] = 96
        elif name.endswith("_token_id") and value >= 90:
            changes[name] = 0
    if "kv_lora_rank" in changes:  # heads that are compressed together
        changes.pop("head_dim", None)
        changes["num_key_value_heads"] = 4
    if model_type == "xmod":
        changes |= {"languages": ["en_XX"], "default_language": "en_XX"}
    return AutoConfig.for_model(model_type, **changes)


def is_small(config: PreTrainedConfig) -> bool:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModel.from_config(copy.deepcopy(config)).parameters()) < 2e7


def runs(config: PreTrainedConfig, folder) -> None:
    """Builds, runs, saves and reloads a model, and raises the exceptions of the library."""
    torch.manual_seed(0)
    model = AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    ids = torch.arange(5, 13)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        model(**{name: x for name, x in batch.items() if name in inspect.signature(model.forward).parameters})
    model.save_pretrained(folder)
    torch.testing.assert_close(
        AutoModel.from_pretrained(folder).state_dict(), model.state_dict(), rtol=0, atol=0, equal_nan=True
    )


TYPES = sorted({config.model_type for config in MODEL_MAPPING})


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
def test_every_family_of_transformers_makes_students_or_refuses(part, tmp_path):
    """A student of every model type runs and can be saved and loaded, unless `student_config` refuses it."""
    failures, made = {}, 0
    for model_type in TYPES[part::16]:
        try:
            teacher = small_config(model_type)
        except Exception:  # this type restricts its sizes
            continue
        for layers, hidden, heads in ((2, 24, 4), (6, 24, 4), (3, 48, 6)):
            try:
                student = student_config(teacher, layers, hidden, num_attention_heads=heads)
            except ValueError:
                continue
            if not is_small(student) or not is_small(teacher):
                continue
            try:
                runs(student, tmp_path)
                made += 1
            except Exception as error:
                # If the teacher does not run either, the model type needs other inputs than tokens.
                with contextlib.suppress(Exception):
                    runs(teacher, tmp_path)
                    failures[model_type, layers, hidden, heads] = repr(error)
    assert not failures
    assert made


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
    assert weight[5:].std().item() == pytest.approx(config.initializer_range, rel=0.1)  # the initialization of the type
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

    # The student has the teacher's first and third layers. A teacher with only these layers gives the same output.
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


@pytest.mark.parametrize(
    ("count", "expected"), [(6, [1, 2, 3, 4, 5, 6]), (4, [1, 3, 4, 6]), (3, [1, 3, 6]), (2, [1, 6]), (1, [6])]
)
def test_a_number_of_layers_is_evenly_spaced(count, expected):
    teacher = AutoModel.from_config(teacher_config("bert"))
    student, same = copied_student(teacher, count), copied_student(teacher, expected)
    torch.testing.assert_close(student.state_dict(), same.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="layers=7: expected a number of layers from 1 to the teacher's 6"):
        copied_student(teacher, 7)


T5 = {"d_model": 48, "d_kv": 12, "num_layers": 4, "num_heads": 4, "d_ff": 96, "vocab_size": 90}


def test_students_of_encoder_decoders_are_encoder_decoders(tmp_path):
    t5 = AutoConfig.for_model("t5", **T5, decoder_start_token_id=0)
    student = student_config(t5, 2, 24, num_attention_heads=3)
    assert (student.num_layers, student.num_decoder_layers, student.d_kv, student.d_ff) == (2, 2, 8, 96)
    sides = {f"{x}_{name}": n for x in ("encoder", "decoder") for name, n in (("layers", 4), ("attention_heads", 4))}
    bart = AutoConfig.for_model("bart", d_model=48, encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=90, **sides)
    student = student_config(bart, 2, 24, num_attention_heads=3, intermediate_size=40)
    assert (student.encoder_layers, student.decoder_layers, student.decoder_attention_heads) == (2, 2, 3)
    assert (student.encoder_ffn_dim, student.decoder_ffn_dim) == (40, 40)
    made_and_reloaded(student, tmp_path)


def test_copied_layers_of_t5_keep_the_bias_of_the_first():
    """Only T5's first layer has the position bias, which all layers use."""
    teacher = AutoModel.from_config(AutoConfig.for_model("t5", **T5)).eval()
    student = copied_student(teacher, [2, 4], projections="encoder").eval()
    ids = torch.randint(5, 90, (2, 9))
    blocks = teacher.encoder.block
    with torch.no_grad():
        found = student.encoder(input_ids=ids).last_hidden_state
        bias = blocks[0].layer[0].SelfAttention.relative_attention_bias
        blocks[1].layer[0].SelfAttention.relative_attention_bias = bias
        blocks[1].layer[0].SelfAttention.has_relative_attention_bias = True
        blocks._modules = {"0": blocks[1], "1": blocks[3]}
        torch.testing.assert_close(found, teacher.encoder(input_ids=ids).last_hidden_state)
    assert len(student.decoder.block) == 4


def test_layers_of_albert_share_one_module():
    sizes = {**SIZES, "num_hidden_layers": 6, "embedding_size": 16}
    teacher = AutoModel.from_config(AutoConfig.for_model("albert", **sizes)).eval()
    student = copied_student(teacher, 2).eval()
    torch.testing.assert_close(student.state_dict(), teacher.state_dict(), rtol=0, atol=0)
    ids = torch.randint(5, 90, (2, 9))
    with torch.no_grad():
        found = student(input_ids=ids)
        teacher.encoder.config.num_hidden_layers = 2
        torch.testing.assert_close(found, teacher(input_ids=ids))
    groups = AutoModel.from_config(AutoConfig.for_model("albert", **sizes, num_hidden_groups=2))
    with pytest.raises(ValueError, match="share 2 modules"):
        copied_student(groups, [1, 4])


def test_key_heads_keep_their_ratio_where_their_number_does_not_divide():
    teacher = AutoConfig.for_model("llama", **{**DECODER, "num_attention_heads": 8, "num_key_value_heads": 4})
    assert student_config(teacher, 2, 24, num_attention_heads=4).num_key_value_heads == 4
    assert student_config(teacher, 2, 24, num_attention_heads=6).num_key_value_heads == 3
    with pytest.raises(ValueError, match="give num_key_value_heads too, one of 1, 3"):
        student_config(teacher, 2, 24, num_attention_heads=3)


def test_pca_embeddings_keep_the_most_variance():
    """By the theorem of Eckart and Young: what is left of the variance are the largest squared singular values."""
    torch.manual_seed(0)
    teacher = AutoModel.from_config(teacher_config("bert"), dtype=torch.bfloat16)
    with torch.no_grad():
        teacher.embeddings.word_embeddings.weight.mul_(torch.linspace(0.1, 2, 48)).add_(0.3)
    config = student_config(teacher.config, 2, 24)
    student = pca_student(teacher, config, seed=3)
    theirs, mine = (m.embeddings.word_embeddings.weight.detach().double() for m in (teacher, student))
    values = torch.linalg.svdvals(theirs - theirs.mean(0))
    left = (mine - mine.mean(0)).square().sum()
    torch.testing.assert_close(left, values[:24].square().sum(), rtol=1e-6, atol=0)
    directions = principal_directions(theirs, 24)
    torch.testing.assert_close(directions.T @ directions, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)
    # All tables that are added to the words have the same directions.
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        expected = teacher.get_submodule(f"embeddings.{name}").weight.double() @ directions
        assert torch.equal(student.get_submodule(f"embeddings.{name}").weight, expected.float())
    # Everything else is that of a random student.
    random = random_student(config, seed=3).state_dict()
    same = {name for name, x in student.state_dict().items() if torch.equal(x, random[name])}
    assert random.keys() - same == {f"embeddings.{x}_embeddings.weight" for x in ("word", "position", "token_type")}
    torch.testing.assert_close(pca_student(teacher, config, seed=3).state_dict(), student.state_dict(), rtol=0, atol=0)
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_directions_do_not_depend_on_order_or_sign():
    rows = torch.randn(80, 9, dtype=torch.float64) * torch.arange(1, 10)
    expected = principal_directions(rows, 4)
    for other in (rows.flip(0), -rows, rows + 5):
        torch.testing.assert_close(principal_directions(other, 4), expected, rtol=0, atol=1e-10)
    assert torch.equal(principal_directions(rows, 9), torch.eye(9, dtype=torch.float64))
    largest = expected.gather(0, expected.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_pca_leaves_tables_of_the_same_width():
    """ELECTRA's embeddings are narrower than its layers and are copied, also the position bias of T5."""
    electra = AutoModel.from_config(teacher_config("electra", embedding_size=16))
    student = pca_student(electra, student_config(electra.config, 2, 24))
    torch.testing.assert_close(student.embeddings.word_embeddings.weight, electra.embeddings.word_embeddings.weight)
    t5 = AutoModel.from_config(AutoConfig.for_model("t5", **T5))
    narrow = pca_student(t5, student_config(t5.config, 2, 24, num_attention_heads=4))
    assert narrow.encoder.embed_tokens.weight.shape == narrow.decoder.embed_tokens.weight.shape == (90, 24)
    torch.testing.assert_close(narrow.shared.weight, narrow.encoder.embed_tokens.weight)


def test_embeddings_that_pca_cannot_reduce():
    teacher = AutoModel.from_config(teacher_config("bert"))
    with pytest.raises(TypeError, match="teacher"):
        pca_student(torch.nn.Linear(2, 2), teacher.config)
    with pytest.raises(ValueError, match="60 columns, more than the teacher's 48"):
        pca_student(teacher, student_config(teacher.config, 2, 60))
    with pytest.raises(ValueError, match=r"vocab_size is 30, .* 211 rows"):
        pca_student(teacher, student_config(teacher.config, 2, 24, vocab_size=30))
    with torch.no_grad():
        teacher.embeddings.word_embeddings.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        pca_student(teacher, student_config(teacher.config, 2, 24))


QKV = [f"self_attn.{letter}_proj" for letter in "qkv"]
NEO = {"hidden_size": 48, "num_layers": 4, "num_heads": 4, "vocab_size": 90, "max_position_embeddings": 64}
MIXED = {"head_dim": 12, "layer_types": [FULL, SLIDING, SLIDING, FULL], "use_sliding_window": True, "sliding_window": 3}


@pytest.mark.parametrize(
    ("model_type", "options", "stack", "modules"),
    [
        ("llama", DECODER, "layers", QKV),
        ("qwen3", {**DECODER, **MIXED}, "layers", QKV),
        ("gemma2", {**DECODER, "head_dim": 12, "sliding_window": 3}, "layers", QKV),
        ("gpt_neo", {**NEO, "attention_types": [[["global", "local"], 2]], "window_size": 3}, "h", None),
        ("smollm3", DECODER, "layers", QKV),
        ("camembert", {**SIZES, "max_position_embeddings": 64}, "encoder.layer", None),
    ],
)
@pytest.mark.parametrize("layers", [[2, 3], [4, 1, 2]])
def test_layers_are_copied_from_any_list_with_their_settings(model_type, options, stack, modules, layers):
    """The student computes the same as the teacher reduced to these layers, with their windows and types."""
    teacher = AutoModel.from_config(AutoConfig.for_model(model_type, **options)).eval()
    modules = modules or [f"attn.attention.{x}_proj" for x in "qkv"]
    projections = None if model_type == "camembert" else [f"{stack}.{{i}}.{module}" for module in modules]
    student = copied_student(teacher, layers, projections=projections).eval()
    batch = {"input_ids": torch.randint(5, 90, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    batch |= {} if model_type == "camembert" else {"use_cache": False}
    original = teacher.get_submodule(stack)
    kept = [original[layer - 1] for layer in layers]
    for name in ("layer_types", "attention_layers", "no_rope_layers"):
        if getattr(teacher.config, name, None) is not None:
            entries = list(getattr(teacher.config, name))
            assert list(getattr(student.config, name)) == [entries[layer - 1] for layer in layers]
            setattr(teacher.config, name, getattr(student.config, name))
    original._modules = {str(i): layer for i, layer in enumerate(kept)}
    teacher.config.num_hidden_layers = len(layers)
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).last_hidden_state, teacher(**batch).last_hidden_state)


def test_a_layer_that_cannot_stand_elsewhere_is_refused():
    """Only the first layers of DeepSeek are dense, and layers of DiffLlama depend on their index."""
    shape = {**DECODER, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8}
    shape |= {"qk_rope_head_dim": 4, "v_head_dim": 12, "n_routed_experts": 8, "n_group": 1, "topk_group": 1}
    shape |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    teacher = AutoModel.from_config(AutoConfig.for_model("deepseek_v3", **shape))
    names = [f"layers.{{i}}.self_attn.{name}" for name in ("q_b_proj", "kv_b_proj", "o_proj")]
    with pytest.raises(ValueError, match=r"teacher's layers\.2 cannot become the student's layers\.0.*mlp"):
        copied_student(teacher, [3, 4], projections=names)
    assert len(copied_student(teacher, [1, 4], projections=names).layers) == 2
    diff = AutoModel.from_config(AutoConfig.for_model("diffllama", **DECODER))
    with pytest.raises(ValueError, match="self_attn"):
        copied_student(diff, [1, 4], projections=[f"layers.{{i}}.{name}" for name in QKV])


def test_a_teacher_with_changed_layers_is_refused():
    teacher = AutoModel.from_config(teacher_config("bert"))
    teacher.encoder.layer[3].attention.self.query = torch.nn.Sequential(teacher.encoder.layer[3].attention.self.query)
    with pytest.raises(ValueError, match="merge adapters"):
        copied_student(teacher, [1, 4])


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
    xlnet = AutoConfig.for_model("xlnet", d_model=16, n_head=2, n_layer=1, d_inner=16, vocab_size=10)
    with pytest.raises(ValueError, match="xlnet"):
        copied_student(AutoModel.from_config(xlnet), [1])


# Published: (vocabulary, layers, hidden size) -> millions of parameters.
PUBLISHED = {
    (30522, 6, 768): 66,
    (30522, 12, 384): 33,
    (30522, 6, 384): 22,
    (30522, 4, 384): 19,
    (30522, 3, 384): 17,
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
    published = PUBLISHED[(config.vocab_size, *shape)]
    assert preset.million_parameters == published
    count = parameter_count(config)
    assert round(count / 1e6) == published
    # By formula: word embeddings, and per layer four square projections, the feed-forward and two LayerNorms.
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
    assert (preset.teacher_layers, preset.teacher_hidden_size) == ((24, 1024) if large else (12, 768))
    if preset.method == "minilm":
        assert preset.relation_heads == 12
        assert preset.teacher_layer == 12
    else:
        assert preset.relation_heads == (64 if large else 48)
        assert preset.teacher_layer == {"bert-base": 12, "bert-large": 21}.get(preset.teacher, 19)
    assert config.hidden_size % preset.relation_heads == 0


def test_every_published_student_is_there():
    expected = """
        minilm-l6-h768-bert-base minilm-l12-h384-bert-base minilm-l6-h384-bert-base minilm-l4-h384-bert-base
        minilm-l3-h384-bert-base minilm-l12-h384-in-house-base minilm-l6-h384-in-house-base
        minilm-l12-h384-xlm-roberta-base minilm-l6-h384-xlm-roberta-base
        minilmv2-l6-h768-bert-base minilmv2-l6-h384-bert-base minilmv2-l6-h768-bert-large minilmv2-l6-h384-bert-large
        minilmv2-l6-h768-roberta-large minilmv2-l12-h384-roberta-large minilmv2-l6-h384-roberta-large
        minilmv2-l12-h384-xlm-roberta-large minilmv2-l6-h384-xlm-roberta-large
    """
    assert set(PRESETS) == set(expected.split())
    speed = {(p.num_hidden_layers, p.hidden_size): p.speedup for p in PRESETS.values()}
    assert speed == {(6, 768): 2.0, (12, 384): 2.7, (6, 384): 5.3, (4, 384): 7.8, (3, 384): 10.1}


# (layers, hidden size, teacher) -> batch, peak learning rate, thousands of steps, beta2, scores. From MiniLM,
# section 4.1 and tables 2, 3, 8, 11, 13.
MINILM = {
    (6, 768, "bert-base"): (1024, 5e-4, 400, 0.999, 84.0, 76.4),
    (12, 384, "bert-base"): (256, 3e-4, 400, 0.999),
    (6, 384, "bert-base"): (256, 3e-4, 400, 0.999, 82.4, 72.7),
    (4, 384, "bert-base"): (256, 3e-4, 400, 0.999, 80.6, 69.7),
    (3, 384, "bert-base"): (256, 3e-4, 400, 0.999, 79.1, 66.9),
    (12, 384, "in-house-base"): (2048, 6e-4, 400, 0.98, 85.7, 81.7),
    (6, 384, "in-house-base"): (512, 4e-4, 400, 0.98, 83.3, 75.6),
    (12, 384, "xlm-roberta-base"): (256, 3e-4, 1000, 0.999, 71.1, 63.2),
    (6, 384, "xlm-roberta-base"): (512, 6e-4, 400, 0.999, 68.0, 53.7),
}
# The scores of the MiniLMv2 students, from the authors' README.
MINILMV2 = {
    (6, 768, "roberta-large"): (87.0, 81.6),
    (12, 384, "roberta-large"): (86.9, 82.3),
    (6, 384, "roberta-large"): (84.4, 76.4),
    (6, 768, "bert-large"): (85.0, 77.7),
    (6, 384, "bert-large"): (83.0, 74.3),
    (6, 768, "bert-base"): (84.2, 76.3),
    (6, 384, "bert-base"): (82.8, 72.9),
    (12, 384, "xlm-roberta-large"): (72.9, 64.9),
    (6, 384, "xlm-roberta-large"): (69.3, 59.0),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_settings_and_scores(name):
    preset = PRESETS[name]
    key = (preset.num_hidden_layers, preset.hidden_size, preset.teacher)
    trained = (preset.total_batch_size, preset.learning_rate, preset.max_steps, preset.adam_betas)
    if preset.method == "minilm":
        batch, rate, thousands, beta2, *scores = MINILM[key]
        assert trained == (batch, rate, 1000 * thousands, (0.9, beta2))
    else:
        scores = MINILMV2[key]
        assert trained == ((256, 6e-4, 400_000, (0.9, 0.999)) if preset.family == "bert" else (None,) * 4)
    tasks = ("XNLI", "MLQA") if preset.family == "xlm-roberta" else ("MNLI-m", "SQuAD 2.0")
    assert preset.scores == dict(zip(tasks, scores, strict=False))
    small = (preset.num_hidden_layers <= preset.teacher_layers / 2) and (
        preset.hidden_size <= preset.teacher_hidden_size / 2
    )
    assisted = preset.method == "minilm" and small
    assert preset.assistant == (f"minilm-l12-h384-{preset.teacher}" if assisted else None)
    assert preset.assistant is None or PRESETS[preset.assistant].assistant is None


def test_an_unknown_preset_is_an_error_with_the_names():
    with pytest.raises(ValueError, match="minilmv2-l6-h384-roberta-large"):
        preset_config("minilm")
