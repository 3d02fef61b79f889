"""Small random models of every type of the installed transformers, with inputs that they accept."""

import inspect
import re
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

LAYERS, HEADS, KEY_HEADS, WIDTH = 2, 4, 2, 64

# Settings by patterns of their names, the first that matches; applied to integers (and to lists of them) only.
_SIZES: list[tuple[str, int]] = [
    (r"^(num_)?(key_value|kv)_heads?$|num_key_value_heads|num_kv_heads|n_kv_heads|^multi_query_group_num$", KEY_HEADS),
    (r"heads?$|n_head$|^decoder_attention_heads|num_heads", HEADS),
    (r"num_hidden_groups|inner_group_num", 1),
    (r"feat_extract_layers|conv_layers", 0),
    (r"(^|_)(n_layers?|layers|num_layers|num_blocks|depth)$|num_hidden_layers|num_block_layers", LAYERS),
    (r"^qk_nope_head_dim$|^v_head_dim$|^kv_channels$|^global_head_dim$|^attention_key_size$", 16),
    (r"^qk_rope_head_dim$", 8),
    (r"^(attention_)?head_(dim|size)$|^d_kv$|_head_dim$|^dim_head$", 16),
    (r"vocab_size$", 300),
    (r"lora_rank$|^index_topk$|_rank$", 16),
    (r"num_(local_|routed_)?experts$|n_routed_experts|^num_experts$", 4),
    (r"experts_per_tok|n_group$|topk_group|n_shared_experts|moe_top_?k|^top_k$|num_shared_experts", 1),
    (r"intermediate_size$|ffn_dim$|^d_ff$|^d_inner$|^n_inner$|ffn_hidden_size|_ff_dim$|^feed_forward_size", 96),
    (r"^(hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|embedding_size|word_embed_proj_dim|emb_dim|model_dim)$", WIDTH),
    (r"hidden_size$|hidden_dim$|_embed_dim$|embedding_size$|_embd$|projection_dim$|^projection_size|_embed_size$", WIDTH),
    (r"^(max_position_embeddings|n_positions|max_target_positions|max_source_positions|n_ctx)$", 128),
]  # fmt: skip
# Exceptions by model type: settings that the patterns do not fit.
_SETTINGS: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


def model_types() -> list[str]:
    return [name for name in CONFIG_MAPPING if CONFIG_MAPPING[name] in MODEL_MAPPING]


def folder(model_type: str) -> str:
    """The folder of transformers that has the model's code."""
    return model_type_to_module_name(model_type)


def small_config(model_type: str) -> PreTrainedConfig:
    return _shrunk(CONFIG_MAPPING[model_type](), _SETTINGS.get(model_type, {}))


def _shrunk(config: Any, settings: dict[str, Any]) -> Any:
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            given[name] = _shrunk(value, _SETTINGS.get(value.model_type, {}))
        elif (size := _size(name, value)) is not None:
            given[name] = size
    if "head_dim" in values and values["head_dim"] is None:
        given.pop("head_dim", None)
    if isinstance(values.get("layer_types"), list):
        given["layer_types"] = _kinds(values["layer_types"])
    given |= {name: value for name, value in settings.items()}
    for name in list(values):
        if re.search("token_id$|token_index$", name) and isinstance(values[name], int) and values[name] >= 300:
            given[name] = 290 - len(given) % 40
    kept = {
        k: v
        for k, v in values.items()
        if k not in given and not _per_layer(v, config) and k not in ("transformers_version",)
    }
    errors = []
    for base in (given, kept | given):
        try:
            return type(config)(**base)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _per_layer(value: Any, config: Any) -> bool:
    return isinstance(value, (list, tuple, dict))


def _size(name: str, value: Any) -> Any:
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            if not size:
                return None
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return min(size, value) if size < WIDTH else size
            return None
    return None


def _kinds(types: list[str]) -> list[str]:
    kinds = sorted(set(types), key=lambda kind: "full" in kind or kind == "attention")
    return (kinds if len(kinds) >= LAYERS else kinds * LAYERS)[-max(LAYERS, 2) :]


def small_model(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = small_config(model_type)
    model = AutoModel.from_config(config)
    if sum(p.numel() for p in model.parameters()) > 3e8:
        raise ValueError("too large")
    for parameter in model.parameters():  # zeros would hide mistakes
        if parameter.is_floating_point() and parameter.dim() < 2:
            torch.nn.init.normal_(parameter.data, 1.0 if parameter.data.mean() > 0.5 else 0.0, 0.1)
    return model.float().eval()


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    names = inspect.signature(type(model).forward).parameters
    config: Any = model.config
    found: dict[str, torch.Tensor] = {}
    ids = torch.randint(5, 200, (2, 9))

    def of(name, default):
        for c in (
            config,
            getattr(config, "vision_config", None),
            getattr(config, "audio_config", None),
            getattr(config, "encoder_config", None),
            getattr(config, "backbone_config", None),
        ):
            v = getattr(c, name, None)
            if v is not None:
                return v
        return default

    main = model.main_input_name
    if "input_ids" in names:
        found["input_ids"] = ids
        if "attention_mask" in names:
            found["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in names:
        found["decoder_input_ids"] = ids
    if "bbox" in names:
        found["bbox"] = torch.zeros(2, 9, 4, dtype=torch.long)
    if "pixel_values" in names and (
        "input_ids" not in names
        or main == "pixel_values"
        or names["pixel_values"].default is inspect.Parameter.empty
        or hasattr(config, "vision_config")
        and hasattr(config, "projection_dim")
    ):
        size = of("image_size", 224)
        h, w = size if isinstance(size, (list, tuple)) else (size, size)
        found["pixel_values"] = torch.randn(2, of("num_channels", 3), h, w)
    if "input_features" in names and "input_ids" not in names:
        found["input_features"] = (
            torch.randn(2, of("num_mel_bins", 80), 2 * of("max_source_positions", 64))
            if "max_source_positions" in vars(config)
            and hasattr(config, "num_mel_bins")
            and "speech_to_text" not in config.model_type
            else torch.randn(2, 64, of("num_mel_bins", of("feature_size", of("input_feat_per_channel", 80))))
        )
    if "input_values" in names:
        found["input_values"] = torch.randn(2, 8000)
    return found
