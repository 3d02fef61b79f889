"""Projections of many architectures: their divisions, calls and quantities, and layers that are refused."""

import random

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from minilm_kernels import QKV, QKVExtractor, record_qkv

from .architectures.__main__ import scan
from .architectures.page import wrong
from .architectures.small_models import model_types
from .test_qkv import SMALL, assert_equal, batch_of, loss_of

GRANITE = {"layer_types": ["full_attention"] * 3, "mamba_n_heads": 4, "mamba_d_head": 24}
GRANITE |= {"num_local_experts": 0}  # products of groups have no float64
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 12, "v_head_dim": 10}
MLA |= {"qk_rope_head_dim": 6, "head_dim": 6, "first_k_dense_replace": 3, "rope_interleave": True}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}


def build(model_type: str, **settings) -> PreTrainedModel:
    """A float64 model with nonzero biases."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SMALL | {"max_position_embeddings": 40} | settings))
    config.use_cache = False
    model = AutoModel.from_config(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, float(parameter.mean() > 0.5), 0.1)
    return model


def inputs_of(model: PreTrainedModel, path: str, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The inputs of a module in the calls of one forward."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return found


def recorded(model: PreTrainedModel, layer: int, batch: dict[str, torch.Tensor], rotary="before", **options) -> QKV:
    with record_qkv(model, [layer], rotary, **options) as recorder, torch.no_grad():
        model(**batch)
        return recorder.pop()[layer]


# Divisions


def blocks(part: str, head: int, heads: int, keys: int) -> int:
    """The index of a head among the heads in the output of a fused projection: [q | k | v]."""
    return {"q": 0, "k": heads, "v": heads + keys}[part] + head


def by_key_head(part: str, head: int, heads: int, keys: int) -> int:
    """Each key head has its queries, then its key, then its value."""
    group = heads // keys
    if part == "q":
        return head // group * (group + 2) + head % group
    return head * (group + 2) + group + "kv".index(part)


def codegen(part: str, head: int, heads: int, keys: int) -> int:
    """Four groups of heads, each [q | v | k]."""
    group = heads // 4
    return head // group * 3 * group + "qvk".index(part) * group + head % group


DIVIDED = {
    "gpt2": ("gpt2", "h.1.attn.c_attn", blocks, 4, {"n_inner": 64}),
    "modernbert": ("modernbert", "layers.1.attn.Wqkv", blocks, 4, {"pad_token_id": 0, "global_attn_every_n_layers": 1}),
    "phi3": ("phi3", "layers.1.self_attn.qkv_proj", blocks, 2, {"pad_token_id": 0, "num_key_value_heads": 2}),
    "gpt_neox": ("gpt_neox", "layers.1.attention.query_key_value", by_key_head, 4, {}),
    "bloom": ("bloom", "h.1.self_attention.query_key_value", by_key_head, 4, {}),
    "falcon": ("falcon", "h.1.self_attention.query_key_value", by_key_head, 1, {}),
    "falcon, one key head for each head": (
        "falcon",
        "h.1.self_attention.query_key_value",
        by_key_head,
        4,
        {"multi_query": False},
    ),
    "falcon, new": (
        "falcon",
        "h.1.self_attention.query_key_value",
        by_key_head,
        2,
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "gpt_bigcode": ("gpt_bigcode", "h.1.attn.c_attn", blocks, 1, {"n_inner": 64}),
    "gpt_bigcode, all key heads": ("gpt_bigcode", "h.1.attn.c_attn", by_key_head, 4, {"multi_query": False}),
    "mpt": ("mpt", "blocks.1.attn.Wqkv", blocks, 4, {}),
    "deberta": ("deberta", "encoder.layer.1.attention.self.in_proj", by_key_head, 4, DEBERTA),
    "codegen": ("codegen", "h.1.attn.qkv_proj", codegen, 8, {"num_attention_heads": 8, "rotary_dim": 4}),
}


@pytest.mark.parametrize("case", DIVIDED)
def test_a_fused_projection_is_divided_by_rows_of_its_weight(case):
    model_type, path, index, keys, settings = DIVIDED[case]
    model, batch = build(model_type, **settings), batch_of()
    del batch["attention_mask"]  # with which left padding and ALiBi give NaN
    heads = model.config.num_attention_heads
    projection, width = model.get_submodule(path), 48 // heads
    weight = projection.weight if isinstance(projection, nn.Linear) or model_type == "falcon" else projection.weight.T
    x, expected = inputs_of(model, path, batch)[0], []
    for part, count in (("q", heads), ("k", keys), ("v", keys)):
        rows = [index(part, head, heads, keys) * width + i for head in range(count) for i in range(width)]
        y = x @ weight[rows].T
        if getattr(projection, "bias", None) is not None:
            y = y + projection.bias[rows]
        bias = getattr(model.get_submodule(path.rpartition(".")[0]), f"{part}_bias", None)
        expected.append(y if bias is None else y + bias)
    found = recorded(model, 2, batch)
    assert_equal(found, QKV(*expected), 1e-12)
    extractor = QKVExtractor(model, 2)
    assert_equal(extractor(**batch), found, 0)
    loss_of(extractor(**batch)).backward()
    assert extractor.unused_parameters() == [n for n, p in model.named_parameters() if p.grad is None]


def test_latent_attention():
    """The key of each head is its part of the last projection, and the part that all heads share and rotate."""
    model, batch = build("deepseek_v3", **MLA), batch_of()
    attention, path = model.layers[1].self_attn, "layers.1.self_attn"
    hidden, latent = inputs_of(model, f"{path}.q_a_proj", batch)[0], inputs_of(model, f"{path}.kv_b_proj", batch)[0]
    query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden)))
    shared, last = hidden @ attention.kv_a_proj_with_mqa.weight[16:].T, attention.kv_b_proj.weight
    latent = latent.view(*hidden.shape[:-1], 16)
    keys, values = [], []
    for head in range(4):
        keys += [latent @ last[22 * head : 22 * head + 12].T, shared]
        values.append(latent @ last[22 * head + 12 : 22 * head + 22].T)
    found = recorded(model, 2, batch)
    assert_equal(found, QKV(query, torch.cat(keys, -1), torch.cat(values, -1)), 1e-12)
    after = recorded(model, 2, batch, "after")
    assert torch.equal(after.value, found.value)
    scores = [(x.query * x.key).unflatten(-1, (4, 18)).sum(-1) for x in (found, after)]
    torch.testing.assert_close(*scores)  # each position with itself: a rotation does not change these
    with pytest.raises(ValueError, match=r"multi-head latent attention, .*record_qkv"):
        QKVExtractor(model)


def test_a_query_with_a_gate():
    model = build("qwen3_next", num_key_value_heads=2, head_dim=12, layer_types=["full_attention"] * 3).float()
    batch, path = batch_of(), "layers.1.self_attn.q_proj"
    weight, x = model.get_submodule(path).weight, inputs_of(model, path, batch)[0]
    query = torch.cat([x @ weight[24 * head : 24 * head + 12].T for head in range(4)], dim=-1)
    found = recorded(model, 2, batch)
    torch.testing.assert_close(found.query, query)
    assert [y.shape[-1] for y in found] == [48, 24, 24]
    assert_equal(QKVExtractor(model, 2)(**batch), found, 0)


class Fused(nn.Module):
    """A model of one's own with a fused projection."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.qkv = 2, nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.qkv(x)[..., :8]

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.stages = nn.Sequential(self.Layer(), self.Layer())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.stages(self.embed(tokens))


