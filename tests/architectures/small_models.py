"""Small random models of all types of the installed transformers, and batches for them."""

import contextlib
import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

LAYERS, HEADS, KEY_HEADS, HEAD_WIDTH, WIDTH, VOCABULARY = 2, 4, 2, 16, 64, 300
MOST_PARAMETERS, LARGEST_IMAGE = 120_000_000, 224

# Integer settings of small configs: the first pattern that matches the name counts. None keeps the default.
_SIZES: list[tuple[str, int | None]] = [
    (r"num_hidden_groups|inner_group_num|feat_extract_layers|conv_layers", None),
    (r"num_kv_shared_layers", 0),
    (r"mamba_d_ssm$", 2 * WIDTH),
    (r"mamba_d_head$|mamba_head_dim$", WIDTH // 2),
    (r"^qk_head_dim$", HEAD_WIDTH + HEAD_WIDTH // 2),
    (r"^upsample_groups$", WIDTH),
    (r"(key_value|kv)_(n_)?heads?$|kv_n_heads|^multi_query_group_num$", KEY_HEADS),
    (r"heads?$|n_head$|num_heads", HEADS),
    (r"(^|_)(n_layers?|layers|num_blocks|depth)$|num_(hidden|block)_layers", LAYERS),
    (r"^qk_rope_head_dim$|^rotary_dim$", HEAD_WIDTH // 2),
    (r"head_(dim|size)$|^d_kv$|^dim_head$|^kv_channels$|^attention_key_size$", HEAD_WIDTH),
    (r"vocab_size$|_vocab$", VOCABULARY),
    (r"_rank$|^index_topk$", 16),
    (r"(^|_)experts$", 4),
    (r"^num_queries$", 9),
    (r"^(num_frames|frames_per_clip)$", 4),
    (r"^n_groups$", 1),
    (r"^image_embedding_size$", LARGEST_IMAGE // 16),
    (r"experts_per_tok(en)?$|n_group$|topk_group$|shared_experts$|top_?k$|^moe_k$", 1),
    (r"intermediate_size$|ffn_dim$|^d_ff$|^(d|n)_inner$|ffn_hidden_size$", 96),
    (r"(hidden|embedding|projection|embed|condition)_(size|dim)$|_embd$|^hidden_size_global$", WIDTH),
    (r"^(d_model|dim|emb_dim|model_dim|embed_dim)$", WIDTH),
    (r"^(max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx)$", 128),
]
# Settings that are None by default in models that need them.
_NEEDED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_WIDTH,
    "layer_types": ["full_attention"] * LAYERS,
    "mlp_layer_types": ["dense", "sparse"],
}
_LATENT = {"num_key_value_heads": HEADS, "head_dim": HEAD_WIDTH // 2}  # multi-head latent attention
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
_PROTEIN = {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "max_position_embeddings": 128}
_WITH_SECTIONS = (
    *("glm4v_text", "glm_image_text", "glmga_text", "glm_ocr_text", "hunyuan_vl_text"),
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"),
)
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_SETTINGS: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    **dict.fromkeys(("informer", "time_series_transformer"), _SERIES),
    "autoformer": _SERIES | {"label_length": 4},
    "align": {"projection_dim": 640},
    "blt": {"local_attention_window_len": None},
    "chameleon": {"vocabulary_map": {"<image>": 7}},
    "depth_pro": {"patch_size": LARGEST_IMAGE, "intermediate_hook_ids": [LAYERS - 1, 0]},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 1, "moe_intermediate_size": 96},
    "emu3": {"vocabulary_map": {"<image>": 7, "<|extra_200|>": 8}},
    "ernie4_5_vl_moe_text": {"rope_parameters": _SECTIONS | {"mrope_section": [3, 3, 2]}},
    "esm": _PROTEIN,
    "esmc": {"num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_head": WIDTH // 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "instructblip": {"image_token_index": VOCABULARY - 1},
    "instructblipvideo": {"video_token_index": VOCABULARY - 1, "image_token_index": VOCABULARY - 1},
    "kosmos-2": {"latent_query_num": 4},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "lw_detr_vit": {"image_size": 256},
    "longcat_flash": {"moe_topk": 2},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "perceiver": {"d_latents": WIDTH, "num_latents": 16},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 7},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 7},
    **{f"sam_{name}": {"hidden_size": 256} for name in ("prompt_encoder", "mask_decoder", "hq_prompt_encoder")},
    "sam_hq_mask_decoder": {"hidden_size": 256, "vit_dim": WIDTH},
    "xlnet": {"d_head": WIDTH // HEADS},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dbrx": {"attn_config": {"kv_n_heads": KEY_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    **{name: {"rope_parameters": _SECTIONS} for name in _WITH_SECTIONS},
    "glm4v_moe_text": {"rope_parameters": _SECTIONS | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
}


def model_types() -> list[str]:
    """All types that AutoModel builds, models of several parts last: most of these parts are types of their own."""
    types = sorted(name for name in CONFIG_MAPPING if CONFIG_MAPPING[name] in MODEL_MAPPING)
    return sorted(types, key=lambda name: bool(CONFIG_MAPPING[name].sub_configs))


def folder(model_type: str) -> str:
    """The folder of transformers that has the code of a type."""
    return model_type_to_module_name(model_type)


def small_models(model_type: str) -> Iterator[PreTrainedModel]:
    """Models of a type: one that is small in all sizes, then one that is small in depth and vocabulary only.

    Sizes may be too different from the defaults for one another, which shows when a model is built or runs.

    Raises:
        Exception: the model cannot be built.
    """
    for every in (True, False):
        torch.manual_seed(0)
        config = _small(CONFIG_MAPPING[model_type](), every)
        if not every:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in AutoModel.from_config(copy.deepcopy(config)).parameters())
            if parameters > MOST_PARAMETERS:
                return
        model = AutoModel.from_config(config, attn_implementation="eager").float().eval()
        for parameter in model.parameters():  # biases of 0 would hide that they are left out
            if parameter.dim() == 1:
                nn.init.normal_(parameter, float(parameter.mean() > 0.5), 0.1)
        yield model


# A backbone for models whose own comes from timm.
_BACKBONE = ResNetConfig(
    embedding_size=16,
    hidden_sizes=[16, 16, 32, 64],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)


def _small(config: Any, every: bool) -> Any:
    """A config like `config` with small sizes; with the depth and the vocabulary alone if not `every`."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    every = every and not any(isinstance(values.get(name), (list, tuple)) for name in ("num_heads", "depths"))
    given: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig) and value.model_type == "timm_backbone":
            given[name] = _BACKBONE
        elif isinstance(value, PreTrainedConfig):
            given[name] = _small(value, every)
        elif (size := _size(name, value, every)) is not None:
            given[name] = size
        elif re.search("token_(id|index)$", name) and isinstance(value, int) and value >= VOCABULARY:
            given[name] = VOCABULARY - 1 - len(given) % 50
    if isinstance(values.get("layer_types"), list):
        given["layer_types"] = _kinds(values["layer_types"])
    elif "sliding_window" in values:
        given["sliding_window"] = None
    for name in ("fullatt_block_indexes", "global_attn_indexes", "attn_layer_indices"):
        if name in values:
            given[name] = [LAYERS - 1]
    if "attn_layer_period" in values:
        given |= {"attn_layer_period": LAYERS, "attn_layer_offset": LAYERS - 1}
    if every:
        given |= {name: size for name, size in _NEEDED.items() if values.get(name, size) is None}
    if every and "kv_lora_rank" in values:
        given |= _LATENT
    rope = values.get("rope_parameters")
    if every and isinstance(rope, dict) and "mrope_section" in rope:
        half = int(HEAD_WIDTH * rope.get("partial_rotary_factor", 1.0)) // 2
        given["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    given |= _SETTINGS.get(config.model_type, {})
    others = {
        name: value
        for name, value in values.items()
        if name not in given and not isinstance(value, (list, tuple, dict)) and name != "transformers_version"
    }
    features = (
        {"out_features": config.out_features} if getattr(config, "out_features", None) else {}
    )  # backbones have these
    for settings in (given | features, others | given | features, given, others | given):
        with contextlib.suppress(Exception):  # config classes raise exceptions of their own
            return type(config)(**settings)
    given.pop("sliding_window", None)  # it may not be None
    return type(config)(**given)


def _size(name: str, value: Any, every: bool) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return None
    if name in ("image_size", "crop_size"):
        return min(value, LARGEST_IMAGE) if every else None
    size = next((size for pattern, size in _SIZES if re.search(pattern, name)), None)
    if size is None or (not every and (size not in (LAYERS, VOCABULARY) or "head" in name)):
        return None
    return size if size >= WIDTH else min(size, value)


def _kinds(types: list[str]) -> list[str]:
    """Types of layers for two layers, of which the last has full attention if there is such a layer."""
    if set(types) == {"sliding_attention"}:  # the config's default; others have layers with full attention
        types = ["sliding_attention", "full_attention"]
    kinds = sorted(set(types), key=lambda kind: ("full" in kind or kind == "attention", kind))
    return (kinds * LAYERS)[:LAYERS] if len(kinds) == 1 else kinds[-LAYERS:]


def batches(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Arguments of the model's forward: two sequences of nine tokens, images or sounds; first with tokens alone."""
    names = inspect.signature(type(model).forward).parameters
    needed = {name for name, p in names.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    ids = torch.randint(5, min(VOCABULARY - 60, getattr(model.config, "vocab_size", None) or VOCABULARY), (2, 9))
    tokens = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids,
        "qformer_input_ids": ids,
        "bbox": torch.zeros(2, 9, 4, dtype=torch.long),
    }
    has_tokens = "input_ids" in names
    found = {
        name: value
        for name, value in tokens.items()
        if name in needed or (name in names and (has_tokens or name == "decoder_input_ids"))
    }
    if "use_cache" in names:
        found["use_cache"] = False
    others = {name: make for name, make in _OTHERS.items() if name in names}
    if "pixel_attention_mask" in needed:
        others["pixel_attention_mask"] = lambda model: torch.ones(2, 16, dtype=torch.long)
    found |= {name: make(model) for name, make in others.items() if name in needed or not has_tokens}
    alternatives = [found]
    if has_tokens and others:
        alternatives.append(found | {name: make(model) for name, make in others.items()})
    for batch in alternatives:
        yield batch
        if "grid_thw" in batch and "pixel_values" in batch:
            yield batch | {"pixel_values": _patches(model)}
        if "input_features" in batch:  # some models have the bands of frequencies last, others first
            yield batch | {"input_features": batch["input_features"].transpose(-1, -2)}


def _setting(model: PreTrainedModel, *names: str, default: Any) -> Any:
    """A setting of the config or of one of its parts."""
    config: Any = model.config
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]
    return next((value for part in parts for name in names if (value := getattr(part, name, None))), default)


def _image(model: PreTrainedModel) -> torch.Tensor:
    size = _setting(model, "image_size", default=224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if model.config.model_type == "seggpt":  # each image is above its prompt
        height //= 2
    if model.config.model_type == "depth_pro":  # takes patches of several scales
        height = width = 4 * model.config.patch_size
    if model.config.model_type == "siglip2_vision_model":
        return _patches(model).repeat(2, 1, 1)
    channels = _setting(model, "num_channels", "in_channels", default=3)
    frames = [model.config.num_frames] if hasattr(model.config, "num_frames") else []
    if model.config.model_type in ("idefics", "lightglue", "instructblipvideo"):
        frames = [2]  # several images
    return torch.randn(2, *frames, channels, height, width)


def _video(model: PreTrainedModel) -> torch.Tensor:
    size = _setting(model, "image_size", "crop_size", default=224)
    frames = _setting(model, "num_frames", "frames_per_clip", default=4)
    return torch.randn(1, frames, _setting(model, "num_channels", "in_chans", default=3), size, size)


def _sound(model: PreTrainedModel) -> torch.Tensor:
    bands = _setting(
        model,
        "feature_projection_input_dim",
        "num_mel_bins",
        "input_dim",
        "feature_size",
        "input_feat_per_channel",
        default=80,
    )
    if hasattr(model.config, "max_source_positions") and not hasattr(model.config, "input_feat_per_channel"):
        return torch.randn(2, bands, 2 * model.config.max_source_positions)
    channels = [1] if model.config.model_type == "clap" else []
    return torch.randn(2, *channels, _frames(model), bands * getattr(model.config, "num_stacked_frames", 1))


def _frames(model: PreTrainedModel) -> int:
    """The length of a sound. The first model adds it to the tokens, after it has shortened it eight times."""
    return {"voxtral_realtime": 72, "qwen3_asr_encoder": 100}.get(model.config.model_type, 64)


def _wave(model: PreTrainedModel) -> torch.Tensor:
    if hasattr(model.config, "spectrogram_length") or hasattr(model.config, "max_length"):
        return torch.randn(2, _setting(model, "max_length", default=1024), _setting(model, "num_mel_bins", default=128))
    if model.config.model_type == "speecht5":  # the base model takes the output of convolutions
        return torch.randn(2, 9, model.config.hidden_size)
    if re.match("omniasr|pe_audio|mimi|encodec|xcodec|dac", model.config.model_type):
        return torch.randn(2, 1, 8000)
    return torch.randn(2, 8000)


def _patches(model: PreTrainedModel) -> torch.Tensor:
    """16 patches of an image, each a row, for vision models that take several images in one sequence."""
    frames = _setting(model, "temporal_patch_size", default=1)
    width = _setting(model, "in_channels", "num_channels", "in_chans", default=3)
    return torch.randn(16, width * frames * _setting(model, "patch_size", "spatial_patch_size", default=14) ** 2)


def _length(model: PreTrainedModel) -> int:
    """The number of past values that a model of time series takes."""
    return model.config.context_length + max(getattr(model.config, "lags_sequence", None) or [0])


def _series(model: PreTrainedModel) -> torch.Tensor:
    channels = getattr(model.config, "num_input_channels", None)
    return torch.randn(2, _length(model), *([channels] if channels else []))


_OTHERS = {
    "pixel_values": _image,
    "pixel_values_videos": _video,
    "input_features": _sound,
    "input_values": _wave,
    "hidden_states": _patches,
    "grid_thw": lambda model: torch.tensor([[1, 4, 4]]),
    "query_embeds": lambda model: torch.randn(2, 9, model.config.hidden_size),
    "encoder_hidden_states": lambda model: torch.randn(2, 9, _setting(model, "encoder_hidden_size", default=WIDTH)),
    "visual_feats": lambda model: torch.randn(2, 4, model.config.visual_feat_dim),
    "visual_pos": lambda model: torch.rand(2, 4, 4),
    "past_values": _series,
    "past_time_features": lambda model: torch.randn(2, _length(model), model.config.num_time_features),
    "past_values_padding": lambda model: torch.zeros(2, _length(model)),
    "freq": lambda model: torch.zeros(2, 1, dtype=torch.long),
    "future_values": lambda model: torch.randn(2, model.config.prediction_length),
    "future_time_features": lambda model: torch.randn(
        2, model.config.prediction_length, model.config.num_time_features
    ),
    "past_observed_mask": lambda model: torch.ones_like(_series(model)),
    "input_features_mask": lambda model: torch.ones(2, _frames(model), dtype=torch.long),
    "merge_sizes": lambda model: torch.tensor([1]),
    "inputs": lambda model: torch.randn(2, 9, model.config.d_model),
    "decoder_input_values": _wave,
    "prompt_pixel_values": _image,
    "prompt_masks": _image,
    "states": lambda model: torch.randn(2, 9, model.config.state_dim),
    "actions": lambda model: torch.randn(2, 9, model.config.act_dim),
    "rewards": lambda model: torch.randn(2, 9, 1),
    "returns_to_go": lambda model: torch.randn(2, 9, 1),
    "timesteps": lambda model: torch.arange(9).repeat(2, 1),
    "image_embeds_position_mask": lambda model: torch.arange(9).repeat(2, 1) < model.config.latent_query_num,
    "spatial_shapes": lambda model: torch.tensor([[4, 4], [4, 4]]),
    "task_inputs": lambda model: torch.ones(2, model.config.task_seq_len, dtype=torch.long),
    "is_longer": lambda model: torch.zeros(2, 1, dtype=torch.bool),
}
