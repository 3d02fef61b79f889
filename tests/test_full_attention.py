"""Layers with partial attention are refused, under all names that models use for it."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from minilm_kernels.qkv import QKVExtractor

from .test_qkv import LLAMA, SMALL, make_rotary

BERT = [f"encoder.layer.{{i}}.attention.self.{name}" for name in ("query", "key", "value")]
GPT_NEO = [f"h.{{i}}.attn.attention.{p}_proj" for p in "qkv"]
ENCODER = [f"encoder.layers.{{i}}.self_attn.{p}_proj" for p in "qkv"]
LED = [f"encoder.layers.{{i}}.self_attn.longformer_self_attn.{name}" for name in ("query", "key", "value")]
LED_DECODER = [f"decoder.layers.{{i}}.self_attn.{p}_proj" for p in "qkv"]
SEQ2SEQ = {"vocab_size": 200, "d_model": 48, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4}
SEQ2SEQ |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
LONG_T5 = {"vocab_size": 200, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 3, "num_heads": 4}


def build(model_type: str, **sizes) -> PreTrainedModel:
    return AutoModel.from_config(AutoConfig.for_model(model_type, **sizes)).eval()


def gpt_neo(kinds: list[str]) -> PreTrainedModel:
    sizes = {"vocab_size": 200, "hidden_size": 48, "num_layers": len(kinds), "num_heads": 4, "window_size": 4}
    return build("gpt_neo", **sizes, attention_types=[[kinds, 1]])


def check(model: nn.Module, projections: list[str], refused: set[int], legal: set[int], message: str) -> None:
    for layer in legal:
        assert QKVExtractor(model, layer, projections=projections).layer == layer
    for layer in refused:
        with pytest.raises(ValueError, match=f"layer={layer} has {message}") as error:
            QKVExtractor(model, layer, projections=projections)
        listed = str(error.value).rpartition("layers with full attention: ")[2]
        assert listed == (", ".join(map(str, sorted(legal))) or "none")


@pytest.mark.parametrize(
    ("model_type", "overrides", "refused", "legal", "message"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, {3}, {1, 2}, "sliding"),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4}, set(), {1, 2, 3}, ""),
        ("mistral", {"sliding_window": 4}, {1, 2, 3}, set(), "sliding_attention"),
        ("mistral", {"sliding_window": None}, set(), {1, 2, 3}, ""),
        (
            "gemma2",
            {"layer_types": ["sliding_attention", "full_attention"] * 2, "layers": 4, "attention": "eager"},
            {1, 3},
            {2, 4},
            "sliding_attention",
        ),
        (
            "gemma3_text",
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            {1, 3},
            {2},
            "sliding_attention",
        ),
        (
            "llama4_text",
            {"layer_types": ["chunked_attention", "full_attention", "chunked_attention"], "moe_layers": []},
            {1, 3},
            {2},
            "chunked_attention",
        ),
    ],
)
def test_windows_and_chunks_of_decoders(model_type, overrides, refused, legal, message):
    check(make_rotary(model_type, **overrides), LLAMA, refused, legal, message)


def test_windows_beside_layer_types():
    """MiniMax applies its sliding_window to all layers, including those that layer_types calls full."""
    layer_types = ["full_attention", "linear_attention", "full_attention"]
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": layer_types}
    check(make_rotary("minimax", **experts, sliding_window=4), LLAMA, {1, 3}, set(), "sliding_attention")
    check(make_rotary("minimax", **experts, sliding_window=None), LLAMA, {2}, {1, 3}, "linear_attention")


@pytest.mark.parametrize("kinds", [["global", "local", "global", "local"], ["local"] * 2, ["global"] * 2])
def test_local_layers_of_gpt_neo(kinds):
    numbers = {kind: {i for i, other in enumerate(kinds, 1) if other == kind} for kind in ("local", "global")}
    check(gpt_neo(kinds), GPT_NEO, numbers["local"], numbers["global"], "local")


def test_the_text_tower_of_a_model_of_several_towers():
    """The config of the text or image part of a model is used, not that of the whole model."""
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    text = sizes | {"vocab_size": 200, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 4}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    model = build("gemma3", text_config=text, vision_config=sizes | {"image_size": 28, "patch_size": 14})
    check(model, [f"language_model.{name}" for name in LLAMA], {1}, {2}, "sliding_attention")


@pytest.mark.parametrize(
    ("model_type", "sizes", "projections", "message"),
    [
        ("longformer", SMALL | {"attention_window": 4}, BERT, r"local or approximate attention \(Longformer"),
        ("led", SEQ2SEQ | {"attention_window": 4}, LED, "local or approximate"),
        ("big_bird", SMALL | {"attention_type": "block_sparse"}, BERT, "block_sparse"),
        ("nystromformer", SMALL | {"num_landmarks": 2, "segment_means_seq_len": 4}, BERT, "local or approximate"),
        ("yoso", SMALL, BERT, "local or approximate"),
        ("pegasus_x", SEQ2SEQ, ENCODER, "local or approximate"),
        ("autoformer", SEQ2SEQ | {"prediction_length": 4}, ENCODER, "local or approximate"),
        (
            "longt5",
            LONG_T5 | {"encoder_attention_type": "local"},
            [f"encoder.block.{{i}}.layer.0.LocalSelfAttention.{p}" for p in "qkv"],
            "local or approximate",
        ),
        (
            "longt5",
            LONG_T5 | {"encoder_attention_type": "transient-global"},
            [f"encoder.block.{{i}}.layer.0.TransientGlobalSelfAttention.{p}" for p in "qkv"],
            "local or approximate",
        ),
        (
            "reformer",
            {"vocab_size": 200, "hidden_size": 48, "num_attention_heads": 4, "attention_head_size": 12}
            | {"feed_forward_size": 64, "attn_layers": ["local", "lsh", "local"], "axial_pos_embds": False},
            [f"encoder.layers.{{i}}.attention.self_attention.{name}" for name in ("query", "key", "value")],
            "local or approximate",
        ),
        (
            "funnel",
            {"vocab_size": 200, "d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 64, "block_sizes": [3, 1]}
            | {"architectures": ["FunnelModel"]},
            [f"encoder.blocks.0.{{i}}.attention.{p}_head" for p in "qkv"],
            "local or approximate",
        ),
        ("fnet", SMALL, [f"encoder.layer.{{i}}.fourier.self.{p}" for p in "qkv"], "local or approximate"),
        (
            "xlstm",
            {"vocab_size": 200, "hidden_size": 64, "num_heads": 2, "num_blocks": 3},
            [f"blocks.{{i}}.mlstm_layer.{p}" for p in "qkv"],
            "local or approximate",
        ),
    ],
)
def test_windowed_sparse_and_approximate_attention(model_type, sizes, projections, message):
    check(build(model_type, **sizes), projections, {1, 3}, set(), message)


def test_full_attention_of_families_that_have_other_kinds_too():
    check(build("big_bird", **SMALL, attention_type="original_full"), BERT, set(), {1, 3}, "")
    check(
        build("led", **SEQ2SEQ, attention_window=4, max_encoder_position_embeddings=64), LED_DECODER, set(), {1, 3}, ""
    )


class Windowed(nn.Module):
    """Custom models are recognized by the same names of windows, in a config or in a module."""

    class Layer(nn.Module):
        def __init__(self, **attributes):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in "qkv")
            self.__dict__.update(attributes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.q(x) * self.k(x) * self.v(x)

    class Config:
        def __init__(self, **attributes):
            self.__dict__.update(attributes)

    def __init__(self, config: dict, *layers: dict):
        super().__init__()
        self.config = self.Config(**config)
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.Sequential(*(self.Layer(**attributes) for attributes in layers))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embed(input_ids))


@pytest.mark.parametrize(
    "name",
    [
        "window_size",
        "attention_window",
        "attention_window_size",
        "local_attention",
        "attention_chunk_size",
        "sliding_window",
        "sliding_window_size",
        "local_radius",
    ],
)
@pytest.mark.parametrize("size", [4, [4, 4], [[4, 2], [4, 0]]])
def test_names_of_windows(name, size):
    names = [f"blocks.{{i}}.{p}" for p in "qkv"]
    check(Windowed({name: size}, {}, {}), names, {1, 2}, set(), f".* \\({name}=")
    check(Windowed({}, {}, {name: size}), names, {2}, {1}, f".* \\({name}=")
    for absent in (None, 0, -1, False, []):
        check(Windowed({name: absent}, {}, {}), names, set(), {1, 2}, "")


@pytest.mark.parametrize(
    "attributes", [{"is_local": True}, {"is_sliding": True}, {"attention_type": "local"}, {"layer_type": "sparse"}]
)
def test_what_modules_say_about_themselves(attributes):
    names = [f"blocks.{{i}}.{p}" for p in "qkv"]
    unlike = {name: False if value is True else "full_attention" for name, value in attributes.items()}
    check(Windowed({}, attributes, unlike), names, {1}, {2}, "")


def test_numbers_that_only_look_like_windows():
    config = {"max_window_layers": 2, "use_sliding_window": False, "sliding_window": 4, "window_kernel_size": 3}
    config["layer_types"] = ["basic", "bottleneck"]  # RT-DETR: convolutions
    check(Windowed(config, {}, {}), [f"blocks.{{i}}.{p}" for p in "qkv"], set(), {1, 2}, "")