@pytest.mark.parametrize("order", ["blocks", "heads"])
def test_a_fused_projection_of_a_model_of_one_s_own(order):
    model, tokens = Fused(), torch.tensor([[1, 2, 3]])
    names = {"stages.{i}.qkv": order}
    with record_qkv(model, [2], projections=names) as recorder:
        model(tokens)
        found = recorder.pop()[2]
    y = model.stages[1].qkv(model.stages[0](model.embed(tokens)))
    first = {"blocks": [0, 1], "heads": [0, 3]}[order]
    expected = [torch.cat([y[..., 4 * (i + j) : 4 * (i + j) + 4] for i in first], -1) for j in (0, 1, 2)]
    if order == "blocks":
        expected = y.chunk(3, dim=-1)
    assert_equal(found, QKV(*expected), 0)
    assert_equal(QKVExtractor(model, projections=names, example={"tokens": tokens})(tokens=tokens), found, 0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"layers.{i}.self_attn.qkv_proj": "heads"}, "has another order than 'heads'"),
        ({"layers.{i}.self_attn.qkv_proj": "codegen"}, "has another order than 'codegen'"),
        ({"layers.{i}.self_attn.qkv_proj": "rows"}, r"one of 'blocks', 'heads', 'codegen', got .*'rows'"),
        ({"layers.{i}.self_attn.qkv_proj": "blocks", "b": "blocks"}, "expected one name and the order"),
        ({"layers.qkv_proj": "blocks"}, r"expected a name of the form <list of layers>\.\{i\}\.<module>"),
        ({"layers.{i}.self_attn.qkv": "blocks"}, r"no module layers\.2\.self_attn\.qkv"),
        ({"layers.0.{i}.qkv": "heads"}, r"layers\.0 is not a list of layers"),
    ],
)
def test_a_wrong_order_is_refused(names, message):
    model = build("phi3", pad_token_id=0, num_key_value_heads=2)
    with pytest.raises(ValueError, match=message):
        QKVExtractor(model, projections=names)
    QKVExtractor(model, projections={"layers.{i}.self_attn.qkv_proj": "blocks"})


# Modules that run several times


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layer", [1, 2, 4, -1])
def test_albert_counts_runs_of_its_groups(groups, layer):
    model = build("albert", embedding_size=16, num_hidden_layers=4, num_hidden_groups=groups, inner_group_num=1)
    batch, number = batch_of(), layer % 5
    attention = model.encoder.albert_layer_groups[(number - 1) * groups // 4].albert_layers[0].attention
    hidden = model.encoder.embedding_hidden_mapping_in(model.embeddings(batch["input_ids"]))
    seen = [hidden]
    for module in model.encoder.albert_layer_groups:
        module.register_forward_hook(lambda m, a, y: seen.append(y))
    with torch.no_grad():
        model(**batch)
    expected = QKV(*(getattr(attention, name)(seen[number - 1]) for name in ("query", "key", "value")))
    assert_equal(recorded(model, layer, batch), expected, 1e-12)
    extractor = QKVExtractor(model, layer)
    assert extractor.layer == number
    assert_equal(extractor(**batch), expected, 1e-12)
    assert_equal(QKVExtractor(model, layer, rotary="after")(**batch), expected, 1e-12)
    assert_equal(recorded(model, layer, batch, "after"), expected, 1e-12)


def test_albert_trains_and_counts_forwards():
    model, batch = build("albert", embedding_size=16), batch_of()
    extractor = QKVExtractor(model)
    loss_of(extractor(**batch)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert extractor.unused_parameters() == [n for n, p in model.named_parameters() if p.grad is None]
    model.zero_grad()
    with record_qkv(model, [1, 2, 3]) as recorder:
        model(**batch)
        found = recorder.pop()
        loss_of(found[3]).backward()
        torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if n in gradients}, gradients)
        assert not torch.equal(found[1].query, found[3].query)
        model(**batch)
        model(**batch)
        with pytest.raises(RuntimeError, match="layer 1 ran more than once"):
            recorder.pop()


@pytest.mark.parametrize("share", [False, True])
def test_deberta_v2_gives_the_content(share):
    """Its projections also project the embeddings of relative positions, after the tokens."""
    settings = DEBERTA | {"share_att_key": share, "norm_rel_ebd": "layer_norm", "position_buckets": 4}
    model, batch = build("deberta-v2", **settings), batch_of()
    attention = model.encoder.layer[1].attention.self
    calls = inputs_of(model, "encoder.layer.1.attention.self.query_proj", batch)
    assert len(calls) == 1 + share
    expected = QKV(*(getattr(attention, f"{name}_proj")(calls[0]) for name in ("query", "key", "value")))
    with record_qkv(model, [2]) as recorder, torch.no_grad():
        model(**batch)
        assert_equal(recorder.pop()[2], expected, 0)
        assert recorder.quantity == {2: "content"}
        model(**batch)
        model(**batch)
        with pytest.raises(RuntimeError, match="layer 2 ran more than once"):
            recorder.pop()
    extractor = QKVExtractor(model, 2)
    assert extractor.quantity == "content"
    assert_equal(extractor(**batch), expected, 1e-12)


# Quantities


@pytest.mark.parametrize(
    ("model_type", "settings", "before", "after"),
    [
        ("bert", {}, "projection", "projection"),
        ("llama", {"num_key_value_heads": 2}, "projection", "rotated"),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 12}, "projection", "normed, rotated"),
        ("esm", {"vocab_size": 200, "pad_token_id": 1, "mask_token_id": 4}, "projection", "scaled"),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 48}, "projection", "scaled"),
        ("granitemoehybrid", GRANITE, "projection", "projection"),
        ("granitemoehybrid", GRANITE | {"position_embedding_type": "rope"}, "projection", "rotated"),
        ("mpnet", {}, "content", None),
        ("deberta", DEBERTA, "content", None),
        ("deberta", {"relative_attention": False}, "projection", None),
        ("bloom", {}, "content", None),
        ("falcon", {}, "projection", None),
    ],
)
def test_the_quantity_is_named(model_type, settings, before, after):
    model = build(model_type, **settings)
    assert QKVExtractor(model).quantity == before
    with record_qkv(model, [1, -1]) as recorder:
        assert recorder.quantity == {1: before, -1: before}
    if after is None:
        for make in (QKVExtractor, record_qkv):
            with pytest.raises(ValueError, match=r'use rotary="before"; layers with "after": none'):
                make(model, rotary="after")
    else:
        assert QKVExtractor(model, rotary="after").quantity == after


# Stacks and layers


def test_a_model_with_several_main_inputs():
    model, batch = build("bert"), batch_of()
    found = recorded(model, 2, batch)
    model.main_input_name = ["input_ids", "attention_mask"]
    assert_equal(recorded(model, 2, batch), found, 0)


def test_a_stack_is_chosen_by_its_name():
    model = build("bart", d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4)
    batch = batch_of()
    for make in (QKVExtractor, record_qkv):
        with pytest.raises(ValueError, match=r"several stacks .*'encoder\.layers' .* or .*'decoder\.layers'"):
            make(model)
        with pytest.raises(ValueError, match=r"other stacks .*'encoder\.layers'"):
            make(model, projections="embed")
    found = recorded(model, -1, batch, projections="encoder")
    assert_equal(QKVExtractor(model, projections="encoder")(**batch), found, 0)
    names = [f"encoder.layers.{{i}}.self_attn.{x}_proj" for x in "qkv"]
    assert_equal(recorded(model, -1, batch, projections=names), found, 0)


@pytest.mark.parametrize(
    ("model_type", "settings", "layer", "legal"),
    [
        ("modernbert", {"pad_token_id": 0, "num_hidden_layers": 4}, 2, "1, 4"),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, -1, "2"),
        ("cohere2", {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}, 1, "3"),
        ("llama4_text", {"layer_types": ["chunked_attention", "full_attention", "chunked_attention"]}, 1, "2"),
        ("qwen3_next", {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}, 1, "3"),
    ],
)
def test_layers_without_full_attention_are_refused(model_type, settings, layer, legal):
    if model_type != "modernbert":
        settings = settings | {"num_key_value_heads": 2, "head_dim": 12}
    model, legal_layer = build(model_type, **settings).float(), int(legal.rpartition(" ")[2])
    for make in (QKVExtractor, record_qkv):
        for rotary in ("before", "after"):
            with pytest.raises(ValueError, match=rf"layers with full attention: {legal}$"):
                make(model, layer if make is QKVExtractor else [layer], rotary=rotary)
    batch = batch_of()
    with torch.no_grad():
        assert_equal(QKVExtractor(model, legal_layer)(**batch), recorded(model, legal_layer, batch), 0)


def test_speech_models_are_recorded_without_a_copy():
    """Their position embeddings are convolutions with weight normalization, which cannot be copied."""
    for model_type in ("wav2vec2", "hubert"):
        model = build(model_type, conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
        sound = {"input_values": torch.randn(2, 4000, dtype=torch.float64)}
        path = "encoder.layers.1.attention"
        x = inputs_of(model, f"{path}.v_proj", sound)[0]
        assert_equal(
            recorded(model, 2, sound), QKV(*(model.get_submodule(f"{path}.{n}_proj")(x) for n in "qkv")), 1e-12
        )


# The scan


@pytest.mark.slow
def test_a_sample_of_all_architectures():
    rows = [row for rows in scan(sorted(random.Random(0).sample(model_types(), 40)), timeout=600) for row in rows]
    assert not wrong(rows)
    assert sum(bool(row.get("before")) for row in rows) > 15


def test_the_scan_notices_wrong_values(monkeypatch):
    from minilm_kernels import _architectures

    monkeypatch.setitem(_architectures._DIVISIONS, "blocks", lambda x, *_: x.chunk(3, dim=-1)[::-1])
    ((row,),) = scan(["gpt2"], timeout=600)
    assert row["before"] == "unproved"
    assert "has another order than 'blocks'" in row["reasons"]["extract"]
